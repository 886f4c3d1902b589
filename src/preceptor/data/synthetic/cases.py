"""A generated data set of volumes: synthetic heads with a tumour, as NIfTI files in the layout of BraTS.

It shows that a method works and is no evidence about medicine; the folder says so itself.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.synthetic.anatomy import MR_CONTRASTS
from preceptor.data.synthetic.folder import write_once
from preceptor.data.synthetic.tumour import make_tumour_case
from preceptor.errors import UserError

FORMAT = 1
"""Raised whenever the same arguments give other bytes."""
SPLIT = "splits.json"
README = "README.txt"


def write_phantom_cases(
    folder: Path, *, train: int, validation: int, test: int, seed: int, size: int = 48, missing: float = 0.0
) -> Path:
    """Write cases into `folder` and return it; those that are there already are used again.

    `folder/PHANTOM_000/PHANTOM_000_t1ce.nii.gz` and so on for flair, t1, t1ce, t2 and the label map `seg` (1 necrotic
    core, 2 oedema, 4 enhancing tumour), `size` voxels a side; `splits.json` holds the splits. Of each case each
    modality but one drawn by lot is left out with a probability that makes the share `missing` of all files.
    The same arguments give the same voxels and files.

    Raises:
        UserError: the folder holds something else or a damaged phantom, or a number does not fit.
    """
    if min(train, validation, test) < 0 or train + validation + test < 1:
        raise UserError(
            f"train {train}, validation {validation}, test {test}: the numbers of cases must not be below 0"
        )
    if not 0 <= missing <= 0.75:
        raise UserError(
            f"missing is {missing}; of four modalities at most 0.75 can be, as none has all of them missing"
        )
    if size < 32:
        raise UserError(f"size is {size}; below 32 voxels a side a tumour's splits vanish")
    arguments: dict[str, Any] = {
        "format": FORMAT,
        "train": train,
        "validation": validation,
        "test": test,
        "seed": seed,
        "size": size,
        "missing": missing,
    }
    write_once(folder, arguments, lambda target: _write(target, arguments), _digest)
    return folder


def _write(folder: Path, arguments: dict[str, Any]) -> None:
    splits: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    number = 0
    for split, names in splits.items():
        for _ in range(arguments[split]):
            name = f"PHANTOM_{number:03d}"
            _case(folder / name, name, number, arguments)
            names.append(name)
            number += 1
    (folder / SPLIT).write_text(json.dumps(splits, indent=1), "utf-8")
    (folder / README).write_text(_readme(arguments), "utf-8")


def _case(folder: Path, name: str, number: int, arguments: dict[str, Any]) -> None:
    folder.mkdir()
    case = make_tumour_case(arguments["seed"], number, size=arguments["size"])
    rng = np.random.default_rng([arguments["seed"], number, 20])
    kept = rng.integers(len(MR_CONTRASTS))
    # One of four is always there, so that the others go more often than the share of all.
    absent = rng.random(len(MR_CONTRASTS)) < arguments["missing"] * 4 / 3
    for place, contrast in enumerate(MR_CONTRASTS):
        if place == kept or not absent[place]:
            _save(folder / f"{name}_{contrast}.nii.gz", case.contrasts[contrast], case.spacing)
    _save(folder / f"{name}_seg.nii.gz", case.label, case.spacing)


def _save(path: Path, volume: np.ndarray, spacing: float) -> None:
    """Write a volume (z, y, x) with its axes to the left, back and top, as the files of BraTS have them."""
    import nibabel

    side = volume.shape[0]
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = spacing * (side - 1) / 2 * np.array([1, 1, -1])
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _digest(folder: Path) -> str:
    """Return the SHA-256 of the split and of every volume, with their names."""
    digest = hashlib.sha256((folder / SPLIT).read_bytes())
    for path in sorted(folder.glob("*/*.nii.gz")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _readme(arguments: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in arguments.items())
    return (
        "SYNTHETIC VOLUMES. No patient was imaged. The heads and tumours are computed from warped ellipsoids.\n"
        "They serve to try software; nothing about medicine follows from them.\n"
        f"Written by preceptor with: {settings}.\n"
    )
