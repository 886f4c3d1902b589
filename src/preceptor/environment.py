"""What ran: the processor and the versions, for a reader of results."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch

QUESTIONS = ("transformers", "tokenizers", "pillow")
VOLUMES = ("monai", "nibabel", "scipy")
"""What answers of a kind depend on, beside what every run does."""


def machine() -> dict[str, Any]:
    """Return what a reader needs to place a timing, and nothing that names this very machine."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        processor = next((value.strip() for key, _, value in lines if key.strip() == "model name"), processor)
    found: dict[str, Any] = {"processor": processor, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def versions(*names: str) -> dict[str, str]:
    """Return the versions of Python, of what every model needs, and of the packages `names`."""
    from importlib.metadata import version

    every = ("preceptor", "torch", "accelerate", "safetensors", "numpy", *names)
    return {"python": platform.python_version(), **{name: version(name) for name in every}}
