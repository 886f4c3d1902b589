"""A finding about the data reaches the results, the report and the terminal of a run of every task."""

from __future__ import annotations

import importlib
import json

import pytest

from preceptor.data.findings import Finding
from tests.command_line import call
from tests.fault.tiny import CLINKD, LCKD, RECIPE, write_recipe

REASON = "thirteen rows are not what they seem"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "recipe", "settings"),
    [
        ("vqa", RECIPE, ["teacher.train.epochs=1"]),
        ("segmentation", LCKD, ["stages=[baseline]", "train.epochs=1"]),
        ("grounding", CLINKD, ["stages=[teacher]", "teacher.train.epochs=1"]),
    ],
)
def test_a_finding_is_in_the_results_the_report_and_the_terminal(tmp_path, monkeypatch, task, recipe, settings):
    module = importlib.import_module(f"preceptor.{task}.data")
    read_named = module.read_named

    def read(*arguments):
        data = read_named(*arguments)
        data.findings.append(Finding((), None, REASON, "warning"))
        return data

    monkeypatch.setattr(module, "read_named", read)
    folder = [f"output={tmp_path / 'run'}", f"data.root={tmp_path / 'data'}"]
    code, out, err = call("train", str(write_recipe(tmp_path, recipe)), *settings, *folder)
    assert code == 0, err
    assert REASON in " ".join((out + err).split())
    assert REASON in (tmp_path / "run" / "report.html").read_text()
    assert REASON in json.dumps(json.loads((tmp_path / "run" / "results.json").read_text()))
