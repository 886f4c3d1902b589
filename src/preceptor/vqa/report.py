"""The report of a VQA run: one HTML page, and the tables that the terminal shows too. It reads only the run folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.files import write_text
from preceptor.report.contents import (
    RunRecord,
    first_value,
    get_nested,
    protocols_of,
    read_run,
    stage_kind,
    stage_title,
    stages_of,
)
from preceptor.report.format import SPACE, bounds, count, difference_sentence, interval, p_value, percent
from preceptor.report.image_reliance import image_reliance_table
from preceptor.report.page import Bar, Bars, Details, Fragment, Page, Section, Text
from preceptor.report.pictures import data_uri, read_figures
from preceptor.report.sections import cost_table, heading, record_section, skipped_note, training_section
from preceptor.report.tables import Table
from preceptor.vqa import metrics
from preceptor.vqa.metrics import OTHER, confusion

FREQUENT_ANSWERS = 10
MOST_QUESTION_TYPES = 12
SUBJECTS = {"distilled": "The distilled student", "baseline": "The baseline", "teacher": "The teacher"}
BASELINES = {
    "majority": "Most frequent answer",
    "question_only": "Question only, without the image",
    "look_up": "Nearest training question",
    "look_up_same_image": "Nearest question on the same image",
    "linear": "Linear model of question words and frozen image features",
}
METRICS = {"accuracy": "Accuracy", "bleu": "BLEU", "vqa_soft": "VQA accuracy"}
LEAK = "Leaking split: these scores are too high. Answers of test questions occur in training."


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the files of the run folder and return its path.

    Raises UserError if `run` is not a run folder.
    """
    path = run / "report.html"
    write_text(path, render(read_run(run, fields=metrics.ROW_FIELDS)))
    return path


def render(run: RunRecord) -> str:
    """Return the HTML page."""
    title, facts = heading(run, "Visual question answering", "questions")
    sections = [
        Section("finding", "Result", _finding(run)),
        Section("accuracy", "Accuracy", _accuracy(run)),
        Section("types", "By question type", [question_types(run.document)]),
        training_section(run, score="accuracy", unit="Rows"),
        Section("confusion", "Frequent answers", _confusion(run)),
        Section("questions", "Questions", _questions(run)),
        record_section(run, "rows"),
    ]
    notes = [*run.notes, *_warnings(run), *skipped_note(run, "rows")]
    style = "vqa/templates/report.css"
    return Page(title, facts, sections, notes, LEAK if run.leaking else "", style).render()


# --- tables -----------------------------------------------------------------------------------------------------------


def summary(results: Mapping[str, Any]) -> list[Table]:
    """Return the scores under each protocol, and the size and speed of the models."""
    return [*score_tables(results), cost_table(results, metrics.UNIT)]


def score_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return, for each protocol, the score of every stage and of the baselines.

    A second table has the scores with other images, if these were measured.
    """
    tables = [[_scores(results, protocol), _other_images(results, protocol)] for protocol in protocols_of(results)]
    return [table for pair in tables for table in pair if table]


def _other_images(results: Mapping[str, Any], protocol: str) -> Table:
    metric = METRICS.get(first_value(results, "protocols", protocol, "metric"), "Score")
    found = {
        name: (stage_title(name), get_nested(stage, "image_reliance", protocol) or {})
        for name, stage in stages_of(results).items()
    }
    return image_reliance_table(protocol, metric, found)


def _scores(results: Mapping[str, Any], protocol: str) -> Table:
    rows, keys = [], []
    for name, stage in stages_of(results).items():
        scores = get_nested(stage, "protocols", protocol) or {}
        cells = [percent(scores.get("accuracy")), interval(*_interval(scores))]
        cells += [percent(scores.get("open")), percent(scores.get("closed"))]
        rows.append([stage_title(name), *cells])
        keys.append(stage_kind(name))
    for name, scores in (first_value(results, "baselines", protocol) or {}).items():
        cells = [percent(get_nested(scores, key)) for key in ("accuracy", "open", "closed")]
        rows.append([BASELINES.get(name, name), cells[0], interval(*_interval(scores)), *cells[1:]])
        keys.append("blind")
    ceiling = first_value(results, "protocols", protocol, "ceiling")
    if ceiling is not None:
        rows.append(["Answer ceiling", percent(ceiling), "", "", ""])
        keys.append("ceiling-mark")
    metric = first_value(results, "protocols", protocol, "metric") or "accuracy"
    kinds = [
        f"{kind.title()}{_of(first_value(results, 'protocols', protocol, f'n_{kind}'))}" for kind in ("open", "closed")
    ]
    columns = ["Model", METRICS.get(metric, metric), f"95{SPACE}% interval", *kinds]
    described = first_value(results, "describes", protocol)
    n = first_value(results, "protocols", protocol, "n")
    title = f"{protocol}{_of(n)}{f': {described}' if described else ''}. In{SPACE}%."
    return Table(title, columns, rows, _compared(results, protocol), keys)


def _compared(results: Mapping[str, Any], protocol: str) -> list[str]:
    entry = get_nested(results, "comparison", protocol, "distilled - baseline")
    notes = []
    if entry is not None and (sentence := difference_sentence(entry)):
        p = get_nested(entry, "p_holm") if "p_holm" in entry else get_nested(entry, "p")
        tested = p is not None and bounds(entry)[0] is not None
        grouped = get_nested(entry, "groups") not in (None, get_nested(entry, "n"))
        tests = (
            "the largest of bootstrap, analysis of variance and McNemar's exact test over groups of questions"
            if grouped
            else "the larger of bootstrap and McNemar's exact test"
        )
        test = f" p = {p_value(p)}, {tests}." if tested else ""
        test = test.replace("= <", "<")
        notes.append(f"Distilled minus baseline, on the same questions. {sentence}{test}")
    kept = get_nested(results, "comparison", protocol, "distilled / teacher")
    if kept is not None:
        notes.append(f"Distilled / teacher: {percent(kept, unit=True)}.")
    return notes


def _interval(scores: Mapping[str, Any]) -> tuple[float | None, float | None]:
    return bounds({**(get_nested(scores, "interval") or {}), "n": get_nested(scores, "n")})


def _of(n: Any) -> str:
    return f" (n{SPACE}={SPACE}{n})" if n is not None else ""


def question_types(results: Mapping[str, Any]) -> Table:
    """Return the accuracy of each stage by question type, the frequent types first; rare ones are pooled."""
    protocol = next(iter(protocols_of(results)), "")
    stages = stages_of(results)
    by_stage = [
        {
            name: scores
            for name, scores in (get_nested(stage, "protocols", protocol, "question_types") or {}).items()
            if get_nested(scores, "n") and get_nested(scores, "accuracy") is not None
        }
        for stage in stages.values()
    ]
    counts = {name: scores["n"] for types in by_stage for name, scores in types.items()}
    ordered = sorted(counts, key=lambda name: (-counts[name], name))
    groups = [(name, [name]) for name in ordered[:MOST_QUESTION_TYPES]]
    if rare := ordered[MOST_QUESTION_TYPES:]:
        groups.append((f"{len(rare)} rarer types", rare))
    rows = []
    for title, names in groups:
        cells = []
        for types in by_stage:
            known = [types[name] for name in names if name in types]
            total = sum(scores["n"] for scores in known)
            cells.append(percent(sum(scores["accuracy"] * scores["n"] for scores in known) / total if total else None))
        rows.append([title, str(sum(counts[name] for name in names)), *cells])
    columns = ["Question type", "Questions", *map(stage_title, stages)]
    return Table(f"Accuracy in{SPACE}%, {protocol}", columns, rows)


# --- sections ---------------------------------------------------------------------------------------------------------


def headline(run: RunRecord) -> list[str]:
    """Return the main result in sentences, the most important first."""
    protocol, focus = run.protocol, run.focus
    accuracy = focus.score(protocol, "accuracy")
    if protocol is None or accuracy is None:
        return ["This run has no scores yet."]
    subject = SUBJECTS.get(focus.kind, "The model")
    teacher, baseline = run.stage("teacher"), run.stage("baseline")
    size = []
    if parameters := focus.results.get("parameters"):
        size.append(f"{count(parameters)} parameters".replace(f"{SPACE}M", f"{SPACE}million"))
        larger = teacher.results.get("parameters") if teacher and focus.kind != "teacher" else None
        size += [f"{parameters / larger:.0%} of the teacher's".replace("%", f"{SPACE}%")] if larger else []
    low, high = _interval(get_nested(focus.results, "protocols", protocol) or {})
    within = f" (95{SPACE}% interval {interval(low, high)}{SPACE}%)" if low is not None else ""
    n = focus.score(protocol, "n")
    of = f" of {n} question{'' if n == 1 else 's'}" if n else " of the questions"
    described = f" ({', '.join(size)})" if size else ""
    found = [f"{subject}{described} answers {percent(accuracy, unit=True)}{of} correctly{within}."]
    before = baseline.score(protocol, "accuracy") if baseline and focus.kind == "distilled" else None
    if before is not None:
        found.append(f"The baseline, the same student without distillation, answers {percent(before, unit=True)}.")
        found.append(difference_sentence(get_nested(run.results, "comparison", protocol, "distilled - baseline")))
    kept = get_nested(run.results, "comparison", protocol, "distilled / teacher")
    if kept is not None and teacher:
        reference = percent(teacher.score(protocol, "accuracy"), unit=True)
        found.append(f"It keeps {percent(kept, unit=True)} of the teacher's {reference}.")
    return [sentence for sentence in found if sentence]


def _finding(run: RunRecord) -> list[Any]:
    first, *others = headline(run)
    blocks: list[Any] = [Text(first, "headline"), Text(" ".join(others))]
    protocol = run.protocol
    if protocol is None:
        return blocks
    bars = [
        Bar(BASELINES.get(name, name), "blind", get_nested(scores, "accuracy"), *_interval(scores))
        for name, scores in (run.first("baselines", protocol) or {}).items()
    ]
    for stage in sorted(run.stages, key=lambda stage: stage.kind == "teacher"):
        low, high = _interval(get_nested(stage.results, "protocols", protocol) or {})
        bars.append(Bar(stage.title, stage.kind, stage.score(protocol, "accuracy"), low, high))
    ceiling = run.first("protocols", protocol, "ceiling")
    caption = "Share of test questions answered correctly"
    caption += (
        f"; whiskers are 95{SPACE}% intervals over questions." if any(bar.low is not None for bar in bars) else "."
    )
    if ceiling is not None:
        caption += (
            f" The dashed line is the answer ceiling: {percent(ceiling, unit=True)} of the questions have an answer "
            "that is a class of the models."
        )
    return [*blocks, Bars(bars, f"{caption} Protocol {protocol}.", ceiling)]


def _accuracy(run: RunRecord) -> list[Any]:
    measures = []
    for protocol in run.protocols:
        scored = [(stage, get_nested(stage.results, "protocols", protocol) or {}) for stage in run.stages]
        rows = [
            [stage.title, *(percent(scores.get(key)) for key in ("macro", "f1", "bleu"))]
            for stage, scores in scored
            if scores
        ]
        keys = [stage.kind for stage, scores in scored if scores]
        measures.append(Table(protocol, ["Model", "Mean over types", "Token F1", "BLEU"], rows, keys=keys))
    return [*summary(run.document), Details("Further measures", measures)]


def _warnings(run: RunRecord) -> list[str]:
    """Warn of a model that is no better than a baseline without the image, or than the linear model."""
    protocol = run.protocol or ""
    accuracy = run.focus.score(protocol, "accuracy")
    known = {
        name: value
        for name, scores in (run.first("baselines", protocol) or {}).items()
        if (value := get_nested(scores, "accuracy")) is not None
    }
    linear = known.pop("linear", None)
    best = max(known, key=lambda name: known[name], default=None)
    rivals = []
    if best is not None:
        rivals.append((f"Without the image, the baseline \u201c{BASELINES.get(best, best).lower()}\u201d", known[best]))
    if linear is not None:
        rivals.append(("The linear model of question words and frozen image features", linear))
    return [
        f"{name} answers {percent(value, unit=True)}, which is not less than the model's "
        f"{percent(accuracy, unit=True)}."
        for name, value in rivals
        if accuracy is not None and value >= accuracy
    ]


def _confusion(run: RunRecord) -> list[Any]:
    protocol = next((name for name in run.protocols if run.focus.rows.get(name)), None)
    if protocol is None:
        return []
    labels, matrix = confusion(run.focus.rows[protocol], FREQUENT_ANSWERS)  # type: ignore[arg-type]
    rows = []
    for index, label in enumerate(labels):
        total = max(1, int(matrix[index].sum()))
        cells = [
            {"count": number, "share": number / total, "correct": column == index and label != OTHER}
            for column, number in enumerate(matrix[index].tolist())
        ]
        rows.append({"label": label, "cells": cells})
    about = (
        f"{run.focus.title}, {protocol}. Rows are the correct answers, columns the predicted ones. The shade is the "
        "share of the row; outlined cells are correct."
    )
    return [Text(about, "small"), Fragment("vqa/templates/confusion.html.j2", {"labels": labels, "rows": rows})]


def _questions(run: RunRecord) -> list[Any]:
    """Return the stored questions with the answer and the class activation map of every model."""
    protocol = next((name for name in run.protocols if run.focus.rows.get(name)), "")
    stages = [stage for stage in run.stages if stage.name == stage.kind]  # only the first of an ensemble of teachers
    rows = {stage.name: {str(row.get("id")): row for row in stage.rows.get(protocol, [])} for stage in stages}
    figures = {
        stage.name: {entry["id"]: entry for entry in read_figures(stage.folder).get("questions", [])}
        for stage in stages
    }
    questions = []
    for id, entry in figures.get(run.focus.name, {}).items():
        answers = []
        for stage in stages:
            row, stored = rows[stage.name].get(id), figures[stage.name].get(id, {})
            if row is None:
                continue
            probability = row.get("probability")
            answers.append(
                {
                    "key": stage.kind,
                    "title": stage.title,
                    "text": row.get("prediction", ""),
                    "correct": bool(row.get("correct")),
                    "probability": percent(probability, unit=True) if probability is not None else "",
                    "map": data_uri(stage.folder, stored.get("map")),
                    "peak": stored.get("peak", ""),
                }
            )
        facts: Sequence[str] = [fact for fact in (entry.get("answer_type"), entry.get("question_type")) if fact]
        questions.append(
            {
                "id": id,
                "text": entry.get("question", ""),
                "target": " / ".join(entry.get("answers", [])),
                "facts": [*facts, f"id {id}"],
                "image": data_uri(run.focus.folder, entry.get("image")),
                "answers": answers,
            }
        )
    about = (
        "The questions are chosen by a rule that does not look at the predictions: open and closed questions, question "
        "types and images in turn; among equals the hash of the id decides. The colours are the class activation map "
        "(Grad-CAM) of the predicted answer: red where the image speaks most for it, plain where it does not, each map "
        "scaled to its largest value. A map shows what a model used, not where a finding is."
    )
    return [Text(about, "small"), Fragment("vqa/templates/questions.html.j2", questions)] if questions else []
