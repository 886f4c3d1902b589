"""The driver of learning curves, on a recipe of seconds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from preceptor.errors import UserError
from tests.fault.tiny import write_recipe

SCRIPT = Path(__file__).parents[2] / "bench" / "learning_curves.py"


@pytest.fixture(scope="module")
def driver() -> ModuleType:
    spec = importlib.util.spec_from_file_location("learning_curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_curves_are_made_reused_and_compared(driver: ModuleType, tmp_path: Path, capsys):
    quick = ["teacher.train.epochs=1", "student.train.epochs=1", f"data.root={tmp_path / 'data'}"]
    arguments = [str(write_recipe(tmp_path)), *quick, "--output", str(tmp_path / "curves"), "--seeds", "0", "1"]
    arguments += ["--stages", "teacher", "distilled"]
    driver.main([*arguments, "--shares", "0.5"])
    first = tmp_path / "curves" / "50-percent" / "seed-1"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    driver.main([*arguments, "--shares", "0.5", "1", "--baseline", "teacher"])
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before
    document = json.loads((tmp_path / "curves" / "compare" / "compare.json").read_text("utf-8"))
    assert [curve["method"] for curve in document["curves"]] == ["teacher", "distilled"]
    for curve in document["curves"]:
        half, whole = curve["points"]
        assert (half["seeds"], whole["seeds"]) == (2, 2)
        assert half["train"] < whole["train"]
    assert "| distilled | 50% |" in capsys.readouterr().out

    driver.main([str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "curves"), "--table", "--baseline", "teacher"])
    assert "| teacher | 100% |" in capsys.readouterr().out

    arguments[2] = "student.train.epochs=2"
    with pytest.raises(UserError, match=r"is finished, but not by this recipe \(student\.train\.epochs: 1.* -> 2"):
        driver.main([*arguments, "--shares", "0.5"])


def test_a_recipe_that_cannot_run_is_refused_before_the_first_training(driver: ModuleType, tmp_path: Path):
    with pytest.raises(UserError, match="train_share"):
        driver.main([str(write_recipe(tmp_path)), "--output", str(tmp_path / "curves"), "--shares", "0.5", "5"])
    assert not (tmp_path / "curves").exists()
