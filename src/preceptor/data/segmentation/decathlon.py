"""Find the cases of a `dataset.json`: the Medical Segmentation Decathlon, and nnU-Net of version 1 and 2.

The Decathlon has one file per case with all channels, nnU-Net one file per channel (``CASE_0000.nii.gz``).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data import nifti
from preceptor.data.findings import Finding
from preceptor.data.images import resolve_image
from preceptor.data.nifti import VolumeError
from preceptor.data.segmentation.folders import Listing
from preceptor.data.segmentation.layouts import FoundCases, patient_of
from preceptor.data.segmentation.modalities import (
    NIFTI,
    canonical_name,
    check_regions,
    require_known,
    sort_modalities,
    stem,
)
from preceptor.data.texts import AS_RELEASED, read_json
from preceptor.data.types import Case, VolumeFile
from preceptor.errors import UserError

LIST = "dataset.json"
TEST_IMAGES = "imagesTs"
IMAGE_FOLDERS = ("imagesTr", TEST_IMAGES)
DECATHLON_BRAIN = {"et": (3,), "tc": (2, 3), "wt": (1, 2, 3)}
"""Regions of the brain task of the Decathlon: 1 oedema, 2 non-enhancing, 3 enhancing."""


def find_decathlon(root: Path, modalities: tuple[str, ...] | None) -> FoundCases:
    """Find the labelled cases of a `dataset.json`.

    Raises:
        UserError: `dataset.json` is invalid, names a file that does not exist, or gives another number of cases.
    """
    file = root / LIST
    content = read_list(file)
    channels = channel_names(content, file)
    selected = modalities or sort_modalities(channels)
    index = {name: channels.index(require_known(name, channels, str(file))) for name in selected}
    entries = _listed(root, file, content) if "training" in content else _in_folders(root, file, content)
    cases: list[Case] = []
    used: set[Path] = set()
    for image, mask, place in entries:
        name, volumes = _case_images(image, channels, place, file)
        used |= {*(volume.path for volume in volumes), mask}
        images = {key: volumes[channel] for key, channel in index.items()}
        if not mask.is_file():
            raise UserError(f"{place}: {mask} does not exist; unpack the archive again")
        cases.append(Case(name, images, VolumeFile(mask), patient_of(name), "train"))
    _require_distinct(cases, f"{file}: case", "training")
    number = content.get("numTraining", len(cases))
    if number != len(cases):
        raise UserError(
            f"{file}: numTraining is {number!r}, but there are {len(cases)} training cases; unpack the archive again, "
            "or correct the number"
        )
    found = FoundCases("dataset.json", selected, sorted(cases, key=lambda case: case.id))
    found.regions, note = label_regions(content["labels"], file)
    found.notes.append(note)
    written = [canonical_name(name) for name in content["modality"].values()]
    if repeated := [name for name in channels if name not in written]:
        found.notes.append(f"Channels with one name in {LIST} have their numbers as well: {', '.join(repeated)}.")
    listing = Listing()
    listing.add(
        [
            path
            for folder in ("imagesTr", "labelsTr")
            if (root / folder).is_dir()
            for path in _volumes(root / folder)
            if path not in used
        ],
        "{} files are not training cases of dataset.json and were left out",
        root,
    )
    found.findings = listing.findings
    return found


def find_test_cases(root: Path) -> FoundCases:
    """Find the cases of a `dataset.json` to predict on: those of `test` or of imagesTs, else those of training.

    What was left out is a finding.

    Raises:
        UserError: `dataset.json` is invalid, or names a file that does not exist.
    """
    file, folder = root / LIST, root / TEST_IMAGES
    content = read_list(file)
    rows = content.get("test", [])
    if not isinstance(rows, list):
        raise UserError(f"{file}: test is not a list; {AS_RELEASED}")
    if not rows and not (folder.is_dir() and _volumes(folder)):
        found = find_decathlon(root, None)
        reason = f"{file} has no test cases, so the training cases were predicted"
        found.findings.append(Finding((), file, reason, "warning"))
        return found
    if rows:
        entries = []
        for number, row in enumerate(rows, start=1):
            place = f"{file}: test entry {number}"
            name = row.get("image") if isinstance(row, dict) else row
            if not isinstance(name, str):
                raise UserError(f"{place} has no image; {AS_RELEASED}")
            entries.append((resolve_image(root, name.removeprefix("./"), place), place))
        found = _unlabelled(entries, content, file)
    else:
        found = find_image_folder(folder)
    used = {volume.path for case in found.cases for volume in case.images.values()}
    listing = Listing()
    rest = [path for path in _volumes(folder) if path not in used] if folder.is_dir() else []
    listing.add(rest, "{} files are not test cases of dataset.json and were left out", root)
    count = f" ({len(content['training'])})" if "training" in content else ""
    reason = f"the training cases of {LIST}{count} were left out; to segment them, give the folder {root / 'imagesTr'}"
    found.findings += [*listing.findings, Finding((), file, reason, "warning")]
    return found


def holds_images(folder: Path) -> bool:
    """Return whether a folder is imagesTr or imagesTs of a `dataset.json`."""
    folder = folder.resolve()
    return folder.name in IMAGE_FOLDERS and (folder.parent / LIST).is_file()


def find_image_folder(folder: Path) -> FoundCases:
    """Find the cases in imagesTr or imagesTs, without label maps, by the channels that `dataset.json` names.

    Raises:
        UserError: `dataset.json` is invalid, or an image does not have its channels.
    """
    file = folder.resolve().parent / LIST
    content = read_list(file)
    number = len(channel_names(content, file))
    paths = _volumes(folder)
    bare = [re.sub(r"_(\d{4})(?=\.nii)", "", path.name) for path in paths]
    channels = [re.search(r"_(\d{4})\.nii", path.name) for path in paths]
    if all(match is not None and int(match[1]) < number for match in channels):  # a file for each channel
        paths = [folder / name for name in dict.fromkeys(bare)]
    return _unlabelled([(path, str(path)) for path in paths], content, file)


def _unlabelled(entries: Sequence[tuple[Path, str]], content: Mapping[str, Any], file: Path) -> FoundCases:
    """Return the cases of images, each with its place, with all channels and without label maps."""
    channels = channel_names(content, file)
    cases = []
    for image, place in entries:
        name, volumes = _case_images(image, channels, place, file)
        cases.append(Case(name, dict(zip(channels, volumes, strict=True)), None, patient_of(name), "test"))
    _require_distinct(cases, f"{file}: case", "test")
    return FoundCases(LIST, sort_modalities(channels), sorted(cases, key=lambda case: case.id))


def _volumes(folder: Path) -> list[Path]:
    entries = sorted(folder.iterdir())
    return [path for path in entries if not path.name.startswith(".") and stem(path.name) is not None]


def _require_distinct(cases: Sequence[Case], what: str, split: str) -> None:
    twice = [id for id, count in Counter(case.id for case in cases).items() if count > 1]
    if twice:
        raise UserError(f"{what} {min(twice)!r} is in {split} twice; keep one entry")


def _case_images(image: Path, channels: list[str], place: str, file: Path) -> tuple[str, list[VolumeFile]]:
    """Return the name of a case and the volume of each channel."""
    name, files = _images(image, channels, place)
    if len(files) == 1:
        _require_channels(files[0], channels, file)
    if len(files) == len(channels):
        return name, [VolumeFile(path) for path in files]
    return name, [VolumeFile(files[0], channel) for channel in range(len(channels))]


def _listed(root: Path, file: Path, content: Mapping[str, Any]) -> list[tuple[Path, Path, str]]:
    """Return the image and the label map of each entry of `training`, and its place."""
    entries = []
    for number, row in enumerate(content["training"], start=1):
        place = f"{file}: training entry {number}"
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or not isinstance(row.get("label"), str):
            raise UserError(f"{place} has no image and label; {AS_RELEASED}")
        image, mask = (resolve_image(root, row[key].removeprefix("./"), place) for key in ("image", "label"))
        entries.append((image, mask, place))
    return entries


def _in_folders(root: Path, file: Path, content: Mapping[str, Any]) -> list[tuple[Path, Path, str]]:
    """Return the cases of nnU-Net 2, whose dataset.json need not list them: one for each label map."""
    ending = content.get("file_ending", ".nii.gz")
    if ending not in NIFTI:
        raise UserError(f"{file}: files of type {ending!r} (file_ending) are not read; convert them to .nii.gz")
    labels = root / "labelsTr"
    if not labels.is_dir():
        raise UserError(f"{file} lists no training cases, and there is no folder {labels}; {AS_RELEASED}")
    masks = sorted(path for path in labels.iterdir() if path.name.endswith(ending) and not path.name.startswith("."))
    return [(root / "imagesTr" / mask.name, mask, str(mask)) for mask in masks]


def _images(image: Path, channels: list[str], place: str) -> tuple[str, list[Path]]:
    """Return the name of a case and its image: one file, or one for each channel (nnU-Net)."""
    name = stem(image.name)
    if name is None:
        raise UserError(f"{place}: {image.name} is not a .nii or .nii.gz file; convert it to .nii.gz")
    if image.is_file():
        return name, [image]
    ending = image.name[len(name) :]
    files = [image.with_name(f"{name}_{channel:04d}{ending}") for channel in range(len(channels))]
    missing = [file for file in files if not file.is_file()]
    if len(missing) == len(files):
        raise UserError(f"{place}: {image} does not exist; unpack the archive again")
    if missing:
        raise UserError(f"{place}: {missing[0]} does not exist, but other channels of the case do; copy it again")
    return name, files


def _require_channels(image: Path, channels: Sequence[str], file: Path) -> None:
    """Raise UserError if the header of an image has another number of channels than `dataset.json` names.

    A header that cannot be read is no error here: whoever reads the voxels reports it.
    """
    try:
        number = nifti.channels_of(image)
    except VolumeError:
        return
    if number != len(channels):
        raise UserError(
            f"{image} has {number} channels, but {file} names {len(channels)} ({', '.join(channels)}); correct "
            "dataset.json, or copy the file again from its source"
        )


def label_regions(labels: Mapping[str, Any], file: Path) -> tuple[dict[str, tuple[int, ...]], str]:
    """Return the regions of `labels` and a note. Keys are label values (Decathlon) or names (nnU-Net 2).

    Raises:
        UserError: the labels are neither, or one of them is to be ignored.
    """
    if labels and all(re.fullmatch(r"\d+", key) for key in labels) and all(isinstance(v, str) for v in labels.values()):
        values: dict[str, Any] = {}
        for key, name in labels.items():
            if name in values:
                raise UserError(f"{file}: the label name {name!r} occurs twice in labels; give each label its own name")
            values[name] = int(key)
    else:
        values = dict(labels)
    regions: dict[str, tuple[int, ...]] = {}
    for name, value in values.items():
        members = value if isinstance(value, list) else [value]
        if not members or any(isinstance(one, bool) or not isinstance(one, int) for one in members):
            raise UserError(
                f"{file}: label {name!r} is {value!r}; labels must map values to names, or names to values or lists of "
                "values"
            )
        if name.lower() == "ignore":
            raise UserError(f"{file}: the label 'ignore' is not supported; set it to the background in the label maps")
        if members != [0]:
            regions[name] = tuple(members)
    if not regions:
        raise UserError(f"{file}: labels names no label but the background; {AS_RELEASED}")
    try:
        regions = check_regions(regions)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    if brain_labels({values[0]: name for name, values in regions.items() if len(values) == 1}):
        return dict(DECATHLON_BRAIN), (
            "Regions from dataset.json: 1 oedema, 2 non-enhancing, 3 enhancing tumour; et = 3, tc = 2 and 3, wt = 1, 2 "
            "and 3 (not the numbers of BraTS)."
        )
    return regions, f"Regions from dataset.json: {', '.join(regions)}."


def brain_labels(names: Mapping[int, str]) -> bool:
    """Return whether the label names, by value, are those of the brain task of the Decathlon."""
    words = [names.get(value, "").lower() for value in (1, 2, 3)]
    return len(names) == 3 and "edema" in words[0] and words[1].startswith("non") and words[2].startswith("enhanc")


def read_list(file: Path) -> dict[str, Any]:
    """Return the content of a `dataset.json`. Raises UserError if the file is invalid."""
    content = read_json(file)
    if isinstance(content, dict) and "modality" not in content and "channel_names" in content:
        content["modality"] = content["channel_names"]
    for key, kind in {"modality": dict, "labels": dict}.items():
        if not isinstance(content, dict) or not isinstance(content.get(key), kind):
            raise UserError(f"{file} has no {key!r}; give a dataset.json of the Decathlon or of nnU-Net")
    if not isinstance(content.get("training", []), list):
        raise UserError(f"{file}: training is not a list; {AS_RELEASED}")
    return content


def channel_names(content: Mapping[str, Any], file: Path) -> list[str]:
    """Return the canonical modality names of the channels, in order.

    A name of several channels is followed by the number of each: ct_0 and ct_1. In nnU-Net 2, the name chooses the
    normalisation, so that all phases of a CT are named CT.
    """
    written = content["modality"]
    uses = Counter(str(name).lower() for name in written.values())
    try:
        numbered = {
            int(channel): canonical_name(name) + (f"_{int(channel)}" if uses[name.lower()] > 1 else "")
            for channel, name in written.items()
        }
    except (ValueError, TypeError, AttributeError):
        numbered = {}
    if sorted(numbered) != list(range(len(numbered))) or not numbered or len(set(numbered.values())) < len(numbered):
        raise UserError(f"{file}: modality {content['modality']} does not number distinct channels from 0")
    return [numbered[channel] for channel in range(len(numbered))]
