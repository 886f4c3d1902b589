"""Read the records of a file of dialogues (see `data.grounding.sharegpt`), with their texts as written."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.grounding.image_marks import MARK, place_images
from preceptor.data.grounding.swift_objects import BBOX, REFERENCE, Objects, read_objects
from preceptor.data.groups import unread_splits
from preceptor.data.identifying_columns import patient_columns
from preceptor.data.images import resolve_image
from preceptor.data.texts import (
    AS_UTF8,
    as_text,
    check_column_names,
    is_given,
    json_lines,
    parse_json,
    read_text,
)
from preceptor.errors import UserError

SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}
OPTIONAL_KEYS = ("id", "task", "modality", "group", "split")
KEYS = {"conversations", "messages", "image", "images", "system", "objects", *OPTIONAL_KEYS}
TURN_KEYS = {"from", "value", "role", "content"}
_IMAGE_KEY = re.compile(
    r"(image|img|imgs|picture|pic|pics|photo|video|audio|frame|scan|dicom|media|file|filename|filepath|path|url)s?"
)
_DIALOGUE_KEY = re.compile(
    r"(conversation|message|dialog|dialogue|chat|turn|history|instruction|input|output|prompt|query|question|answer|"
    r"response|reply|completion|tool|function|caption|text|qa|human|gpt|user|assistant|bbox|bboxes|box|boxes|object)s?"
)
_HARMLESS = {"id", "type", "size", "width", "height", "modality", "count", "source", "hash", "license", "number"}
_FILE_URL = "file://"
_FILE = re.compile(r"\.(png|jpe?g|bmp|tiff?|webp|dcm|dicom|gif|nii|nii\.gz)$", re.IGNORECASE)


@dataclass(frozen=True)
class Record:
    """A record with the texts as they are written."""

    place: str
    cells: Mapping[str, Any]
    system: str
    turns: list[list[str]]
    images: tuple[Path, ...]
    objects: Objects | None = None


def dialogue_rows(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the rows of a file of dialogues with their places: of JSONL, or of a JSON list, as its suffix says."""
    text = read_text(file, AS_UTF8)
    lines_suffix = file.suffix.lower() == ".jsonl"
    if lines_suffix and text.lstrip().startswith("["):
        raise UserError(f"{file} contains a JSON list, not one JSON object per line; rename it to .json")
    if not lines_suffix and _is_json_lines(text):
        raise UserError(f"{file} contains one JSON object per line, not a JSON list; rename it to .jsonl")
    rows: list[tuple[str, Any]]
    if lines_suffix:
        rows = [(f"{file}:{line}", row) for line, row in json_lines(text, str(file))]
    else:
        document = parse_json(text, str(file), "write a list of records, or one record per line in a .jsonl file")
        if not isinstance(document, list):
            raise UserError(f"{file} must be a list of records, or one record per line in a .jsonl file")
        rows = [(f"{file}, record {number}", row) for number, row in enumerate(document)]
    if not rows:
        raise UserError(f"{file} contains no records")
    for place, row in rows:
        if not isinstance(row, dict):
            raise UserError(
                f"{place}: {type(row).__name__} instead of a JSON object with 'conversations' or 'messages'"
            )
    return rows


def _is_json_lines(text: str) -> bool:
    """Return whether the first two lines with text are JSON objects."""
    lines = [line for line in text.split("\n") if line.strip()][:2]
    try:
        return len(lines) > 1 and all(isinstance(json.loads(line), dict) for line in lines)
    except (ValueError, RecursionError):
        return False


def read_record(place: str, cells: dict[str, Any], root: Path, answered: bool) -> Record:
    _check_keys(cells, KEYS, place)
    check_column_names(cells, OPTIONAL_KEYS, place)
    chosen = [key for key in ("conversations", "messages") if is_given(cells.get(key))]
    entries = cells[chosen[0]] if chosen else None
    if len(chosen) != 1 or not isinstance(entries, list) or not entries:
        raise UserError(f"{place}: the record needs one non-empty list, 'conversations' or 'messages'")
    names = _image_names(cells, place)
    system = as_text(cells.get("system"), f"{place}: system")
    messages: list[tuple[str, str]] = []
    inline: list[str] = []
    for entry in entries:
        role, text = _message(entry, inline, place)
        if role == "system":
            if messages or system:
                raise UserError(f"{place}: a system message must be the first message, and the only one of its kind")
            system = text
            if MARK in text:
                raise UserError(f"{place}: the system message contains {MARK}; move it into a question")
        messages.append((role, text))
    if names and inline:
        raise UserError(f"{place}: images are given in the messages and in the record; keep one of them")
    turns = _turns([message for message in messages if message[0] != "system"], place, answered)
    paths = tuple(resolve_image(root, _file_name(name, root), place) for name in names or inline)
    objects = read_objects(cells.get("objects"), [text for turn in turns for text in turn], len(paths), place)
    turns = place_images(turns, len(paths), place, (BBOX, REFERENCE) if objects else ())
    return Record(place, cells, system, turns, paths, objects)


def _message(entry: Any, images: list[str], place: str) -> tuple[str, str]:
    """Return the role and the text of a message, and add the images of its parts to `images`."""
    if isinstance(entry, dict):
        _check_keys(entry, TURN_KEYS, place)
        for one, other in (("from", "role"), ("value", "content")):
            if one in entry and other in entry and entry[one] != entry[other]:
                raise UserError(f"{place}: a message has {one!r} and {other!r}; keep one of them")
        speaker, content = entry.get("from", entry.get("role")), entry.get("value", entry.get("content"))
        if isinstance(content, list):
            content = "".join(_part(part, images, place) for part in content)
        if isinstance(speaker, str) and speaker in SPEAKERS and isinstance(content, str):
            return SPEAKERS[speaker], content
    raise UserError(
        f"{place}: {json.dumps(entry, ensure_ascii=False)[:80]} is not a turn; write "
        '{"from": "human" or "gpt", "value": text}, or "role" user or assistant and "content"'
    )


def _part(part: Any, images: list[str], place: str) -> str:
    """Return the text of one part of a message in the format of OpenAI, a mark for an image."""
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image" and set(part) == {"type"}:
        return MARK
    if kind in ("image", "image_url"):
        value = part.get(kind, part.get("url", part.get("path")))
        name = value.get("url") if isinstance(value, dict) else value
        if isinstance(name, str) and re.match(rf"{_FILE_URL}|(?![a-zA-Z][a-zA-Z+.-]*:)", name):
            images.append(name)
            return MARK
        raise UserError(f"{place}: {str(name)[:60]!r} is not the name of an image file; save the image as a file")
    raise UserError(
        f"{place}: a part of a message of type {str(kind)[:60]!r} is not known; write text, image or image_url"
    )


def _turns(messages: Sequence[tuple[str, str]], place: str, answered: bool) -> list[list[str]]:
    """Return (question, answer) texts with their image marks."""
    turns: list[list[str]] = []
    question: str | None = None
    for role, text in messages:
        has_text = is_given(text.replace(MARK, ""))
        if role == "question" and question is not None and has_text and not answered:
            turns.append([question, ""])
            question = text
        elif (role == "question") == (question is not None) or not has_text:
            raise UserError(f"{place}: questions and answers must alternate, start with a question, and not be empty")
        elif role == "question":
            question = text
        else:
            turns.append([str(question), text])
            question = None
    if question is not None and not answered:
        turns.append([question, ""])
    elif question is not None or not turns:
        raise UserError(f"{place}: the last question has no answer; write it, or remove the record")
    return turns


def _image_names(cells: Mapping[str, Any], place: str) -> list[str]:
    given = [key for key in ("images", "image") if is_given(cells.get(key)) and cells[key] != []]
    if len(given) > 1:
        raise UserError(f"{place}: the record has 'image' and 'images'; keep one of them")
    value = cells[given[0]] if given else []
    names = [_stored_name(name, place) for name in (value if isinstance(value, list) else [value])]
    if not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{place}: 'images' must be a list of file names")
    return names


def _stored_name(value: Any, place: str) -> Any:
    """Return the file name in an image as the library `datasets` stores it, and other values as they are."""
    if not isinstance(value, dict) or value.keys() != {"bytes", "path"}:
        return value
    if value["bytes"]:
        raise UserError(f"{place}: an image is embedded as bytes; save it as a file, and write the name of the file")
    return value["path"]


def _file_name(name: str, root: Path) -> str:
    """Return the name of an image without ``file://``, relative to `root` if it is inside."""
    if not name.startswith(_FILE_URL):
        return name
    path = Path(name.removeprefix(_FILE_URL))
    folder = root.absolute()
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def _words(key: str) -> list[str]:
    return re.findall(r"[a-z]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", key).lower())


def _check_keys(cells: Mapping[str, Any], known: set[str], place: str) -> None:
    """Raise UserError for an unknown key with a value that may be an image, a text or a box of the dialogue."""
    for key in cells.keys() - known:
        value = cells[key]
        if not is_given(value) or value in ([], {}) or isinstance(value, bool | int | float):
            continue
        words = _words(key)
        is_file = isinstance(value, str) and _FILE.search(value)
        looks = any(_IMAGE_KEY.fullmatch(word) or _DIALOGUE_KEY.fullmatch(word) for word in words)
        if is_file or (looks and words[-1] not in _HARMLESS and not patient_columns([key])):
            raise UserError(
                f"{place}: the key {key!r} is not known, and its content may belong to the dialogue; the keys are "
                f"{', '.join(sorted(known))}"
            )


def unknown_keys(records: Sequence[Record], file: Path) -> list[Finding]:
    """Return a finding that lists the keys that are not read, and one for each that seems to name the splits."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(key for key in record.cells if key not in KEYS and not patient_columns([key]))
        for entries in (record.cells.get("conversations"), record.cells.get("messages")):
            for entry in entries or ():
                counts.update(f"{key} of a message" for key in entry if key not in TURN_KEYS)
    findings = []
    for key in list(counts):
        if splits := unread_splits(key, (record.cells.get(key) for record in records)):
            findings.append(splits)
            del counts[key]
    if counts:
        listed = ", ".join(f"{key} ({count})" for key, count in sorted(counts.items()))
        findings.append(Finding((), file, f"keys of the records that are not read: {listed}", "warning"))
    return findings
