"""The report of a run: one HTML page that needs nothing but itself. No script, no request, no file path."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import yaml

from preceptor.config import Recipe, load_recipe
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.report import scores, words
from preceptor.report.contents import RunRecord, look, read_run
from preceptor.report.figures import Line, line_chart
from preceptor.report.markup import chip, document, escape, row, table
from preceptor.report.samples import Question, Shown, questions
from preceptor.report.words import NONE, percent
from preceptor.types import VqaData

log = logging.getLogger("preceptor")

BOOKKEEPING = {"step", "epoch", "lr", "grad_norm", "loss", "samples/s"}
HIDDEN = "(local path, not shown)"


def write_report(run: Path, *, data: VqaData | None = None, recipe: Recipe | None = None) -> Path:
    """Write RUN/report.html and return its path.

    Without `recipe` that of the run folder is used; without `data` the data set is read where the recipe says, and the
    questions are shown without images where it cannot be. Raises UserError where `run` is no run folder.
    """
    record = read_run(run)
    if recipe is None:
        recipe = _saved_recipe(run)
    if data is None and recipe is not None:
        data = _find_data(recipe, run)
    number = recipe.report.questions if recipe else 10
    page = render(record, data, recipe, questions(record, data, recipe, number))
    path = run / "report.html"
    write_text(path, page)
    return path


def render(run: RunRecord, data: VqaData | None, recipe: Recipe | None, shown: list[Question]) -> str:
    """Return the page."""
    title = recipe.name if recipe else run.folder.resolve().name
    sections = [
        ("finding", "What was found", scores.finding(run)),
        ("accuracy", "Accuracy", scores.accuracy(run)),
        ("types", "By type of question", scores.question_types(run)),
        ("training", "Training", _training(run)),
        ("confusion", "Frequent answers", scores.confused_answers(run)),
        ("questions", "Questions", _questions(run, shown)),
        ("record", "Record", _record(run, recipe)),
    ]
    return document(f"{title} · Preceptor report", _header(run, title, recipe), _notes(run, data), sections)


def _saved_recipe(run: Path) -> Recipe | None:
    try:
        return load_recipe(str(run / "recipe.yaml"))
    except UserError as error:
        log.warning("the report goes without the recipe: %s", error)
        return None


def _find_data(recipe: Recipe, run: Path) -> VqaData | None:
    from preceptor.data.read import read_data

    try:
        return read_data(recipe.data, run / "data")
    except UserError as error:
        log.warning("the report goes without images: %s", error)
        return None


def _header(run: RunRecord, title: str, recipe: Recipe | None) -> str:
    sizes = run.first("data") or {}
    facts = [" / ".join(escape(sizes[key]) for key in ("name", "split") if sizes.get(key))]
    counted = [part for part in ("train", "validation", "test") if sizes.get(part)]
    facts += [f"{sizes[part]:,} {part}".replace(",", words.SPACE) for part in counted]
    described = f'<p class="described">{escape(recipe.description)}</p>' if recipe and recipe.description else ""
    return f'<h1>{escape(title)}</h1>{described}<p class="facts">{" · ".join(fact for fact in facts if fact)}</p>'


def _notes(run: RunRecord, data: VqaData | None) -> str:
    sentences = list(dict.fromkeys([*run.notes, *(data.notes if data else []), *words.warnings(run, data)]))
    items = "".join(f"<li>{escape(sentence)}</li>" for sentence in sentences)
    if words.leaks(run, data):
        banner = "<strong>Leaking split: these scores flatter.</strong> Answers of test questions occur in training."
        return f'<aside class="banner leak" aria-label="Warning"><p>{banner}</p><ul>{items}</ul></aside>'
    return f'<aside class="banner" aria-label="Notes"><ul>{items}</ul></aside>' if items else ""


# --- training ---------------------------------------------------------------------------------------------------------


def _training(run: RunRecord) -> str:
    charts = [_validation(run)]
    terms = dict.fromkeys(key for stage in run.stages for line in stage.metrics for key in line)
    for term in sorted(terms, key=lambda term: (term != "label", term != "output")):
        if term in BOOKKEEPING or term.startswith("validation/"):
            continue
        lines = [
            Line(stage.title, stage.kind, [(line["step"], line[term]) for line in stage.metrics if term in line])
            for stage in run.stages
        ]
        charts.append(_chart(f"Loss term: {term}", line_chart(f"Loss term {term} by step", lines, x_title="step")))
    kinds = {stage.kind: stage.title for stage in reversed(run.stages)}
    legend = "".join(f'<li><i class="stroke {escape(kind)}"></i>{escape(title)}</li>' for kind, title in kinds.items())
    drawn = "".join(charts)
    figures = f'<ul class="legend">{legend}</ul><div class="charts">{drawn}</div>' if drawn else ""
    return figures + _effort(run)


def _validation(run: RunRecord) -> str:
    lines = []
    for stage in run.stages:
        scored = [(line["step"], line["validation/score"]) for line in stage.metrics if "validation/score" in line]
        best = look(stage.results, "training", "kept_step")
        lines.append(Line(stage.title, stage.kind, scored, best))
    chart = line_chart("Validation accuracy by step", lines, x_title="step", percent=True)
    return _chart("Validation accuracy (ring: chosen step)", chart)


def _chart(title: str, svg: str) -> str:
    return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>" if svg else ""


def _effort(run: RunRecord) -> str:
    rows = []
    for stage in run.stages:
        t = look(stage.results, "training")
        if not t:
            continue
        numbers = [t.get("steps"), t.get("kept_step"), words.duration(t.get("seconds")), t.get("samples_per_second")]
        numbers += [look(stage.results, "seed"), len(t.get("skipped") or [])]
        begun = look(stage.results, "provenance") or {}
        origin = "; ".join(f"{part}: {source}" for part, source in begun.items()) or NONE
        cells = [NONE if number is None else str(number) for number in numbers]
        rows.append(row(escape(stage.title), [*cells, origin], wide=True))
    heads = ["Model", "Steps", "Chosen step", "Time", "Samples/s", "Seed", "Rows left out", "Weights begin"]
    return f'<div class="training">{table("Training of each model", heads, rows)}</div>' if rows else ""


# --- questions --------------------------------------------------------------------------------------------------------


def _questions(run: RunRecord, shown: list[Question]) -> str:
    if not shown:
        return ""
    mapped = any(answer.picture for question in shown for answer in question.shown)
    about = (
        f"Chosen by rule, not by hand: correct and wrong (of \u201c{escape(run.focus.title)}\u201d), open and closed, "
        "types of question and images in turn; among equals the hash of the id decides."
    )
    if mapped:
        about += (
            " The colours are the class activation map (Grad-CAM) of the answer given: red where the image spoke most "
            "for it, plain where it did not, each map scaled to its own largest value. A map shows what a model used, "
            "not where a finding is."
        )
    if not any(question.picture for question in shown):
        about += " The images are not shown: the data set was not found."
    scale = '<p class="scale" aria-hidden="true"><span>0</span><i></i><span>largest</span></p>' if mapped else ""
    return f'<p class="small">{about}</p>{scale}' + "".join(_question(question) for question in shown)


def _question(question: Question) -> str:
    text = question.text or f"Question {question.id}"
    facts = [question.answer_type, question.question_type, f"id {question.id}"]
    figures = ""
    if question.picture:
        picture = f'<img src="{question.picture}" alt="The image of question {escape(question.id)}, as it is">'
        figures = f"<figure>{picture}<figcaption><b>Image</b></figcaption></figure>"
    figures += "".join(_shown(question, answer) for answer in question.shown)
    target = f"Correct answer: <b>{escape(question.target)}</b>"
    about = " · ".join([target, *(escape(fact) for fact in facts if fact)])
    head = f'<h3>{escape(text)}</h3><p class="facts">{about}</p>'
    return f'<article class="question">{head}<div class="answers">{figures}</div></article>'


def _shown(question: Question, shown: Shown) -> str:
    alt = f"Class activation map of {shown.stage.title} on question {question.id}: {shown.where}"
    picture = f'<img src="{shown.picture}" alt="{escape(alt)}">' if shown.picture else ""
    verdict = '<span class="yes">✓ correct</span>' if shown.correct else '<span class="no">✗ wrong</span>'
    sure = f" · {percent(shown.probability)}" if shown.probability is not None else ""
    return (
        f"<figure>{picture}<figcaption>{chip(shown.stage.kind, shown.stage.title)}"
        f"<br><b>{escape(shown.answer) or NONE}</b><br>{verdict}{sure}</figcaption></figure>"
    )


# --- record -----------------------------------------------------------------------------------------------------------


def _record(run: RunRecord, recipe: Recipe | None) -> str:
    facts: dict[str, Any] = {}
    if fingerprint := run.first("data", "sha256"):
        facts["Data (SHA-256 of the rows)"] = fingerprint
    seeds = {stage.title: look(stage.results, "seed") for stage in run.stages}
    if named := [f"{title} {seed}" for title, seed in seeds.items() if seed is not None]:
        facts["Seeds"] = ", ".join(named)
    if machine := run.first("machine"):
        facts["Machine"] = ", ".join(f"{key} {value}" for key, value in machine.items())
    seconds = [look(stage.results, "training", "seconds") for stage in run.stages]
    if any(value is not None for value in seconds):
        facts["Training time, all models"] = words.duration(sum(value or 0 for value in seconds))
    if versions := look(run.results, "versions") or run.first("versions"):
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    for stage in run.stages:
        if skipped := look(stage.results, "training", "skipped"):
            facts[f"Rows left out, {stage.title}"] = ", ".join(map(str, skipped))
    listed = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in facts.items())
    found = f'<dl class="facts-list">{listed}</dl>' if listed else ""
    if recipe is not None:
        text = yaml.safe_dump(_without_paths(recipe.model_dump(mode="json")), sort_keys=False, allow_unicode=True)
        found += f'<details><summary>Recipe</summary><pre tabindex="0">{escape(text)}</pre></details>'
    return found


def _without_paths(value: Any, key: str = "") -> Any:
    """Return a recipe with every path on this machine replaced: a page is passed on, and paths may name people."""
    if isinstance(value, dict):
        return {name: _without_paths(inner, name) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner, key) for inner in value]
    names_path = key in ("output", "root", "cache", "runs", "init")
    if isinstance(value, str) and (names_path or value.startswith((".", "/", "~", "\\")) or value[1:3] == ":\\"):
        return HIDDEN
    return value
