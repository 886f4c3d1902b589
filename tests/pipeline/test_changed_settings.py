"""A finished run that is repeated with other settings: what the stage depends on is refused, the rest is not."""

from __future__ import annotations

from pathlib import Path

import pytest

import preceptor
from preceptor.errors import UserError
from tests.fault.tiny import CLINKD, LCKD, write_recipe

pytestmark = pytest.mark.slow


def test_scores_of_other_settings_are_not_returned(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, LCKD), tmp_path / "run"
    settings = [f"output={run}", "stages=[baseline]", "train.epochs=1", "train.evaluate_every=1"]
    first = preceptor.train(recipe, settings)
    assert first.results["evaluation"]["evaluation"]["et_minimum"] == 500
    message = (
        r"evaluated with other settings \(evaluation\.et_minimum: 500 -> 0\).*: preceptor evaluate .*run KEY=VALUE"
    )
    with pytest.raises(UserError, match=message):
        preceptor.train(recipe, [*settings, "evaluation.et_minimum=0"])
    with pytest.raises(UserError, match=r"another recipe \(evaluation\.validation_overlap: 0\.0 -> 0\.5"):
        preceptor.train(recipe, [*settings, "evaluation.validation_overlap=0.5"])
    again = preceptor.evaluate(run, ["evaluation.et_minimum=0"], output=tmp_path / "again")
    assert again["evaluation"]["evaluation"]["et_minimum"] == 0
    with pytest.raises(UserError, match=message):
        preceptor.evaluate(run, ["evaluation.et_minimum=0"])
    assert set(again["protocols"]) == set(first.results["protocols"])
    assert preceptor.train(recipe, [*settings, "report.cases=0"]).results["protocols"] == first.results["protocols"]


def test_a_stage_resumes_whatever_it_does_not_use(tmp_path: Path) -> None:
    recipe, run = write_recipe(tmp_path, CLINKD), tmp_path / "run"
    short = [f"{role}.train.{key}=2" for role in ("teacher", "student") for key in ("epochs", "evaluate_every")]
    settings = [f"output={run}", *short, "stages=[teacher, baseline]"]
    preceptor.train(recipe, settings)

    def times() -> dict[str, int]:
        return {s: (run / s / "metrics.jsonl").stat().st_mtime_ns for s in ("teacher", "baseline")}

    before = times()
    # Neither stage has pseudo-labels or reflection.
    unused = ["method.pseudo_labels.min_usable=0", "method.pseudo_labels.alpha=1", "method.reflection.ratio=0.1"]
    preceptor.train(recipe, [*settings, *unused])
    assert times() == before
    with pytest.raises(
        UserError, match=r"baseline was evaluated with other settings \(method\.selection\.candidates: 2"
    ):
        preceptor.train(recipe, [*settings, "method.selection.candidates=3"])
    with pytest.raises(UserError, match=r"teacher was evaluated with other settings \(answers\.max_new_tokens: 8 -> 9"):
        preceptor.train(recipe, [*settings, "answers.max_new_tokens=9"])
    # A stage more: only the last one selects among several answers.
    later = [*settings[:-1], "stages=[teacher, baseline, guided]", *unused, "method.selection.candidates=3"]
    results = preceptor.train(recipe, later).results["stages"]
    assert times() == before
    assert results["guided"]["evaluation"]["method"]["selection"]["candidates"] == 3
    assert results["guided"]["selection"]["candidates"] == 3
    with pytest.raises(UserError, match=r"guided contains a run of another recipe \(method\.guidance\.gap: 1\.5 -> 2"):
        preceptor.train(recipe, [*later, "method.guidance.gap=2"])
