"""The benchmark of schedule lengths, on a recipe of seconds: the baseline gets the seconds of teacher and student."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.fault.tiny import write_recipe

BENCH = Path(__file__).parents[2] / "bench"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("schedule_lengths", BENCH / "schedule_lengths.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_epochs_of_equal_compute_follow_from_the_measured_seconds(script: ModuleType, tmp_path: Path) -> None:
    """A teacher of 60 s, a cache of 10 s and a student of 30 s on average, against 20 s of the baseline."""
    seconds = {"teacher-0": 60, "distilled-x1/seed-0": 25, "distilled-x1/seed-1": 35}
    seconds |= {"baseline-x1/seed-0": 20, "baseline-x1/seed-1": 20}
    for name, value in seconds.items():
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "results.json").write_text(json.dumps({"training": {"seconds": value}}))
    (tmp_path / "cache-seconds.json").write_text("10")
    assert script.matched_factor(SimpleNamespace(output=tmp_path, seeds=[0, 1]), 1) == 5.0


@pytest.mark.slow
def test_the_arms_are_trained_and_compared_with_the_baseline_of_their_length(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "lengths"
    settings = [f"data.root={tmp_path / 'data'}", "data.augment.views=1", "method.name=mhkd", "teacher.train.epochs=2"]
    arguments = ["--output", str(output), "--recipe", str(write_recipe(tmp_path)), "--seeds", "2", "--lengths", "0.5"]
    arguments += ["--matched", *settings, "method.inherit_token_embeddings=true", "method.output.weight=1"]
    script.main(arguments)
    names = {path.name for path in output.iterdir() if (path / "seed-1" / "results.json").is_file()}
    assert names == {"baseline-x0.5", "distilled-x0.5", "inherited-x0.5", "matched-x0.5"}
    steps = {
        name: script.results(output / f"{name}-x0.5" / "seed-0")["training"]["steps"]
        for name in ("baseline", "matched")
    }
    assert steps["matched"] > steps["baseline"]
    document = json.loads((output / "compare" / "x0.5" / "compare.json").read_text("utf-8"))
    assert len(document["differences"]) == 3
    epochs = script.results(output / "matched-x0.5" / "seed-1")["training"]["steps"]
    script.main(arguments)  # what is finished is read back, and the factor does not change
    assert script.results(output / "matched-x0.5" / "seed-1")["training"]["steps"] == epochs
