"""The speed of models, measured side by side: every round times all models, so that a busy machine slows them alike."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROUNDS = 5
SECONDS = 0.5
MOST_ROUNDS = 200
"""Rounds are added until there are `ROUNDS` and they took `SECONDS`: a fast model gets many undisturbed chances."""
SIDE_BY_SIDE_BYTES = 8 * 2**30
"""Models with more bytes than this in all are not held in memory together; they are timed one after the other."""


@dataclass(frozen=True)
class SpeedTest:
    """What to time of a model: `one_by_one` handles `units` units, one at a time; `batch` handles `batch_size`
    at once, if units can be batched.

    `unit` is the word for a unit: question, case, answer.
    """

    unit: str
    one_by_one: Callable[[], Any]
    units: int
    batch: Callable[[], Any] | None = None
    batch_size: int = 1


def measure_speed(prepare: Callable[[Path], SpeedTest], folders: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """Return `latency_ms` (one unit at a time) and `units_per_second` (in a batch) of the model in each folder.

    `prepare` loads a model folder. Both are None without units, for example if no test image can be read.

    Each number is the minimum over rounds after one to warm up. Reading and decoding of files are not included.
    """
    size = sum(file.stat().st_size for folder in folders.values() for file in folder.glob("*.safetensors"))
    if size <= SIDE_BY_SIDE_BYTES:
        return _in_turn({name: prepare(folder) for name, folder in folders.items()})
    found: dict[str, dict[str, Any]] = {}
    for name, folder in folders.items():
        found |= _in_turn({name: prepare(folder)})
    return found


def _in_turn(tests: dict[str, SpeedTest]) -> dict[str, dict[str, Any]]:
    latency = dict.fromkeys(tests, float("inf"))
    duration = dict.fromkeys(tests, float("inf"))
    rounds, start = 0, time.perf_counter()
    timed = {name: test for name, test in tests.items() if test.units}
    while timed and (rounds <= ROUNDS or (time.perf_counter() - start < SECONDS and rounds < MOST_ROUNDS)):
        for name, test in timed.items():
            single = _seconds(test.one_by_one) / test.units
            batch = _seconds(test.batch) / test.batch_size if test.batch else single
            if rounds > 0:
                latency[name], duration[name] = min(latency[name], single), min(duration[name], batch)
        rounds += 1
    measured = max(0, rounds - 1)
    together = "all models in turn" if len(tests) > 1 else "this model alone"
    return {
        name: {
            "latency_ms": round(1000 * latency[name], 3) if test.units else None,
            "units_per_second": round(1 / duration[name], 2) if test.units else None,
            "batch_size": test.batch_size,
            "unit": test.unit,
            "describes": f"one {test.unit} at a time, files already read, minimum of {measured} rounds, {together}",
        }
        for name, test in tests.items()
    }


def _seconds(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    with torch.inference_mode():
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start
