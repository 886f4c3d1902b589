"""Read dialogues in the formats of ShareGPT, LLaMA-Factory and OpenAI, as a JSON list or JSONL.

A record has `conversations` (``{"from": "human" | "gpt", "value": text}``) or `messages` (``{"role": "user" |
"assistant", "content": text or list of parts}``), and `images` or `image`. The first message may be of the system.
Optional keys are `id`, `task`, `modality`, `group` and `split`, and a column that names the patient. Marks ``<image>``
give the positions of images (see `data.grounding.image_marks`), boxes may be in any format of
`data.grounding.box_formats`. Every text is stored with boxes in the canonical format.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from preceptor.data.findings import Finding
from preceptor.data.grounding.box_detection import decide_format, require_decision
from preceptor.data.grounding.box_formats import (
    CANONICAL,
    Size,
    convert,
    find_boxes,
    require_format,
    without_boxes,
    written_boxes,
)
from preceptor.data.grounding.box_policy import Policy, apply_to_turns, require_inside, require_unit
from preceptor.data.grounding.box_syntax import may_hold_other_boxes
from preceptor.data.grounding.image_marks import MARK, place_images
from preceptor.data.grounding.med_grit import INFERRED, UNKNOWN, modality_findings, modality_of, task_of
from preceptor.data.groups import (
    examination_columns,
    folder_findings,
    group_by_content,
    group_by_patient,
    identifier_findings,
    patient_columns,
    unread_splits,
    unused_patients,
)
from preceptor.data.images import image_size, require_images, resolve_image
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.splits import SPLIT_NAMES, cut
from preceptor.data.texts import (
    AS_UTF8,
    as_choice,
    as_identifier,
    as_text,
    check_column_names,
    is_given,
    json_lines,
    parse_json,
    read_text,
)
from preceptor.data.types import Dialogue, GroundingDataset, GroundingTask, Split
from preceptor.errors import UserError

SPEAKERS = {"human": "question", "user": "question", "gpt": "answer", "assistant": "answer", "system": "system"}
UNANSWERED, HELD_OUT = "unanswered", "held_out"
"""Tags of a dialogue with an unanswered question (see `read_sharegpt`)."""
OPTIONAL_KEYS = ("id", "task", "modality", "group", "split")
KEYS = {"conversations", "messages", "image", "images", "system", *OPTIONAL_KEYS}
TURN_KEYS = {"from", "value", "role", "content"}
_IMAGE_KEY = re.compile(
    r"(image|img|imgs|picture|pic|pics|photo|video|audio|frame|scan|dicom|media|file|filename|filepath|path|url)s?"
)
_DIALOGUE_KEY = re.compile(
    r"(conversation|message|dialog|dialogue|chat|turn|history|instruction|input|output|prompt|query|question|answer|"
    r"response|reply|completion|tool|function|caption|text|qa|human|gpt|user|assistant|bbox|bboxes|box|boxes|object)s?"
)
_HARMLESS = {"id", "type", "size", "width", "height", "modality", "count", "source", "hash", "license", "number"}
_MARKUP = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?[A-Za-z][\w:-]{0,40}/?>|!\[[^\]\n]*\]\([^)\n]*\)|\{image\}")
_HTML = {"b", "i", "u", "p", "br", "em", "li", "ol", "ul", "sub", "sup", "strong"}
_FILE = re.compile(r"\.(png|jpe?g|bmp|tiff?|webp|dcm|dicom|gif|nii|nii\.gz)$", re.IGNORECASE)


@dataclass(frozen=True)
class _Record:
    """A record with the texts as they are written."""

    place: str
    cells: Mapping[str, Any]
    system: str
    turns: list[list[str]]
    images: tuple[Path, ...]


def read_sharegpt(
    file: Path,
    images: Path | None = None,
    *,
    boxes: Policy = "refuse",
    box_format: str = "auto",
    validation_fraction: float = 0.1,
    test_fraction: float = 0.1,
    seed: int = 0,
    answered: bool = True,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> GroundingDataset:
    """Read a file of dialogues.

    If no record has a `split`, splits are cut by group in fractions of all rows. The group is `group`, else the columns
    that name the patient, which are joined (see `group_by_patient`), else the path of the first image; dialogues that
    share the content of an image are in one group in any case. `task` and `modality` default to the values inferred
    from the boxes and from the name of the first image.

    Args:
        file: JSON or JSONL file.
        images: Folder of the images, by default the folder of the file.
        boxes: What to do with a record that has a faulty box (see `data.grounding.box_policy.apply_policy`).
        box_format: Format of the boxes (see `BOX_FORMATS`). auto: `decide_format` finds it. none: there are no boxes.
        validation_fraction: Fraction of the rows in the validation split.
        test_fraction: Fraction of the rows in the test split.
        seed: Seed of the cuts.
        answered: Whether every question must have an answer. Otherwise a record with an unanswered question is in the
            split `unlabelled`, and the missing answer is an empty text. The splits of the other records do not depend
            on it. Its tag `UNANSWERED` is its place. It has the tag `HELD_OUT` if it names the validation or test
            split, or shares a group or an image with such a record.
        max_bytes: Largest accepted image file, if boxes in pixels need the sizes of the images.
        max_pixels: Largest accepted number of pixels of such an image.

    Raises:
        UserError: a record or box is invalid, or the format of the boxes is not clear. The message names the place.
    """
    root = images or file.parent
    records = [_read_record(place, cells, root, answered) for place, cells in _records(file)]
    places = {path: record.place for record in reversed(records) for path in record.images}
    require_images(places, file)
    data = GroundingDataset(file.stem, "by-group", root, [])
    data.findings += _unknown_keys(records, file)
    data.findings += _text_findings(records, file)
    size_of = cache(partial(image_size, max_bytes=max_bytes, max_pixels=max_pixels))
    note, doubt = _translate(records, box_format, str(file), size_of)
    data.notes += [note] if note else []
    if doubt:
        reason = f"{doubt}; name the format with data.box_format"
        data.findings.append(Finding((), file, reason, "warning"))

    ids, repeated = _ids(records)
    data.findings += repeated
    faults: Counter[str] = Counter()
    rows: list[tuple[Dialogue, Split | None]] = []
    by_id: dict[str, _Record] = {}
    dropped = 0
    for id, record in zip(ids, records, strict=True):
        turns = apply_to_turns(record.turns, boxes, record.place, faults, data.faulty)
        if turns is None:
            dropped += 1
            continue
        rows.append(_dialogue(record, turns, id, root))
        by_id[id] = record
    given = {split is not None for row, split in rows if row.split != "unlabelled"}
    if len(given) > 1:
        raise UserError(f"{file}: some records have a split and others do not; give every record a split, or none")
    patients = _patients(by_id)
    labelled = [row for row, _ in rows if row.split != "unlabelled"]
    dialogues = group_by_content(group_by_patient(labelled, _deciding(patients, by_id), data.notes), data.notes)
    if True not in given:
        dialogues = cut(dialogues, "test", test_fraction, seed, leave=2)
        dialogues = cut(dialogues, "validation", validation_fraction, seed)
    else:
        data.variant = "given"
    if len(dialogues) < len(rows):
        grouped = group_by_content(group_by_patient([row for row, _ in rows], _deciding(patients, by_id)))
        dialogues = _with_unlabelled(dialogues, grouped, [split for _, split in rows])
    data.samples, data.faults = dialogues, dict(faults)
    data.findings += _group_findings(by_id, patients, dialogues)
    data.findings += modality_findings(dialogues)
    if dropped:
        data.notes.append(f"{dropped} records with faulty boxes were left out ({dict(faults)}).")
    return data


def _with_unlabelled(
    labelled: Sequence[Dialogue], grouped: Sequence[Dialogue], splits: Sequence[Split | None]
) -> list[Dialogue]:
    """Return all rows in their order: the labelled ones with their splits, the others tagged if they are held out.

    `grouped` are all rows with groups that the unlabelled ones may join, `splits` are those that their records name.
    """
    with_splits = {row.id: row for row in labelled}
    held_out = {row.group for row in grouped if row.id in with_splits and with_splits[row.id].split != "train"}
    found = []
    for row, given in zip(grouped, splits, strict=True):
        if row.id not in with_splits and (row.group in held_out or given in ("validation", "test")):
            row = replace(row, tags={**row.tags, HELD_OUT: "yes"})
        found.append(with_splits.get(row.id, row))
    return found


def _ids(records: Sequence[_Record]) -> tuple[list[str], list[Finding]]:
    """Return the id of each record, and a finding if the ids are not unique. All records are then numbered."""
    numbered = [f"row-{number}" for number, _ in enumerate(records, start=1)]
    given = [as_identifier(record.cells.get("id"), f"{record.place}: id") for record in records]
    ids = [id or number for id, number in zip(given, numbered, strict=True)]
    repeated = [id for id, count in Counter(ids).items() if count > 1]
    if not repeated:
        return ids, []
    reason = (
        f"{len(repeated)} ids belong to several records, such as {repeated[0]!r}; all records are named by their "
        "number instead, row-1 for the first; make the ids unique to keep them"
    )
    return numbered, [Finding((), None, reason, "warning")]


def _dialogue(
    record: _Record, turns: tuple[tuple[str, str], ...], id: str, root: Path
) -> tuple[Dialogue, Split | None]:
    """Return a dialogue, and the split that its record names."""
    cells, place = record.cells, record.place
    task = as_choice(cells.get("task"), {name: name for name in get_args(GroundingTask)}, f"{place}: task")
    given = as_choice(cells.get("split"), SPLIT_NAMES, f"{place}: split")
    labelled = all(answer for _, answer in turns)
    split: Split = (given or "train") if labelled else "unlabelled"
    group = as_identifier(cells.get("group"), f"{place}: group")
    group = group or _default_group(record, root)
    modality = as_text(cells.get("modality"), f"{place}: modality").lower()
    modality = modality or (modality_of(record.images[0].stem) if record.images else UNKNOWN)
    tags = {} if task else INFERRED
    dialogue = Dialogue(
        id,
        record.images,
        turns,
        task or task_of(turns),
        modality,
        group,
        split,
        tags=tags if labelled else {**tags, UNANSWERED: place},
        system=record.system,
    )
    return dialogue, given


def _default_group(record: _Record, root: Path) -> str:
    """Return the first image, else the id that the record gives, which may be that of several records."""
    if record.images:
        return record.images[0].relative_to(root).as_posix()
    return as_identifier(record.cells.get("id"), f"{record.place}: id") or record.place


def _patients(records: Mapping[str, _Record]) -> dict[str, dict[str, str]]:
    """Return the patient of each record, by id, by the name of the column."""
    columns = patient_columns(dict.fromkeys(key for record in records.values() for key in record.cells))
    return {
        column: {id: as_identifier(r.cells.get(column), f"{r.place}: {column}") for id, r in records.items()}
        for column in columns
    }


def _deciding(patients: Mapping[str, Mapping[str, str]], records: Mapping[str, _Record]) -> dict[str, dict[str, str]]:
    """Return the patients of the records without a group, which decides before the patient's columns."""
    without_group = [id for id, record in records.items() if not is_given(record.cells.get("group"))]
    return {column: {id: names[id] for id in without_group} for column, names in patients.items()}


def _group_findings(
    records: Mapping[str, _Record],
    patients: Mapping[str, Mapping[str, str]],
    dialogues: Sequence[Dialogue],
) -> list[Finding]:
    """Return findings about patients that the groups may not follow."""
    findings = []
    groups = {id: as_identifier(record.cells.get("group"), record.place) for id, record in records.items()}
    deciding = {"group": groups, **_deciding(patients, records)}
    for column, names in deciding.items():
        findings += identifier_findings(column, names.values())
    undecided = {id for id in records if not any(names.get(id) for names in deciding.values())}
    unused: dict[str, Mapping[str, Any]] = {}
    if any(groups.values()):
        unused |= patients
    if undecided:
        columns = examination_columns(dict.fromkeys(key for record in records.values() for key in record.cells))
        unused |= {column: {id: r.cells.get(column) for id, r in records.items()} for column in columns}
    used = [row for row in dialogues if HELD_OUT not in row.tags]
    findings += [finding for column, values in unused.items() if (finding := unused_patients(column, values, used))]
    return findings + folder_findings((path, row.split) for row in used if row.id in undecided for path in row.images)


def _text_findings(records: Sequence[_Record], file: Path) -> list[Finding]:
    """Return findings about dialogues without an image, and about texts that look like more than text."""
    bare = [record for record in records if not record.images]
    boxed = [record for record in bare if any(find_boxes(text) for turn in record.turns for text in turn)]
    marks: Counter[str] = Counter()
    others: list[str] = []
    for record in records:
        for text in (text for turn in record.turns for text in turn):
            rest = without_boxes(text).replace(MARK, "")
            found = [mark for mark in _MARKUP.findall(rest) if mark.strip("</>").lower() not in _HTML]
            # The link of an image in Markdown may contain the name of a patient.
            marks.update("![](...)" if mark[0] == "!" else mark for mark in found)
            if may_hold_other_boxes(text):
                others.append(record.place)
    findings = []
    if boxed:
        reason = (
            f"{len(boxed)} dialogues have boxes but no image, such as {Path(boxed[0].place).name}; add their images"
        )
        findings.append(Finding((), file, reason))
    elif bare:
        reason = f"{len(bare)} of {len(records)} dialogues have no image, such as {Path(bare[0].place).name}"
        findings.append(Finding((), file, reason, "warning"))
    if marks:
        listed = ", ".join(f"{mark} ({count})" for mark, count in marks.most_common(5))
        findings.append(Finding((), file, f"marks in the texts that are read as text: {listed}", "warning"))
    if others:
        reason = (
            f"{len(others)} texts contain numbers that may be boxes or polygons in a way of writing that is not read, "
            f"such as {Path(others[0]).name}; they are read as text; write boxes as (x1,y1),(x2,y2)"
        )
        findings.append(Finding((), file, reason, "warning"))
    return findings


# Boxes


def _translate(records: Sequence[_Record], name: str, place: str, size_of: Callable[[Path], Size]) -> tuple[str, str]:
    """Write the boxes of all texts in the canonical format. `size_of` returns the size of an image.

    Returns:
        A note about the format they were in, and why it may be wrong; both may be empty.

    Raises:
        UserError: the format is not known or not clear, or the boxes do not fit it.
    """

    def sizes(record: _Record) -> list[Size]:
        return list(dict.fromkeys(size_of(path) for path in record.images))

    texts = [(text, record) for record in records for turn in record.turns for text in turn]
    count = sum(len(written_boxes(text)) for text, _ in texts)
    if name == "none":
        marked = [record.place for text, record in texts if find_boxes(text)]
        if marked:
            raise UserError(
                f"{marked[0]}: data.box_format=none, but {len(marked)} texts contain boxes in marks or as "
                "(x1,y1),(x2,y2); name their format"
            )
        return "", ""
    chosen, doubt = name != "auto", ""
    if not chosen:
        decision = decide_format((text, record.place, partial(sizes, record)) for text, record in texts)
        if decision.boxes == 0:
            return "", ""
        name = require_decision(decision, place, "data.box_format")
        doubt = decision.doubt and f"the boxes are read as {name}, but {decision.doubt}"
    source = require_format(name)
    for record in records:
        for turn in record.turns:
            for i, text in enumerate(turn):
                size = None
                if "pixels" in source.unit and written_boxes(text):
                    size = _one_size([source.size_seen(size) for size in sizes(record)], record.place)
                require_unit(written_boxes(text), source, record.place)
                turn[i] = convert(text, name, CANONICAL, size)
    require_inside((text for record in records for turn in record.turns for text in turn), name, place)
    how = "as data.box_format says" if chosen else "as their syntax and values show"
    return f"{count} boxes were read in the format {name} (unit: {source.unit}), {how}." if count else "", doubt


def _one_size(sizes: Sequence[Size], place: str) -> Size:
    if len(sizes) != 1:
        raise UserError(
            f"{place}: boxes in pixels need the size of one image, and the dialogue has images of {len(sizes)} sizes; "
            "write the boxes in thousandths"
        )
    return sizes[0]


# Records


def _records(file: Path) -> list[tuple[str, dict[str, Any]]]:
    """Return the records with their places."""
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


def _read_record(place: str, cells: dict[str, Any], root: Path, answered: bool) -> _Record:
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
    paths = tuple(resolve_image(root, name, place) for name in names or inline)
    return _Record(place, cells, system, place_images(turns, len(paths), place), paths)


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
        if isinstance(name, str) and not re.match(r"[a-zA-Z][a-zA-Z+.-]*:", name):
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
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise UserError(f"{place}: 'images' must be a list of file names")
    return names


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


def _unknown_keys(records: Sequence[_Record], file: Path) -> list[Finding]:
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


def read(config: Any, scratch: Path) -> GroundingDataset:
    """Read the file of a recipe's data settings. Records with an unanswered question are unlabelled."""
    if config.root is None:
        raise UserError("data.name=sharegpt needs data.root=FILE, the JSON or JSONL file of the dialogues")
    return read_sharegpt(
        Path(config.root),
        Path(config.images) if config.images else None,
        boxes=config.boxes,
        box_format=config.box_format,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        answered=False,
        max_bytes=config.max_image_bytes,
        max_pixels=config.max_image_pixels,
    )
