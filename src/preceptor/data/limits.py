"""Default limits on the size of input files. A module of its own, because recipes are checked without numpy."""

MAX_BYTES = 64 * 2**20
"""Largest image file, in bytes."""
MAX_PIXELS = 32_000_000
"""Largest image. The largest detectors of radiology, for mammography, have 28 million pixels. `bench/image_limits.py`
shows the cost."""
MAX_VOXELS = 512**3
"""Largest volume."""
