"""The report of a segmentation run: what any combination of modalities gives, on one page that needs nothing else."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from preceptor.data.types import SegmentationDataset
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.recipe import read_recipe, validate
from preceptor.report.contents import RunRecord, StageRecord, get_nested, read_run
from preceptor.report.dotplot import Dot, dot_plot
from preceptor.report.markup import banner, chip, document, escape, row, stylesheet, table
from preceptor.report.record import heading, record
from preceptor.report.training import figure, training
from preceptor.report.words import NONE, count, leaks, percent
from preceptor.segmentation import report_text as words
from preceptor.segmentation.combinations import (
    LONG,
    POST,
    Subject,
    Table,
    column_mean,
    name_of,
    number,
    subject_of,
    table_of,
    validation_table,
)
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.overlays import DrawnCase, cases_section, draw_cases
from preceptor.segmentation.report_elections import elections
from preceptor.segmentation.report_heatmap import Column, heat_table
from preceptor.segmentation.report_missing import distribution, missing
from preceptor.vqa.report_scores import bar

log = logging.getLogger("preceptor")


def write_segmentation_report(
    run: Path, *, data: SegmentationDataset | None = None, recipe: SegmentationRecipe | None = None
) -> Path:
    """Write RUN/report.html from what lies in a run folder, of one stage or of several, and return its path.

    Without `recipe` that of the run folder is used; without `data` no case is drawn. Raises UserError where `run` is
    no run folder.
    """
    read = read_run(run, words.TITLES)
    if recipe is None:
        recipe = _saved_recipe(run)
    settings = recipe or SegmentationRecipe(name="defaults")
    drawn = []
    if data is not None and settings.report.cases:
        drawn = draw_cases(read, subject_of(read), data, settings.report.cases, settings.data.max_voxels)
    path = run / "report.html"
    write_text(path, render(read, data, recipe, drawn))
    return path


def render(
    run: RunRecord, data: SegmentationDataset | None, recipe: SegmentationRecipe | None, drawn: Sequence[DrawnCase]
) -> str:
    """Return the page."""
    title = recipe.name if recipe else run.folder.resolve().name
    subject = subject_of(run)
    more = {"Test cases (SHA-256)": value} if (value := run.first("data", "test_sha256")) else {}
    sections = [
        ("finding", "What was found", finding(run, subject)),
        ("combinations", "Every combination of modalities", combination_tables(run, subject)),
        ("missing", "Missing modalities", missing(run, subject)),
        ("elections", "Elections", elections(run, subject, recipe)),
        ("cases", "Worst cases", cases_section(run, subject, drawn)),
        ("spread", "Over cases", distribution(run, subject)),
        ("training", "Training", training(run, "Dice", "Cases left out")),
        ("record", "Record", record(run, recipe, "cases", more)),
    ]
    sentences = [*run.notes, *(data.notes if data else []), *words.warnings(run, data)]
    notes = banner(sentences, words.LEAKING if leaks(run, data) else None)
    header = heading(run, title, recipe, " cases")
    return document(f"{title} · Preceptor report", header, notes, sections, style=stylesheet("segmentation.css"))


def _saved_recipe(run: Path) -> SegmentationRecipe | None:
    try:
        recipe = validate(*read_recipe(str(run / "recipe.yaml")), SegmentationRecipe)
    except UserError as error:
        log.warning("the report goes without the recipe: %s", error)
        return None
    return recipe if isinstance(recipe, SegmentationRecipe) else None


# --- what was found ---------------------------------------------------------------------------------------------------


def finding(run: RunRecord, subject: Subject) -> str:
    """Return the finding in words, the stages as bars, the paired difference by region, and a table of the stages."""
    first, *others = words.headline(run, subject)
    rest = f"<p>{escape(' '.join(others))}</p>" if others else ""
    return f'<p class="headline">{escape(first)}</p>{rest}{_bars(run, subject)}{_summary(run, subject)}'


def _bars(run: RunRecord, subject: Subject) -> str:
    bars = "".join(
        bar(stage.title, stage.kind, words.overall_dice(stage, subject), None, None)
        for stage in sorted(run.stages, key=lambda stage: stage.kind == "teacher")
    )
    if not bars or subject.protocol is None:
        return ""
    over = "combinations and regions" if len(subject.regions) > 1 else "combinations"
    about = f"Mean Dice over {over}. Protocol <code>{escape(subject.protocol)}</code>."
    left = f'<figure class="bars"><dl>{bars}</dl><figcaption>{about}</figcaption></figure>'
    plot = _differences(run, subject)
    return f'<div class="beside">{left}<div class="charts">{plot}</div></div>' if plot else left


def _differences(run: RunRecord, subject: Subject) -> str:
    """Return the paired differences of distilled and undistilled network with their intervals, by region."""
    entry = get_nested(run.results, "comparison", subject.protocol or "", "distilled - baseline")
    named = [(name_of(region), get_nested(entry, "regions", region)) for region in subject.regions]
    if len(subject.regions) > 1:
        named.append((name_of("mean"), entry))
    rows = []
    for name, found in named:
        value, low, high = (number(get_nested(found, key)) for key in ("difference", "low", "high"))
        if value is not None:
            rows.append((name, [Dot("distilled", "distilled less undistilled", value, low, high)]))
    over = get_nested(entry, "interval")
    title = "Distilled less undistilled" + (f" ({over})" if isinstance(over, str) else "")
    return figure(title, dot_plot("Distilled less undistilled", rows, x_title="points of Dice"))


def _summary(run: RunRecord, subject: Subject) -> str:
    """Return a row per stage: the mean by region, with one and with all modalities, and what the network costs."""
    if subject.protocol is None or not subject.columns:
        return ""
    last = subject.columns[-1]
    several = len(subject.modalities) > 1
    rows, costs = (
        [],
        any(get_nested(stage.results, key) for stage in run.stages for key in ("parameters", "latency_ms")),
    )
    for stage in run.stages:
        scores = table_of(stage, subject.protocol, subject)
        if not scores:
            continue
        cells = [percent(_region(stage, scores, key, subject), unit=False) for key in subject.regions]
        if several:
            single = [subset for subset in scores if len(subset) == 1]
            cells.append(percent(column_mean(scores, last, single), unit=False))
            cells.append(percent(column_mean(scores, last, [subject.modalities]), unit=False))
        if costs:
            milliseconds = number(get_nested(stage.results, "latency_ms"))
            cells += [count(stage.parameters), NONE if milliseconds is None else f"{milliseconds:,.0f}"]
        rows.append(row(chip(stage.kind, stage.title), cells))
    if not rows:
        return ""
    heads = ["Model", *(name_of(region) for region in subject.regions)]
    heads += ["One modality", "All modalities"] if several else []
    heads += ["Parameters", "ms/case"] if costs else []
    caption = "Dice in %, the mean over combinations" + (
        ", with one and with all modalities over regions" if several else ""
    )
    if explained := [f"{name_of(region)}: {LONG[region]}" for region in subject.regions if region in LONG]:
        caption += f". {'; '.join(explained)}."
    timing = run.first("latency")
    about = f'<p class="small">Milliseconds per case: {escape(timing)}.</p>' if timing and costs else ""
    return table(caption, heads, rows) + about


def _region(stage: StageRecord, scores: Table, region: str, subject: Subject) -> float | None:
    given = number(get_nested(stage.results, "protocols", subject.protocol or "", "regions", region))
    return given if given is not None else column_mean(scores, region)


# --- every combination ------------------------------------------------------------------------------------------------


def combination_tables(run: RunRecord, subject: Subject) -> str:
    """Return the combination table of the main protocol; HD95, post-processed and other protocols fold out below."""
    if subject.protocol is None:
        return ""
    found = _heat(run, subject, subject.protocol, "dice")
    legend = "Rows are what the network was given: filled dots are present. "
    sentence = words.tally(run, subject)
    if sentence:
        legend += "Small numbers are the difference to the undistilled network; cells with a corner are worse. "
    about = f'<p class="small">{legend}{escape(sentence)}</p>' if found else ""
    folded = [("HD95, in mm", _heat(run, subject, subject.protocol, "hd95"))]
    post = f"{subject.protocol}{POST}"
    others = [post, *(id for id in run.protocols if id not in (subject.protocol, post))]
    for id in [id for id in others if id in run.protocols]:
        title = "After post-processing" if id == post else id
        folded += [(f"{title}: Dice", _heat(run, subject, id, "dice"))]
        folded += [(f"{title}: HD95, in mm", _heat(run, subject, id, "hd95"))]
    tables = [(stage, validation_table(stage, subject)) for stage in run.stages]
    columns = [Column(stage.kind, stage.title, found) for stage, found in tables]
    folded.append(("On validation cases: Dice", heat_table("Dice in %, validation cases.", subject, columns)))
    details = "".join(
        f"<details><summary>{escape(title)}</summary>{content}</details>" for title, content in folded if content
    )
    return f"{about}{found}{details}"


def _heat(run: RunRecord, subject: Subject, protocol: str, score: str) -> str:
    columns = [Column(stage.kind, stage.title, table_of(stage, protocol, subject, score)) for stage in run.stages]
    cases = number(run.first("protocols", protocol, "n"))
    of = f" ({cases:g} cases)" if cases else ""
    described = run.first("describes", protocol)
    unit: Literal["%", "mm"] = "%" if score == "dice" else "mm"
    what = "Dice in %" if score == "dice" else "HD95 in mm, less is better"
    about = f": {escape(described)}" if described else ""
    return heat_table(f"{what}, <code>{escape(protocol)}</code>{of}{about}", subject, columns, unit)
