"""Find the cases in a folder: NIfTI files named after case and modality, and the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.data.images import resolve_image
from preceptor.data.segmentation.modalities import MASK, Endings, canonical_name, require_known, sort_modalities, stem
from preceptor.data.types import Case, VolumeFile
from preceptor.errors import UserError

LIST = "dataset.json"  # of a task of the Decathlon


@dataclass
class FoundCases:
    """The cases in a folder or table, all in the training split, and what is known about them.

    Attributes:
        layout: Name of the layout, for messages.
        modalities: Modalities in order.
        cases: The cases.
        regions: Label values of each region, if the layout defines them.
        split_given: Whether the layout assigns cases to splits.
        notes: Sentences to print with the results.
    """

    layout: str
    modalities: tuple[str, ...]
    cases: list[Case]
    regions: dict[str, tuple[int, ...]] | None = None
    split_given: bool = False
    notes: list[str] = field(default_factory=list)


def patient_of(case: str) -> str:
    """Return the patient in the id of a case: BraTS-GLI-00001-000 and -001, or Brats18_X_1 and _2, share a patient."""
    for pattern in (r"(BraTS-[A-Za-z]+-\d+)-\d+", r"(Brats1[789]_.+_.+)_\d+"):
        match = re.fullmatch(pattern, case, re.IGNORECASE)
        if match:
            return match[1]
    return case


def find_files(root: Path, modalities: tuple[str, ...] | None) -> FoundCases:
    """Find ``case_modality.nii.gz`` files, in one folder or in subfolders (BraTS of any year).

    Raises:
        UserError: no modality is found, or a case has two files of one modality.
    """
    endings = Endings(modalities)
    files: defaultdict[str, dict[str, Path]] = defaultdict(dict)
    unknown: Counter[str] = Counter()
    by_folder: defaultdict[Path, list[tuple[str, str, Path]]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        name = None if path.name.startswith(".") else stem(path.name)
        if name is None:
            continue
        parsed = endings.split(name)
        if parsed is None:
            unknown[re.split(r"[_-]", name)[-1]] += 1
        else:
            by_folder[path.parent].append((*parsed, path))
    for folder, entries in by_folder.items():
        # A folder with the name of its files is a case. In BraTS 2020 one file of such a folder has another name.
        one_case = folder != root and any(case == folder.name for case, _, _ in entries)
        for case, kind, path in entries:
            name = folder.name if one_case or not case else case
            if kind in files[name]:
                raise UserError(f"case {name}: {files[name][kind]} and {path} are both its {kind}; keep one")
            files[name][kind] = path
    names = {kind for by_kind in files.values() for kind in by_kind if kind != MASK}
    if not names:
        wanted = "flair, t1, t1ce, t2, ct, pet ..." if modalities is None else ", ".join(modalities)
        endings_found = ", ".join(name for name, _ in unknown.most_common(6))
        hint = f"; the names end in {endings_found}" if unknown else ""
        raise UserError(
            f"{root} contains no .nii or .nii.gz file named CASE_MODALITY with one of {wanted}{hint}; set "
            "data.modalities to the modalities in the file names, or write a table (docs/how-to/volumes.md)"
        )
    _require_all(modalities, names, root)
    cases = [_case(name, by_kind, root) for name, by_kind in sorted(files.items()) if set(by_kind) - {MASK}]
    style = "BraTS 2023" if any(re.match(r"BraTS-[A-Z]+-\d", case.id) for case in cases) else "files by case"
    found = FoundCases(style, modalities or sort_modalities(names), cases)
    if unknown:
        found.notes.append(
            f"{unknown.total()} NIfTI files were left out, because their names end in none of the modalities "
            f"({', '.join(sorted(unknown)[:6])})."
        )
    return found


def _case(name: str, files: Mapping[str, Path], root: Path) -> Case:
    images = {kind: VolumeFile(path) for kind, path in files.items() if kind != MASK}
    parents = {parent.upper() for path in files.values() for parent in path.relative_to(root).parts[:-1]}
    grade = parents & {"HGG", "LGG"}
    tags = {"grade": grade.pop()} if len(grade) == 1 else {}
    mask = VolumeFile(files[MASK]) if MASK in files else None
    return Case(name, images, mask, patient_of(name), "train", tags)


def _require_all(modalities: Sequence[str] | None, names: set[str], root: Path) -> None:
    absent = [name for name in modalities or () if name not in names]
    if absent:
        raise UserError(
            f"{root}: no case has the modality {absent[0]!r}, only {', '.join(sorted(names))}; remove it from "
            "data.modalities, or check the file names"
        )


def find_decathlon(root: Path, modalities: tuple[str, ...] | None) -> FoundCases:
    """Find the labelled cases of a task of the Medical Segmentation Decathlon.

    Raises:
        UserError: `dataset.json` is invalid or names a file that does not exist.
    """
    file = root / LIST
    content = read_list(file)
    channels = channel_names(content, file)
    names = {int(value): str(name) for value, name in content.get("labels", {}).items() if int(value)}
    selected = modalities or sort_modalities(channels)
    index = {name: channels.index(require_known(name, channels, str(file))) for name in selected}
    cases = []
    for number, row in enumerate(content["training"], start=1):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not isinstance(row.get("label"), str):
            raise UserError(f"{file}: training entry {number} has no image and label; take the file as released")
        place = f"{file}: training entry {number}"
        image, mask = (resolve_image(root, row[key].removeprefix("./"), place) for key in ("image", "label"))
        for path in (image, mask):
            if not path.is_file():
                raise UserError(f"{place}: {path} does not exist; unpack the archive again")
        name = stem(image.name) or image.stem
        files = {key: VolumeFile(image, channel if len(channels) > 1 else None) for key, channel in index.items()}
        cases.append(Case(name, files, VolumeFile(mask), name, "train"))
    found = FoundCases("Medical Segmentation Decathlon", selected, sorted(cases, key=lambda case: case.id))
    if brain_labels(names):
        from preceptor.data.segmentation.modalities import DECATHLON_BRAIN

        found.regions = dict(DECATHLON_BRAIN)
        found.notes.append(
            "Regions from dataset.json: 1 oedema, 2 non-enhancing, 3 enhancing tumour; et = 3, tc = 2 and 3, wt = 1, 2 "
            "and 3 (not the numbers of BraTS)."
        )
    elif names:
        found.regions = {name: (value,) for value, name in sorted(names.items())}
        found.notes.append(f"Regions from dataset.json: one per label ({', '.join(found.regions)}).")
    return found


def brain_labels(names: Mapping[int, str]) -> bool:
    """Return whether the label names, by value, are those of the brain task of the Decathlon."""
    words = [names.get(value, "").lower() for value in (1, 2, 3)]
    return len(names) == 3 and "edema" in words[0] and words[1].startswith("non") and words[2].startswith("enhanc")


def read_list(file: Path) -> dict[str, Any]:
    """Return the content of a `dataset.json` of the Decathlon. Raises UserError if the file is invalid."""
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); take the file as released") from error
    kinds = {"modality": dict, "training": list, "labels": dict}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{file} has no {key!r}; give a dataset.json of the Medical Segmentation Decathlon")
    return content


def channel_names(content: Mapping[str, Any], file: Path) -> list[str]:
    """Return the canonical modality names of the channels, in order."""
    try:
        numbered = {int(channel): canonical_name(str(name)) for channel, name in content["modality"].items()}
    except ValueError:
        numbered = {}
    if sorted(numbered) != list(range(len(numbered))) or not numbered or len(set(numbered.values())) < len(numbered):
        raise UserError(f"{file}: modality {content['modality']} does not number distinct channels from 0")
    return [numbered[channel] for channel in range(len(numbered))]
