"""Small NIfTI files for the tests of volumes."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np

REGIONS = {"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}
LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


def save(path: Path, volume: np.ndarray, affine: np.ndarray = LPS) -> Path:
    """Write a volume (X, Y, Z) in the file's own order of axes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(volume, affine).to_filename(path)
    return path


def head(seed: int, shape: tuple[int, int, int] = (12, 14, 10)) -> np.ndarray:
    """Return int16 noise from 100 to 199 in a box that leaves two background voxels all around."""
    volume = np.zeros(shape, np.int16)
    inner = tuple(slice(2, side - 2) for side in shape)
    volume[inner] = np.random.default_rng(seed).integers(100, 200, [side - 4 for side in shape])
    return volume


def lesion(shape: tuple[int, int, int] = (12, 14, 10), values: tuple[int, ...] = (1, 2, 4)) -> np.ndarray:
    """Return a label map with a plane of each value."""
    label = np.zeros(shape, np.uint8)
    for row, value in enumerate(values):
        label[3 + row, 4:8, 4:7] = value
    return label


def write_case(folder: Path, name: str, seed: int = 0, endings: dict[str, str] | None = None, **label) -> Path:
    """Write a case with the given endings, by modality (default BraTS 2021), and its label map."""
    chosen = endings or {m: f"_{m}" for m in ("flair", "t1", "t1ce", "t2")}
    separator = next(iter(chosen.values()))[0]
    for number, ending in enumerate(chosen.values()):
        save(folder / f"{name}{ending}.nii.gz", head(10 * seed + number))
    save(folder / f"{name}{separator}seg.nii.gz", lesion(**label))
    return folder
