"""The section of a report that shows how its models were trained."""

from __future__ import annotations

from preceptor.report import words
from preceptor.report.contents import RunRecord, get_nested
from preceptor.report.figures import Line, line_chart
from preceptor.report.markup import escape, row, table
from preceptor.report.words import NONE

BOOKKEEPING = {"step", "epoch", "lr", "grad_norm", "loss", "samples/s"}


def training(run: RunRecord, score: str = "accuracy", left_out: str = "Rows left out") -> str:
    """Return the curves of validation (of what is called `score`) and of every loss term, and what training took.

    `left_out` heads the number of skipped rows, whatever a row is.
    """
    charts = [_validation(run, score)]
    terms = dict.fromkeys(key for stage in run.stages for line in stage.metrics for key in line)
    for term in sorted(terms, key=lambda term: (term != "label", term != "output")):
        if term in BOOKKEEPING or term.startswith("validation/"):
            continue
        lines = [
            Line(stage.title, stage.kind, [(line["step"], line[term]) for line in stage.metrics if term in line])
            for stage in run.stages
        ]
        charts.append(figure(f"Loss term: {term}", line_chart(f"Loss term {term} by step", lines, x_title="step")))
    kinds = {stage.kind: stage.title for stage in reversed(run.stages)}
    legend = "".join(f'<li><i class="stroke {escape(kind)}"></i>{escape(title)}</li>' for kind, title in kinds.items())
    drawn = "".join(charts)
    figures = f'<ul class="legend">{legend}</ul><div class="charts">{drawn}</div>' if drawn else ""
    return figures + _effort(run, left_out)


def _validation(run: RunRecord, score: str) -> str:
    lines = []
    for stage in run.stages:
        scored = [(line["step"], line["validation/score"]) for line in stage.metrics if "validation/score" in line]
        best = get_nested(stage.results, "training", "kept_step")
        lines.append(Line(stage.title, stage.kind, scored, best))
    chart = line_chart(f"Validation {score} by step", lines, x_title="step", percent=True)
    return figure(f"Validation {score} (ring: chosen step)", chart)


def figure(title: str, svg: str) -> str:
    """Return a chart under its title; "" without a chart."""
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" if svg else ""


def _effort(run: RunRecord, left_out: str) -> str:
    heads = ["Model", "Steps", "Chosen step", "Time", "Samples/s", "Seed", left_out]
    begins = any(get_nested(stage.results, "provenance") for stage in run.stages)
    rows = []
    for stage in run.stages:
        t = get_nested(stage.results, "training")
        if not t:
            continue
        numbers = [t.get("steps"), t.get("kept_step"), words.duration(t.get("seconds")), t.get("samples_per_second")]
        numbers += [get_nested(stage.results, "seed"), len(t.get("skipped") or [])]
        cells = [NONE if number is None else str(number) for number in numbers]
        if begins:
            begun = get_nested(stage.results, "provenance") or {}
            cells.append("; ".join(f"{part}: {source}" for part, source in begun.items()) or NONE)
        rows.append(row(escape(stage.title), cells, wide=begins))
    if not rows:
        return ""
    drawn = table("Training of each model", [*heads, "Weights begin"] if begins else heads, rows)
    return f'<div class="training">{drawn}</div>' if begins else drawn
