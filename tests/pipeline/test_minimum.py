"""Below the stated minimum of units and seeds no page, file or sentence has an interval or a verdict, in any task."""

from __future__ import annotations

import json
import re
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.comparison.page import render
from preceptor.comparison.run import compare_runs
from preceptor.comparison.summary import headline, summary
from preceptor.comparison.tables import as_csv, as_latex
from preceptor.pipeline.comparison import compare_stages
from preceptor.pipeline.run_dir import write_predictions
from preceptor.recipe import dump_recipe
from preceptor.statistics import MINIMUM_UNITS
from preceptor.tasks import module, recipe_from
from preceptor.vqa.metrics import score
from preceptor.vqa.protocols import Protocol

TASKS = ("vqa", "segmentation", "grounding")
PROTOCOLS = {"vqa": "toy/given", "segmentation": "toy/given/A", "grounding": "toy/given/strict"}
CONCLUDES = ("helped", "hurt", "better", "worse")


def rows_of(task: str, hits: list[bool], per_group: int) -> list[dict[str, Any]]:
    """Return predictions of which as many are right as `hits` says; `per_group` units share an image or patient."""
    rows: list[dict[str, Any]] = []
    for i, hit in enumerate(hits):
        names = {"id": f"{i:03}", "group": str(i // per_group)}
        if task == "vqa":
            kinds = {"answer_type": "closed" if i % 2 else "open", "question_type": "organ", "correct": hit}
            rows.append(names | {"score": float(hit), "answer": "yes", "answers": ["yes"], **kinds})
            rows[-1] |= {"prediction": "yes" if hit else "no", "target": "yes"}
        elif task == "segmentation":
            dice = 0.5 + 0.4 * hit + 0.001 * i
            rows += [
                names | {"subset": subset, "region": region, "dice": dice, "hd95": 1.0}
                for subset in ("t1", "t2", "t1+t2")
                for region in ("tc", "wt")
            ]
        else:
            answer = {"prediction": "left lung" if hit else "spleen", "target": "left lung", "question": "?"}
            rows.append(names | {"turn": 1, "task": "roc", "modality": "ct", **answer})
    return rows


def write(folder: Path, task: str, hits: dict[str, list[bool]], per_group: int, **more: Any) -> dict[str, Any]:
    """Write a run with these stages as training does; return its results.json."""
    protocol, metrics = PROTOCOLS[task], module(task, "metrics")
    stages: dict[str, Any] = {}
    for stage, of_stage in hits.items():
        rows = rows_of(task, of_stage, per_group)
        write_predictions(folder / stage, {protocol: rows})
        if task == "vqa":
            scores = {"metric": "accuracy", "n": len(rows), "accuracy": float(np.mean(of_stage))}
        elif task == "segmentation":
            scores = metrics.table(rows)
        else:
            scores = metrics.score_rows(rows, "strict")
        data = {"name": "toy", "variant": "given", "sha256": "a", "test_sha256": "b", "train": 3, "test": len(of_stage)}
        stages[stage] = {"task": task, "stage": stage, "seed": 0, "protocols": {protocol: scores}, "data": data, **more}
        stages[stage] |= {"modalities": ["t1", "t2"], "regions": ["tc", "wt"]} if task == "segmentation" else {}
        stages[stage].setdefault("notes", [])
        recipe: dict[str, Any] = {"name": "toy", "task": task, "stages": [stage], "output": str(folder / stage)}
        if task == "segmentation":
            recipe["data"] = {"name": "volumes", "modalities": ["t1", "t2"], "regions": {"tc": [1], "wt": [1, 2]}}
        if task == "vqa" and stage == "distilled":
            recipe["method"] = {"teaching": {"runs": ["runs/teacher"]}}
        if task == "grounding" and stage == "distilled":
            recipe["method"] = {"teaching_run": "runs/teacher"}
        (folder / stage / "recipe.yaml").write_text(dump_recipe(recipe_from(recipe, "toy")), "utf-8")
        (folder / stage / "results.json").write_text(json.dumps(stages[stage]), "utf-8")
    compared = compare_stages({stage: folder / stage for stage in stages}, [protocol], metrics)
    last = stages[next(reversed(stages))]
    results = {**last, "stages": stages, "comparison": compared}
    (folder / "results.json").write_text(json.dumps(results, allow_nan=False), "utf-8")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe_from(recipe, "toy")), "utf-8")
    return results


def pages_of(folder: Path, task: str, results: dict[str, Any]) -> dict[str, str]:
    """Return all texts in which a user meets the scores."""
    report = module(task, "report")
    document = compare_runs([folder], resamples=200).to_dict()
    tables = [*report.summary(results), *summary(document)]
    experiment = module(task, "experiment").EXPERIMENT
    recipe = recipe_from({"name": "toy", "task": task, "stages": ["baseline"]}, "toy")
    return {
        "report page": report.write_report(folder).read_text("utf-8"),
        "terminal": "\n".join(" | ".join([t.title, *t.columns, *chain(*t.rows), *t.notes]) for t in tables),
        "comparison": json.dumps(results["comparison"]),
        "compare.json": json.dumps(document),
        "compare page": render(document),
        "compare headline": " ".join(headline(document)),
        "compare.csv": as_csv(document),
        "compare.tex": as_latex(document),
        "model card": experiment(recipe, None).model_card(results["stages"]["distilled"]),
    }


def words(text: str) -> str:
    """Return the text of a page without its style sheet and its explanations of verdicts in general."""
    text = re.sub(r"<style>.*?</style>|<section id=\"reading\">.*?</section>", "", text, flags=re.DOTALL)
    return re.sub(r"cells with a corner are for the worse|less is better|The worst cases", "", text)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("units", "per_group"), [(1, 1), (2, 1), (9, 1), (45, 5)])
def test_below_the_minimum_nothing_is_concluded(task: str, units: int, per_group: int, tmp_path: Path) -> None:
    """Every answer of the student is right, none of the baseline: even so, 9 units or 9 images are too few."""
    results = write(tmp_path, task, {"baseline": [False] * units, "distilled": [True] * units}, per_group)
    for where, text in pages_of(tmp_path, task, results).items():
        assert not re.search("|".join(CONCLUDES), words(text)), where
        assert not re.search(r"\d to [+\u2212]?\d", text.replace("t1 to", "")), where
        assert 'whisker"' not in text, where
    entry = next(iter(results["comparison"][PROTOCOLS[task]].values()))
    entry = entry.get("roc", entry)
    assert (entry["low"], entry["p"], entry["p_holm"], entry["verdict"]) == (None, None, None, "too few units")
    assert entry["groups"] == -(-units // per_group)


@pytest.mark.parametrize("task", TASKS)
def test_at_the_minimum_there_is_an_interval_and_no_claim_beyond_one_seed(task: str, tmp_path: Path) -> None:
    hits = {"baseline": [False] * MINIMUM_UNITS, "distilled": [True] * MINIMUM_UNITS}
    results = write(tmp_path, task, hits, 1)
    pages = pages_of(tmp_path, task, results)
    entry = next(iter(results["comparison"][PROTOCOLS[task]].values()))
    entry = entry.get("roc", entry)
    assert entry["low"] > 0
    assert entry["verdict"] == "better for this seed"
    for where, text in pages.items():
        assert "distillation helped" not in text, where
    assert "one seed" in pages["compare headline"]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("units", [1, 2, 9, 10, 40])
def test_identical_predictions_never_help(task: str, units: int, tmp_path: Path) -> None:
    hits = [i % 3 == 0 for i in range(units)]
    results = write(tmp_path, task, {"baseline": hits, "distilled": hits}, 1)
    for where, text in pages_of(tmp_path, task, results).items():
        assert not re.search("|".join(CONCLUDES), words(text)), where
    entry = next(iter(results["comparison"][PROTOCOLS[task]].values()))
    entry = entry.get("roc", entry)
    assert entry["verdict"] == ("undecided" if units >= MINIMUM_UNITS else "too few units")


@pytest.mark.parametrize("task", TASKS)
def test_no_units_at_all(task: str, tmp_path: Path) -> None:
    for stage in ("baseline", "distilled"):
        write_predictions(tmp_path / stage, {PROTOCOLS[task]: []})
    folders = {stage: tmp_path / stage for stage in ("baseline", "distilled")}
    found = compare_stages(folders, [PROTOCOLS[task]], module(task, "metrics"))
    assert found[PROTOCOLS[task]]["distilled - baseline"] == {}
    assert score([], [], Protocol("x", "mevf", lambda _: True, "")).interval() is None


@pytest.mark.parametrize("task", TASKS)
def test_results_of_an_earlier_version_are_not_believed(task: str, tmp_path: Path) -> None:
    """One test unit and "95 % interval 0.0 to 0.0: distillation helped" was once written; a page made anew hides it."""
    results = write(tmp_path, task, {"baseline": [True], "distilled": [True]}, 1)
    entry = next(iter(results["comparison"][PROTOCOLS[task]].values()))
    for one in (entry, *(value for value in entry.values() if isinstance(value, dict))):
        one |= {"difference": 0.0, "low": 0.0, "high": 0.0, "verdict": "better", "interval": "95 %", "n": 1}
    (tmp_path / "results.json").write_text(json.dumps(results), "utf-8")
    page = module(task, "report").write_report(tmp_path).read_text("utf-8")
    assert "helped" not in page
    assert "0.0 to 0.0" not in page


@pytest.mark.parametrize("task", TASKS)
def test_notes_and_findings_of_the_data_are_everywhere(task: str, tmp_path: Path) -> None:
    told = "Two patients are in several splits: p\u00e4tients.csv, column ward."
    results = write(tmp_path, task, {"baseline": [True] * 12, "distilled": [False] * 12}, 1, notes=[told])
    pages = pages_of(tmp_path, task, results)
    for where in ("report page", "compare page", "model card"):
        assert pages[where].count(told) == 1, where
    assert told in json.loads(pages["compare.json"])["notes"]
    assert told in results["notes"]


@pytest.mark.parametrize("task", ["segmentation", "grounding"])
@pytest.mark.parametrize("units", [9, 10])
def test_a_difference_without_an_interval_is_not_drawn(task: str, units: int, tmp_path: Path) -> None:
    """A line from 0 to the difference would look like an interval."""
    hits = [i % 2 == 0 for i in range(units)]
    write(tmp_path, task, {"baseline": [False] * units, "distilled": hits}, 1)
    page = module(task, "report").write_report(tmp_path).read_text("utf-8")
    labels = [
        label for label in re.findall(r'aria-label="([^"]*)', page) if label.lower().startswith(("dist", "minus"))
    ]
    assert len(labels) == (units >= MINIMUM_UNITS)
