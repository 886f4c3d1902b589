from __future__ import annotations

import base64
import copy
import io
import json
import math
import re
import shutil
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from preceptor.data.types import Case, SegmentationDataset
from preceptor.errors import UserError
from preceptor.report.contents import RunRecord, StageRecord, read_run
from preceptor.segmentation import subset_scores
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.figures import write_figures
from preceptor.segmentation.report import headline, render, write_report
from tests.report.page import Page, draw_equal_figures_once
from tests.segmentation.made_run import REGIONS, MadeSegmentation, all_subsets, make_segmentation

MINUS = "\u2212"
STAGES = ("teacher", "baseline", "distilled")
SECTIONS = ["finding", "combinations", "missing", "elections", "cases", "spread", "training", "record"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> MadeSegmentation:
    """A run of three stages; tests that change it copy it first."""
    return make_segmentation(tmp_path_factory.mktemp("segmentation"))


@pytest.fixture(scope="module")
def written(made: MadeSegmentation) -> str:
    return write_report(made.folder).read_text("utf-8")


@pytest.fixture
def copied(made: MadeSegmentation, tmp_path: Path) -> MadeSegmentation:
    shutil.copytree(made.folder, tmp_path / "run")
    return MadeSegmentation(tmp_path / "run", made.data, made.recipe)


def stage_results(made: MadeSegmentation, stage: str) -> dict[str, Any]:
    return json.loads((made.folder / stage / "results.json").read_text("utf-8"))


def edit(path: Path, change) -> None:
    tree = json.loads(path.read_text("utf-8"))
    change(tree)
    path.write_text(json.dumps(tree), "utf-8")


def tables(text: str) -> list[list[list[str]]]:
    """Return the body cells of every combination table: rows of texts."""
    found = []
    for table in re.findall(r'<table class="heat[^>]*>.*?</table>', text, re.S):
        rows = re.findall(r"<tr.*?</tr>", table[table.index("<tbody>") :], re.S)
        found.append([re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows])
    return found


def rows_of(text: str) -> list[str]:
    """Return the combinations of the first table, as they are read aloud."""
    (first, *_) = re.findall(r'<table class="heat[^>]*>.*?</table>', text, re.S)
    return [unescape(name) for name in re.findall(r'<span class="unseen">(.*?)</span>', first)]


def test_all_sections_are_there_and_tags_nest(written: str):
    page = Page(written)
    assert page.ids == SECTIONS
    assert set(page.values("href")) >= {f"#{name}" for name in SECTIONS}
    assert page.tags["article"] == 2
    for text in ("phantom/by-file/A", "cross_modal", "full/output", "Best over all", "monai 1.5.0", "1.2 M", "431"):
        assert text in page.text


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(written: str):
    page = Page(written)
    (policy,) = [value for value in page.values("content") if "default-src" in value]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "img"} & set(page.tags)
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    for tag, name, value in page.attributes:
        if name in ("src", "href", "srcset", "data", "poster", "xlink:href"):
            assert value.startswith("#" if tag in ("a", "use") else "data:image/png;base64,")
    assert "url(" not in written
    assert "@import" not in written
    assert not re.search(r"https?://", written)


def test_no_path_and_no_file_name_is_shown(written: str, made: MadeSegmentation):
    for hidden in (str(made.folder.parent), "patient-smith", "jane-doe", ".nii"):
        assert hidden not in written
    for key in ("root", "output", "split_file"):
        assert f"{key}: (local path, not shown)" in written


def test_without_a_recipe_given_that_of_the_run_is_used(copied: MadeSegmentation):
    text = write_report(copied.folder).read_text("utf-8")
    assert "<h1>Segmentation: phantom / by-file</h1>" in text
    assert "Recipe toy-&lt;run&gt; · " in text
    assert "teachers: multi" in text
    (copied.folder / "recipe.yaml").unlink()
    text = write_report(copied.folder).read_text("utf-8")
    assert "Recipe run · " in text
    assert "<pre" not in text


def test_the_same_run_gives_the_same_bytes(copied: MadeSegmentation, written: str):
    again = write_report(copied.folder)
    assert again.read_text("utf-8") == written


def test_rows_are_in_published_order(written: str):
    # The order of the published tables: F, T1, T1c, T2, then pairs, triples and all.
    assert rows_of(written) == [
        "FLAIR",
        "T1",
        "T1ce",
        "T2",
        "FLAIR + T1",
        "FLAIR + T1ce",
        "FLAIR + T2",
        "T1 + T1ce",
        "T1 + T2",
        "T1ce + T2",
        "FLAIR + T1 + T1ce",
        "FLAIR + T1 + T2",
        "FLAIR + T1ce + T2",
        "T1 + T1ce + T2",
        "FLAIR + T1 + T1ce + T2",
    ]


@pytest.mark.parametrize(
    ("place", "protocol", "key"),
    [
        (0, "phantom/by-file/A", "dice"),
        (1, "phantom/by-file/A", "hd95"),
        (2, "phantom/by-file/A-post", "dice"),
        (3, "phantom/by-file/A-post", "hd95"),
    ],
)
def test_cells_are_the_results(written: str, made: MadeSegmentation, place: int, protocol: str, key: str):
    found = {name: stage_results(made, name)["protocols"][protocol]["subsets"] for name in STAGES}
    factor = 100 if key == "dice" else 1
    table = tables(written)[place]
    assert len(table) == 16
    for subset, cells in zip(all_subsets(made.data.modalities), table, strict=False):
        expected = []
        for region in [*REGIONS, None]:
            values = {
                name: factor * (scores[subset][key][region] if region else np.mean(list(scores[subset][key].values())))
                for name, scores in found.items()
            }
            more = values["distilled"] - values["baseline"]
            sign = f"{more:+.1f}".replace("-", MINUS)
            expected += [f"{values['teacher']:.1f}", f"{values['baseline']:.1f}"]
            expected += [f"<b>{values['distilled']:.1f}</b><small>{'0.0' if sign[1:] == '0.0' else sign}</small>"]
        assert cells == expected
    last = [f"{factor * np.mean([s[key]['et'] for s in found[n].values()]):.1f}" for n in ("teacher", "baseline")]
    assert table[15][:2] == last


def test_cells_that_distillation_made_worse_are_marked(copied: MadeSegmentation):
    def change(results: dict) -> None:
        results["protocols"]["phantom/by-file/A"]["subsets"]["flair"]["dice"]["et"] = 0.01
        results["protocols"]["phantom/by-file/A"]["subsets"]["flair"]["hd95"]["et"] = 0.0

    edit(copied.folder / "distilled" / "results.json", change)
    text = render(read_run(copied.folder))
    first, second, *_ = re.findall(r'<table class="heat[^>]*>.*?</table>', text, re.S)
    assert re.search(r'class="h0 worse"><b>1.0</b>', first)
    assert re.search(r'class="h8"><b>0.0</b>', second)


def test_the_numbers_of_the_finding_are_those_of_the_results(written: str, made: MadeSegmentation):
    text = Page(written).text.replace(MINUS, "-")
    for stage in STAGES:
        scores = stage_results(made, stage)["protocols"]["phantom/by-file/A"]
        for value in (scores["dice"], *scores["regions"].values()):
            assert f"{100 * value:.1f}" in text
    entry = json.loads((made.folder / "results.json").read_text())["comparison"]["phantom/by-file/A"]
    entry = entry["distilled - baseline"]
    assert f"The difference is {100 * entry['difference']:+.1f} points, {100 * entry['low']:+.1f} to " in text
    plot = next(value for value in Page(written).values("aria-label") if value.startswith("Distilled minus"))
    for name, found in [("WT", entry["regions"]["wt"]), ("Mean", entry)]:
        shown = [f"{100 * found[key]:+.1f}" for key in ("difference", "low", "high")]
        assert f"{name}: {shown[0]} ({shown[1]} to {shown[2]})" in plot.replace(MINUS, "-")


def headline_with(entry: dict | None, made: MadeSegmentation) -> str:
    run = read_run(made.folder)
    run.results["comparison"]["phantom/by-file/A"]["distilled - baseline"] = entry
    text = " ".join(headline(run, subset_scores.subject_of(run.document)))
    return text.replace("\u00a0", " ").replace(MINUS, "-")


def test_headline_is_honest_about_its_interval(made: MadeSegmentation):
    assert "-0.1 to +2.0 (95 %): not distinguishable from 0." in headline_with(
        {"difference": 0.01, "low": -0.001, "high": 0.02}, made
    )
    assert "distillation helped" in headline_with(
        {"difference": 0.01, "low": 0.001, "high": 0.02, "verdict": "better"}, made
    )
    without = headline_with({"difference": 0.01, "low": math.nan, "high": math.nan}, made)
    assert "The difference is +1.0 points." in without
    assert "difference" not in headline_with(None, made)


def test_elections_are_drawn_and_listed(written: str, made: MadeSegmentation):
    votes = stage_results(made, "distilled")["elections"]
    charts = [value for value in Page(written).values("aria-label") if value.startswith("Soft Dice of")]
    assert len(charts) == 3
    last = votes[-1]["soft_dice"]["tc"]["t1ce"]
    first = votes[0]["soft_dice"]["tc"]["t1ce"]
    assert f"T1ce: from {100 * first:.1f}\u00a0% to {100 * last:.1f}\u00a0%" in charts[1]
    section = written[written.index('<section id="elections">') : written.index('<section id="cases">')]
    assert section.count("<use ") == 3 * len(votes)  # the rings
    names = {"flair": "FLAIR", "t1": "T1", "t1ce": "T1ce", "t2": "T2"}
    for vote in votes:
        assert " ".join(names[vote["elected"][region]] for region in REGIONS) in " ".join(Page(section).words)
    assert "each of them everywhere" in section


def test_votes_with_the_same_winners_share_a_row(copied: MadeSegmentation):
    def change(results: dict) -> None:
        for vote in results["elections"]:
            vote["elected"], vote["overall"] = {"et": "t1ce", "tc": "t1ce", "wt": "flair"}, "flair"
            vote["soft_dice"]["et"]["t2"] = None

    edit(copied.folder / "distilled" / "results.json", change)
    text = render(read_run(copied.folder))
    cells = "|".join(word.strip() for word in Page(text).words)
    assert "|0 to 150|4|T1ce|T1ce|FLAIR|FLAIR and T1ce|FLAIR|" in cells


def test_cases_are_drawn_worst_first(written: str, made: MadeSegmentation):
    lines = (made.folder / "distilled" / "predictions" / "phantom-by-file-A.jsonl").read_text().splitlines()
    dice: dict[str, list[float]] = {}
    for row in map(json.loads, lines):
        dice.setdefault(row["id"], []).append(row["dice"])
    drawn = sorted(("case-0", "case-1"), key=lambda id: np.mean(dice[id]))
    found = re.findall(r"<h3>(case-\d)</h3>\s*<p class=\"facts\">Mean Dice over all combinations: <b>([\d.]+)", written)
    assert found == [(id, f"{100 * np.mean(dice[id]):.1f}") for id in drawn]
    pictures = re.findall(r'<image href="data:image/png;base64,([^"]+)"', written)
    assert len(pictures) == 2 * 4 * 3
    for picture in pictures:
        image = Image.open(io.BytesIO(base64.b64decode(picture)))
        assert image.mode == "L"
        assert not image.info.get("exif")
    assert len(written) < 3_000_000
    labels = [value for value in Page(written).values("aria-label") if "plane of case" in value]
    row = next(r for r in map(json.loads, lines) if (r["id"], r["subset"], r["region"]) == ("case-0", "flair", "et"))
    assert any(
        value.startswith("axial plane of case case-0, segmented from FLAIR: ")
        and f"ET\u00a0{100 * row['dice']:.1f}" in value
        for value in labels
    )


@pytest.mark.parametrize("broken", ["no masks", "no reference", "truncated", "other grid", "too large"])
def test_cases_that_cannot_be_drawn_are_left_out(copied: MadeSegmentation, tmp_path: Path, broken: str):
    data, recipe = copied.data, copied.recipe
    masks = copied.folder / "distilled" / "predictions" / "masks"
    if broken == "no masks":
        shutil.rmtree(masks)
    elif broken == "no reference":
        data = copy.copy(copied.data)
        data.samples = [Case(c.id, c.images, None, c.group, c.split) for c in copied.data.samples]
    elif broken == "truncated":
        for path in masks.iterdir():
            path.write_bytes(path.read_bytes()[:200])
    elif broken == "other grid":
        import nibabel

        for path in masks.iterdir():
            nibabel.save(nibabel.Nifti1Image(np.zeros((9, 9, 9), np.uint8), np.eye(4)), path)
    else:
        recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"max_voxels": 100})})
    draw(copied, data, recipe)
    page = Page(write_report(copied.folder).read_text("utf-8"))
    assert page.tags["image"] == 0
    assert page.ids == [name for name in SECTIONS if name != "cases"]


def draw(made: MadeSegmentation, data: SegmentationDataset, recipe: SegmentationRecipe) -> None:
    """Write the figures of the last stage again."""
    stage = read_run(made.folder).focus
    write_figures(stage.folder, data, recipe, stage.rows)


def test_as_many_cases_as_the_recipe_says(copied: MadeSegmentation):
    for cases in (0, 1):
        update = {"report": copied.recipe.report.model_copy(update={"cases": cases})}
        draw(copied, copied.data, copied.recipe.model_copy(update=update))
        page = Page(write_report(copied.folder).read_text("utf-8"))
        assert page.tags["article"] == cases


def test_the_spread_over_cases(written: str, made: MadeSegmentation):
    lines = (made.folder / "distilled" / "predictions" / "phantom-by-file-A.jsonl").read_text().splitlines()
    held = [r["dice"] for r in map(json.loads, lines) if (r["subset"], r["region"]) == ("t1+t2", "wt")]
    (chart,) = [v for v in Page(written).values("aria-label") if v.startswith("Dice of WT over cases by combination")]
    assert f"T1 + T2: {100 * np.median(held):.1f}\u00a0%" in chart
    assert chart.count("%") == 15


def test_curves_over_the_number_of_modalities(written: str, made: MadeSegmentation):
    subsets = stage_results(made, "baseline")["protocols"]["phantom/by-file/A"]["subsets"]
    single = [scores["dice"]["et"] for name, scores in subsets.items() if "+" not in name]
    whole = subsets["flair+t1+t1ce+t2"]["dice"]["et"]
    (chart,) = [v for v in Page(written).values("aria-label") if v.startswith("Dice of ET by number of modalities")]
    assert f"Baseline: from {100 * np.mean(single):.1f}\u00a0% to {100 * whole:.1f}\u00a0%" in chart


def test_a_run_of_one_stage(tmp_path: Path):
    made = make_segmentation(tmp_path, stages=("distilled",), cases=3)
    text = write_report(made.folder).read_text("utf-8")
    page = Page(text)
    assert page.ids == SECTIONS
    assert "aseline" not in page.text.rpartition("Recipe")[0]
    assert "<small>" not in text
    assert [len(row) for row in tables(text)[0]] == [4] * 16


@pytest.mark.parametrize(
    ("modalities", "regions", "rows"),
    [
        (("ct", "pet"), {"lesion": (1,)}, 3),
        (("flair", "t1", "t1ce", "t2", "perfusion"), REGIONS, 31),
        (("a", "b", "c", "d", "e", "f"), {"x": (1,), "y": (1, 2)}, 63),
        (("ct",), {"lesion": (1,)}, 1),
    ],
)
def test_any_modalities_and_regions(tmp_path: Path, modalities: tuple, regions: dict, rows: int):
    made = make_segmentation(
        tmp_path, stages=("baseline", "distilled"), modalities=modalities, regions=regions, cases=3
    )
    text = write_report(made.folder).read_text("utf-8")
    page = Page(text)
    columns = len(regions) + (len(regions) > 1)
    assert [len(row) for row in tables(text)[0]] == [2 * columns] * (rows + 1)
    assert page.tags["image"] > 0
    assert "nan" not in re.sub(r"base64,[^\"]+", "", text).replace("resonan", "")
    if len(modalities) == 1:
        assert "missing" not in page.ids


def test_hostile_names_are_escaped(tmp_path: Path):
    modalities, region = ("<b>t1", "\"onload=x'"), "<script>alert(1)</script>"
    made = make_segmentation(
        tmp_path, stages=("baseline", "distilled"), modalities=modalities, regions={region: (1,)}, cases=2
    )
    for stage in ("baseline", "distilled"):
        edit(
            made.folder / stage / "results.json",
            lambda r: r.update(
                notes=["<i>note"],
                describes={"phantom/by-file/A": "<i>what"},
                machine={"<i>": "<i>"},
                latency="<i>",
                versions={"<i>": "<i>"},
                seed="<i>",
                training={"steps": "<i>", "kept_step": "<i>", "skipped": ["<i>"]},
            ),
        )
    data = copy.copy(made.data)
    data.samples = [Case("<i>", c.images, c.mask, "<i>", "test") for c in made.data.samples[:1]]
    shown = made.folder / "distilled" / "predictions" / "masks"
    for path in sorted(shown.glob("case-0__*")):
        path.rename(shown / path.name.replace("case-0", "<i>"))
    draw(made, data, made.recipe)
    text = write_report(made.folder).read_text("utf-8")
    page = Page(text)
    assert "<b>t1" not in text
    assert "<i>" not in re.sub(r"<i></i>", "", text)
    assert page.tags["script"] == page.tags["onload"] == 0
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.tags["image"] == 6
    assert "<script>alert(1)</script>" in page.text
    assert "<i>note" in page.text


@pytest.mark.parametrize(
    "lost",
    [
        "teacher",
        "baseline/metrics.jsonl",
        "distilled/predictions",
        "recipe.yaml",
        "results.json",
        "baseline/predictions",
    ],
)
def test_missing_files_are_survived(copied: MadeSegmentation, lost: str):
    path = copied.folder / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    Page(write_report(copied.folder).read_text("utf-8"))


def test_a_folder_that_is_no_run(tmp_path: Path):
    with pytest.raises(UserError, match=r"not a run folder.*results\.json"):
        write_report(tmp_path)


def paths_of(value: Any, kinds: type | tuple[type, ...], path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of every value of these types in nested dictionaries and lists."""
    if path and isinstance(value, kinds):
        yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_of(inner, kinds, (*path, key))


LOST = object()


@pytest.mark.parametrize(
    ("kinds", "how"),
    [(object, LOST), (object, None), (float, math.nan), (dict, {}), (list, [])],
    ids=["missing", "null", "nan", "empty", "no rows"],
)
def test_any_part_of_the_results_may_be_missing_or_empty(tmp_path: Path, kinds: type, how: Any, monkeypatch):
    draw_equal_figures_once(monkeypatch, "segmentation")
    made = make_segmentation(tmp_path, stages=("baseline", "distilled"), modalities=("ct", "pet"), cases=2, votes=2)
    run = read_run(made.folder)

    def without(tree: dict, path: tuple) -> dict:
        tree = copy.deepcopy(tree)
        parent: Any = tree
        for key in path[:-1]:
            parent = parent[key]
        if how is LOST:
            del parent[path[-1]]
        else:
            parent[path[-1]] = how
        return tree

    focus = run.focus
    scores = ("protocols", "elections", "validation_subsets", "latency_ms")
    # One path of each place: every subset, region and election has the same keys.
    places = {(path[0], len(path), path[-1]): path for path in paths_of(focus.results, kinds)}
    for path in places.values():
        if kinds is float and path[0] not in scores:
            continue
        stage = StageRecord(focus.name, focus.folder, without(focus.results, path), focus.metrics, focus.rows)
        page = render(RunRecord(run.folder, [run.stages[0], stage], run.results))
        assert "nan" not in page
    for path in paths_of(run.results["comparison"], kinds):
        results = run.results | {"comparison": without(run.results["comparison"], path)}
        assert "nan" not in render(RunRecord(run.folder, run.stages, results))


def test_a_run_without_scores_says_so(tmp_path: Path):
    (tmp_path / "results.json").write_text('{"stage": "baseline"}')
    page = Page(write_report(tmp_path).read_text("utf-8"))
    assert "This run has no scores yet." in page.text


def test_a_leaking_split_is_called_out(copied: MadeSegmentation):
    assert "Leaking split" not in render(read_run(copied.folder))
    edit(copied.folder / "distilled" / "results.json", lambda r: r["data"].update(leaking=True))
    assert "Leaking split: these scores are too high. Patients" in render(read_run(copied.folder))


def test_tables_have_scoped_heads_and_scroll_within(written: str):
    page = Page(written)
    heads = [value for tag, name, value in page.attributes if tag == "th" and name == "scope"]
    assert len(heads) == page.tags["th"]
    assert set(heads) == {"row", "col", "colgroup"}
    assert page.values("class").count("scroll") == page.tags["table"]
