"""The benchmark of learning curves, on a recipe of seconds."""

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
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("learning_curves", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_curves_are_trained_resumed_and_compared(script: ModuleType, tmp_path: Path, capsys) -> None:
    settings = ["teacher.train.epochs=1", "student.train.epochs=1", f"data.root={tmp_path / 'data'}"]
    arguments = [str(write_recipe(tmp_path)), *settings, "--output", str(tmp_path / "curves"), "--seeds", "0", "1"]
    arguments += ["--stages", "teacher", "distilled"]
    script.main([*arguments, "--shares", "0.5"])
    first = tmp_path / "curves" / "50-percent" / "seed-1"
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*.safetensors")}
    script.main([*arguments, "--shares", "0.5", "1", "--baseline", "teacher"])
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*.safetensors")} == before
    document = json.loads((tmp_path / "curves" / "compare" / "compare.json").read_text("utf-8"))
    assert [curve["method"] for curve in document["curves"]] == ["teacher", "distilled"]
    for curve in document["curves"]:
        half, whole = curve["points"]
        assert (half["seeds"], whole["seeds"]) == (2, 2)
        assert half["train"] < whole["train"]
    assert "| distilled | 50% |" in capsys.readouterr().out

    script.main([str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "curves"), "--table", "--baseline", "teacher"])
    assert "| teacher | 100% |" in capsys.readouterr().out

    arguments[2] = "student.train.epochs=2"
    with pytest.raises(UserError, match=r"another recipe .*train\.epochs: 1.* -> 2"):
        script.main([*arguments, "--shares", "0.5"])


def test_a_recipe_that_is_invalid_is_refused_before_the_first_training(script: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="train_share"):
        script.main([str(write_recipe(tmp_path)), "--output", str(tmp_path / "curves"), "--shares", "0.5", "5"])
    assert not (tmp_path / "curves").exists()
