"""Images with true and predicted boxes over them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.data.grounding.boxes import SIDE, find_boxes
from preceptor.data.images import load_image
from preceptor.data.types import GroundingDataset
from preceptor.grounding.metrics import row_score
from preceptor.report.contents import RunRecord
from preceptor.report.markup import escape
from preceptor.vqa.report_samples import data_uri

LONGEST_SIDE = 420
ABOUT = (
    "Of the test dialogues that ask for boxes, in the order of the last model's score, then of their ids: the worst, "
    "the best and some between, evenly apart."
)


def pictures(run: RunRecord, data: GroundingDataset, number: int) -> str:
    """Return `number` images with the boxes of every stage; "" where there is nothing to draw."""
    if not run.protocols or number == 0:
        return ""
    protocol = run.protocols[0]
    kind = protocol.rpartition("/")[2]
    grounding = [row for row in run.focus.rows.get(protocol, []) if row["task"] == "vg"]
    scored = [(score, row["id"], row) for row in grounding if (score := row_score(row, kind)) is not None]
    ordered = [row for _, _, row in sorted(scored, key=lambda entry: entry[:2])]
    chosen = _evenly(ordered, number)
    dialogues = {dialogue.id: dialogue for dialogue in data.samples}
    said = {stage.kind: {row["id"]: row for row in stage.rows.get(protocol, [])} for stage in run.stages}
    titles = {stage.kind: stage.title for stage in run.stages}
    figures = []
    for row in chosen:
        id = row["id"]
        if id in dialogues and dialogues[id].images:
            answers = {kind: rows[id] for kind, rows in said.items() if id in rows}
            figures.append(_figure(row, dialogues[id].images[0], answers, titles))
    if not figures:
        return ""
    keys = "".join(
        f'<li><svg viewBox="0 0 34 10" aria-hidden="true"><line class="{escape(name)}" x1="2" x2="32" y1="5" y2="5"/>'
        f"</svg>{escape(title)}</li>"
        for name, title in (("true", "true box"), *titles.items())
    )
    return f'<p class="small">{ABOUT}</p><ul class="key">{keys}</ul><div class="found">{"".join(figures)}</div>'


def _evenly(rows: Sequence[Mapping[str, Any]], number: int) -> list[Mapping[str, Any]]:
    if len(rows) <= number:
        return list(rows)
    if number == 1:
        return [rows[0]]
    return [rows[round(i * (len(rows) - 1) / (number - 1))] for i in range(number)]


def _figure(row: Mapping[str, Any], path: Any, said: Mapping[str, Mapping[str, Any]], titles: Mapping[str, str]) -> str:
    image = load_image(path)
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    width, height = image.size
    drawn = _boxes(row["target"], "true", width, height)
    drawn += "".join(_boxes(answer["prediction"], kind, width, height) for kind, answer in said.items())
    words = "; ".join(f"{titles[kind]}: {answer['prediction'] or 'nothing'}" for kind, answer in said.items())
    svg = (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(row["question"])} {escape(words)}">'
        f'<image href="{data_uri(image)}" width="{width}" height="{height}"/>{drawn}</svg>'
    )
    listed = "".join(
        f"<br><b>{escape(titles[kind])}</b> {escape(plain(answer['prediction']))}" for kind, answer in said.items()
    )
    caption = f"<q>{escape(plain(row['question']))}</q><br><b>True</b> {escape(plain(row['target']))}{listed}"
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def _boxes(text: str, kind: str, width: int, height: int) -> str:
    parts = []
    for found in find_boxes(text):
        if found.box is None:
            continue
        x0, x1 = (min(SIDE, max(0, x)) * width / SIDE for x in (found.box[0], found.box[2]))
        y0, y1 = (min(SIDE, max(0, y)) * height / SIDE for y in (found.box[1], found.box[3]))
        shape = f'x="{min(x0, x1):.1f}" y="{min(y0, y1):.1f}" width="{abs(x1 - x0):.1f}" height="{abs(y1 - y0):.1f}"'
        parts.append(f'<rect class="{escape(kind)}" {shape}/>')
    return "".join(parts)


def plain(text: str) -> str:
    """Return a text with the marks of names and boxes written as people would."""
    for mark in ("<|object_ref_start|>", "<|object_ref_end|>", "<ref>", "</ref>"):
        text = text.replace(mark, "")
    for mark in ("<|box_start|>", "<box>"):
        text = text.replace(mark, " [")
    for mark in ("<|box_end|>", "</box>"):
        text = text.replace(mark, "]")
    return " ".join(text.split()) or "(nothing)"
