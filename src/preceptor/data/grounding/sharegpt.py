"""Dialogues in the forms of ShareGPT and LLaMA-Factory, and a user's own: a JSON list or JSONL.

A record has `conversations` (``{"from": "human" | "gpt", "value": text}``) or `messages` (``{"role": "user" |
"assistant", "content": text}``), and `images` or `image`. Of our own are the optional keys `id`, `task`, `modality`,
`group` and `split`. ``<image>`` marks in the first question are taken out: images come before the text.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

from preceptor.data.grounding.boxes import Policy, apply_to_turns
from preceptor.data.grounding.med_grit import modality_of, task_of
from preceptor.data.images import require_images, resolve_image
from preceptor.data.splits import cut
from preceptor.data.texts import read_text
from preceptor.data.types import Dialogue, GroundingDataset, GroundingTask, Split
from preceptor.data.vqa.table import SPLITS
from preceptor.errors import UserError, nearest

SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}
MARK = "<image>"


def read_sharegpt(
    file: Path,
    images: Path | None = None,
    *,
    boxes: Policy = "refuse",
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    answered: bool = True,
) -> GroundingDataset:
    """Read a file of dialogues; image paths are relative to `images`, by default the file's folder.

    Every question must have an answer, unless `answered` is false: a record one of whose questions has none, two
    questions one after the other among them, is then of the split `unlabelled`, with an empty text for the answer.

    Parts are those of `split`; without any, images are divided by their group (`group`, or the first image), by
    fractions of all rows. `task` and `modality` follow from the boxes and the first image's name where they are not
    given.

    Raises:
        UserError: a record or box that is wrong, with its place.
    """
    root = images or file.parent
    faults: Counter[str] = Counter()
    faulty: list[str] = []
    rows: list[tuple[Dialogue, bool | None]] = []
    places: dict[Path, str] = {}
    dropped = 0
    for place, record in _records(file):
        turns = _turns(record, place, answered)
        kept = apply_to_turns(turns, boxes, place, faults, faulty)
        if kept is None:
            dropped += 1
            continue
        paths = tuple(resolve_image(root, name, place) for name in _images(record, place))
        for path in paths:
            places.setdefault(path, place)
        first = paths[0].stem if paths else ""
        task = record.get("task") or task_of(kept)
        if task not in get_args(GroundingTask):
            raise UserError(f"{place}: task {task!r} is not known{nearest(str(task), get_args(GroundingTask))}")
        written = record.get("split")
        if written is not None and str(written) not in SPLITS:
            raise UserError(f"{place}: split {written!r} is not known{nearest(str(written), SPLITS)}")
        split: Split = SPLITS[str(written)] if written is not None else "train"
        labelled = all(answer for _, answer in kept)
        if not labelled:
            split = "unlabelled"
        group = str(record.get("group") or first or record.get("id") or place)
        id = str(record.get("id") or f"row-{len(rows) + dropped + 1}")
        modality = str(record.get("modality") or modality_of(first))
        rows.append(
            (Dialogue(id, paths, kept, task, modality, group, split), written is not None if labelled else None)
        )
    require_images(places)
    splits = {given for _, given in rows if given is not None}
    if len(splits) > 1:
        raise UserError(f"{file}: some records have a split and others do not; give it to all or to none")
    repeated = [id for id, count in Counter(d.id for d, _ in rows).items() if count > 1]
    if repeated:
        raise UserError(f"{file}: id {repeated[0]!r} is given to several records; make ids unique")
    dialogues = [dialogue for dialogue, _ in rows]
    given = True in splits
    if not given:
        dialogues = cut(dialogues, "test", test_fraction, seed, leave=2)
        dialogues = cut(dialogues, "validation", validation_fraction, seed)
    data = GroundingDataset(
        file.stem, "given" if given else "by-group", root, dialogues, faults=dict(faults), faulty=faulty
    )
    if dropped:
        data.notes.append(f"{dropped} records with faulty boxes were left out ({dict(faults)}).")
    return data


def _records(file: Path) -> list[tuple[str, dict[str, Any]]]:
    text = read_text(file, "save the file with the encoding UTF-8")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
    try:
        if file.suffix.lower() == ".jsonl":
            found = []
            for number, line in lines:
                place = f"{file}:{number}"
                found.append((place, json.loads(line)))
        else:
            place = str(file)
            records = json.loads(text)
            if not isinstance(records, list):
                raise UserError(f"{file} must hold a list of records; for one record a line name it .jsonl")
            found = [(f"{file}, record {number}", record) for number, record in enumerate(records)]
    except ValueError as error:
        raise UserError(f"{place}: broken JSON ({error})") from error
    if not found:
        raise UserError(f"{file} holds no record")
    for place, record in found:
        if not isinstance(record, dict):
            raise UserError(f"{place}: {type(record).__name__} instead of a JSON object")
    return found


def _turns(record: dict[str, Any], place: str, answered: bool) -> list[list[str]]:
    """Return the pairs of question and answer; what a system says goes before the first question.

    Unless they must be `answered`, an answer may be missing, and is then empty."""
    entries = record.get("conversations", record.get("messages"))
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{place}: it needs 'conversations' or 'messages', a list that is not empty")
    system, waiting = "", None
    turns: list[list[str]] = []
    for entry in entries:
        speaker = entry.get("from", entry.get("role")) if isinstance(entry, dict) else None
        said = entry.get("value", entry.get("content")) if isinstance(entry, dict) else None
        if speaker not in SPEAKERS or not isinstance(said, str):
            raise UserError(
                f"{place}: {json.dumps(entry, ensure_ascii=False)[:80]} is no turn; write "
                '{"from": "human" or "gpt", "value": text}'
            )
        role = SPEAKERS[speaker]
        text = said.replace(MARK, "").strip()
        if role == "system":
            system = f"{text}\n" if text else ""
        elif role == "question" and waiting is not None and text and not answered:
            turns.append([waiting, ""])
            waiting = text
        elif (role == "question") == (waiting is not None) or not text:
            raise UserError(f"{place}: questions and answers must take turns, beginning with a question, none empty")
        elif role == "question":
            waiting = (system if not turns else "") + text
        else:
            turns.append([str(waiting), text])
            waiting = None
    if waiting is not None and not answered:
        turns.append([waiting, ""])
    elif waiting is not None or not turns:
        raise UserError(f"{place}: the last question has no answer")
    return turns


def _images(record: dict[str, Any], place: str) -> list[str]:
    given = record.get("images", record.get("image", []))
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{place}: 'images' must be a list of file names")
    return names
