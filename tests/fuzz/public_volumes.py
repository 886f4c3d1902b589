"""Folders of BraTS, the Decathlon and nnU-Net, built small in their released layout, against the files written."""

from __future__ import annotations

import gzip
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st

from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.volumes import load_case
from tests.fuzz.case_tables import nifti
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely
from tests.fuzz.outcome import attempt, command, require
from tests.fuzz.target import Target

SHAPE = (4, 5, 6)


def voxels(seed: int, channels: int = 0) -> np.ndarray:
    """Return an image of positive values; every seed has another one."""
    shape = (*SHAPE, channels) if channels else SHAPE
    return np.random.default_rng(seed).integers(1, 999, shape).astype(np.int16)


def labels(seed: int, values: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(seed).choice((0, *values), SHAPE).astype(np.uint8)


def write(path: Path, array: np.ndarray, mutations: tuple[Mutation, ...] = ()) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(mutate(gzip.compress(nifti(array), mtime=0), mutations))


# --- BraTS ------------------------------------------------------------------------------------------------------------

KINDS = {
    "2020": ("BraTS20_Training_{:03d}", {"flair": "flair", "t1": "t1", "t1ce": "t1ce", "t2": "t2"}, "_", (1, 2, 4)),
    "2018": ("Brats18_TCIA{:02d}_{:03d}_1", {"flair": "flair", "t1": "t1", "t1ce": "t1ce", "t2": "t2"}, "_", (1, 2, 4)),
    "2023": ("BraTS-GLI-{:05d}-000", {"flair": "t2f", "t1": "t1n", "t1ce": "t1c", "t2": "t2w"}, "-", (1, 2, 3)),
}
MODALITIES = ("flair", "t1", "t1ce", "t2")


@dataclass(frozen=True)
class BratsInput:
    """A year, the modalities of each case, names of further files, and damage to the first image of the first case."""

    year: str
    cases: tuple[tuple[str, ...], ...]
    masks: tuple[bool, ...]
    others: tuple[str, ...]
    grades: bool
    mutations: tuple[Mutation, ...]
    by_command: bool


HELD = st.lists(st.sampled_from(MODALITIES), min_size=1, max_size=3, unique=True).map(tuple)
BRATS = st.builds(
    BratsInput,
    year=st.sampled_from(sorted(KINDS)),
    cases=st.lists(mostly(st.just(MODALITIES), HELD, 4), min_size=5, max_size=7).map(tuple),
    masks=st.tuples(*[mostly(st.just(True), st.just(False), 10)] * 7),
    others=st.lists(
        st.sampled_from(
            [
                "name_mapping.csv",
                "survival.csv",
                ".DS_Store",
                "._{case}_flair.nii.gz",
                "{case}_swi.nii.gz",
                "{case}_t1 (1).nii.gz",
                "{case}_flair.nii",
                "{case}_T1CE.nii.gz",
                "notes.nii.gz",
            ]
        ),
        max_size=2,
        unique=True,
    ).map(tuple),
    grades=st.booleans(),
    mutations=DAMAGE,
    by_command=rarely(30),
)


def check_brats(case: BratsInput, folder: Path) -> bool:
    """Read a folder of BraTS, and compare cases, files and labels with those that were written."""
    pattern, names, sign, values = KINDS[case.year]
    root = folder / "brats"
    written: dict[str, dict[str, Path]] = {}
    for number, held in enumerate(case.cases):
        name = pattern.format(number + 1, number + 1)
        place = root / ("HGG" if number % 2 else "LGG") / name if case.grades and case.year == "2018" else root / name
        written[name] = {modality: place / f"{name}{sign}{names[modality]}.nii.gz" for modality in held}
        for index, path in enumerate(written[name].values()):
            write(path, voxels(10 * number + index), case.mutations if not (number or index) else ())
        if case.masks[number]:
            written[name]["mask"] = place / f"{name}{sign}seg.nii.gz"
            # All label values occur, because the numbers of a year are recognised by them.
            array = labels(number, values)
            array.reshape(-1)[: len(values)] = values
            write(written[name]["mask"], array)
    first = next(iter(written))
    place = next(iter(written[first].values())).parent
    for other in case.others:
        path = place / other.format(case=first)
        path.write_bytes(gzip.compress(nifti(voxels(999)), mtime=0) if path.suffix == ".gz" else nifti(voxels(998)))
    if case.by_command:
        return command("doctor", "lckd-brats", f"data.root={root}").accepted
    outcome = attempt(lambda: read_volumes(root, name="brats", modalities=MODALITIES), place=folder.name)
    if not outcome.accepted:
        return False
    data = outcome.value
    labelled = {name: files for name, files in written.items() if "mask" in files}
    unclear = {name for name in labelled if name == first and case.others}  # the findings may take its place
    require({c.id for c in data.samples} >= set(labelled) - unclear, "a case is missing", data.findings)
    require({c.id for c in data.samples} <= set(labelled), "a case without a label map", [c.id for c in data.samples])
    for found in data.samples:
        files = {kind: path for kind, path in written[found.id].items() if kind != "mask"}
        images = {kind: file.path for kind, file in found.images.items()}
        told = found.id in unclear and (data.findings or data.notes)
        require(images == files or told, "other images", (images, files))
        require(found.mask is not None and found.mask.path == written[found.id]["mask"], "another label map", found)
    require(data.regions["wt"] == values, "other regions", data.regions)
    groups = {c.group for c in data.samples}
    require(len(groups) == len(data.samples), "patients were merged", groups)
    read_all(data, written, case.mutations, first)
    return True


def read_all(data: Any, written: dict[str, dict[str, Path]], mutations: Any, first: str) -> None:
    """Raise Wrong unless the voxels of the first case are those that were written, in the orientation of arrays."""
    found = next((case for case in data.samples if case.id == first), None)
    if found is None:
        return
    outcome = attempt(lambda: load_case(found, data), place=first)
    require(outcome.accepted or mutations or data.findings, "a sound case is refused", outcome.sentence)
    if not outcome.accepted or mutations or data.findings:
        return
    for number, modality in enumerate(kind for kind in written[first] if kind != "mask"):
        # With an identity affine, (D, H, W) is (Z, Y, X).
        require(np.array_equal(outcome.value.images[modality], voxels(number).T), "other voxels", modality)


# --- Decathlon and nnU-Net --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DecathlonInput:
    """The form and the channels of a dataset.json, an odd value in it, and damage to its bytes and to its files."""

    form: str
    channels: tuple[str, ...]
    count: int
    file_channels: int
    dropped: str
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    by_command: bool


CHANNELS = st.sampled_from([("FLAIR", "T1w"), ("CT",), ("T2", "ADC"), ("FLAIR", "T1w", "t1gd", "T2w")])
DECATHLON = st.builds(
    DecathlonInput,
    form=st.sampled_from(["decathlon", "nnunet1", "nnunet2"]),
    channels=CHANNELS,
    count=st.integers(5, 6),
    file_channels=mostly(st.just(0), st.sampled_from([-1, 1]), 10),
    dropped=mostly(st.just(""), st.sampled_from(["image", "label", "entry"]), 8),
    replaced=mostly(st.none(), st.tuples(st.integers(1, 50), json_values()), 3),
    mutations=DAMAGE,
    by_command=rarely(30),
)


def check_decathlon(case: DecathlonInput, folder: Path) -> bool:
    """Read a dataset.json with its files, and compare cases, channels and regions with those that were written."""
    root = folder / "Task01"
    separate = case.form != "decathlon"
    count = len(case.channels)
    for number in range(case.count):
        name = f"BRATS_{number:03d}"
        if separate:
            for channel in range(count):
                write(root / "imagesTr" / f"{name}_{channel:04d}.nii.gz", voxels(10 * number + channel))
        else:
            channels = max(1, count + case.file_channels)
            write(root / "imagesTr" / f"{name}.nii.gz", voxels(number, channels if channels > 1 else 0))
        write(root / "labelsTr" / f"{name}.nii.gz", labels(number, (1, 2)))
    content: dict[str, Any] = {"name": "x", "labels": {"0": "background", "1": "lesion", "2": "core"}}
    if case.form == "nnunet2":
        content |= {
            "channel_names": {str(i): name for i, name in enumerate(case.channels)},
            "labels": {"background": 0, "lesion": 1, "core": 2},
            "file_ending": ".nii.gz",
            "numTraining": case.count,
        }
    else:
        content["modality"] = {str(i): name for i, name in enumerate(case.channels)}
        entries = [
            {"image": f"./imagesTr/BRATS_{n:03d}.nii.gz", "label": f"./labelsTr/BRATS_{n:03d}.nii.gz"}
            for n in range(case.count - (case.dropped == "entry"))
        ]
        content |= {"numTraining": len(entries), "numTest": 0, "training": entries, "test": []}
    if case.dropped in ("image", "label"):
        next(iter(sorted((root / f"{case.dropped}sTr").iterdir()))).unlink()
    if case.replaced is not None:
        content = replace_nested(content, *case.replaced)
    data = json.dumps(content).encode(errors="surrogatepass")
    (root / "dataset.json").write_bytes(mutate(data, case.mutations))
    if case.by_command:
        return command(
            "doctor", "lckd-brats", f"data.root={root}", "data.name=volumes", "data.modalities=[t1]"
        ).accepted
    outcome = attempt(lambda: read_volumes(root), place=folder.name)
    if not outcome.accepted:
        return False
    found = outcome.value
    require(case.dropped != "image", "a missing image")
    require(case.dropped != "label" or case.form == "nnunet2", "a missing label map")
    if case.mutations or case.replaced is not None:
        return True
    require(case.dropped != "label", "fewer cases than numTraining")
    wrong = not separate and max(1, count + case.file_channels) != count
    require(not wrong, "another number of channels", (case.channels, case.file_channels))
    unlisted = case.dropped == "entry" and case.form != "nnunet2"  # which lists no entries
    expected = case.count - unlisted
    require(len(found.samples) == expected, "another number of cases", len(found.samples))
    require(not unlisted or found.findings, "a file that is not listed is left out without a word")
    require(len(found.modalities) == count, "another number of modalities", found.modalities)
    require(found.regions == {"lesion": (1,), "core": (2,)}, "other regions", found.regions)
    parts = {split: {c.id for c in found.samples if c.split == split} for split in ("train", "validation", "test")}
    require(all(parts.values()), "an empty split", parts)
    for one in found.samples[:2]:
        number = int(one.id[-3:])
        volume = attempt(lambda one=one: load_case(one, found), place=one.id)
        require(volume.accepted, "a sound case is refused", volume.sentence)
        for modality in found.modalities:
            channel = case.channels.index(next(n for n in case.channels if canonical(n) == modality))
            right = voxels(10 * number + channel) if separate else voxels(number, count if count > 1 else 0)
            right = right if separate or count == 1 else right[..., channel]
            require(np.array_equal(volume.value.images[modality], right.T), "other voxels", modality)
    return True


def canonical(name: str) -> str:
    """Return the name that Preceptor gives to a channel."""
    return {"t1w": "t1", "t2w": "t2", "t1gd": "t1ce"}.get(name.lower(), name.lower())


BRATS_TARGET = Target(BRATS, check_brats, 30)
DECATHLON_TARGET = Target(DECATHLON, check_decathlon, 40)
