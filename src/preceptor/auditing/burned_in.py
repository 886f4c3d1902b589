"""Detect possible burned-in text: rows of small, high-contrast strokes near the border of an image."""

from __future__ import annotations

import numpy as np
from PIL import Image

LONGEST_SIDE = 640  # in pixels; larger images are downsampled
CONTRAST = 48  # grey levels across two pixels
HEIGHT, WIDTH = 9, 32  # size of the window, about five letters
STROKES = 4  # smallest number of left and of right edges in a row of the window
ROWS = 3  # smallest number of such rows in the window
QUIET, CALM = 0.3, 6  # smallest fraction of flat pixels in the window; largest change in grey levels of a flat pixel
BORDER = 0.2  # the centre of the window is in this outer fraction of the height or the width


def has_text(image: Image.Image) -> bool:
    """Return whether a window near the border looks like text on a plain background.

    In a row of letters, grey values rise and fall several times over a flat background. Noise lacks the background;
    bones and outlines lack the number of strokes. The result is only a suspicion: docs/explanation/leakage.md reports
    how often it is correct. Letters smaller than about 6 pixels are missed.
    """
    grey = image.convert("L")
    scale = LONGEST_SIDE / max(grey.size)
    if scale < 1:
        width, height = (max(1, round(side * scale)) for side in grey.size)
        grey = grey.resize((width, height), Image.Resampling.BOX)
    values_HW = np.asarray(grey).astype(np.int16)
    if values_HW.shape[0] < HEIGHT or values_HW.shape[1] < WIDTH + 2:
        return False
    steps = values_HW[:, 2:] - values_HW[:, :-2]
    rises, falls = _starts(steps > CONTRAST), _starts(steps < -CONTRAST)
    lines = (_sums(rises, WIDTH, 1) >= STROKES) & (_sums(falls, WIDTH, 1) >= STROKES)
    quiet = _sums(_sums(np.abs(steps) <= CALM, WIDTH, 1), HEIGHT, 0)
    windows = (_sums(lines, HEIGHT, 0) >= ROWS) & (quiet >= QUIET * HEIGHT * WIDTH)
    y, x = np.nonzero(windows)
    across, down = (x + WIDTH / 2) / values_HW.shape[1], (y + HEIGHT / 2) / values_HW.shape[0]
    to_border = np.minimum(np.minimum(across, 1 - across), np.minimum(down, 1 - down))
    return bool((to_border < BORDER).any())


def _starts(mask: np.ndarray) -> np.ndarray:
    """Return a mask of the first pixel of every run in a row."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    return starts


def _sums(values: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Return the sums over all windows of the given length along an axis."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (1, 0)
    total = np.pad(values, padding).cumsum(axis, dtype=np.int32)
    count = values.shape[axis] - length + 1
    return total.take(range(length, length + count), axis) - total.take(range(count), axis)
