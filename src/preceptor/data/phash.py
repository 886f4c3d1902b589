"""Perceptual hashes of images, which hardly change if an image is resized or encoded again.

A hash has one bit for each of the 16 x 16 lowest frequencies of the cosine transform of an image. A bit is set if the
coefficient exceeds the median. See Zauner, "Implementation and benchmarking of perceptual image hash functions" (2010);
we use 256 bits instead of 64, because head CTs look alike. The transform is computed from 64 x 64 grey values, each the
mean of a cell of the image.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

SIDE = 64
LOW = 16
BITS = LOW * LOW
COPY_BITS = 20
"""Largest number of differing bits at which two images count as the same if only their hashes are known."""
ALIKE_BITS = 40
"""Largest number of differing bits at which two radiographs are copies or, most often, adjacent slices of one scan."""
BLANK = 2.0  # standard deviation of the grey values below which an image counts as blank

_POSITIONS = np.pi * (2 * np.arange(SIDE) + 1) / (2 * SIDE)
_COSINES = np.sqrt(2 / SIDE) * np.cos(np.arange(SIDE)[:, None] * _POSITIONS)
_COSINES[0] /= np.sqrt(2)


def thumbnail(image: Image.Image) -> np.ndarray:
    """Return grey values (64, 64) uint8. The aspect ratio is not kept."""
    return np.asarray(image.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX))


def cosine_transform(thumbnails_N: np.ndarray) -> np.ndarray:
    """Return the orthonormal type II cosine transform (N, 64, 64) of grey values (N, 64, 64)."""
    return _COSINES @ thumbnails_N.astype(np.float64) @ _COSINES.T


def hashes(thumbnails_N: np.ndarray) -> np.ndarray:
    """Return the hashes (N, 4) uint64 of grey values (N, 64, 64). The hash of a blank image is zero."""
    low = cosine_transform(thumbnails_N)[:, :LOW, :LOW].reshape(len(thumbnails_N), BITS)
    bits = low > np.median(low[:, 1:], axis=1, keepdims=True)
    bits[:, 0] = False  # the mean brightness
    bits[thumbnails_N.reshape(len(thumbnails_N), -1).std(axis=1) < BLANK] = False
    return np.packbits(bits, axis=1).view(">u8").astype(np.uint64)


def as_text(hash_4: np.ndarray) -> str:
    """Return a hash (4,) as 64 hexadecimal digits."""
    return "".join(f"{int(word):016x}" for word in hash_4)


def from_text(texts: list[str]) -> np.ndarray:
    """Return the hashes (N, 4) of texts that `as_text` wrote. Raises ValueError for other texts."""
    if any(len(text) != BITS // 4 for text in texts):
        raise ValueError(f"a perceptual hash has {BITS // 4} hexadecimal digits")
    words = [[int(text[i : i + 16], 16) for i in range(0, BITS // 4, 16)] for text in texts]
    return np.array(words, dtype=np.uint64).reshape(len(texts), 4)


def near(
    left_N4: np.ndarray, right_M4: np.ndarray, bits: int, *, upper: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the pairs of hashes that differ in at most `bits` bits.

    Blank images are in no pair. With `upper`, only pairs whose left row is smaller than the right row are returned.

    Returns:
        Rows of the left hash, rows of the right hash, and the numbers of differing bits.
    """
    blocks: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    block = max(1, 2**22 // max(1, len(right_M4)))
    left_nonblank, right_nonblank = (left_N4 != 0).any(axis=1), (right_M4 != 0).any(axis=1)
    for start in range(0, len(left_N4), block):
        left_block = left_N4[start : start + block]
        distance = np.zeros((len(left_block), len(right_M4)), np.uint16)
        for word in range(4):
            distance += np.bitwise_count(left_block[:, word, None] ^ right_M4[None, :, word])
        nonblank = left_nonblank[start : start + block, None] & right_nonblank[None, :]
        matches = np.logical_and(distance <= bits, nonblank)
        rows, columns = np.nonzero(matches)
        distances = distance[rows, columns]
        rows = rows + start
        selected = rows < columns if upper else slice(None)
        blocks.append((rows[selected], columns[selected], distances[selected]))
    if not blocks:
        empty = np.zeros(0, np.int64)
        return empty, empty, empty
    rows, columns, distances = (np.concatenate(parts) for parts in zip(*blocks, strict=True))
    return rows, columns, distances.astype(np.int64)
