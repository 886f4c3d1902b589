from __future__ import annotations

import base64
import copy
import io
import json
import re
import shutil
from collections import Counter
from html.parser import HTMLParser
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from preceptor.errors import UserError
from preceptor.report import words
from preceptor.report.contents import RunRecord, StageRecord, read_run
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.report import render, write_report
from preceptor.vqa.report_samples import choose
from tests.vqa.conftest import HOSTILE, MadeRun, make_data

MINUS = "\u2212"
VOID = {"meta", "img", "br", "line", "polyline", "circle"}


class Page(HTMLParser):
    """Checks that tags nest, and gathers what the tests ask about."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes another"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).replace("\u00a0", " ").split())

    def values(self, *names: str) -> list[str]:
        return [value for _, name, value in self.attributes if name in names]


@pytest.fixture(scope="module")
def written(made_run: MadeRun, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("written") / "run"
    shutil.copytree(made_run.folder, folder)
    return write_report(folder, data=made_run.data, recipe=made_run.recipe).read_text("utf-8")


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
    assert set(page.values("href")) == {f"#{name}" for name in page.ids}
    assert ("html", "lang", "en") in page.attributes
    for text in ("toy/published", "Most frequent answer", "Answer ceiling", "embedding/image", "hidden/0-1", "12.3"):
        assert text in page.text
    assert "torch 2.13.0" in page.text


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(written: str):
    page = Page(written)
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert all(value.startswith("data:image/jpeg;base64,") for value in page.values("src", "srcset", "data", "poster"))
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


def test_every_question_of_the_hostile_kind_is_escaped(copied: MadeRun):
    recipe = copied.recipe.model_copy(update={"report": copied.recipe.report.model_copy(update={"questions": 24})})
    page = Page(write_report(copied.folder, data=copied.data, recipe=recipe).read_text("utf-8"))
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
            row.update({key: mark + row[key] for key in ("id", "prediction", "target", "question_type")})
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
    edit(copied.folder / "results.json", lambda r: r.update(versions={mark: mark}))
    shutil.copytree(copied.folder / "baseline", copied.folder / "<u>")
    page = Page(write_report(copied.folder, data=copied.data, recipe=copied.recipe).read_text("utf-8"))
    assert page.tags["u"] == 0
    assert page.text.count(mark) > 40


def test_maps_are_those_of_the_recorded_answers(copied: MadeRun, monkeypatch):
    asked = []

    def spy(model, batch, class_index):
        asked.append((batch.ids[0], model.config.id2label[class_index]))
        return np.eye(4)

    monkeypatch.setattr("preceptor.vqa.activation_map.activation_map", spy)
    write_report(copied.folder, data=copied.data, recipe=copied.recipe)
    expected = []
    for stage in ("teacher", "baseline", "distilled"):
        lines = (copied.folder / stage / "predictions" / "toy-published.jsonl").read_text("utf-8").splitlines()
        said = {row["id"]: row["prediction"] for row in map(json.loads, lines)}
        expected += [(id, said[id]) for id, _ in asked[:10]]
    assert asked == expected


@pytest.mark.parametrize("path", ["runs/jane-doe", "../jane-doe", "~/jane-doe", "C:\\jane-doe"])
def test_local_paths_of_the_recipe_are_not_shown(copied: MadeRun, path: str):
    raw = copied.recipe.model_dump()
    raw["output"] = raw["data"]["root"] = raw["method"]["teaching"]["cache"] = raw["student"]["model"]["init"] = path
    raw["method"]["teaching"]["runs"] = [path]
    if not path.startswith("runs"):
        raw["teacher"]["model"]["text"]["pretrained"] = [path, "google/bert_uncased_L-2_H-128_A-2"]
    page = render(read_run(copied.folder), copied.data, VqaRecipe.model_validate(raw), [])
    assert "jane-doe" not in page
    if not path.startswith("runs"):
        assert "google/bert_uncased_L-2_H-128_A-2" in page


def test_no_path_and_no_file_name_is_shown(written: str, made_run: MadeRun):
    assert str(made_run.folder.parent) not in written
    assert "patient-smith" not in written
    assert "root: (local path, not shown)" in written
    assert "output: (local path, not shown)" in written


def test_images_are_pictures_with_words_for_them(written: str):
    page = Page(written)
    sources = page.values("src")
    assert len(sources) == len(page.values("alt")) == 40  # ten questions: the image and three maps
    assert all(page.values("alt"))
    for source in sources:
        image = Image.open(io.BytesIO(base64.b64decode(source.split(",")[1])))
        assert image.size == (288, 192)
        assert not image.getexif()
    assert len([alt for alt in page.values("alt") if "of the image" in alt or "nothing in the image" in alt]) == 30


def test_tables_have_scoped_heads_and_scroll_within(written: str):
    page = Page(written)
    heads = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert len(heads) == page.tags["th"]
    assert set(heads) == {"row", "col"}
    assert page.values("class").count("scroll") == page.tags["table"]


def test_the_same_run_gives_the_same_bytes(copied: MadeRun, written: str):
    assert write_report(copied.folder, data=copied.data, recipe=copied.recipe).read_text("utf-8") == written


def test_numbers_are_those_of_the_results(written: str, made_run: MadeRun):
    results = json.loads((made_run.folder / "results.json").read_text("utf-8"))
    text = Page(written).text
    for stage in results["stages"].values():
        scores = stage["protocols"]["toy/published"]
        for key in ("accuracy", "open", "closed"):
            assert f"{100 * scores[key]:.1f} %" in text
    difference = results["comparison"]["toy/published"]["distilled - baseline"]["difference"]
    assert f"{100 * difference:+.1f} points" in text.replace(MINUS, "-")


def test_recipe_and_data_are_found_where_the_run_says(copied: MadeRun, monkeypatch):
    asked = []
    monkeypatch.setattr("preceptor.vqa.data.read_data", lambda config, scratch: asked.append(scratch) or copied.data)
    page = Page(write_report(copied.folder).read_text("utf-8"))
    assert asked == [copied.folder / "data"]
    assert page.tags["img"] == 40


def test_without_the_data_set_answers_are_shown_without_images(copied: MadeRun, monkeypatch):
    def gone(config, scratch):
        raise UserError("/secret/place is missing")

    monkeypatch.setattr("preceptor.vqa.data.read_data", gone)
    text = write_report(copied.folder).read_text("utf-8")
    page = Page(text)
    assert page.tags["img"] == 0
    assert page.tags["article"] == 10
    assert "the data set was not found" in page.text
    assert "/secret/place" not in text


def test_an_image_that_cannot_be_read_loses_only_its_pictures(copied: MadeRun, tmp_path: Path):
    data = make_data(tmp_path / "images")
    data.split("test")[0].image.write_bytes(b"no image")  # of the first two questions
    recipe = copied.recipe.model_copy(update={"report": copied.recipe.report.model_copy(update={"questions": 24})})
    page = Page(write_report(copied.folder, data=data, recipe=recipe).read_text("utf-8"))
    assert page.tags["article"] == 24
    assert page.tags["img"] == 4 * 22


@pytest.mark.parametrize(
    "lost",
    ["distilled/model", "teacher", "baseline/metrics.jsonl", "distilled/predictions", "recipe.yaml", "results.json"],
)
def test_missing_files_are_survived(copied: MadeRun, lost: str):
    path = copied.folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(copied.folder, data=copied.data, recipe=copied.recipe).read_text("utf-8"))


def test_a_run_of_one_stage(copied: MadeRun):
    page = Page(write_report(copied.folder / "baseline", data=copied.data, recipe=copied.recipe).read_text("utf-8"))
    assert page.text.count("The student (") == 1
    assert "distilled" not in page.text.split("Recipe")[0].lower().replace("undistilled", "")


def test_an_ensemble_of_teachers_lists_its_members_in_order(copied: MadeRun):
    for number in (10, 2):
        shutil.copytree(copied.folder / "teacher", copied.folder / f"teacher-{number}")
    titles = [stage.title for stage in read_run(copied.folder).stages]
    assert titles == ["Teacher", "Teacher 2", "Teacher 10", "Student, undistilled", "Student, distilled"]
    page = Page(write_report(copied.folder, data=copied.data, recipe=copied.recipe).read_text("utf-8"))
    assert page.tags["img"] == 40


def test_a_folder_that_is_no_run_and_results_that_are_no_json(tmp_path: Path, copied: MadeRun):
    with pytest.raises(UserError, match=r"no run folder.*results\.json"):
        write_report(tmp_path / "empty")
    (copied.folder / "baseline" / "results.json").write_text('{"stage": ')
    with pytest.raises(UserError, match=r"baseline/results\.json is not JSON"):
        write_report(copied.folder, data=copied.data, recipe=copied.recipe)


def test_a_leaking_split_has_a_banner(copied: MadeRun):
    assert "Leaking split" not in render(read_run(copied.folder), copied.data, copied.recipe, [])
    leaking = copy.copy(copied.data)
    leaking.leaking = True
    assert "Leaking split" in render(read_run(copied.folder), leaking, copied.recipe, [])
    # Without the data set, the description of the protocol tells.
    edit(
        copied.folder / "distilled" / "results.json",
        lambda r: r["describes"].update(
            {"toy/published": "all test questions; the split leaks test rows into training"}
        ),
    )
    page = render(read_run(copied.folder), None, copied.recipe, [])
    assert "Leaking split" in page
    assert 'class="banner leak"' in page


def test_notes_of_the_run_are_shown_once(copied: MadeRun):
    for stage in ("baseline", "distilled"):
        edit(copied.folder / stage / "results.json", lambda r: r.update(notes=["Two <rows> are twins."]))
    page = render(read_run(copied.folder), copied.data, copied.recipe, [])
    assert page.count("Two &lt;rows&gt; are twins.") == 1


def test_a_model_no_better_than_a_blind_baseline_is_called_out(copied: MadeRun):
    edit(
        copied.folder / "distilled" / "results.json",
        lambda r: r["baselines"]["toy/published"]["look_up"].update(accuracy=0.99),
    )
    (warning,) = words.warnings(read_run(copied.folder), copied.data)
    assert "“most similar training question” answers 99.0" in warning


def test_changed_data_are_called_out(copied: MadeRun):
    changed = copy.copy(copied.data)
    changed.samples = changed.samples[:-1]
    assert "has changed since this run" in words.warnings(read_run(copied.folder), changed)[0]
    assert words.warnings(read_run(copied.folder), copied.data) == []


def trees(value: Any, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the path of every key in a nested dictionary."""
    found = [path] if path else []
    if isinstance(value, dict):
        for key, inner in value.items():
            found += trees(inner, (*path, key))
    return found


@pytest.mark.parametrize("null", [False, True], ids=["missing", "null"])
def test_any_part_of_the_results_may_be_missing_or_null(made_run: MadeRun, null: bool):
    """Every key in turn, of the stage that the page is about and of the results over all stages."""
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
        render(RunRecord(run.folder, [*run.stages[:-1], stage], run.results), None, None, [])
    for path in trees(run.results["comparison"]):
        results = run.results | {"comparison": without(run.results["comparison"], path)}
        render(RunRecord(run.folder, run.stages, results), None, None, [])


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.003, 0.031, "not distinguishable from 0"),
        (0.0, 0.03, "not distinguishable from 0"),
        (0.002, 0.031, "distillation helped"),
        (-0.05, -0.01, "distillation hurt"),
    ],
)
def test_the_verdict_follows_the_interval(low: float, high: float, verdict: str):
    sentence = words.difference({"difference": (low + high) / 2, "low": low, "high": high})
    assert sentence.endswith(f": {verdict}.")


def test_headline_in_words():
    stages = [
        StageRecord(name, Path(), {"protocols": {"p": {"accuracy": right / 451, "n": 451}}, "parameters": parameters})
        for name, right, parameters in (
            ("teacher", 281, 26_000_000),
            ("baseline", 270, 4_736_642),
            ("distilled", 276, 4_736_642),
        )
    ]
    entry = {"difference": 6 / 451, "low": -0.003, "high": 0.031}
    results = {"comparison": {"p": {"distilled - baseline": entry, "distilled / teacher": 276 / 281}}}
    found = " ".join(words.headline(RunRecord(Path(), stages, results))).replace("\u00a0", " ")
    # scipy.stats.binomtest(276, 451).proportion_ci(method="wilson"): 0.5662 to 0.6558.
    assert found.replace(MINUS, "-") == (
        "The distilled student (4.7 million parameters, 18 % of the teacher's) answers 61.2 % of 451 questions "
        "correctly (95 % interval 56.6 to 65.6 %). The same student without distillation answers 59.9 %. The "
        "difference is +1.3 points, 95 % interval -0.3 to +3.1 over questions, this seed alone: not distinguishable "
        "from 0. The distilled student keeps 98.2 % of the teacher's 62.3 %."
    )


@pytest.mark.parametrize(
    ("number", "text"),
    [(None, words.NONE), (999, "999"), (1000, "1.0 k"), (430_900, "431 k"), (4_736_642, "4.7 M"), (2.6e9, "2.6 G")],
)
def test_counts(number: float | None, text: str):
    assert words.count(number).replace("\u00a0", " ") == text


def test_durations_and_points():
    seconds = [words.duration(s).replace("\u00a0", " ") for s in (9.6, 60, 3599.7, 7322)]
    assert seconds == ["10 s", "1 min 0 s", "1 h 0 min", "2 h 2 min"]
    points = [words.points(d) for d in (0.0142, -0.0031, 0.0001, -0.0001, None)]
    assert points == ["+1.4", f"{MINUS}0.3", "0.0", "0.0", words.NONE]


rows_of = st.lists(
    st.tuples(st.booleans(), st.sampled_from(["open", "closed"]), st.sampled_from(["", "POS", "PRES"])), max_size=30
)


def make_row(number: int, correct: bool, answer_type: str, question_type: str) -> dict[str, Any]:
    return {"id": str(number), "correct": correct, "answer_type": answer_type, "question_type": question_type}


@given(rows_of, st.integers(0, 12), st.randoms(use_true_random=False))
def test_the_choice_of_questions_does_not_depend_on_their_order(kinds, number, random):
    rows = [make_row(i, *kind) for i, kind in enumerate(kinds)]
    chosen = choose(rows, number)
    assert len(chosen) == len(set(chosen)) == min(number, len(rows))
    shuffled = rows[:]
    random.shuffle(shuffled)
    assert choose(shuffled, number) == chosen


def test_the_choice_of_questions_is_balanced():
    rows = [make_row(i, i % 10 < 8, "closed" if i % 3 else "open", f"T{i % 5}") for i in range(200)]
    chosen = set(choose(rows, 8))
    picked = [row for row in rows if row["id"] in chosen]
    assert Counter((row["correct"], row["answer_type"]) for row in picked) == {
        (True, "open"): 2,
        (True, "closed"): 2,
        (False, "open"): 2,
        (False, "closed"): 2,
    }
    assert len({row["question_type"] for row in picked}) == 5


def palettes() -> list[dict[str, str]]:
    css = (resources.files("preceptor.report") / "page.css").read_text("utf-8")
    blocks = re.findall(r":root \{(.*?)\}", css, re.S)
    return [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in blocks[:2]]


def luminance(colour: str) -> float:
    """Relative luminance, WCAG 2.1."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_of_text_and_marks(scheme: int):
    colours = palettes()[scheme]

    def contrast(a: str, b: str) -> float:
        high, low = sorted((luminance(colours[a]), luminance(colours[b])), reverse=True)
        return (high + 0.05) / (low + 0.05)

    for ground in ("page", "card", "note", "leak"):
        assert contrast("text", ground) >= 7
        assert contrast("soft", ground) >= 4.5
    for mark in ("correct", "wrong"):
        assert contrast(mark, "card") >= 4.5
    for mark in ("teacher", "baseline", "distilled", "other"):
        assert contrast(mark, "card") >= 3
