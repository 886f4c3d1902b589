"""Cases as they lie on a disk: NIfTI files named after case and modality, and the Medical Segmentation Decathlon."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.data.images import resolve_image
from preceptor.data.segmentation.modalities import MASK, Endings, in_order, plain, require_known, stem
from preceptor.data.types import Case, VolumeFile
from preceptor.errors import UserError

LIST = "dataset.json"  # of the Decathlon


@dataclass
class Found:
    """What a folder holds: `cases` all in the training split, `layout` for people, and what is to be said of it."""

    layout: str
    modalities: tuple[str, ...]
    cases: list[Case]
    regions: dict[str, tuple[int, ...]] | None = None
    split_given: bool = False
    notes: list[str] = field(default_factory=list)


def patient_of(case: str) -> str:
    """Return the patient of a case as the id says: BraTS-GLI-00001-000 and -001 are one patient, as are Brats18_X_1."""
    for pattern in (r"(BraTS-[A-Za-z]+-\d+)-\d+", r"(Brats1[789]_.+_.+)_\d+"):
        match = re.fullmatch(pattern, case, re.IGNORECASE)
        if match:
            return match[1]
    return case


def find_files(root: Path, modalities: tuple[str, ...] | None) -> Found:
    """Return the cases of a folder of ``case_modality.nii.gz`` files, flat or in folders (BraTS of any year).

    Raises UserError where no modality is found, or a case has two files for one.
    """
    endings = Endings(modalities)
    files: defaultdict[str, dict[str, Path]] = defaultdict(dict)
    unknown: Counter[str] = Counter()
    by_folder: defaultdict[Path, list[tuple[str, str, Path]]] = defaultdict(list)
    for path in sorted(root.rglob("*")):
        name = None if path.name.startswith(".") else stem(path.name)
        if name is None:
            continue
        splits = endings.split(name)
        if splits is None:
            unknown[re.split(r"[_-]", name)[-1]] += 1
        else:
            by_folder[path.parent].append((*splits, path))
    for folder, entries in by_folder.items():
        # A folder that is named as the files in it is a case: one file of BraTS 2020 has a name of its own in there.
        one_case = folder != root and any(case == folder.name for case, _, _ in entries)
        for case, kind, path in entries:
            name = folder.name if one_case or not case else case
            if kind in files[name]:
                raise UserError(f"case {name}: {files[name][kind]} and {path} are both its {kind}; keep one")
            files[name][kind] = path
    names = {kind for held in files.values() for kind in held if kind != MASK}
    if not names:
        wanted = "flair, t1, t1ce, t2, ct, pet ..." if modalities is None else ", ".join(modalities)
        seen = f"; the names end in {', '.join(name for name, _ in unknown.most_common(6))}" if unknown else ""
        raise UserError(
            f"{root} holds no .nii or .nii.gz file named CASE_MODALITY with one of {wanted}{seen}; name the modalities "
            "as the files do with data.modalities, or write a table (docs/how-to/volumes.md)"
        )
    _require_all(modalities, names, root)
    cases = [_case(name, held, root) for name, held in sorted(files.items()) if set(held) - {MASK}]
    style = "BraTS 2023" if any(re.match(r"BraTS-[A-Z]+-\d", case.id) for case in cases) else "files by case"
    found = Found(style, modalities or in_order(names), cases)
    if unknown:
        found.notes.append(
            f"{unknown.total()} NIfTI files were left out: their names end in none of the modalities "
            f"({', '.join(sorted(unknown)[:6])})."
        )
    return found


def _case(name: str, held: Mapping[str, Path], root: Path) -> Case:
    images = {kind: VolumeFile(path) for kind, path in held.items() if kind != MASK}
    parents = {split.upper() for path in held.values() for split in path.relative_to(root).parts[:-1]}
    grade = parents & {"HGG", "LGG"}
    tags = {"grade": grade.pop()} if len(grade) == 1 else {}
    mask = VolumeFile(held[MASK]) if MASK in held else None
    return Case(name, images, mask, patient_of(name), "train", tags)


def _require_all(modalities: Sequence[str] | None, names: set[str], root: Path) -> None:
    absent = [name for name in modalities or () if name not in names]
    if absent:
        raise UserError(
            f"{root}: no case has the modality {absent[0]!r}; found are {', '.join(sorted(names))}: leave it out of "
            "data.modalities, or check the files' names"
        )


def find_decathlon(root: Path, modalities: tuple[str, ...] | None) -> Found:
    """Return the labelled cases of a Medical Segmentation Decathlon task.

    Raises UserError where `dataset.json` is not as released or names a file that is not there.
    """
    file = root / LIST
    content = read_list(file)
    channels = channel_names(content, file)
    names = {int(value): str(name) for value, name in content.get("labels", {}).items() if int(value)}
    chosen = modalities or in_order(channels)
    index = {name: channels.index(require_known(name, channels, str(file))) for name in chosen}
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
    found = Found("Medical Segmentation Decathlon", chosen, sorted(cases, key=lambda case: case.id))
    if brain_labels(names):
        from preceptor.data.segmentation.modalities import DECATHLON_BRAIN

        found.regions = dict(DECATHLON_BRAIN)
        found.notes.append(
            "Regions from dataset.json: 1 oedema, 2 non-enhancing, 3 enhancing tumour; et = 3, tc = 2 and 3, wt = 1, 2 "
            "and 3 (not the numbers of BraTS)."
        )
    elif names:
        found.regions = {name: (value,) for value, name in sorted(names.items())}
        found.notes.append(f"Regions from dataset.json: each label of its own ({', '.join(found.regions)}).")
    return found


def brain_labels(names: Mapping[int, str]) -> bool:
    """Return whether labels, by value, are those of the Decathlon's brain task."""
    words = [names.get(value, "").lower() for value in (1, 2, 3)]
    return len(names) == 3 and "edema" in words[0] and words[1].startswith("non") and words[2].startswith("enhanc")


def read_list(file: Path) -> dict[str, Any]:
    """Return the content of a Decathlon's `dataset.json`; raises UserError where it is another file."""
    try:
        content = json.loads(file.read_text("utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}); take the file as released") from error
    kinds = {"modality": dict, "training": list, "labels": dict}
    for key, kind in kinds.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{file} has no {key!r}; a dataset.json of the Medical Segmentation Decathlon is expected")
    return content


def channel_names(content: Mapping[str, Any], file: Path) -> list[str]:
    """Return the usual names of the channels of a Decathlon's images, in order."""
    try:
        numbered = {int(channel): plain(str(name)) for channel, name in content["modality"].items()}
    except ValueError:
        numbered = {}
    if sorted(numbered) != list(range(len(numbered))) or not numbered or len(set(numbered.values())) < len(numbered):
        raise UserError(f"{file}: modality {content['modality']} does not number distinct channels from 0")
    return [numbered[channel] for channel in range(len(numbered))]
