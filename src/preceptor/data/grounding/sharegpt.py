"""Read dialogues in the formats of ShareGPT, LLaMA-Factory, ms-swift and OpenAI, as a JSON list or JSONL.

A record has `conversations` (``{"from": "human" | "gpt", "value": text}``) or `messages` (``{"role": "user" |
"assistant", "content": text or list of parts}``), and `images` or `image`. The first message may be of the system.
Optional keys are `id`, `task`, `modality`, `group` and `split`, and a column that names the patient. Marks ``<image>``
give the positions of images (see `data.grounding.image_marks`), boxes may be in any format of
`data.grounding.box_formats`, or in `objects` (see `data.grounding.swift_objects`). Every text is stored with boxes in
the canonical format.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any, get_args

from preceptor.data.findings import Finding
from preceptor.data.grounding.box_detection import decide_format, doubt_resized, require_decision
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
from preceptor.data.grounding.check import answer_findings
from preceptor.data.grounding.image_marks import MARK
from preceptor.data.grounding.med_grit import INFERRED, UNKNOWN, modality_findings, modality_of, task_of
from preceptor.data.grounding.sharegpt_records import KEYS, Record, dialogue_rows, read_record, unknown_keys
from preceptor.data.grounding.swift_objects import insert_objects
from preceptor.data.groups import (
    column_findings,
    folder_findings,
    group_by_content,
    group_by_patient,
    undecided,
    without_group,
)
from preceptor.data.identifying_columns import examination_columns, patient_columns
from preceptor.data.images import image_size, require_images
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.options import contains_options, label_of_option, option_columns, options_of
from preceptor.data.splits import SPLIT_NAMES, cut
from preceptor.data.texts import (
    as_choice,
    as_identifier,
    as_text,
)
from preceptor.data.types import Dialogue, GroundingDataset, GroundingTask, Split
from preceptor.errors import UserError

UNANSWERED, HELD_OUT = "unanswered", "held_out"
"""Tags of a dialogue with an unanswered question (see `read_sharegpt`)."""
_MARKUP = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?[A-Za-z][\w:-]{0,40}/?>|!\[[^\]\n]*\]\([^)\n]*\)|\{image\}")
_HTML = {"b", "i", "u", "p", "br", "em", "li", "ol", "ul", "sub", "sup", "strong"}


def read_sharegpt(
    file: Path,
    images: Path | None = None,
    *,
    boxes: Policy = "refuse",
    box_format: str = "auto",
    box_max_pixels: int | None = None,
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
        box_max_pixels: Limit of the pixels of the resized images in whose pixels boxes in the format qwen2.5-vl are;
            None for the published one.
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
    records = [read_record(place, cells, root, answered) for place, cells in dialogue_rows(file)]
    places = {path: record.place for record in reversed(records) for path in record.images}
    require_images(places, file)
    data = GroundingDataset(file.stem, "by-group", root, [])
    data.findings += unknown_keys(records, file)
    size_of = cache(partial(image_size, max_bytes=max_bytes, max_pixels=max_pixels))
    note, doubt = _translate(records, box_format, str(file), size_of, box_max_pixels)
    data.notes += [text for text in (note, _insert_objects(records, box_format, str(file), size_of)) if text]
    data.findings += _text_findings(records, file)
    if doubt:
        data.findings.append(Finding((), file, doubt, "warning"))

    ids, repeated = _ids(records)
    data.findings += repeated
    faults: Counter[str] = Counter()
    rows: list[tuple[Dialogue, Split | None]] = []
    by_id: dict[str, Record] = {}
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
    patients = {
        key: {id: as_identifier(value, f"{by_id[id].place}: {key}") for id, value in values.items()}
        for key, values in _columns(by_id, lambda keys: ["group", *patient_columns(keys)]).items()
    }
    groups = patients.pop("group")
    deciding = undecided(groups, patients)
    labelled = [row for row, _ in rows if row.split != "unlabelled"]
    dialogues = group_by_content(group_by_patient(labelled, deciding, data.notes), data.notes)
    if True not in given:
        dialogues = cut(dialogues, "test", test_fraction, seed, leave=2)
        dialogues = cut(dialogues, "validation", validation_fraction, seed)
    else:
        data.variant = "given"
    if len(dialogues) < len(rows):
        grouped = group_by_content(group_by_patient([row for row, _ in rows], deciding))
        dialogues = _with_unlabelled(dialogues, grouped, [split for _, split in rows])
    data.samples, data.faults = dialogues, dict(faults)
    used = [row for row in dialogues if HELD_OUT not in row.tags]
    data.findings += column_findings(groups, patients, _columns(by_id, examination_columns), used, by_row=True)
    ungrouped = without_group(used, groups, patients)
    data.findings += folder_findings((path, row.split) for row in ungrouped for path in row.images)
    data.findings += _labels_of_options(by_id, file)
    data.findings += answer_findings(dialogues)
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


def _ids(records: Sequence[Record]) -> tuple[list[str], list[Finding]]:
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


def _dialogue(record: Record, turns: tuple[tuple[str, str], ...], id: str, root: Path) -> tuple[Dialogue, Split | None]:
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


def _default_group(record: Record, root: Path) -> str:
    """Return the first image, else the id that the record gives, which may be that of several records."""
    if record.images:
        return record.images[0].relative_to(root).as_posix()
    return as_identifier(record.cells.get("id"), f"{record.place}: id") or record.place


def _columns(records: Mapping[str, Record], choose: Callable[[Iterable[str]], list[str]]) -> dict[str, dict[str, Any]]:
    """Return the values of the keys that `choose` returns, by key and by the id of the record."""
    keys = choose(dict.fromkeys(key for record in records.values() for key in record.cells))
    return {key: {id: record.cells.get(key) for id, record in records.items()} for key in keys}


def _labels_of_options(records: Mapping[str, Record], file: Path) -> list[Finding]:
    """Return an error if answers are letters or numbers of options that the dialogue itself does not list."""
    answers = {id: [answer for _, answer in record.turns if answer] for id, record in records.items()}
    keys = dict.fromkeys(key for record in records.values() for key in record.cells if key not in KEYS)
    columns = option_columns(keys, [(answers[id], record.cells) for id, record in records.items()])
    labels = {}
    for id, record in records.items():
        label = label_of_option(answers[id], record.cells, columns)
        asked = "\n".join([record.system, *(question for question, _ in record.turns)])
        if label and not contains_options(asked, options_of(record.cells, columns)):
            labels[id] = label
    if not labels:
        return []
    reason = (
        f"the answers of {len(labels)} of {len(records)} dialogues, such as {next(iter(labels.values()))!r}, are "
        f"letters or numbers of the options in {', '.join(map(repr, columns))}, which the question does not contain, "
        "and would be learned as such; write the text of the option as the answer, or all options into the question"
    )
    return [Finding(tuple(labels), file, reason)]


def _text_findings(records: Sequence[Record], file: Path) -> list[Finding]:
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


def _translate(
    records: Sequence[Record], name: str, place: str, size_of: Callable[[Path], Size], resized_limit: int | None
) -> tuple[str, str]:
    """Write the boxes of all texts in the canonical format. `size_of` returns the size of an image.

    Returns:
        A note about the format they were in, and why it may be wrong; both may be empty.

    Raises:
        UserError: the format is not known or not clear, the boxes do not fit it, or it has no resized images and
            `resized_limit` is given.
    """

    def sizes(record: Record) -> list[Size]:
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
        if decision.doubt:
            doubt = f"the boxes are read as {name}, but {decision.doubt}; name the format with data.box_format"
    source = require_format(name)
    resized = source.unit == "resized pixels"
    if resized_limit and not resized:
        raise UserError(
            f"data.box_max_pixels={resized_limit} applies to boxes in pixels of resized images (qwen2.5-vl), and those "
            f"of {place} are in the format {name}; remove it, or set data.box_format=qwen2.5-vl"
        )
    if resized and not resized_limit:
        boxes = [(box, record.place, partial(sizes, record)) for text, record in texts for box in written_boxes(text)]
        if why := doubt_resized(boxes):
            doubt = f"the boxes are read as {name}, but {why}; name the limit with data.box_max_pixels"
    for record in records:
        for turn in record.turns:
            for i, text in enumerate(turn):
                size = None
                if "pixels" in source.unit and written_boxes(text):
                    size = _one_size(
                        [source.size_seen(size, max_pixels=resized_limit) for size in sizes(record)], record.place
                    )
                require_unit(written_boxes(text), source, record.place)
                turn[i] = convert(text, name, CANONICAL, size)
    require_inside((text for record in records for turn in record.turns for text in turn), name, place)
    how = "as data.box_format says" if chosen else "as their syntax and values show"
    return f"{count} boxes were read in the format {name} (unit: {source.unit}), {how}." if count else "", doubt


def _insert_objects(records: Sequence[Record], name: str, place: str, size_of: Callable[[Path], Size]) -> str:
    """Replace the marks of ms-swift by the names and boxes of `objects`, and return a note about them, or "".

    Raises:
        UserError: the boxes do not fit their images, or `name`, the format that the user has given.
    """
    found: dict[str, list[str]] = {}
    for record in records:
        if record.objects:
            if name not in ("auto", "none", record.objects.format):
                raise UserError(
                    f"{record.place}: data.box_format={name}, but the boxes of 'objects' are in the format "
                    f"{record.objects.format}, as bbox_type says; set data.box_format=auto"
                )
            boxes = insert_objects(record.turns, record.objects, record.images, record.place, size_of)
            found.setdefault(record.objects.format, []).extend(boxes)
    fix = "write pixels of the image file, or fractions from 0 to 1 with bbox_type=norm1"
    for format, boxes in found.items():
        require_inside(boxes, format, f"{place}: objects.bbox", fix)
    listed = " and ".join(f"{len(boxes)} in the format {format}" for format, boxes in found.items() if boxes)
    return f"Boxes were read from 'objects': {listed}." if listed else ""


def _one_size(sizes: Sequence[Size], place: str) -> Size:
    if len(sizes) != 1:
        raise UserError(
            f"{place}: boxes in pixels need the size of one image, and the dialogue has images of {len(sizes)} sizes; "
            "write the boxes in thousandths"
        )
    return sizes[0]


def read(config: Any, scratch: Path) -> GroundingDataset:
    """Read the file of a recipe's data settings. Records with an unanswered question are unlabelled."""
    if config.root is None:
        raise UserError("data.name=sharegpt needs data.root=FILE, the JSON or JSONL file of the dialogues")
    return read_sharegpt(
        Path(config.root),
        Path(config.images) if config.images else None,
        boxes=config.boxes,
        box_format=config.box_format,
        box_max_pixels=config.box_max_pixels,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
        answered=False,
        max_bytes=config.max_image_bytes,
        max_pixels=config.max_image_pixels,
    )
