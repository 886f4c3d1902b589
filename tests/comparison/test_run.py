"""From run folders to compare.json, the page, the picture and the terminal."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preceptor.comparison.page import render
from preceptor.comparison.run import Comparison, compare_runs, compare_seeds, write_comparison
from preceptor.comparison.summary import headline
from preceptor.comparison.tables import as_csv, as_latex, escape_latex
from preceptor.errors import UserError
from preceptor.report.page import POLICY
from preceptor.statistics import mean_interval
from tests.command_line import call
from tests.comparison.made import PROTOCOL, hits, write_run, write_stage
from tests.report.page import Page

HOSTILE = '<script>alert("x")</script> $\\frac'


def make_runs(root: Path, shares: Sequence[float] = (1.0,), seeds: int = 3) -> list[Path]:
    """Write runs of baseline and distilled; the latter is right where the former is, and on about 40 questions more."""
    runs = []
    for share in shares:
        for seed in range(seeds):
            baseline = hits(300, 0.4 + 0.1 * share, seed)
            distilled = baseline | hits(300, 0.25, 100 + seed)
            runs.append(
                write_run(
                    root / f"run-{share}-{seed}",
                    {"baseline": baseline, "distilled": distilled},
                    seed=seed,
                    settings={"data": {"train_share": share}},
                )
            )
    return runs


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory) -> Comparison:
    return compare_runs(make_runs(tmp_path_factory.mktemp("curves"), (0.1, 0.25, 0.5, 1.0)), resamples=400)


def test_a_comparison_of_three_seeds(tmp_path: Path):
    document = compare_runs(make_runs(tmp_path)).to_dict()
    assert document["protocol"] == PROTOCOL
    assert document["n"] == 300
    assert document["baseline"] == "baseline"
    baseline, distilled = document["groups"]
    assert baseline["seeds"] == distilled["seeds"] == [0, 1, 2]
    assert baseline["scores"][0]["mean"] == pytest.approx(0.5)
    (difference,) = document["differences"]
    assert difference["difference"] == pytest.approx(distilled["scores"][0]["mean"] - 0.5)
    assert difference["verdict"] == "better"
    assert difference["low"] > 0
    assert [pair["seed"] for pair in difference["per_seed"]] == [0, 1, 2]
    assert all(pair["p_mcnemar"] < 0.001 for pair in difference["per_seed"])
    assert {part["category"] for part in difference["categories"]} == {
        "open",
        "closed",
        "modality",
        "organ",
        "plane",
        "presence",
    }
    # never a bare difference
    for part in (difference, *difference["categories"]):
        assert part["low"] <= part["difference"] <= part["high"]
        assert part["n"] > 0
    assert document["curves"] == []


def test_the_same_runs_give_the_same_document(tmp_path: Path):
    runs = make_runs(tmp_path)
    assert compare_runs(runs).to_dict() == compare_runs(runs[::-1]).to_dict()


def test_swapping_the_baseline_flips_the_difference(tmp_path: Path):
    runs = make_runs(tmp_path)
    (there,) = compare_runs(runs, baseline="baseline").contrasts
    (back,) = compare_runs(runs, baseline="distilled").contrasts
    assert there.overall.difference == pytest.approx(-back.overall.difference)
    assert (there.overall.verdict, back.overall.verdict) == ("better", "worse")


def test_learning_curves(curves: Comparison):
    document = curves.to_dict()
    assert [curve["method"] for curve in document["curves"]] == ["baseline", "distilled"]
    points = document["curves"][0]["points"]
    assert [point["train_share"] for point in points] == [0.1, 0.25, 0.5, 1.0]
    assert [point["mean"] for point in points] == pytest.approx(
        [round(300 * a) / 300 for a in (0.41, 0.425, 0.45, 0.5)]
    )
    assert all(point["low"] < point["mean"] < point["high"] and point["n"] == 300 for point in points)
    assert [(c.group.name, c.baseline.name) for c in curves.contrasts] == [
        (f"distilled at {share} %", f"baseline at {share} %") for share in (10, 25, 50, 100)
    ]


@pytest.mark.parametrize("other", [0.25, 0.5])
def test_a_share_is_a_note_unless_it_is_part_of_the_names(tmp_path: Path, other: float) -> None:
    runs = [
        write_stage(
            tmp_path / str(place),
            hits(50, 0.5, place),
            seed=place,
            settings={"data": {"train_share": share}},
            notes=[f"Trained on {share:.0%} of the training groups (data.train_share).", "A toy."],
        )
        for place, share in enumerate((0.25, other))
    ]
    notes = compare_runs(runs).notes
    assert "A toy." in notes
    assert any("data.train_share" in note for note in notes) == (other == 0.25)


def test_one_group_has_scores_and_no_difference(tmp_path: Path):
    runs = [write_stage(tmp_path / str(seed), hits(50, 0.5, seed), seed=seed) for seed in range(2)]
    found = compare_runs(runs)
    assert found.contrasts == ()
    assert "nothing to compare it with" in headline(found.to_dict())[0]
    Page(render(found.to_dict()))
    write_comparison(found, tmp_path / "out")


def test_one_seed_is_said(tmp_path: Path):
    found = compare_runs(make_runs(tmp_path, seeds=1))
    assert "Every group has one seed" in found.notes[-1]
    assert found.contrasts[0].overall.p_mcnemar is not None


def test_many_tests_can_still_be_significant(tmp_path: Path):
    """The smallest p of 100 resamples is 0.02: of ten methods none could be marked, were it not for more resamples."""
    base = hits(100, 0.2)
    runs = [write_stage(tmp_path / "baseline", base, stage="baseline")]
    for number in range(10):
        settings = {"method": {"output": {"weight": 2.0 + number}}}
        runs.append(write_stage(tmp_path / str(number), ~base, settings=settings))
    found = compare_runs(runs, resamples=100)
    assert all(c.overall.significant for c in found.contrasts)


# --- files ------------------------------------------------------------------------------------------------------------


def test_the_page_needs_nothing_but_itself(curves: Comparison):
    page = render(curves.to_dict())
    parsed = Page(page)
    assert POLICY in parsed.values("content")
    assert not re.search(r"https?://|url\(|@import", page)
    assert parsed.tags["script"] == 0
    assert parsed.tags["svg"] == 1 + 4 + 1  # overall, by type for each share, the curve
    assert len(parsed.all_ids) == len(set(parsed.all_ids))
    for word in ("Result", "Differences", "By category", "Learning curves", "Runs", "Holm", "n = 300"):
        assert word in parsed.text
    for svg in re.findall(r'<svg [^>]*aria-label="([^"]+)"', page):
        assert "NaN" not in svg
        assert "nan" not in svg


def test_the_curve_shows_every_interval(curves: Comparison):
    page = render(curves.to_dict())
    section = page[page.index('<section id="curves">') : page.index('<section id="runs">')]
    bars = re.findall(r"stroke: var\(--(\w+)\); stroke-opacity: 0.75", section)
    assert Counter(bars) == {"baseline": 4, "distilled": 4}


def test_hostile_names_and_paths_stay_text(tmp_path: Path):
    """A name can come out of somebody else's recipe, a path can name a person."""
    other = {"name": HOSTILE, "student": {"model": {"init": "/home/smith/run"}}}
    runs = [
        write_stage(tmp_path / "a", hits(60, 0.5), notes=[HOSTILE]),
        write_stage(tmp_path / "b", hits(60, 0.6), settings=other),
        write_stage(tmp_path / "c", hits(60, 0.7), settings={"student": {"model": {"init": f"./{HOSTILE[:8]}"}}}),
    ]
    found = compare_runs(runs)
    document = write_comparison(found, tmp_path / "out")
    page = (tmp_path / "out" / "compare.html").read_text("utf-8")
    assert Page(page).tags["script"] == 0
    assert "&lt;script&gt;" in page
    for text in (page, json.dumps(document)):
        assert str(tmp_path) not in text
        assert "/home/smith" not in text


def test_the_files(curves: Comparison, tmp_path: Path):
    document = write_comparison(curves, tmp_path)
    kinds = ("csv", "html", "json", "pdf", "png", "svg", "tex")
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"compare.{kind}" for kind in kinds]
    assert json.loads((tmp_path / "compare.json").read_text("utf-8")) == document
    with Image.open(tmp_path / "compare.png") as picture:
        assert picture.size[0] > 1000
        assert len(np.unique(np.asarray(picture.convert("L")))) > 20
    first = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write_comparison(curves, tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == first


def test_the_tables_hold_the_numbers_of_the_document(tmp_path: Path):
    document = compare_runs(make_runs(tmp_path)).to_dict()
    lines = list(csv.DictReader(as_csv(document).splitlines()))
    assert len(lines) == 2 * 7 + 7  # two groups and a difference, each in total and in six categories
    (overall,) = (row for row in lines if row["row"] == "difference" and row["kind"] == "all")
    assert float(overall["mean"]) == document["differences"][0]["difference"]
    assert (overall["group"], overall["baseline"], overall["verdict"]) == ("distilled", "baseline", "better")
    latex = as_latex(document)
    assert latex.count(r"\\") == 3
    assert "distilled & 3 & " in latex
    assert f"{100 * document['groups'][1]['scores'][0]['mean']:.1f} [" in latex
    assert r"]\,*" in latex  # significant


def test_latex_sees_no_command_in_a_name():
    assert escape_latex(r"a_b & 50 % {x}\y $") == r"a\_b \& 50 \% \{x\}\textbackslash{}y \$"


def test_seeds_of_one_recipe(tmp_path: Path):
    runs = make_runs(tmp_path)
    document = compare_seeds(runs).to_dict()
    accuracies = [hits(300, 0.5, seed).mean() for seed in range(3)]
    interval = mean_interval(accuracies)
    baseline = document["groups"][0]["scores"][0]
    assert baseline["mean"] == pytest.approx(np.mean(accuracies))
    assert baseline["over_seeds"] == pytest.approx({"low": interval.low, "high": interval.high})
    other = write_stage(tmp_path / "other", hits(300, 0.5), settings={"method": {"output": {"weight": 2.0}}}, seed=7)
    with pytest.raises(UserError, match=r"more than their seeds \(method\.output\.weight="):
        compare_seeds([*runs, other])


def test_a_leaking_split_is_said_at_the_top(tmp_path: Path):
    runs = [
        write_stage(tmp_path / name, hits(40, 0.5), stage=name, describes={PROTOCOL: "all; the split leaks test rows"})
        for name in ("baseline", "distilled")
    ]
    assert "Leaking split: these scores are too high." in Page(render(compare_runs(runs).to_dict())).text


# --- command line -----------------------------------------------------------------------------------------------------


def compare(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setenv("COLUMNS", "160")
    return call("compare", *arguments)


def test_the_terminal(tmp_path: Path, monkeypatch):
    runs = [str(run) for run in make_runs(tmp_path)]
    code, out, err = compare(monkeypatch, *runs, "--output", str(tmp_path / "out"))
    assert (code, err) == (0, "")
    for word in (
        "toy/test (n = 300)",
        "distilled \u2212 baseline",
        "3 paired seeds",
        "(Holm)",
        "better *",
        "presence",
        "A toy.",
    ):
        assert word in out
    assert (tmp_path / "out" / "compare.html").is_file()


def test_json_is_the_file(tmp_path: Path, monkeypatch):
    runs = [str(run) for run in make_runs(tmp_path)]
    out = tmp_path / "out"
    code, printed, _ = compare(monkeypatch, *runs, "--baseline", "distilled", "--output", str(out), "--json")
    assert code == 0
    assert json.loads(printed) == json.loads((out / "compare.json").read_text("utf-8"))
    assert json.loads(printed)["baseline"] == "distilled"


def test_a_mistake_is_one_sentence_and_exit_code_2(tmp_path: Path, monkeypatch):
    run = make_runs(tmp_path, seeds=1)[0]
    other = write_stage(tmp_path / "other", hits(299, 0.5))
    out = tmp_path / "out"
    for arguments in ([str(other)], [str(tmp_path)], ["--baseline", "b"], ["--protocol", "toy/b"]):
        code, printed, err = compare(monkeypatch, str(run), *arguments, "--output", str(out))
        assert (code, printed) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert not out.exists()
