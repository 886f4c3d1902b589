"""Synthetic heads and torsos in three dimensions: anatomy, lesions and imaging contrasts.

Nothing here comes from a patient. A case consists of jittered, warped ellipsoids. It resembles anatomy just enough to
ask questions about it and to segment it. `questions.py` cuts images from cases and asks about them.

The axes of every volume are (z, y, x): z from the feet to the head, y from front to back, x from the right to the left
of the patient. An axial slice `volume[z]` is therefore in radiological orientation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

Region = Literal["head", "torso"]
Side = Literal["left", "right"]
SizeClass = Literal["small", "large"]

MR_CONTRASTS = ("t1", "t1ce", "t2", "flair")
CONTRASTS = (*MR_CONTRASTS, "ct")

NECROSIS, OEDEMA, ENHANCING = 1, 2, 4
"""Labels of a brain lesion, as in BraTS: et = {4}, tc = {1, 4}, wt = {1, 2, 4}. Lesions of a torso have label 1."""

# Mean of each tissue in t1, t1ce, t2, flair (arbitrary units, fat about 0.85) and ct (HU; torso with contrast agent).
_MEANS: dict[str, tuple[float, float, float, float, float]] = {
    "air": (0.0, 0.0, 0.0, 0.0, -1000),
    "fat": (0.85, 0.85, 0.70, 0.60, -90),
    "muscle": (0.40, 0.46, 0.24, 0.28, 55),
    "bone": (0.12, 0.13, 0.10, 0.10, 800),
    "vertebra": (0.52, 0.56, 0.42, 0.40, 260),
    "csf": (0.14, 0.14, 1.00, 0.12, 6),
    "grey matter": (0.45, 0.47, 0.60, 0.58, 40),
    "white matter": (0.64, 0.65, 0.44, 0.44, 30),
    "deep grey matter": (0.51, 0.53, 0.54, 0.54, 40),
    "ventricles": (0.14, 0.15, 1.00, 0.13, 6),
    "cerebellum": (0.52, 0.54, 0.55, 0.53, 37),
    "brainstem": (0.59, 0.60, 0.47, 0.47, 32),
    "right eye": (0.17, 0.18, 0.95, 0.15, 12),
    "left eye": (0.17, 0.18, 0.95, 0.15, 12),
    "vessel": (0.22, 1.05, 0.10, 0.15, 65),
    "right lung": (0.06, 0.08, 0.10, 0.09, -820),
    "left lung": (0.06, 0.08, 0.10, 0.09, -820),
    "heart": (0.46, 0.78, 0.46, 0.42, 130),
    "aorta": (0.20, 1.05, 0.14, 0.12, 210),
    "liver": (0.58, 0.68, 0.34, 0.36, 105),
    "spleen": (0.42, 0.60, 0.58, 0.52, 115),
    "stomach": (0.30, 0.32, 0.75, 0.32, 15),
    "right kidney": (0.42, 0.82, 0.66, 0.58, 170),
    "left kidney": (0.42, 0.82, 0.66, 0.58, 170),
    "bowel": (0.38, 0.48, 0.48, 0.40, 40),
}
TISSUES = tuple(_MEANS)
TISSUE = {name: index for index, name in enumerate(TISSUES)}

ORGANS: dict[str, tuple[str, ...]] = {
    "brain": ("grey matter", "white matter", "deep grey matter", "ventricles", "cerebellum", "brainstem"),
    "ventricles": ("ventricles",),
    "cerebellum": ("cerebellum",),
    "right eye": ("right eye",),
    "left eye": ("left eye",),
    "right lung": ("right lung",),
    "left lung": ("left lung",),
    "heart": ("heart",),
    "liver": ("liver",),
    "spleen": ("spleen",),
    "stomach": ("stomach",),
    "right kidney": ("right kidney",),
    "left kidney": ("left kidney",),
}

_LESION_MEANS: dict[tuple[str, int], tuple[float, float, float, float, float]] = {
    ("brain", NECROSIS): (0.26, 0.25, 0.98, 0.68, 6),
    ("brain", OEDEMA): (0.40, 0.41, 0.86, 1.00, 12),
    ("brain", ENHANCING): (0.39, 1.05, 0.66, 0.72, 70),
    ("lung", 1): (0.50, 0.68, 0.60, 0.55, 60),
    ("liver", 1): (0.28, 0.32, 0.80, 0.70, 10),
    ("kidney", 1): (0.15, 0.16, 1.00, 0.16, 2),
}
# Radius of a lesion in half-widths of the volume, (minimum, maximum) by organ and size class. A brain lesion includes
# oedema. The size classes of an organ do not overlap, so that an image shows the class.
_RADII: dict[str, dict[SizeClass, tuple[float, float]]] = {
    "brain": {"small": (0.14, 0.17), "large": (0.30, 0.38)},
    "lung": {"small": (0.12, 0.15), "large": (0.22, 0.27)},
    "liver": {"small": (0.12, 0.15), "large": (0.22, 0.27)},
    "kidney": {"small": (0.11, 0.13), "large": (0.22, 0.25)},
}
_COUNT_WEIGHTS = (0.22, 0.36, 0.26, 0.16)  # probabilities of 0, 1, 2, 3 lesions


@dataclass(frozen=True)
class Lesion:
    """A lesion in brain, lung, liver or kidney. `centre` is in voxels (z, y, x); `index` is its value in the map."""

    index: int
    organ: str
    side: Side
    size: SizeClass
    centre: tuple[int, int, int]


@dataclass
class PhantomCase:
    """A synthetic case. Volumes are (z, y, x) cubes with isotropic voxels of `spacing` mm.

    Attributes:
        id: Identifier.
        region: `head` or `torso`.
        seed: Seed and index of the case.
        spacing: Voxel size in mm.
        tissue: Indices into `TISSUES` (int8): the anatomy without lesions.
        label: Label map of the lesions (int8, see `NECROSIS`).
        lesion_index: Number of the lesion, from 1, or 0 (int8).
        lesions: The lesions.
        contrasts: Rendered contrasts (float32): MR in arbitrary units, never negative; ct in HU.
    """

    id: str
    region: Region
    seed: tuple[int, int]
    spacing: float
    tissue: np.ndarray
    label: np.ndarray
    lesion_index: np.ndarray
    lesions: tuple[Lesion, ...]
    contrasts: dict[str, np.ndarray] = field(default_factory=dict)

    def contrast(self, name: str) -> np.ndarray:
        """Return one contrast. It is rendered on the first call; the order of calls does not change its values."""
        if name not in self.contrasts:
            self.contrasts[name] = _render(self, name)
        return self.contrasts[name]

    def organ_mask(self, organ: str) -> np.ndarray:
        """Return the bool mask of an organ (a key of `ORGANS`), including lesions inside it."""
        indices = [TISSUE[name] for name in ORGANS[organ]]
        return np.isin(self.tissue, indices) if len(indices) > 1 else self.tissue == indices[0]


def make_case(
    seed: int, index: int, *, region: Region, size: int = 64, contrasts: tuple[str, ...] = MR_CONTRASTS
) -> PhantomCase:
    """Generate case `index` of the phantom with this seed. The same arguments always give the same arrays.

    `size` is the number of voxels along each axis. The field of view is 220 mm for a head and 384 mm for a torso.
    """
    assert size >= 32, "small organs vanish below 32 voxels"
    rng = np.random.default_rng([seed, index, 0])
    space = Space(rng, size)
    paint = paint_head if region == "head" else _torso
    tissue, allowed = paint(rng, space)
    label, lesion_index, lesions = _lesions(rng, space, tissue, allowed)
    spacing = (220.0 if region == "head" else 384.0) / size
    case = PhantomCase(f"case-{index:04d}", region, (seed, index), spacing, tissue, label, lesion_index, lesions)
    for name in contrasts:
        case.contrast(name)
    return case


def bounding_box(mask: np.ndarray) -> tuple[int, ...]:  # (dims starts, dims ends)
    """Return the starts and the exclusive ends of the bounding box of a non-empty mask."""
    starts, ends = [], []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        starts.append(int(hit[0]))
        ends.append(int(hit[-1]) + 1)
    return (*starts, *ends)


def smooth_noise(rng: np.random.Generator, size: int, knots: int) -> np.ndarray:
    """Return a noise field (size, size, size) float32, linearly interpolated between knots of unit variance.

    It does not use matrix products, because the rounding of a BLAS may depend on the number of threads.
    """
    values = rng.standard_normal((knots, knots, knots), dtype=np.float32)
    position = np.linspace(0, knots - 1, size, dtype=np.float32)
    low = np.minimum(position.astype(np.int64), knots - 2)
    weight = position - low
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = size
        w = weight.reshape(shape)
        values = values.take(low, axis) * (1 - w) + values.take(low + 1, axis) * w
    return values


class Space:
    """Warped coordinates of a cube with the centre `middle` and the half side `half`, and ellipsoids in it."""

    def __init__(
        self,
        rng: np.random.Generator,
        size: int,
        middle: tuple[float, float, float] = (0.0, 0.0, 0.0),
        half: float = 1.0,
    ) -> None:
        self.size = size
        axes = [np.linspace(m - half, m + half, size, dtype=np.float32) for m in middle]
        tilt = rng.normal(0, 0.05, 3).astype(np.float32)
        shift = rng.normal(0, 0.025, 3).astype(np.float32)
        z, y, x = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
        warp = [0.022 * smooth_noise(rng, size, 6) for _ in range(3)]
        self.z = z + tilt[0] * y + shift[0] + warp[0]
        self.y = y - tilt[0] * z + tilt[1] * x + shift[1] + warp[1]
        self.x = x - tilt[1] * y + tilt[2] * z + shift[2] + warp[2]
        self.jitter = rng
        self._axes = axes
        self._bent = [float(np.abs(a - b).max()) for a, b in ((self.z, z), (self.y, y), (self.x, x))]

    def radius(self, centre: tuple[float, float, float], radii: tuple[float, float, float]) -> np.ndarray:
        """Return the squared radius in units of an ellipsoid; it is below 1 inside."""
        total = np.square((self.z - np.float32(centre[0])) * np.float32(1 / radii[0]))
        total += np.square((self.y - np.float32(centre[1])) * np.float32(1 / radii[1]))
        total += np.square((self.x - np.float32(centre[2])) * np.float32(1 / radii[2]))
        return total

    def organ(
        self, centre: tuple[float, float, float], radii: tuple[float, float, float], spread: float = 1.0
    ) -> np.ndarray:
        """Return the mask of an ellipsoid whose position and radii vary between cases, scaled by `spread`."""
        moved = np.asarray(centre) + self.jitter.normal(0, 0.018 * spread, 3)
        grown = np.asarray(radii) * np.clip(self.jitter.normal(1, 0.07 * spread, 3), 0.8, 1.25)
        # Compute only the block that the warped ellipsoid can reach, because most organs are small.
        reach = [(m - g - b, m + g + b) for m, g, b in zip(moved, grown, self._bent, strict=True)]
        block = tuple(slice(*np.searchsorted(axis, ends)) for axis, ends in zip(self._axes, reach, strict=True))
        total = np.zeros((), np.float32)
        for coordinate, middle, extent in zip((self.z, self.y, self.x), moved, grown, strict=True):
            total = total + np.square((coordinate[block] - np.float32(middle)) * np.float32(1 / extent))
        mask = np.zeros(self.z.shape, bool)
        mask[block] = total < 1
        return mask


def paint_head(rng: np.random.Generator, space: Space) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the tissue map of a head, and the mask of possible lesion centres."""
    size, x, y, z = space.size, space.x, space.y, space.z
    tissue = np.zeros((size, size, size), np.int8)
    length, width = rng.normal(1, 0.03, 2).clip(0.93, 1.07)
    folds, deep_folds = smooth_noise(rng, size, 22), smooth_noise(rng, size, 14)

    cranium = space.radius((0.16, 0.02, 0), (0.70, 0.80 * length, 0.64 * width))
    face = space.radius((-0.42, -0.30, 0), (0.52, 0.50 * length, 0.46 * width))
    nose = space.radius((-0.35, -0.80, 0), (0.16, 0.12, 0.09)) < 1
    neck = space.radius((-1.0, 0.16, 0), (0.80, 0.38, 0.36))
    tissue[(cranium < 1) | (face < 1) | (neck < 1) | nose] = TISSUE["fat"]
    tissue[(face < 0.84) | (neck < 0.80) | (cranium < 0.80)] = TISSUE["muscle"]
    skull = (cranium > 0.79) & (cranium < 0.92) & (z > -0.30)
    tissue[skull] = TISSUE["bone"]
    jaw = (np.abs(np.sqrt(space.radius((-0.72, -0.25, 0), (10, 0.42, 0.34))) - 0.9) < 0.1) & (y < 0) & (z < -0.58)
    tissue[jaw & (z > -0.82) & (face < 0.95)] = TISSUE["bone"]
    tissue[space.organ((-0.98, 0.24, 0), (0.52, 0.13, 0.14))] = TISSUE["vertebra"]

    inside = (cranium < 0.79) & (z > -0.26 + 0.10 * (y < 0) - 0.25 * np.maximum(y, 0))
    tissue[inside] = TISSUE["csf"]
    brain = (cranium < 0.735) & (z > -0.20 + 0.10 * (y < 0) + 0.02 * folds)
    sulcus = (cranium > 0.52) & (folds > 0.95)
    fissure = (np.abs(x) < 0.018) & (z > 0.12) & (cranium > 0.12)
    brain &= ~sulcus & ~fissure
    tissue[brain] = TISSUE["grey matter"]
    white = brain & (cranium < 0.50 + 0.16 * deep_folds) & (np.abs(x) > 0.05) & (z > -0.08)
    callosum = brain & (space.radius((0.30, 0.05, 0), (0.05, 0.32, 0.12)) < 1)
    tissue[white | callosum] = TISSUE["white matter"]
    wide = float(np.clip(rng.normal(1, 0.18), 0.7, 1.5))  # the width of the ventricles varies most
    for sign in (-1, 1):
        tissue[space.organ((0.08, 0.08, sign * 0.13), (0.12, 0.16, 0.09))] = TISSUE["deep grey matter"]
        tissue[space.organ((0.12, -0.10, sign * 0.27), (0.12, 0.17, 0.055))] = TISSUE["deep grey matter"]
        tissue[space.organ((0.24, -0.02, sign * 0.10), (0.10, 0.27, 0.055 * wide))] = TISSUE["ventricles"]
        tissue[space.organ((0.14, 0.28, sign * 0.19), (0.12, 0.13, 0.06 * wide))] = TISSUE["ventricles"]
    tissue[space.organ((0.08, 0.05, 0), (0.11, 0.13, 0.024 * wide))] = TISSUE["ventricles"]
    allowed = {"brain": np.isin(tissue, [TISSUE["grey matter"], TISSUE["white matter"]]) & (cranium < 0.48)}

    fossa = space.radius((-0.30, 0.31, 0), (0.25, 0.29, 0.40))
    tissue[(fossa < 1.25) & (fossa > 1) & (z < -0.2)] = TISSUE["bone"]
    tissue[(fossa < 1) & (z < -0.12)] = TISSUE["csf"]
    leaf = 0.06 * np.sin(z * np.float32(42))  # the leaves of the cerebellum
    tissue[(space.radius((-0.29, 0.32, 0), (0.20, 0.25, 0.35)) + leaf < 0.92) & (z < -0.13)] = TISSUE["cerebellum"]
    tissue[space.organ((-0.30, 0.12, 0), (0.26, 0.12, 0.13))] = TISSUE["brainstem"]
    tissue[space.organ((-0.75, 0.20, 0), (0.40, 0.05, 0.05))] = TISSUE["brainstem"]
    for sign, name in ((-1, "right eye"), (1, "left eye")):
        tissue[space.radius((-0.18, -0.52, sign * 0.26), (0.15, 0.24, 0.15)) < 1] = TISSUE["fat"]
        tissue[space.organ((-0.18, -0.60, sign * 0.26), (0.115, 0.115, 0.115), spread=0.6)] = TISSUE[name]
        tissue[space.organ((-0.42, -0.45, sign * 0.20), (0.12, 0.14, 0.09))] = TISSUE["air"]
    tissue[space.organ((-0.38, -0.45, 0), (0.17, 0.24, 0.06))] = TISSUE["air"]
    tissue[space.organ((-0.75, -0.05, 0), (0.35, 0.07, 0.09))] = TISSUE["air"]
    sinus = (np.abs(x) < 0.045) & (cranium > 0.70) & (cranium < 0.80) & (z > 0.0) & (y > -0.45)
    tissue[sinus] = TISSUE["vessel"]
    for sign in (-1, 1):
        tissue[space.organ((-0.70, 0.08, sign * 0.22), (0.45, 0.035, 0.035))] = TISSUE["vessel"]
    return tissue, allowed


def _torso(rng: np.random.Generator, space: Space) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return the tissue map of a torso, and the masks of possible lesion centres by organ."""
    size, x, y, z = space.size, space.x, space.y, space.z
    tissue = np.zeros((size, size, size), np.int8)
    loops, pockets = smooth_noise(rng, size, 14), smooth_noise(rng, size, 9)
    girth, fat = float(np.clip(rng.normal(1, 0.04), 0.9, 1.1)), float(rng.uniform(0.05, 0.13))

    narrowing = 1 - np.square(np.maximum(z - 0.62, 0) / 0.55)  # shoulders to neck
    body = np.square(x / (0.84 * girth * narrowing)) + np.square(y / (0.56 * girth * narrowing))
    body += 0.35 * np.square(x * y / (0.47 * girth**2))  # flatter front and back than an ellipse
    tissue[body < 1] = TISSUE["fat"]
    wall = 1 - 2 * fat
    tissue[body < wall] = TISSUE["muscle"]
    thorax = (space.radius((0.12, 0, 0), (0.72, 0.44 * girth, 0.66 * girth))) < 1
    cavity = (body < wall - 0.22) & (z < 0.15)
    tissue[cavity] = TISSUE["fat"]
    rib = (body > wall - 0.24) & (body < wall - 0.10) & (np.sin((z - 0.45 * y) * np.float32(33)) > 0.25)
    tissue[rib & (z > -0.28) & (z < 0.72)] = TISSUE["bone"]
    sternum = (np.abs(x) < 0.07) & (y < -0.3) & (body > wall - 0.26) & (body < wall - 0.08) & (z > 0) & (z < 0.62)
    tissue[sternum] = TISSUE["bone"]
    for sign in (-1, 1):  # collar bones and shoulder blades
        tissue[space.organ((0.70, -0.20, sign * 0.30), (0.035, 0.07, 0.26))] = TISSUE["bone"]
        tissue[space.organ((0.45, 0.40, sign * 0.42), (0.22, 0.025, 0.14))] = TISSUE["bone"]

    bowel = cavity & (z < -0.32) & (loops > -0.1) & (body < wall - 0.30) & (y < 0.22)
    tissue[bowel] = TISSUE["bowel"]
    tissue[bowel & (pockets > 1.15) & (y < 0)] = TISSUE["air"]
    for sign in (-1, 1):
        tissue[space.organ((-0.80, 0.26, sign * 0.17), (0.5, 0.10, 0.09))] = TISSUE["muscle"]  # psoas

    dome = float(rng.normal(0.02, 0.03)) + 0.16 * (1 - np.square((np.abs(x) - 0.38) / 0.4)) - 0.28 * np.maximum(y, 0)
    lungs = thorax & (body < wall - 0.24) & (z > dome) & (np.abs(x) > 0.10)
    tissue[lungs & (x < 0)] = TISSUE["right lung"]
    tissue[lungs & (x > 0)] = TISSUE["left lung"]
    tissue[thorax & (np.abs(x) <= 0.10) & (z > 0.0) & (body < wall - 0.2)] = TISSUE["fat"]  # mediastinum
    below = (z <= dome) & (body < wall - 0.2)
    liver = space.organ((-0.16, -0.02, -0.36), (0.33, 0.40, 0.36))
    liver |= space.organ((-0.08, -0.20, -0.02), (0.17, 0.18, 0.28))
    tissue[liver & below] = TISSUE["liver"]
    tissue[space.organ((-0.12, 0.20, 0.52), (0.19, 0.18, 0.13)) & below] = TISSUE["spleen"]
    stomach = space.organ((-0.14, -0.16, 0.33), (0.18, 0.18, 0.18)) & below & (tissue != TISSUE["liver"])
    tissue[stomach] = TISSUE["stomach"]
    tissue[stomach & (y < -0.24)] = TISSUE["air"]
    heart = space.organ((0.16, -0.14, 0.11), (0.22, 0.22, 0.26))
    heart |= space.organ((0.34, -0.06, 0.02), (0.14, 0.16, 0.13))
    tissue[heart & (z > -0.06)] = TISSUE["heart"]
    for sign, name in ((-1, "right kidney"), (1, "left kidney")):
        tissue[space.organ((-0.47 + 0.03 * sign, 0.20, sign * 0.32), (0.21, 0.11, 0.12))] = TISSUE[name]
        tissue[space.organ((-0.47 + 0.03 * sign, 0.18, sign * 0.26), (0.09, 0.05, 0.05))] = TISSUE["fat"]

    spine = np.square((y - 0.34) / 0.11) + np.square(x / 0.13) < 1
    tissue[spine] = TISSUE["vertebra"]
    tissue[spine & (np.sin(z * np.float32(38)) > 0.75)] = TISSUE["muscle"]  # discs
    tissue[np.square((y - 0.47) / 0.05) + np.square(x / 0.06) < 1] = TISSUE["csf"]
    tissue[(np.square((y - 0.53) / 0.035) + np.square(x / 0.04) < 1) & (body < wall)] = TISSUE["bone"]
    aorta = (np.square((y - 0.18) / 0.05) + np.square((x - 0.07) / 0.055) < 1) & (z < 0.5)
    arch = np.abs(np.sqrt(np.square((z - 0.42) / 0.13) + np.square((y - 0.05) / 0.15)) - 1) < 0.33
    tissue[aorta | (arch & (z > 0.42) & (np.abs(x - 0.05) < 0.05))] = TISSUE["aorta"]
    tissue[(np.square(y / 0.04) + np.square((x + 0.02) / 0.04) < 1) & (z > 0.36)] = TISSUE["air"]  # trachea
    inner = body < wall - 0.34
    lung = np.isin(tissue, [TISSUE["right lung"], TISSUE["left lung"]])
    allowed = {
        "lung": lung & inner & (np.abs(x) > 0.2) & (z > dome + 0.1),
        "liver": (tissue == TISSUE["liver"]) & inner & (x < -0.12) & (z < dome - 0.06),
        "kidney": np.isin(tissue, [TISSUE["right kidney"], TISSUE["left kidney"]]),
    }
    return tissue, allowed


_MAY_COVER = {
    "brain": ("grey matter", "white matter", "deep grey matter"),
    "lung": ("right lung", "left lung"),
    "liver": ("liver",),
    "kidney": ("right kidney", "left kidney", "fat", "bowel"),
}


def _lesions(
    rng: np.random.Generator, space: Space, tissue: np.ndarray, allowed: dict[str, np.ndarray]
) -> tuple[np.ndarray, np.ndarray, tuple[Lesion, ...]]:
    """Place 0 to 3 lesions that do not touch, and return label map, lesion numbers and lesions."""
    size = space.size
    label, number = np.zeros_like(tissue), np.zeros_like(tissue)
    count = int(rng.choice(4, p=_COUNT_WEIGHTS))
    organ = str(rng.choice(sorted(allowed)))  # a case has one kind of lesion
    grid = np.arange(size, dtype=np.float32)
    spots = np.argwhere(allowed[organ])
    cover = np.isin(tissue, [TISSUE[name] for name in _MAY_COVER[organ]])
    lesions: list[Lesion] = []
    reach: list[float] = []
    for _ in range(40):  # skip lesions that do not fit after this number of trials
        if len(lesions) == count or len(spots) == 0:
            break
        size_class: SizeClass = "small" if rng.random() < 0.5 else "large"
        radius = rng.uniform(*_RADII[organ][size_class]) * size / 2
        centre = spots[rng.integers(len(spots))]
        if lesions and rng.random() < 0.6:  # near the first one, so that a slice may show several
            level = spots[np.abs(spots[:, 0] - lesions[0].centre[0]) <= 2]
            centre = level[rng.integers(len(level))]
        gaps = [np.linalg.norm(centre - other.centre) - radius - r for other, r in zip(lesions, reach, strict=True)]
        off_middle = abs(float(space.x[tuple(centre)]))
        if any(gap < 0.06 * size for gap in gaps) or off_middle < 0.10:
            continue
        axes = radius * rng.uniform(0.85, 1.0, 3)
        distance = sum(
            np.square((grid - centre[a]) / np.float32(axes[a])).reshape([-1 if b == a else 1 for b in range(3)])
            for a in range(3)
        )
        shape = np.sqrt(distance) + 0.07 * smooth_noise(rng, size, 16)
        whole = (shape < 1) & cover & (number == 0)
        if whole.sum() < 0.45 * (shape < 1).sum():
            continue
        voxel = (int(centre[0]), int(centre[1]), int(centre[2]))
        lesions.append(Lesion(len(lesions) + 1, organ, "left" if centre[2] > size / 2 else "right", size_class, voxel))
        reach.append(float(radius))
        number[whole] = len(lesions)
        label[whole] = 1
        if organ == "brain":
            label[whole & (shape >= 0.66)] = OEDEMA
            if rng.random() < 0.85:  # the others do not enhance
                label[whole & (shape < 0.66) & (shape >= rng.uniform(0.30, 0.46))] = ENHANCING
    return label, number, tuple(lesions)


def _render(case: PhantomCase, name: str) -> np.ndarray:
    """Render a contrast: tissue means that vary between cases, texture, partial volume, bias field and noise.

    MR noise is Rician (Gudbjartsson and Patz 1995): the magnitude of a complex Gaussian around the signal.
    """
    column = CONTRASTS.index(name)
    size = case.tissue.shape[0]
    rng = np.random.default_rng([*case.seed, 1 + column])
    ct = name == "ct"
    typical = np.array([row[column] for row in _MEANS.values()], np.float32)
    means = typical + rng.normal(0, 6, len(typical)) if ct else typical * rng.normal(1, 0.05, len(typical))
    volume = means.astype(np.float32)[case.tissue]
    for lesion in case.lesions:
        inside = case.lesion_index == lesion.index
        for value in np.unique(case.label[inside]):
            mean = _LESION_MEANS[lesion.organ, int(value)][column]
            volume[inside & (case.label == value)] = mean + rng.normal(0, 5) if ct else mean * rng.normal(1, 0.06)
    texture = smooth_noise(rng, size, 20)
    if ct:  # soft tissue varies a little; vessels in the lungs are small spots, much fainter than a nodule
        volume += np.where(volume > -200, 6 * texture, 350 * np.maximum(texture - 0.9, 0) * (volume > -900))
    else:
        volume *= 1 + 0.06 * texture
    for axis in range(3):  # partial volume
        padded = np.pad(volume, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, after = padded.take(range(size), axis), padded.take(range(2, size + 2), axis)
        volume = 0.76 * volume + 0.12 * (before + after)
    if ct:
        sigma = rng.uniform(5, 9)
        return (volume + sigma * rng.standard_normal(volume.shape, dtype=np.float32)).astype(np.float32)
    bias = np.exp(0.10 * smooth_noise(rng, size, 3))
    sigma = rng.uniform(0.022, 0.042)
    real = volume * bias + sigma * rng.standard_normal(volume.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(volume.shape, dtype=np.float32)
    return np.sqrt(np.square(real) + np.square(imaginary)).astype(np.float32)
