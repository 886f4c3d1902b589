"""Generate a data set of volumes: synthetic heads with a tumour, as NIfTI files in the layout of BraTS.

It shows that a method works and is not evidence about medicine, as a file in the folder states.
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
"""Increased whenever the same arguments give different files."""
SPLIT = "splits.json"
README = "README.txt"


def write_phantom_cases(
    folder: Path, *, train: int, validation: int, test: int, seed: int, size: int = 48, missing: float = 0.0
) -> Path:
    """Generate cases in `folder` and return the folder. An existing data set of the same arguments is reused.

    A case is a folder `PHANTOM_000` with `PHANTOM_000_t1ce.nii.gz` and so on for flair, t1, t1ce, t2 and the label map
    `seg` (1 necrotic core, 2 oedema, 4 enhancing tumour). `splits.json` lists the splits. The same arguments always
    give the same files.

    Args:
        folder: Output folder.
        train: Number of training cases.
        validation: Number of validation cases.
        test: Number of test cases.
        seed: Random seed.
        size: Voxels along each axis.
        missing: Fraction of all modalities that is left out at random. Every case keeps at least one.

    Raises:
        UserError: the folder contains something else or a changed phantom, or a number is invalid.
    """
    if min(train, validation, test) < 0 or train + validation + test < 1:
        raise UserError(
            f"the numbers of cases train={train}, validation={validation}, test={test} must not be negative, nor all 0"
        )
    if not 0 <= missing <= 0.75:
        raise UserError(f"missing={missing} must be from 0 to 0.75, because each case keeps one of its four modalities")
    if size < 32:
        raise UserError(f"size={size} must be at least 32 voxels, so that the parts of a tumour remain visible")
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
    always_present = rng.integers(len(MR_CONTRASTS))
    # One of four modalities is never missing, so that the others must be missing more often.
    absent = rng.random(len(MR_CONTRASTS)) < arguments["missing"] * 4 / 3
    for index, contrast in enumerate(MR_CONTRASTS):
        if index == always_present or not absent[index]:
            _save(folder / f"{name}_{contrast}.nii.gz", case.contrasts[contrast], case.spacing)
    _save(folder / f"{name}_seg.nii.gz", case.label, case.spacing)


def _save(path: Path, volume: np.ndarray, spacing: float) -> None:
    """Write a volume (z, y, x) with its axes to the left, back and top, as in the files of BraTS."""
    import nibabel

    side = volume.shape[0]
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = spacing * (side - 1) / 2 * np.array([1, 1, -1])
    image = nibabel.Nifti1Image(np.ascontiguousarray(volume.transpose(2, 1, 0)), affine)
    image.header.set_xyzt_units("mm")
    path.write_bytes(gzip.compress(image.to_bytes(), compresslevel=1, mtime=0))


def _digest(folder: Path) -> str:
    """Return a SHA-256 over the split file and all volumes with their names."""
    digest = hashlib.sha256((folder / SPLIT).read_bytes())
    for path in sorted(folder.glob("*/*.nii.gz")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _readme(arguments: dict[str, Any]) -> str:
    settings = ", ".join(f"{key} {value}" for key, value in arguments.items())
    return (
        "SYNTHETIC VOLUMES. No patient was imaged. The heads and tumours are computed from warped ellipsoids.\n"
        "They are for testing software and are not evidence about medicine.\n"
        f"Written by preceptor with: {settings}.\n"
    )
