"""Synthetic heads with a tumour in four MR contrasts, each of which shows a different part of the tumour well.

Enhancing tumour is bright only in t1ce, oedema in flair and t2, the core differs in t1ce and t2, and t1 shows little.
Distractors prevent trivial solutions: classes overlap, vessels are bright in t1ce, fluid in t2, and spots of the white
matter in flair. Nothing here comes from a patient. The axes of volumes are (z, y, x), as in `anatomy.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from preceptor.data.synthetic.anatomy import (
    ENHANCING,
    MR_CONTRASTS,
    NECROSIS,
    OEDEMA,
    TISSUE,
    Space,
    paint_head,
    smooth_noise,
)

# The cube around the brain: centre and half side in the coordinates of a head, whose half side is 110 mm.
MIDDLE, HALF = (0.22, 0.03, 0.0), 0.78
SPACING_48 = 110 * 2 * HALF / 48  # mm, for 48 voxels along each axis

_BRAIN = ("csf", "grey matter", "white matter", "deep grey matter", "ventricles", "cerebellum", "brainstem")
_MAY_COVER = ("grey matter", "white matter", "deep grey matter")

# Mean intensity of each class in t1, t1ce, t2, flair.
_MEANS: dict[str, tuple[float, float, float, float]] = {
    "csf": (0.20, 0.20, 0.98, 0.16),
    "grey matter": (0.46, 0.48, 0.60, 0.58),
    "white matter": (0.62, 0.63, 0.46, 0.46),
    "deep grey matter": (0.51, 0.53, 0.55, 0.56),
    "ventricles": (0.18, 0.19, 1.00, 0.15),
    "cerebellum": (0.51, 0.53, 0.56, 0.54),
    "brainstem": (0.58, 0.59, 0.48, 0.48),
}
_LESION_MEANS: dict[int, tuple[float, float, float, float]] = {
    NECROSIS: (0.36, 0.34, 0.92, 0.64),
    OEDEMA: (0.48, 0.48, 0.79, 0.84),
    ENHANCING: (0.43, 0.89, 0.70, 0.75),
}
_SPREAD = {NECROSIS: 0.12, OEDEMA: 0.06, ENHANCING: 0.09}  # standard deviation of the class mean between cases


@dataclass
class TumourCase:
    """A synthetic case: `contrasts` by name (int16, 0 outside the brain) and `label` (uint8), cubes (z, y, x)."""

    spacing: float
    contrasts: dict[str, np.ndarray]
    label: np.ndarray


def make_tumour_case(seed: int, index: int, *, size: int = 48) -> TumourCase:
    """Generate case `index` of the phantom with this seed. The same arguments always give the same arrays.

    In every case at least 0.08 % of the cube is enhancing tumour and at least 0.2 % is oedema.
    """
    assert size >= 32, "the parts of a tumour vanish below 32 voxels"
    rng = np.random.default_rng([seed, index, 10])
    space = Space(rng, size, MIDDLE, HALF)
    tissue, _ = paint_head(rng, space)
    brain = np.isin(tissue, [TISSUE[name] for name in _BRAIN]) & (space.z > -0.5)
    label = np.zeros(tissue.shape, np.uint8)
    for _ in range(60):
        label = _tumour(rng, space, tissue)
        if (label == ENHANCING).sum() >= 0.0008 * label.size and (label == OEDEMA).sum() >= 0.002 * label.size:
            break
    else:
        raise AssertionError(f"no tumour fits into case {index} of seed {seed}")
    extra = _distractors(rng, space, tissue, label)
    contrasts = {
        name: _render(np.random.default_rng([seed, index, 11 + column]), column, tissue, label, brain, extra)
        for column, name in enumerate(MR_CONTRASTS)
    }
    return TumourCase(SPACING_48 * 48 / size, contrasts, label)


def _tumour(rng: np.random.Generator, space: Space, tissue: np.ndarray) -> np.ndarray:
    """Return the label map of one tumour: oedema along the white matter around an off-centre core."""
    size = space.size
    cover = np.isin(tissue, [TISSUE[name] for name in _MAY_COVER])
    spots = np.argwhere(cover & (np.abs(space.x) > 0.12) & (space.z > 0))
    centre = spots[rng.integers(len(spots))]
    middle = np.array([axis[tuple(centre)] for axis in (space.z, space.y, space.x)])
    radius = rng.uniform(0.24, 0.42)
    along = rng.uniform(0.8, 1.15, 3)
    edge = np.sqrt(_distance(space, middle, radius * along)) + 0.22 * smooth_noise(rng, size, 9)
    whole = (edge + 0.18 * (tissue != TISSUE["white matter"]) < 1) & cover

    core_radius = radius * rng.uniform(0.5, 0.8)
    off = rng.normal(0, 0.16, 3) * radius
    edge = np.sqrt(_distance(space, middle + off, core_radius * rng.uniform(0.8, 1.15, 3)))
    edge += 0.20 * smooth_noise(rng, size, 12)
    core = (edge < 1) & cover
    # The enhancing rim has gaps. In a fifth of the tumours it fills most of the core.
    rim = rng.uniform(0.5, 0.8) if rng.random() < 0.2 else rng.uniform(0.20, 0.36)
    gaps = smooth_noise(rng, size, 8) < rng.uniform(-1.3, -0.4)
    enhancing = core & (1 - edge < rim + 0.12 * smooth_noise(rng, size, 14)) & ~gaps
    label = np.zeros(tissue.shape, np.uint8)
    label[whole | core] = OEDEMA
    label[core] = NECROSIS
    label[enhancing] = ENHANCING
    return label


def _distance(space: Space, middle: np.ndarray, radii: np.ndarray) -> np.ndarray:
    z, y, x = (float(value) for value in middle)
    a, b, c = (float(value) for value in radii)
    return space.radius((z, y, x), (a, b, c))


def _distractors(
    rng: np.random.Generator, space: Space, tissue: np.ndarray, label: np.ndarray
) -> dict[str, np.ndarray]:
    """Return masks of structures that resemble tumour in one contrast: vessels, white matter spots, plexus."""
    size = space.size
    grid = np.stack(np.meshgrid(*[np.arange(size, dtype=np.float32)] * 3, indexing="ij"))
    vessels, spots = np.zeros(tissue.shape, bool), np.zeros(tissue.shape, bool)
    inside = np.argwhere(np.isin(tissue, [TISSUE["grey matter"], TISSUE["white matter"]]))
    for _ in range(int(rng.integers(5, 11))):
        position = inside[rng.integers(len(inside))].astype(np.float64)
        direction = rng.normal(0, 1, 3)
        for _ in range(int(rng.integers(6, 16) * size / 48)):
            direction = 0.8 * direction / np.linalg.norm(direction) + rng.normal(0, 0.25, 3)
            position = position + direction
            vessels |= _ball(grid, position, size / 48 * 0.9)
    white = np.argwhere((tissue == TISSUE["white matter"]) & (label == 0))
    for _ in range(int(rng.integers(4, 14)) if len(white) else 0):
        spots |= _ball(grid, white[rng.integers(len(white))], rng.uniform(0.8, 2.6) * size / 48)
    # Patches of the white matter next to the ventricles.
    ventricles = tissue == TISSUE["ventricles"]
    near = ventricles.copy()
    for _ in range(max(1, round(size / 32))):
        for axis in range(3):
            near |= np.roll(near, 1, axis) | np.roll(near, -1, axis)
    spots |= near & (smooth_noise(rng, size, 10) > 0.5)
    spots &= (tissue == TISSUE["white matter"]) & (label == 0)
    plexus = ventricles & (smooth_noise(rng, size, 12) > 0.9)
    return {"vessel": vessels & (label == 0), "spot": spots, "plexus": plexus}


def _ball(grid: np.ndarray, centre: np.ndarray, radius: float) -> np.ndarray:
    z, y, x = (np.square(axis - np.float32(c)) for axis, c in zip(grid, centre, strict=True))
    return z + y + x <= np.float32(radius * radius)


def _render(
    rng: np.random.Generator,
    column: int,
    tissue: np.ndarray,
    label: np.ndarray,
    brain: np.ndarray,
    extra: dict[str, np.ndarray],
) -> np.ndarray:
    """Render a contrast: class means that vary between cases, texture, partial volume, bias field, Rician noise."""
    size = tissue.shape[0]
    volume = np.zeros(tissue.shape, np.float32)
    for name, means in _MEANS.items():
        volume[tissue == TISSUE[name]] = means[column] * rng.normal(1, 0.05)
    # Spots resemble weak oedema (t2, flair), vessels and plexus resemble strong enhancement (t1ce).
    spot = rng.uniform(0.85, 1.05)
    for mask, values in (
        ("spot", (0.54, 0.55, 0.74 * spot, 0.82 * spot)),
        ("vessel", (0.48, 0.90, 0.36, 0.40)),
        ("plexus", (0.36, 0.78, 0.82, 0.45)),
    ):
        volume[extra[mask]] = values[column]
    inner = smooth_noise(rng, size, 12)  # brightness varies inside a tumour
    for value, means in _LESION_MEANS.items():
        inside = label == value
        volume[inside] = means[column] * rng.normal(1, _SPREAD[value]) * (1 + 0.10 * inner[inside])
    volume *= 1 + 0.05 * smooth_noise(rng, size, 18)
    for axis in range(3):  # partial volume
        padded = np.pad(volume, [(1, 1) if a == axis else (0, 0) for a in range(3)], mode="edge")
        before, after = padded.take(range(size), axis), padded.take(range(2, size + 2), axis)
        volume = 0.70 * volume + 0.15 * (before + after)
    bias = np.exp(0.10 * smooth_noise(rng, size, 3))
    sigma = rng.uniform(0.04, 0.07)
    real = volume * bias + sigma * rng.standard_normal(volume.shape, dtype=np.float32)
    imaginary = sigma * rng.standard_normal(volume.shape, dtype=np.float32)
    scale = rng.uniform(300, 900)  # the intensity scale of scanners is arbitrary
    stored = np.rint(scale * np.sqrt(np.square(real) + np.square(imaginary)))
    return np.where(brain, np.maximum(stored, 1), 0).astype(np.int16)
