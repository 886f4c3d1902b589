"""The report of a run: one HTML page that needs nothing but itself. No script, no request, no file path."""

from __future__ import annotations

import logging
from pathlib import Path

from preceptor.data.types import Dataset, Sample
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.recipe import read_recipe, validate
from preceptor.report import words
from preceptor.report.contents import RunRecord, read_run
from preceptor.report.markup import banner, chip, document, escape
from preceptor.report.record import heading, record
from preceptor.report.training import training
from preceptor.report.words import NONE, percent
from preceptor.vqa import report_scores as scores
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.report_samples import AnswerView, Question, questions

log = logging.getLogger("preceptor")


def write_report(run: Path, *, data: Dataset[Sample] | None = None, recipe: VqaRecipe | None = None) -> Path:
    """Write RUN/report.html and return its path.

    Without `recipe` that of the run folder is used; without `data` the data set is read where the recipe says, and the
    questions are shown without images where it cannot be. Raises UserError where `run` is no run folder.
    """
    read = read_run(run)
    if recipe is None:
        recipe = _saved_recipe(run)
    if data is None and recipe is not None:
        data = _find_data(recipe, run)
    number = recipe.report.questions if recipe else 10
    page = render(read, data, recipe, questions(read, data, recipe, number))
    path = run / "report.html"
    write_text(path, page)
    return path


def render(run: RunRecord, data: Dataset[Sample] | None, recipe: VqaRecipe | None, shown: list[Question]) -> str:
    """Return the page."""
    title = recipe.name if recipe else run.folder.resolve().name
    sections = [
        ("finding", "What was found", scores.finding(run)),
        ("accuracy", "Accuracy", scores.accuracy(run)),
        ("types", "By type of question", scores.question_types(run)),
        ("training", "Training", training(run)),
        ("confusion", "Frequent answers", scores.confused_answers(run)),
        ("questions", "Questions", _questions(run, shown)),
        ("record", "Record", record(run, recipe)),
    ]
    return document(f"{title} · Preceptor report", heading(run, title, recipe), _notes(run, data), sections)


def _saved_recipe(run: Path) -> VqaRecipe | None:
    try:
        return validate(*read_recipe(str(run / "recipe.yaml")), VqaRecipe)
    except UserError as error:
        log.warning("the report goes without the recipe: %s", error)
        return None


def _find_data(recipe: VqaRecipe, run: Path) -> Dataset[Sample] | None:
    from preceptor.vqa.data import read_data

    try:
        return read_data(recipe.data, run / "data")
    except UserError as error:
        log.warning("the report goes without images: %s", error)
        return None


def _notes(run: RunRecord, data: Dataset[Sample] | None) -> str:
    sentences = [*run.notes, *(data.notes if data else []), *words.warnings(run, data)]
    return banner(sentences, words.LEAKING if words.leaks(run, data) else None)


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


def _shown(question: Question, shown: AnswerView) -> str:
    alt = f"Class activation map of {shown.stage.title} on question {question.id}: {shown.where}"
    picture = f'<img src="{shown.picture}" alt="{escape(alt)}">' if shown.picture else ""
    verdict = '<span class="yes">✓ correct</span>' if shown.correct else '<span class="no">✗ wrong</span>'
    sure = f" · {percent(shown.probability)}" if shown.probability is not None else ""
    return (
        f"<figure>{picture}<figcaption>{chip(shown.stage.kind, shown.stage.title)}"
        f"<br><b>{escape(shown.answer) or NONE}</b><br>{verdict}{sure}</figcaption></figure>"
    )
