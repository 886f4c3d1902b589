"""Burned-in text, suspected: lines of small strokes of high contrast near the border of an image."""

from __future__ import annotations

import numpy as np
from PIL import Image

LONGEST_SIDE = 640  # pixels; larger images are made smaller first
CONTRAST = 48  # grey levels over two pixels
HEIGHT, WIDTH = 9, 32  # the window, about one line of five letters
STROKES = 4  # left edges, and as many right ones, in a row of the window
ROWS = 3  # of the window that have them
QUIET, CALM = 0.3, 6  # share of the window that hardly changes, and by how many grey levels at most
BORDER = 0.2  # the middle of the window lies in this outer share of the height or of the width


def has_text(image: Image.Image) -> bool:
    """Return whether some window near the border looks like text on a plain ground.

    In a row of letters grey values jump up and down again several times, over a ground that is flat. Noise lacks the
    ground, bones and outlines lack the number of strokes. It is a suspicion: see docs/explanation/leakage.md for how
    often it is right. Text of letters smaller than about 6 pixels is missed.
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
    """Return where a run of a row begins."""
    starts = mask.copy()
    starts[:, 1:] &= ~mask[:, :-1]
    return starts


def _sums(values: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Return the sums over all windows of `length` along an axis."""
    padding = [(0, 0), (0, 0)]
    padding[axis] = (1, 0)
    total = np.pad(values, padding).cumsum(axis, dtype=np.int32)
    count = values.shape[axis] - length + 1
    return total.take(range(length, length + count), axis) - total.take(range(count), axis)
