"""Perceptual hashes of images: nearly the same for copies that were resized or encoded again.

The hash has one bit for each of the 16 x 16 lowest frequencies of the image's cosine transform: whether it is above
their median (Zauner, "Implementation and benchmarking of perceptual image hash functions", 2010, with 256 bits instead
of 64: head CTs all look alike). It is computed from 64 x 64 grey values, each the mean of its cell of the image.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 64
LOW = 16
BITS = LOW * LOW
COPY_BITS = 20
"""Hashes that differ in no more bits than this are taken for the same image where there is nothing but hashes."""
ALIKE_BITS = 40
"""Up to this many, two radiographs are copies or show the same scan (adjacent slices, most often)."""
BLANK = 2.0  # standard deviation of grey values below which there is nothing to compare

_POSITIONS = np.pi * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
_COSINES = np.sqrt(2 / SIDE) * np.cos(np.arange(SIDE)[:, None] * _POSITIONS)
_COSINES[0] /= np.sqrt(2)


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return (64, 64) uint8 grey values; the aspect ratio is given up."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def cosine_transform(thumbnails_N: np.ndarray) -> np.ndarray:
    """Return the orthonormal type II cosine transform (N, 64, 64) of (N, 64, 64) grey values."""
    return _COSINES @ thumbnails_N.astype(np.float64) @ _COSINES.T


def hashes(thumbnails_N: np.ndarray) -> np.ndarray:
    """Return the hashes (N, 4) uint64 of (N, 64, 64) grey values; all zero where an image is blank."""
    low = cosine_transform(thumbnails_N)[:, :LOW, :LOW].reshape(len(thumbnails_N), BITS)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # the mean brightness
    bits[thumbnails_N.reshape(len(thumbnails_N), -1).std(axis=1) < BLANK] = False
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)


def as_text(hash_4: np.ndarray) -> str:
    """Return a hash (4,) as 64 hexadecimal digits."""
    return "".join(f"{int(word):016x}" for word in hash_4)


def from_text(texts: list[str]) -> np.ndarray:
    """Return hashes (N, 4) from what `as_text` wrote; raises ValueError for anything else."""
    if any(len(text) != BITS // 4 for text in texts):
        raise ValueError(f"a perceptual hash has {BITS // 4} hexadecimal digits")
    words = [[int(text[i : i + 16], 16) for i in range(0, BITS // 4, 16)] for text in texts]
    return np.array(words, dtype=np.uint64).reshape(len(texts), 4)


def near(
    left_N4: np.ndarray, right_M4: np.ndarray, bits: int, *, upper: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rows of left, rows of right, differing bits) of the pairs that differ in at most `bits` bits.

    Blank images are near nothing. With `upper` only pairs with a smaller left than right row are returned.
    """
    found: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    block = max(1, 2**22 // max(1, len(right_M4)))
    there_left, there_right = (left_N4 != 0).any(axis=1), (right_M4 != 0).any(axis=1)
    for start in range(0, len(left_N4), block):
        part = left_N4[start : start + block]
        distance = np.zeros((len(part), len(right_M4)), np.uint16)
        for word in range(4):
            distance += np.bitwise_count(part[:, word, None] ^ right_M4[None, :, word])
        there = there_left[start : start + block, None] & there_right[None, :]
        hit = np.logical_and(distance <= bits, there)
        rows, columns = np.nonzero(hit)
        distances = distance[rows, columns]
        rows = rows + start
        keep = rows < columns if upper else slice(None)
        found.append((rows[keep], columns[keep], distances[keep]))
    if not found:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    rows, columns, distances = (np.concatenate(parts) for parts in zip(*found, strict=True))
    return rows, columns, distances.astype(np.int64)
