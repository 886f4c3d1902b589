"""The comparison of a run's stages: known differences, and one code path for every task."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from preceptor.errors import UserError
from preceptor.grounding import metrics as grounding
from preceptor.pipeline.comparison import compare_stages, difference
from preceptor.pipeline.run_dir import write_predictions
from preceptor.scores import UnitScore, align, unit_means
from preceptor.segmentation import metrics as segmentation
from preceptor.statistics import crossed_test, mcnemar, paired_bootstrap
from preceptor.vqa import metrics as vqa


def question(i: int, hit: bool) -> dict:
    kinds = {"answer_type": "closed" if i % 2 else "open", "question_type": f"type {i % 3}"}
    return {"id": f"{i:03}", "score": float(hit), **kinds}


def test_a_known_difference_of_answers(tmp_path: Path) -> None:
    """Of 90 questions, 20 only the distilled student answers, 5 only the baseline, the teacher 60."""
    hits = {
        "teacher": [i < 60 for i in range(90)],
        "baseline": [i < 35 for i in range(90)],
        "distilled": [5 <= i < 55 for i in range(90)],
    }
    folders = {}
    for stage, of_stage in hits.items():
        folders[stage] = tmp_path / stage
        rows = [question(i, hit) for i, hit in enumerate(of_stage)]
        write_predictions(folders[stage], {"toy/test": rows[::-1]})
    found = compare_stages(folders, ["toy/test"], vqa)["toy/test"]
    assert list(found) == ["distilled - baseline", "distilled / teacher"]
    entry = found["distilled - baseline"]
    expected = paired_bootstrap(hits["distilled"], hits["baseline"])
    assert (entry["metric"], entry["n"], entry["seeds"]) == ("accuracy", 90, 1)
    assert entry["difference"] == pytest.approx(15 / 90)
    assert (entry["low"], entry["high"]) == (expected.low, expected.high)
    assert entry["p"] == mcnemar(hits["distilled"], hits["baseline"])
    assert entry["verdict"] == "better for this seed"
    assert set(entry["answer_types"]) == {"open", "closed"}
    assert sum(part["n"] for part in entry["question_types"].values()) == 90
    assert found["distilled / teacher"] == pytest.approx(50 / 60)


def test_below_ten_cases_there_is_no_interval(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for cases in (9, 10):
        folders = {stage: tmp_path / f"{cases}" / stage for stage in ("baseline", "distilled")}
        dice: dict[str, dict[tuple[str, str, str], float]] = {}
        for stage, folder in folders.items():
            dice[stage] = {
                (f"case {i}", subset, region): float(rng.random())
                for i in range(cases)
                for subset in ("t1", "t2", "t1+t2")
                for region in ("et", "wt")
            }
            rows = [
                {"id": i, "subset": s, "region": r, "dice": value, "hd95": 1.0}
                for (i, s, r), value in dice[stage].items()
            ]
            write_predictions(folder, {"toy/A": rows})
        entry = compare_stages(folders, ["toy/A"], segmentation)["toy/A"]["distilled - baseline"]
        means = {stage: np.mean(list(values.values())) for stage, values in dice.items()}
        assert entry["difference"] == pytest.approx(means["distilled"] - means["baseline"])
        assert entry["n"] == cases
        assert set(entry["modalities"]) == {"1 modality", "2 modalities"}
        et = [np.mean([v for (_, _, r), v in dice[s].items() if r == "et"]) for s in ("distilled", "baseline")]
        assert entry["regions"]["et"]["difference"] == pytest.approx(et[0] - et[1])
        if cases < 10:
            assert (entry["low"], entry["p"], entry["verdict"]) == (None, None, "too few units")
            assert entry["interval"] == "no interval, fewer than 10 cases"
        else:
            assert entry["low"] <= entry["difference"] <= entry["high"]
            assert (
                entry["interval"] == "95 %, the wider of paired bootstrap and analysis of variance over cases, one seed"
            )


@pytest.mark.parametrize(
    ("scores", "groups", "how"),
    [
        ("binary", 40, "paired bootstrap over questions"),
        ("binary", 20, "the wider of paired bootstrap and analysis of variance over questions in 20 groups"),
        ("real", 40, "the wider of paired bootstrap and analysis of variance over questions"),
        ("real", 20, "the wider of paired bootstrap and analysis of variance over questions in 20 groups"),
    ],
)
def test_the_interval_is_described_by_what_it_is_made_of(scores: str, groups: int, how: str) -> None:
    """The bootstrap of single models with right and wrong answers stands alone."""
    rng = np.random.default_rng(3)
    values = rng.random((2, 40)) if scores == "real" else rng.integers(0, 2, (2, 40)).astype(float)
    a, b = ([UnitScore(f"{i}", f"{i % groups}", "accuracy", v) for i, v in enumerate(row)] for row in values.tolist())
    entry = difference(a, b, "question")
    assert entry["interval"] == f"95 %, {how}, one seed"
    of_group = None if groups == 40 else [i % groups for i in range(40)]
    bootstrap = paired_bootstrap(*values, groups=of_group)
    crossed = crossed_test(*values[:, None], paired=True, groups=of_group)
    bounds = [bootstrap] if how.startswith("paired") else [bootstrap, crossed]
    assert entry["low"] == pytest.approx(min(one.low for one in bounds))
    assert entry["high"] == pytest.approx(max(one.high for one in bounds))


def test_stages_of_dialogues_by_task(tmp_path: Path) -> None:
    """Each student is compared with the baseline and with the one before, and the selected answers with the greedy."""

    def rows(right: int) -> list[dict]:
        return [
            {"id": f"{i}", "turn": 1, "task": task, "modality": "ct", "target": "left lung", "prediction": answer}
            for task in ("roc", "rc")
            for i, answer in enumerate(["left lung"] * right + ["spleen"] * (12 - right))
        ]

    folders = {stage: tmp_path / stage for stage in ("teacher", "baseline", "guided", "clinkd")}
    for stage, right in (("teacher", 12), ("baseline", 2), ("guided", 4), ("clinkd", 9)):
        write_predictions(folders[stage], {"toy/given/strict": rows(right)})
    write_predictions(folders["clinkd"], {"toy/given/strict/selected": rows(10)})
    found = compare_stages(folders, ["toy/given/strict"], grounding)["toy/given/strict"]
    pairs = {pair: entry["roc"]["difference"] for pair, entry in found.items()}
    assert pairs == {
        "guided - baseline": pytest.approx(2 / 12),
        "clinkd - baseline": pytest.approx(7 / 12),
        "clinkd - guided": pytest.approx(5 / 12),
        "clinkd selected - clinkd": pytest.approx(1 / 12),
    }
    assert found["clinkd - guided"]["rc"]["metric"] == "f1"
    json.dumps(found, allow_nan=False)


def test_models_on_other_units_are_refused() -> None:
    a, b = [UnitScore("1", "1", "accuracy", 1.0)], [UnitScore("2", "2", "accuracy", 1.0)]
    with pytest.raises(UserError, match="not scored on the same units"):
        difference(a, b, "question")
    with pytest.raises(UserError, match="for example '1'"):
        align(a, [*a, *a], "They")


def test_the_mean_of_a_unit() -> None:
    scores = [UnitScore("a", "x", "dice", 0.2), UnitScore("b", "x", "dice", 1.0), UnitScore("a", "x", "dice", 0.6)]
    assert unit_means(scores) == ({"a": pytest.approx(0.4), "b": 1.0}, ["x", "x"])
