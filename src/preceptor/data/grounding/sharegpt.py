"""Read dialogues in the formats of ShareGPT and LLaMA-Factory, as a JSON list or JSONL.

A record has `conversations` (``{"from": "human" | "gpt", "value": text}``) or `messages` (``{"role": "user" |
"assistant", "content": text}``), and `images` or `image`. Our own optional keys are `id`, `task`, `modality`, `group`
and `split`. ``<image>`` marks are removed, because images always precede the text.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any, get_args

from preceptor.data.grounding.box_policy import Policy, apply_to_turns
from preceptor.data.grounding.med_grit import modality_of, task_of
from preceptor.data.images import require_images, resolve_image
from preceptor.data.splits import SPLIT_NAMES, cut
from preceptor.data.texts import read_text
from preceptor.data.types import Dialogue, GroundingDataset, GroundingTask, Split
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
    """Read a file of dialogues.

    If no record has a `split`, splits are cut by group (`group`, or the first image) in fractions of all rows. `task`
    and `modality` default to the values inferred from the boxes and from the name of the first image.

    Args:
        file: JSON or JSONL file.
        images: Folder of the images, by default the folder of the file.
        boxes: What to do with a record that has a faulty box (see `data.grounding.boxes.apply_policy`).
        validation_fraction: Fraction of the rows in the validation split.
        test_fraction: Fraction of the rows in the test split.
        seed: Seed of the cuts.
        answered: Whether every question must have an answer. Otherwise a record with an unanswered question is in the
            split `unlabelled`, and the missing answer is an empty text.

    Raises:
        UserError: a record or box is invalid. The message names the place.
    """
    root = images or file.parent
    faults: Counter[str] = Counter()
    faulty: list[str] = []
    rows: list[tuple[Dialogue, bool | None]] = []
    places: dict[Path, str] = {}
    dropped = 0
    for place, record in _records(file):
        turns = _turns(record, place, answered)
        checked_turns = apply_to_turns(turns, boxes, place, faults, faulty)
        if checked_turns is None:
            dropped += 1
            continue
        paths = tuple(resolve_image(root, name, place) for name in _images(record, place))
        for path in paths:
            places.setdefault(path, place)
        first = paths[0].stem if paths else ""
        task = record.get("task") or task_of(checked_turns)
        if task not in get_args(GroundingTask):
            raise UserError(f"{place}: task {task!r} is not known{nearest(str(task), get_args(GroundingTask))}")
        given_split = record.get("split")
        if given_split is not None and str(given_split) not in SPLIT_NAMES:
            raise UserError(f"{place}: split {given_split!r} is not known{nearest(str(given_split), SPLIT_NAMES)}")
        split: Split = SPLIT_NAMES[str(given_split)] if given_split is not None else "train"
        labelled = all(answer for _, answer in checked_turns)
        if not labelled:
            split = "unlabelled"
        group = str(record.get("group") or first or record.get("id") or place)
        id = str(record.get("id") or f"row-{len(rows) + dropped + 1}")
        modality = str(record.get("modality") or modality_of(first))
        rows.append(
            (
                Dialogue(id, paths, checked_turns, task, modality, group, split),
                given_split is not None if labelled else None,
            )
        )
    require_images(places)
    splits = {given for _, given in rows if given is not None}
    if len(splits) > 1:
        raise UserError(f"{file}: some records have a split and others do not; give every record a split, or none")
    repeated = [id for id, count in Counter(d.id for d, _ in rows).items() if count > 1]
    if repeated:
        raise UserError(f"{file}: several records have the id {repeated[0]!r}; make ids unique")
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
            records = []
            for number, line in lines:
                place = f"{file}:{number}"
                records.append((place, json.loads(line)))
        else:
            place = str(file)
            entries = json.loads(text)
            if not isinstance(entries, list):
                raise UserError(f"{file} must be a list of records; for one record per line, name the file .jsonl")
            records = [(f"{file}, record {number}", entry) for number, entry in enumerate(entries)]
    except ValueError as error:
        raise UserError(f"{place}: invalid JSON ({error})") from error
    if not records:
        raise UserError(f"{file} contains no record")
    for place, record in records:
        if not isinstance(record, dict):
            raise UserError(f"{place}: {type(record).__name__} instead of a JSON object")
    return records


def _turns(record: dict[str, Any], place: str, answered: bool) -> list[list[str]]:
    """Return the pairs of question and answer. A system message is prepended to the first question.

    Unless `answered` is set, missing answers are empty texts.
    """
    entries = record.get("conversations", record.get("messages"))
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{place}: the record needs a non-empty list 'conversations' or 'messages'")
    system, open_question = "", None
    turns: list[list[str]] = []
    for entry in entries:
        speaker = entry.get("from", entry.get("role")) if isinstance(entry, dict) else None
        content = entry.get("value", entry.get("content")) if isinstance(entry, dict) else None
        if speaker not in SPEAKERS or not isinstance(content, str):
            raise UserError(
                f"{place}: {json.dumps(entry, ensure_ascii=False)[:80]} is not a turn; write "
                '{"from": "human" or "gpt", "value": text}'
            )
        role = SPEAKERS[speaker]
        text = content.replace(MARK, "").strip()
        if role == "system":
            system = f"{text}\n" if text else ""
        elif role == "question" and open_question is not None and text and not answered:
            turns.append([open_question, ""])
            open_question = text
        elif (role == "question") == (open_question is not None) or not text:
            raise UserError(f"{place}: questions and answers must alternate, start with a question, and not be empty")
        elif role == "question":
            open_question = (system if not turns else "") + text
        else:
            turns.append([str(open_question), text])
            open_question = None
    if open_question is not None and not answered:
        turns.append([open_question, ""])
    elif open_question is not None or not turns:
        raise UserError(f"{place}: the last question has no answer")
    return turns


def _images(record: dict[str, Any], place: str) -> list[str]:
    value = record.get("images", record.get("image", []))
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{place}: 'images' must be a list of file names")
    return names


def read(config: Any, scratch: Path) -> GroundingDataset:
    """Read the file of a recipe's data settings."""
    if config.root is None:
        raise UserError("data.name=sharegpt needs data.root=FILE, the JSON or JSONL file of the dialogues")
    return read_sharegpt(
        Path(config.root),
        Path(config.images) if config.images else None,
        boxes=config.boxes,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )
