"""Speeds of several models, with a clock that advances by known amounts."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from preceptor.pipeline import speed
from preceptor.pipeline.speed import ROUNDS, SpeedTest, measure_speed


@dataclass
class Clock:
    """A clock that only moves when a model computes."""

    now: float = 0.0
    calls: list[str] = field(default_factory=list)

    def work(self, name: str, seconds: list[float]):
        """Return a call that takes the next of `seconds` each time."""
        durations = iter(seconds)

        def call() -> None:
            self.calls.append(name)
            self.now += next(durations)

        return call


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock.now)
    return clock


def test_the_fastest_round_counts_and_the_first_one_does_not(clock: Clock) -> None:
    one_by_one = clock.work("single", [0.1, 8, 4, 6, 8, 8])  # the round that warms up would be the fastest
    batch = clock.work("batch", [0.1, 3, 3, 2, 3, 3])
    test = SpeedTest("question", one_by_one, 8, batch, 16)
    found = measure_speed(lambda _: test, {"baseline": Path("none")})["baseline"]
    assert found["latency_ms"] == 1000 * 4 / 8
    assert found["units_per_second"] == 16 / 2
    assert found["batch_size"] == 16
    assert "one question at a time" in found["describes"]
    assert "this model alone" in found["describes"]


def test_all_models_are_timed_in_every_round(clock: Clock) -> None:
    """A machine that becomes slower slows all models: their ratio stays."""
    slow = [1.0] * 2 + [10.0] * (ROUNDS - 1)
    tests = {
        name: SpeedTest("case", clock.work(name, [factor * s for s in slow]), 1)
        for name, factor in (("teacher", 3), ("baseline", 1), ("distilled", 1))
    }
    found = measure_speed(lambda folder: tests[folder.name], {name: Path(name) for name in tests})
    assert clock.calls == list(tests) * (ROUNDS + 1)
    assert found["teacher"]["latency_ms"] == 3 * found["baseline"]["latency_ms"]
    assert found["baseline"] == found["distilled"]
    assert "all models in turn" in found["teacher"]["describes"]


def test_units_that_cannot_be_batched_have_the_speed_of_single_ones(clock: Clock) -> None:
    test = SpeedTest("case", clock.work("case", [2.0] * (ROUNDS + 1)), 1)
    found = measure_speed(lambda _: test, {"distilled": Path("none")})["distilled"]
    assert (found["latency_ms"], found["units_per_second"], found["batch_size"]) == (2000, 0.5, 1)


def test_models_that_do_not_fit_in_memory_together_are_timed_one_after_the_other(
    clock: Clock, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(speed, "SIDE_BY_SIDE_BYTES", 15)
    prepared: list[str] = []

    def prepare(folder: Path) -> SpeedTest:
        prepared.append(folder.name)
        clock.calls.append(f"load {folder.name}")
        return SpeedTest("answer", clock.work(folder.name, [1.0] * (ROUNDS + 1)), 1)

    folders = {name: tmp_path / name for name in ("a", "b")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"0" * 10)
    found = measure_speed(prepare, folders)
    assert clock.calls == ["load a", *["a"] * (ROUNDS + 1), "load b", *["b"] * (ROUNDS + 1)]
    assert "this model alone" in found["a"]["describes"]
