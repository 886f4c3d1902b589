"""Describe the processor and the package versions of a run."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

import torch


def machine() -> dict[str, Any]:
    """Describe the hardware for the interpretation of timings. The result does not identify the machine."""
    processor = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = (line.partition(":") for line in info.read_text().splitlines())
        processor = next((value.strip() for key, _, value in lines if key.strip() == "model name"), processor)
    hardware: dict[str, Any] = {"processor": processor, "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        hardware["gpu"] = torch.cuda.get_device_name()
    return hardware


def versions(*names: str) -> dict[str, str]:
    """Return the versions of Python, of the packages that every run uses, and of the packages `names`."""
    from importlib.metadata import version

    packages = ("preceptor", "torch", "accelerate", "safetensors", "numpy", *names)
    return {"python": platform.python_version(), **{name: version(name) for name in packages}}
