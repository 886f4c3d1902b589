from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preceptor.data.types import Dataset, Sample
from preceptor.errors import UserError
from preceptor.report.contents import RunRecord, StageRecord, read_run
from preceptor.report.format import difference_sentence
from preceptor.statistics import wilson
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.figures import choose, write_figures
from preceptor.vqa.report import headline, render, write_report
from tests.report.page import Page, draw_equal_figures_once
from tests.vqa.conftest import HOSTILE, MadeRun, make_data

MINUS = "\u2212"


@pytest.fixture(scope="module")
def written(made_run: MadeRun, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("written") / "run"
    shutil.copytree(made_run.folder, folder)
    return write_report(folder).read_text("utf-8")


@pytest.fixture
def copied(made_run: MadeRun, tmp_path: Path) -> MadeRun:
    shutil.copytree(made_run.folder, tmp_path / "run")
    return MadeRun(tmp_path / "run", made_run.data, made_run.recipe)


def edit(path: Path, change) -> None:
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")


def test_all_sections_are_there(written: str):
    page = Page(written)
    assert page.ids == ["finding", "accuracy", "types", "training", "confusion", "questions", "record"]
    assert page.tags["article"] == 10
    assert set(page.values("href")) >= {f"#{name}" for name in page.ids}
    assert ("html", "lang", "en") in page.attributes
    for text in ("toy/published", "Most frequent answer", "Answer ceiling", "embedding/image", "hidden/0-1", "12.3"):
        assert text in page.text
    assert "torch 2.13.0" in page.text


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(written: str):
    page = Page(written)
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert all(value.startswith("data:image/png;base64,") for value in page.values("src", "srcset", "data", "poster"))
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert "url(" not in written
    assert "@import" not in written
    assert not re.search(r"(src|href)\s*=\s*[\"']?\s*(https?:)?//", written)


def test_text_of_users_is_shown_not_run(written: str):
    page = Page(written)
    assert page.tags["script"] == 0
    assert "<b>mass" not in written
    assert "toy-<run>" in page.text
    assert HOSTILE not in written


def draw(made: MadeRun, data: Dataset[Sample], questions: int = 10) -> None:
    """Write the figures of every stage again."""
    recipe = made.recipe.model_copy(update={"report": made.recipe.report.model_copy(update={"questions": questions})})
    for stage in read_run(made.folder).stages:
        write_figures(stage.folder, VqaBundle.load(stage.folder / "model"), data, recipe, stage.rows)


def test_every_question_of_the_hostile_kind_is_escaped(copied: MadeRun):
    draw(copied, copied.data, 24)
    page = Page(write_report(copied.folder).read_text("utf-8"))
    assert page.tags["article"] == 24
    assert " ".join(HOSTILE.split()) in page.text
    assert "<img src=x onerror=alert(1)>" in page.text
    assert page.tags["script"] == 0


def test_predictions_ids_types_and_protocols_are_escaped(copied: MadeRun):
    """As an older or a hand-made run may hold them: nothing read from the folder is trusted."""
    mark = "<u>"
    for stage in ("teacher", "baseline", "distilled"):
        folder = copied.folder / stage
        path = folder / "predictions" / "toy-published.jsonl"
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for row in rows:
            row.update({key: mark + row[key] for key in ("prediction", "target", "question_type")})
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        path.with_name("toy-published<u>.jsonl").write_text(lines, "utf-8")
        text = (folder / "results.json").read_text("utf-8")
        (folder / "results.json").write_text(text.replace('"toy/published"', '"toy/published<u>"'), "utf-8")
        edit(
            folder / "results.json",
            lambda r: r.update(
                stage=mark,
                provenance={mark: mark},
                latency=mark,
                seed=mark,
                versions={mark: mark},
                machine={"processor": mark},
                notes=[mark],
                describes={"toy/published<u>": mark},
                data={"name": mark, "variant": mark, "sha256": mark},
            ),
        )
        figures = folder / "figures" / "figures.json"
        texts = dict.fromkeys(("question", "answer_type", "question_type", "peak"), mark) | {"answers": [mark]}
        edit(figures, lambda r, texts=texts: [entry.update(texts) for entry in r["questions"]])
    edit(copied.folder / "results.json", lambda r: r.update(versions={mark: mark}))
    shutil.copytree(copied.folder / "baseline", copied.folder / "<u>")
    page = Page(write_report(copied.folder).read_text("utf-8"))
    assert page.tags["u"] == 0
    assert page.text.count(mark) > 40


def test_maps_are_those_of_the_predicted_answers(copied: MadeRun, monkeypatch):
    drawn = []

    def spy(model, batch, class_index):
        drawn.append((batch.ids[0], model.config.id2label.get(class_index)))
        return np.eye(4)

    monkeypatch.setattr("preceptor.vqa.figures.activation_map", spy)
    draw(copied, copied.data)
    expected = []
    for stage in ("teacher", "baseline", "distilled"):
        lines = (copied.folder / stage / "predictions" / "toy-published.jsonl").read_text("utf-8").splitlines()
        answers = {row["id"]: row["answer"] for row in map(json.loads, lines)}
        classes = VqaBundle.load(copied.folder / stage / "model").vocabulary.answers
        expected += [(id, answers[id] if answers[id] in classes else None) for id, _ in drawn[:10]]
    assert drawn == expected


@pytest.mark.parametrize("path", ["runs/jane-doe", "../jane-doe", "~/jane-doe", "C:\\jane-doe"])
def test_local_paths_of_the_recipe_are_not_shown(copied: MadeRun, path: str):
    raw = copied.recipe.model_dump()
    raw["output"] = raw["data"]["root"] = raw["method"]["teaching"]["cache"] = raw["student"]["model"]["init"] = path
    raw["method"]["teaching"]["runs"] = [path]
    if not path.startswith("runs"):
        raw["teacher"]["model"]["text"]["pretrained"] = [path, "google/bert_uncased_L-2_H-128_A-2"]
    page = render(replace(read_run(copied.folder), recipe=VqaRecipe.model_validate(raw).model_dump(mode="json")))
    assert "jane-doe" not in page
    if not path.startswith("runs"):
        assert "google/bert_uncased_L-2_H-128_A-2" in page


def test_no_path_and_no_file_name_is_shown(written: str, made_run: MadeRun):
    assert str(made_run.folder.parent) not in written
    assert "patient-smith" not in written
    assert "root: (local path, not shown)" in written
    assert "output: (local path, not shown)" in written


def test_pictures_have_descriptions_and_no_metadata(written: str):
    page = Page(written)
    sources = page.values("src")
    assert len(sources) == len(page.values("alt")) == 10 * (1 + 2 * 3)  # ten questions: the image, three with a map
    maps = [alt for alt in page.values("alt") if alt.startswith("Class activation map")]
    assert len(maps) == 30
    assert all("of the image" in alt or "no part of the image" in alt for alt in maps)
    sizes = Counter()
    for source in sources:
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        sizes[image.size] += 1
        assert not image.getexif()
    assert sizes == {(60, 40): 40, (96, 96): 30}


def test_tables_have_scoped_heads_and_scroll_within(written: str):
    page = Page(written)
    heads = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert len(heads) == page.tags["th"]
    assert set(heads) == {"row", "col"}
    assert page.values("class").count("scroll") == page.tags["table"]


def test_the_same_run_gives_the_same_bytes(copied: MadeRun, written: str):
    assert write_report(copied.folder).read_text("utf-8") == written


def test_numbers_are_those_of_the_results(written: str, made_run: MadeRun):
    results = json.loads((made_run.folder / "results.json").read_text("utf-8"))
    text = Page(written).text
    for stage in results["stages"].values():
        scores = stage["protocols"]["toy/published"]
        for key in ("accuracy", "open", "closed"):
            assert f"<td>{100 * scores[key]:.1f}</td>" in written
    difference = results["comparison"]["toy/published"]["distilled - baseline"]["difference"]
    assert f"{100 * difference:+.1f} points" in text.replace(MINUS, "-")


def test_the_report_reads_only_the_run_folder(copied: MadeRun, written: str, monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError("a report reads neither data nor models")

    monkeypatch.setattr("preceptor.vqa.data.read_data", refuse)
    monkeypatch.setattr("preceptor.vqa.bundle.VqaBundle.load", refuse)
    for stage in read_run(copied.folder).stages:
        shutil.rmtree(stage.folder / "model")
    assert write_report(copied.folder).read_text("utf-8") == written


def test_an_image_that_cannot_be_read_loses_only_its_pictures(copied: MadeRun, tmp_path: Path):
    data = make_data(tmp_path / "images")
    data.split("test")[0].image.write_bytes(b"no image")  # of the first two questions
    draw(copied, data, 24)
    page = Page(write_report(copied.folder).read_text("utf-8"))
    assert page.tags["article"] == 24
    assert page.tags["img"] == 7 * 22


@pytest.mark.parametrize("name", ["../../images/patient-smith-test-0.png", "results.json", "gone.png", None])
def test_the_index_of_pictures_cannot_lead_elsewhere(copied: MadeRun, name: str | None):
    figures = copied.folder / "distilled" / "figures" / "figures.json"
    edit(figures, lambda r: [entry.update(image=name) for entry in r["questions"]])
    page = Page(write_report(copied.folder).read_text("utf-8"))
    assert page.tags["img"] == 0
    assert page.tags["article"] == 10


@pytest.mark.parametrize(
    "lost",
    [
        "distilled/model",
        "teacher",
        "baseline/metrics.jsonl",
        "distilled/predictions",
        "distilled/figures",
        "recipe.yaml",
        "results.json",
    ],
)
def test_missing_files_are_survived(copied: MadeRun, lost: str):
    path = copied.folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(copied.folder).read_text("utf-8"))


def test_a_run_of_one_stage(copied: MadeRun):
    page = Page(write_report(copied.folder / "baseline").read_text("utf-8"))
    assert page.text.count("The baseline (") == 1
    assert "distilled" not in page.text.rpartition("Recipe")[0].lower()


def test_an_ensemble_of_teachers_lists_its_members_in_order(copied: MadeRun):
    for number in (10, 2):
        shutil.copytree(copied.folder / "teacher", copied.folder / f"teacher-{number}")
    titles = [stage.title for stage in read_run(copied.folder).stages]
    assert titles == ["Teacher", "Teacher 2", "Teacher 10", "Baseline", "Distilled"]
    page = Page(write_report(copied.folder).read_text("utf-8"))
    assert page.tags["img"] == 70


def test_a_folder_that_is_no_run_and_results_that_are_no_json(tmp_path: Path, copied: MadeRun):
    with pytest.raises(UserError, match=r"not a run folder.*results\.json"):
        write_report(tmp_path / "empty")
    (copied.folder / "baseline" / "results.json").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"baseline/results\.json is not JSON"):
        write_report(copied.folder)


def test_a_leaking_split_has_a_banner(copied: MadeRun):
    assert "Leaking split" not in render(read_run(copied.folder))
    edit(
        copied.folder / "distilled" / "results.json",
        lambda r: r["describes"].update(
            {"toy/published": "all test questions; the split leaks test rows into training"}
        ),
    )
    page = render(read_run(copied.folder))
    assert "Leaking split" in page
    assert 'class="banner leak"' in page

    def leak(results: dict[str, Any]) -> None:
        results.update(describes={}, data=results["data"] | {"leaking": True})

    for stage in ("teacher", "baseline", "distilled"):
        edit(copied.folder / stage / "results.json", leak)
    assert "Leaking split" in render(read_run(copied.folder))


def test_notes_of_the_run_are_shown_once(copied: MadeRun):
    for stage in ("baseline", "distilled"):
        edit(copied.folder / stage / "results.json", lambda r: r.update(notes=["Two <rows> are twins."]))
    page = render(read_run(copied.folder))
    assert page.count("Two &lt;rows&gt; are twins.") == 1


def test_a_model_no_better_than_a_blind_baseline_is_called_out(copied: MadeRun):
    edit(
        copied.folder / "distilled" / "results.json",
        lambda r: r["baselines"]["toy/published"]["look_up"].update(accuracy=0.99),
    )
    assert "“nearest training question” answers 99.0" in render(read_run(copied.folder)).replace("\u00a0", " ")


def trees(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key in a nested dictionary."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += trees(inner, (*path, key))
    return found


@pytest.mark.parametrize("null", [False, True], ids=["missing", "null"])
def test_any_part_of_the_results_may_be_missing_or_null(made_run: MadeRun, null: bool, monkeypatch):
    """Every key in turn, of the stage that the page is about and of the results over all stages."""
    draw_equal_figures_once(monkeypatch, "vqa")
    run = read_run(made_run.folder)

    def without(results: dict, path: tuple[str, ...]) -> dict:
        results = copy.deepcopy(results)
        parent = results
        for key in path[:-1]:
            parent = parent[key]
        parent[path[-1]] = None
        if not null:
            del parent[path[-1]]
        return results

    focus = run.focus
    for path in trees(focus.results):
        stage = StageRecord(focus.name, focus.folder, without(focus.results, path), focus.metrics, focus.rows)
        render(RunRecord(run.folder, [*run.stages[:-1], stage], run.results))
    for path in trees(run.results["comparison"]):
        results = run.results | {"comparison": without(run.results["comparison"], path)}
        render(RunRecord(run.folder, run.stages, results))


@pytest.mark.parametrize(
    ("entry", "end"),
    [
        (
            {"low": -0.003, "high": 0.031, "verdict": "undecided"},
            f" {MINUS}0.3 to +3.1 (95 %): not distinguishable from 0.",
        ),
        ({"low": 0.0, "high": 0.03}, " 0.0 to +3.0 (95 %): not distinguishable from 0."),
        ({"low": 0.002, "high": 0.031, "verdict": "better"}, " +0.2 to +3.1 (95 %): distillation helped."),
        ({"low": -0.05, "high": -0.01, "verdict": "worse"}, f" {MINUS}5.0 to {MINUS}1.0 (95 %): distillation hurt."),
        ({"low": None, "high": None, "interval": "no interval, too few"}, " points; no interval, too few."),
        ({}, " points."),
    ],
)
def test_the_verdict_and_the_interval_are_those_of_the_results(entry: dict[str, Any], end: str):
    sentence = difference_sentence({"difference": 0.01} | entry)
    assert sentence.startswith("The difference is +1.0 points")
    assert sentence.endswith(end)


def test_headline_in_words():
    interval = wilson(276, 451)
    stages = [
        StageRecord(name, Path(), {"protocols": {"p": scores}, "parameters": parameters})
        for name, scores, parameters in (
            ("teacher", {"accuracy": 281 / 451}, 26_000_000),
            ("baseline", {"accuracy": 270 / 451}, 4_736_642),
            (
                "distilled",
                {"accuracy": 276 / 451, "n": 451, "interval": {"low": interval.low, "high": interval.high}},
                4_736_642,
            ),
        )
    ]
    entry = {"difference": 6 / 451, "low": -0.003, "high": 0.031, "interval": "95 %, paired bootstrap, one seed"}
    results = {"comparison": {"p": {"distilled - baseline": entry, "distilled / teacher": 276 / 281}}}
    found = " ".join(headline(RunRecord(Path(), stages, results))).replace("\u00a0", " ")
    # scipy.stats.binomtest(276, 451).proportion_ci(method="wilson"): 0.5662 to 0.6558.
    assert found.replace(MINUS, "-") == (
        "The distilled student (4.7 million parameters, 18 % of the teacher's) answers 61.2 % of 451 questions "
        "correctly (95 % interval 56.6 to 65.6 %). The baseline, the same student without distillation, answers "
        "59.9 %. The difference is +1.3 points, -0.3 to +3.1 (95 %, paired bootstrap, one seed): not distinguishable "
        "from 0. It keeps 98.2 % of the teacher's 62.3 %."
    )


@pytest.mark.parametrize(("groups", "grouped"), [(203, True), (451, False), (None, False)])
def test_the_test_is_named_after_what_it_exchanges(made_run: MadeRun, groups: int | None, grouped: bool) -> None:
    entry = {"difference": 0.01, "low": -0.003, "high": 0.031, "p": 0.2, "n": 451}
    entry |= {"groups": groups} if groups else {}
    run = read_run(made_run.folder)
    results = run.results | {"comparison": {"toy/published": {"distilled - baseline": entry}}}
    text = Page(render(replace(run, results=results))).text
    assert "McNemar's exact test" in text
    assert ("McNemar's exact test over groups of questions." in text) == grouped


kinds = st.lists(st.tuples(st.sampled_from(["open", "closed"]), st.sampled_from(["", "POS", "PRES"])), max_size=30)


def make_sample(number: int, answer_type: Any, question_type: str) -> Sample:
    image = Path(f"{number // 3}.png")
    return Sample(str(number), image, "?", ("yes",), answer_type, image.stem, "test", question_type)


@given(kinds, st.integers(0, 12), st.randoms(use_true_random=False))
def test_the_choice_of_questions_does_not_depend_on_their_order(kinds, number, random):
    samples = [make_sample(i, *kind) for i, kind in enumerate(kinds)]
    chosen = choose(samples, number)
    assert len(chosen) == len({sample.id for sample in chosen}) == min(number, len(samples))
    shuffled = samples[:]
    random.shuffle(shuffled)
    assert choose(shuffled, number) == chosen


def test_the_choice_of_questions_is_balanced():
    samples = [make_sample(i, "closed" if i % 3 else "open", f"T{i % 5}") for i in range(200)]
    chosen = choose(samples, 10)
    assert Counter(sample.answer_type for sample in chosen) == {"open": 5, "closed": 5}
    assert Counter(sample.question_type for sample in chosen) == {f"T{i}": 2 for i in range(5)}
    assert len({sample.image for sample in chosen}) == 10
