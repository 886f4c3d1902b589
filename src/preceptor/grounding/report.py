"""The report of a grounded vision-language run: what each part of the method adds, on one page."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.data.types import GroundingDataset
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.grounding.config import STAGE_ADDS, GroundingRecipe
from preceptor.grounding.metrics import MAIN
from preceptor.grounding.report_boxes import pictures, plain
from preceptor.recipe import read_recipe, validate
from preceptor.report.contents import RunRecord, StageRecord, get_nested, read_run
from preceptor.report.dotplot import Dot, dot_plot
from preceptor.report.figures import Line, line_chart
from preceptor.report.markup import banner, chip, document, escape, row, stylesheet, table
from preceptor.report.record import heading, record
from preceptor.report.training import figure, training
from preceptor.report.words import NONE, count, percent, points

log = logging.getLogger("preceptor")

TITLES = {
    "teacher": "Teacher",
    "baseline": "Supervised",
    "guided": "+ guided positions",
    "distilled": "+ pseudo-labels",
    "clinkd": "+ reflection",
}
TASKS = {
    "vg": "Grounding: recall at IoU 0.5",
    "roc": "Naming: accuracy",
    "rc": "Describing: ROUGE-L",
    "mia": "Image questions: mBMR",
}
HEADS = ("Boxes: recall@0.5", "Names: accuracy", "Describing: ROUGE-L", "Questions: mBMR")
SHORT = {"vg": "grounding", "roc": "naming", "rc": "describing", "mia": "questions"}
LEAKING = ("Leaking split: these scores flatter.", "Images or patients of test dialogues occur in training.")


def write_grounding_report(
    run: Path, *, data: GroundingDataset | None = None, recipe: GroundingRecipe | None = None
) -> Path:
    """Write RUN/report.html from what lies in a run folder, of one stage or of several, and return its path.

    Without `recipe` that of the run folder is used; without `data` no image is drawn. Raises UserError where `run` is
    no run folder.
    """
    read = read_run(run, TITLES)
    path = run / "report.html"
    write_text(path, render(read, data, recipe or _saved_recipe(run)))
    return path


def render(run: RunRecord, data: GroundingDataset | None, recipe: GroundingRecipe | None) -> str:
    """Return the page."""
    title = recipe.name if recipe else run.folder.resolve().name
    settings = recipe or GroundingRecipe(name="defaults")
    sections = [
        ("finding", "What was found", finding(run)),
        ("modalities", "By modality", modalities(run)),
        ("boxes", "Boxes", pictures(run, data, settings.report.pictures) if data else ""),
        ("pseudo", "Pseudo-labels", pseudo_labels(run)),
        ("reflection", "Reflection", reflection(run)),
        ("selection", "Selective generation", selection(run)),
        ("data", "Data", data_section(run)),
        ("training", "Training", training(run, "likelihood of an answer's token", "Dialogues left out")),
        ("record", "Record", record(run, recipe, "dialogues", _fingerprint(run))),
    ]
    sentences = [*run.notes, *(data.notes if data else []), *_warnings(run, data)]
    notes = banner(sentences, LEAKING if data is not None and data.leaking else None)
    header = heading(run, title, recipe, " dialogues")
    return document(f"{title} · Preceptor report", header, notes, sections, style=stylesheet("grounding.css"))


def _saved_recipe(run: Path) -> GroundingRecipe | None:
    try:
        recipe = validate(*read_recipe(str(run / "recipe.yaml")), GroundingRecipe)
    except UserError as error:
        log.warning("the report goes without the recipe: %s", error)
        return None
    return recipe if isinstance(recipe, GroundingRecipe) else None


def _fingerprint(run: RunRecord) -> dict[str, Any]:
    return {"Test dialogues (SHA-256)": value} if (value := run.first("data", "test_sha256")) else {}


def _warnings(run: RunRecord, data: GroundingDataset | None) -> list[str]:
    found = []
    if data is not None and (recorded := run.first("data", "sha256")) and recorded != data.fingerprint():
        found.append("The data set has changed since this run: its fingerprint is no longer the one below.")
    for protocol in run.protocols[:1]:
        found += run.first("protocols", protocol, "notes") or []
    return found


# --- what was found ---------------------------------------------------------------------------------------------------


def finding(run: RunRecord) -> str:
    """Return the finding in words, a table of the stages under each protocol, and the paired differences."""
    if not run.protocols:
        return ""
    first = run.protocols[0]
    headline = f'<p class="headline">{escape(_headline(run, first))}</p>'
    tables = "".join(_stages(run, protocol) for protocol in run.protocols)
    return headline + tables + _differences(run, first)


def _headline(run: RunRecord, protocol: str) -> str:
    said = []
    for task, name in (("vg", "finds {} of the boxes"), ("roc", "names {} of the regions rightly")):
        value = get_nested(run.focus.results, "protocols", protocol, "mean", task, MAIN[task])
        if value is not None:
            said.append(name.format(percent(value)))
    mbmr = get_nested(run.focus.results, "protocols", protocol, "mean", "mia", "mbmr")
    said += [f"reaches an mBMR of {percent(mbmr)} on image questions"] if mbmr is not None else []
    what = STAGE_ADDS.get(run.focus.kind, run.focus.title)
    return f"The model ({what}) {', '.join(said)}." if said else "This run has no scores yet."


def _stages(run: RunRecord, protocol: str) -> str:
    rows = []
    for stage in run.stages:
        means = get_nested(stage.results, "protocols", protocol, "mean") or {}
        cells = [percent(get_nested(means, task, MAIN[task]), unit=False) for task in TASKS]
        cells += [count(stage.parameters), _milliseconds(get_nested(stage.results, "latency_ms"))]
        rows.append(row(chip(stage.kind, stage.title), cells))
    described = run.first("describes", protocol)
    about = f": {escape(described)}" if described else ""
    n = run.first("protocols", protocol, "n")
    caption = f"In %, the mean over modalities. <code>{escape(protocol)}</code> ({n} answers){about}."
    timing = run.first("latency")
    small = f'<p class="small">Milliseconds: {escape(timing)}.</p>' if timing else ""
    return table(caption, ["Model", *HEADS, "Parameters", "ms/answer"], rows) + small


def _milliseconds(value: Any) -> str:
    return NONE if value is None else f"{value:,.0f}"


def _differences(run: RunRecord, protocol: str) -> str:
    """Return the paired differences with their intervals: to the supervised student, and to the stage before."""
    compared = get_nested(run.results, "comparison", protocol) or {}
    charts = []
    for what, title in (("baseline", "Less supervised"), ("", "Less the stage before")):
        rows = []
        for task, name in SHORT.items():
            dots = []
            for pair, entry in compared.items():
                later, _, earlier = pair.partition(" - ")
                found = get_nested(entry, task)
                if found is None or (earlier == "baseline") != (what == "baseline"):
                    continue
                label = f"{TITLES.get(later, later)} less {TITLES.get(earlier, earlier)}"
                kind = later.partition(" ")[0]
                dots.append(Dot(kind, label, found["difference"], found["low"], found["high"]))
            rows.append((name, dots))
        over = "95 %, paired bootstrap over answers, one seed"
        drawn = dot_plot(f"{title} ({over})", rows, x_title="points")
        charts.append(figure(f"{title} ({over})", drawn))
    legend = "".join(
        f'<li><i class="stroke {escape(s.kind)}"></i>{escape(s.title)}</li>' for s in run.stages if s.kind != "teacher"
    )
    drawn = "".join(charts)
    about = (
        '<p class="small">Of each answer: the share of its boxes that are found, whether the name is right, F1 of the '
        "words.</p>"
    )
    return f'<ul class="legend">{legend}</ul><div class="charts">{drawn}</div>{about}' if drawn else ""


def modalities(run: RunRecord) -> str:
    """Return the scores of every stage by modality."""
    found = ""
    for protocol in run.protocols[:1]:
        for task, name in TASKS.items():
            names = sorted(get_nested(run.focus.results, "protocols", protocol, "modalities") or {})
            rows = []
            for stage in run.stages:
                by = get_nested(stage.results, "protocols", protocol, "modalities") or {}
                cells = [percent(get_nested(by, m, task, MAIN[task]), unit=False) for m in names]
                rows.append(row(chip(stage.kind, stage.title), cells))
            sizes = [
                get_nested(run.focus.results, "protocols", protocol, "modalities", m, task, "n") or 0 for m in names
            ]
            heads = [f"{m} (n = {n})" for m, n in zip(names, sizes, strict=True)]
            if names and any(sizes):
                found += table(f"{escape(name)}, in %.", ["Model", *heads], rows)
    return found


# --- the parts of the method ------------------------------------------------------------------------------------------


def _last_with(run: RunRecord, key: str) -> tuple[StageRecord, Mapping[str, Any]] | None:
    found = [(stage, entry) for stage in run.stages if (entry := get_nested(stage.results, key))]
    return found[-1] if found else None


def pseudo_labels(run: RunRecord) -> str:
    """Return how sure the teacher was of its answers, and when they entered."""
    found = _last_with(run, "pseudo_labels")
    if found is None:
        return ""
    entry = found[1]
    bins = len(entry["confidence"])
    lines = [
        Line(name, kind, [((i + 0.5) / bins, float(n)) for i, n in enumerate(entry[key])])
        for key, name, kind in (("confidence", "confidence", "distilled"), ("margin", "margin", "teacher"))
    ]
    sure = line_chart("Pseudo-labels by how sure the teacher was", lines, x_title="mean over an answer's tokens")
    curve = [Line("entered", "distilled", [(x, y) for x, y in entry["entered"]])]
    entered = line_chart(
        "Share of the pseudo-labels that had entered", curve, x_title="share of the prior", percent=True
    )
    about = (
        f"<p>{entry['rows']:,} answers of the teacher were learnt from, before the answers of the data. Confidence is "
        "the mean probability of the likeliest token, margin its distance to the second.</p>"
    )
    legend = '<ul class="legend"><li><i class="stroke distilled"></i>confidence</li><li><i class="stroke teacher"></i>margin</li></ul>'  # noqa: E501
    charts = figure("How sure the teacher was", sure) + figure("Entered by the curriculum", entered)
    return f'{about}{legend}<div class="charts">{charts}</div>'


def reflection(run: RunRecord) -> str:
    """Return the rounds: failure rate, growth of the buffer, and examples of corrections."""
    found = _last_with(run, "reflection")
    if found is None:
        return ""
    stage, entry = found
    rounds = entry["rounds"]
    rates = [(float(r["round"] + 1), r["failure_rate"]) for r in rounds]
    sizes = [(float(r["round"] + 1), float(r["size"])) for r in rounds]
    failed = [Line("failed", stage.kind, rates)]
    failing = line_chart("Failure rate by round", failed, x_title="round", percent=True, counts=True)
    growing = line_chart("Corrections kept", [Line("kept", stage.kind, sizes)], x_title="round", counts=True)
    charts = figure("Answers that failed", failing) + figure("Corrections kept", growing)
    rows = [
        row(
            str(r["round"] + 1),
            [
                str(r["asked"]),
                f"{r['failed']} ({percent(r['failure_rate'])})",
                ", ".join(f"{reason}: {n}" for reason, n in r["reasons"].items()) or NONE,
                f"{r['corrected']} ({r.get('by_sample', 0)} by a sample, else the true answer)",
                str(r["size"]),
            ],
        )
        for r in rounds
    ]
    listed = table("Rounds of reflection", ["Round", "Asked", "Failed", "Why", "Corrected", "Kept"], rows)
    keys = ("reason", "question", "wrong", "truth", "corrected")
    examples = [row(escape(e["id"]), [plain(e[key]) for key in keys], wide=True) for e in entry["examples"][-8:]]
    heads = ["Dialogue", "Why", "Question", "Answered", "True", "Correction"]
    shown = table("Corrections, the newest last", heads, examples) if examples else ""
    return f'<div class="charts">{charts}</div>{listed}{shown}'


def selection(run: RunRecord) -> str:
    """Return what choosing among sampled answers gives, and what it costs."""
    found = _last_with(run, "selection")
    if found is None:
        return ""
    stage, entry = found
    rows = []
    for protocol, chosen in entry["protocols"].items():
        greedy = get_nested(stage.results, "protocols", protocol)
        kind = protocol.rpartition("/")[2]
        for name, scores, seconds in (
            ("greedy", greedy, entry["greedy_seconds_per_answer"]),
            ("chosen", chosen, entry["seconds_per_answer"]),
        ):
            cells = [percent(get_nested(scores, "mean", task, MAIN[task]), unit=False) for task in TASKS]
            rows.append(row(f"{escape(kind)}: {name}", [*cells, f"{1000 * seconds:,.0f}"]))
    ratio = entry["seconds_per_answer"] / max(1e-9, entry["greedy_seconds_per_answer"])
    about = (
        f"<p>{entry['candidates']} answers sampled at temperature {entry['temperature']:g}; the one most like the "
        f"others is given (minimum Bayes risk; the truth takes no part). It takes {ratio:.1f} times as long.</p>"
    )
    compared = get_nested(
        run.results, "comparison", next(iter(entry["protocols"])), f"{stage.kind} selected - {stage.kind}"
    )
    said = "; ".join(
        f"{SHORT[task]} {points(d['difference'])} ({points(d['low'])} to {points(d['high'])})"
        for task, d in (compared or {}).items()
    )
    small = f'<p class="small">Chosen less greedy, in points, by answer: {escape(said)}.</p>' if said else ""
    return about + table("In %, the mean over modalities.", ["Answers", *HEADS, "ms/answer"], rows) + small


def data_section(run: RunRecord) -> str:
    """Return the numbers of dialogues by task and modality, and the faults of boxes."""
    found = ""
    for key, name in (("tasks", "Task"), ("modalities", "Modality")):
        counts: Mapping[str, Mapping[str, int]] = run.first("data", key) or {}
        parts = list(dict.fromkeys(part for by in counts.values() for part in by))
        rows = [row(escape(kind), [f"{by.get(part, 0):,}" for part in parts]) for kind, by in counts.items()]
        if rows:
            found += table(f"Dialogues by {name.lower()}", [name, *parts], rows)
    faults = run.first("data", "faults")
    if faults:
        listed = ", ".join(f"{fault}: {n}" for fault, n in faults.items())
        where = run.first("data", "faulty") or []
        shown = f" The first of them: {escape('; '.join(where))}." if where else ""
        found += f'<p class="small">Boxes with faults: {escape(listed)}.{shown}</p>'
    return found
