"""Dialogues of ShareGPT and LLaMA-Factory with marks, roles and boxes of all formats, against what was written."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from preceptor.data.grounding.box_formats import find_boxes
from preceptor.data.grounding.sharegpt import read_sharegpt
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely, texts
from tests.fuzz.outcome import Outcome, attempt, command, require
from tests.fuzz.question_tables import picture
from tests.fuzz.target import Target

Box = tuple[int, int, int, int]

IMAGES = ("p0/s0.png", "p1/s0.png", "p2/s0.png", "p0/s1.png")
WIDTH, HEIGHT = 200, 100
"""Size of every image, in pixels."""
BOX_FORMATS = {
    "bird": "<ref>lesion</ref><box>({0},{1}),({2},{3})</box>",
    "qwen": "<|object_ref_start|>lesion<|object_ref_end|><|box_start|>({0},{1}),({2},{3})<|box_end|>",
    "bare": "({0},{1}),({2},{3})",
    "list": "[{0}, {1}, {2}, {3}]",
    "json": '[{{"bbox_2d": [{0}, {1}, {2}, {3}], "label": "lesion"}}]',
    "gemma": '[{{"box_2d": [{1}, {0}, {3}, {2}], "label": "lesion"}}]',
    "paligemma": "<loc{9:04d}><loc{8:04d}><loc{11:04d}><loc{10:04d}> lesion",
    "shares": "<box>({4},{5}),({6},{7})</box>",
    "share list": "[{4}, {5}, {6}, {7}]",
}
WORD_TEXTS = st.sampled_from(
    ["Where is the lesion?", "In the lung.", "yes", "肺", "<think>hm</think>", "a <image> b", "(1) left"]
)
FORMATS = mostly(st.sampled_from(sorted(BOX_FORMATS)).map(lambda name: (name,)), st.just(tuple(BOX_FORMATS)))
"""The formats of the boxes in a file: usually one."""
BOX = st.tuples(st.integers(0, 480), st.integers(0, 480), st.integers(500, 1000), st.integers(500, 1000))


@dataclass(frozen=True)
class Turn:
    """A question and an answer, as pieces of text and boxes."""

    question: tuple[Any, ...]
    answer: tuple[Any, ...]


@dataclass(frozen=True)
class Record:
    """A dialogue. `marks` is the number of image marks in each question; `others` are further keys."""

    turns: tuple[Turn, ...]
    images: tuple[str, ...]
    marks: tuple[int, ...]
    image_key: str
    form: str
    system: str | None
    others: tuple[tuple[str, Any], ...]


def turns(formats: tuple[str, ...]) -> st.SearchStrategy[Turn]:
    """Return turns with boxes in some of the formats."""
    piece = st.one_of(st.tuples(st.just("text"), WORD_TEXTS), st.tuples(st.just("box"), st.sampled_from(formats), BOX))
    return st.builds(
        Turn, st.tuples(st.just(("text", "Where?")), piece), st.lists(piece, min_size=1, max_size=2).map(tuple)
    )


OTHERS = st.lists(
    st.one_of(
        st.tuples(
            st.just("id"), st.one_of(st.uuids().map(str), st.sampled_from([0, "", None, 1.0, True]), json_values(2))
        ),
        st.tuples(st.just("group"), st.one_of(st.sampled_from(["p0", "p1", 0, 1, "", None]), json_values(2))),
        st.tuples(st.just("split"), st.one_of(st.sampled_from(["train", "test", "val", "Test", 0]), json_values(2))),
        st.tuples(st.just("task"), st.one_of(st.sampled_from(["vg", "roc", "rc", "mia", "VG"]), json_values(2))),
        st.tuples(st.just("modality"), st.one_of(st.sampled_from(["ct", "mr", 0]), json_values(2))),
        st.tuples(texts(), json_values()),
    ),
    max_size=2,
).map(tuple)


@st.composite
def records(draw: st.DrawFn, formats: tuple[str, ...]) -> Record:
    exchanges = tuple(draw(st.lists(turns(formats), min_size=1, max_size=2)))
    images = tuple(draw(st.lists(st.sampled_from(IMAGES), max_size=2, unique=True)))
    count = len(exchanges)
    right = [len(images), *[0] * (count - 1)]
    odd = st.lists(st.integers(0, 2), min_size=count, max_size=count)
    marks = draw(mostly(st.just(right), odd, 3))
    return Record(
        exchanges,
        images,
        tuple(marks),
        draw(
            mostly(
                st.sampled_from(["images", "image"]),
                st.sampled_from(["img", "image_path", "imgs", "Images", "videos"]),
            )
        ),
        draw(mostly(st.sampled_from(["conversations", "messages"]), st.just("dialog"), 16)),
        draw(st.sampled_from([None, None, "You are a radiologist."])),
        draw(OTHERS),
    )


@dataclass(frozen=True)
class DialoguesInput:
    """The records of a file, how it is written, an odd value at a path of keys, and damage to the bytes."""

    records: tuple[Record, ...]
    kind: str
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    by_command: bool


INPUTS = st.builds(
    DialoguesInput,
    records=FORMATS.flatmap(lambda formats: st.lists(records(formats), min_size=1, max_size=4)).map(tuple),
    kind=st.sampled_from(["json", "jsonl"]),
    replaced=mostly(st.none(), st.tuples(st.integers(0, 99), json_values()), 4),
    mutations=DAMAGE,
    by_command=rarely(30),
)


def written(piece: tuple[Any, ...]) -> str:
    """Return a piece as text."""
    if piece[0] == "text":
        return str(piece[1])
    shares = [f"{number / 1000:.3f}" for number in piece[2]]
    bins = [min(1023, round(number * 1.024)) for number in piece[2]]  # big_vision: 1024 bins over each side
    return BOX_FORMATS[piece[1]].format(*piece[2], *shares, *bins)


def as_json(record: Record) -> dict[str, Any]:
    """Return a record as its JSON object."""
    speaker, text, names = (
        ("role", "content", ("user", "assistant")) if record.form == "messages" else ("from", "value", ("human", "gpt"))
    )
    entries: list[dict[str, Any]] = []
    if record.system is not None:
        entries.append({speaker: "system", text: record.system})
    for turn, marks in zip(record.turns, record.marks, strict=True):
        entries.append({speaker: names[0], text: "<image>" * marks + " ".join(map(written, turn.question))})
        entries.append({speaker: names[1], text: " ".join(map(written, turn.answer))})
    found: dict[str, Any] = {record.form: entries}
    if record.images:
        found[record.image_key] = (
            record.images[0] if record.image_key == "image" and len(record.images) == 1 else list(record.images)
        )
    return found | dict(record.others)


def replace_nested(value: Any, number: int, new: Any) -> Any:
    """Replace the value of the number-th key or entry of a nested value, counted in the order of reading."""
    count = -1

    def walk(node: Any) -> Any:
        nonlocal count
        count += 1
        if count == number:
            return new
        if isinstance(node, dict):
            return {key: walk(child) for key, child in node.items()}
        return [walk(child) for child in node] if isinstance(node, list) else node

    return walk(value)


def check(case: DialoguesInput, folder: Path) -> bool:
    """Read a file of dialogues and compare the numbers of dialogues, turns, images and boxes."""
    for number, name in enumerate(IMAGES):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(picture(number))
    content: Any = [as_json(record) for record in case.records]
    if case.replaced is not None:
        content = replace_nested(content, case.replaced[0] + 1, case.replaced[1])
    text = (
        "".join(json.dumps(row) + "\n" for row in content)
        if case.kind == "jsonl"
        else json.dumps(content, ensure_ascii=False)
    )
    path = folder / f"d.{case.kind}"
    path.write_bytes(mutate(text.encode(errors="surrogatepass"), case.mutations))
    if case.by_command:
        return command("doctor", "clinkd-demo", "data.name=sharegpt", f"data.root={path}").accepted
    outcome = attempt(lambda: read_sharegpt(path), place=path.name)
    if outcome.accepted and case.replaced is None and not case.mutations:
        compare(case, outcome, folder)
    return outcome.accepted


def compare(case: DialoguesInput, outcome: Outcome, folder: Path) -> None:
    """Raise Wrong unless the dialogues are those of the records."""
    data = outcome.value
    told = bool(data.findings) or bool(data.faults)
    require(len(data.samples) == len(case.records), "another number of dialogues", len(data.samples))
    parts: dict[str, set[str]] = {}
    for dialogue, record in zip(data.samples, case.records, strict=True):
        others = dict(record.others)
        require(len(dialogue.turns) == len(record.turns), "another number of turns", len(dialogue.turns))
        known = "images" in others or "image" in others
        found = [str(image.relative_to(folder)) for image in dialogue.images]
        require(known or found == list(record.images), f"images under the key {record.image_key} are left out", found)
        marks = sum(record.marks) + sum(
            " ".join(map(written, pieces)).count("<image>")
            for turn in record.turns
            for pieces in (turn.question, turn.answer)
        )
        require(known or marks in (0, len(record.images)), "the number of image marks is not that of the images", marks)
        for marks, (question, _) in zip(record.marks[1:], dialogue.turns[1:], strict=True):
            require(question.count("<image>") >= marks or told, "an image of a later turn was moved", record.marks)
        in_answer = any("<image>" in written(piece) for turn in record.turns for piece in turn.answer)
        require(not in_answer, "an image mark in an answer was deleted", record.turns)
        if record.system:
            require(record.system == dialogue.system or told, "the system message was dropped", dialogue.system)
        for turn, (question, answer) in zip(record.turns, dialogue.turns, strict=True):
            for pieces, text in ((turn.question, question), (turn.answer, answer)):
                wanted = [(piece[1], piece[2]) for piece in pieces if piece[0] == "box"]
                boxes = [box.box for box in find_boxes(text)]
                names = {name for name, _ in wanted}
                formats = min(names - {"bird", "qwen"}, default="marked") if len(names) == 1 else "mixed"
                require(len(boxes) == len(wanted) or told, f"boxes were not seen ({formats})", text)
                for box, (name, truth) in zip(boxes, wanted, strict=False):
                    near = box is not None and max(abs(a - b) for a, b in zip(box, truth, strict=True)) <= 1.5
                    require(near or told, f"a box is elsewhere ({name})", (box, truth))
        group = others.get("group")
        if isinstance(group, str | int | float) and not isinstance(group, bool) and group != "" and group == group:
            parts.setdefault(str(group), set()).add(dialogue.split)
        identifier = others.get("id")
        if isinstance(identifier, str | int) and not isinstance(identifier, bool) and identifier != "":
            require(dialogue.id == str(identifier).strip() or dialogue.id == str(identifier), "another id", dialogue.id)
        elif isinstance(identifier, list | dict | bool):
            require(told, f"a {type(identifier).__name__} became an id", dialogue.id)
        if isinstance(group, list | dict | bool):
            require(told, f"a {type(group).__name__} became a group", dialogue.group)
    if any("split" in dict(record.others) for record in case.records):
        return
    require(all(len(splits) == 1 for splits in parts.values()), "a group is in several splits", parts)
    of_image: dict[str, set[str]] = {}
    for dialogue in data.samples:
        for image in dialogue.images:
            of_image.setdefault(str(image), set()).add(dialogue.split)
    shared = [name for name, splits in of_image.items() if len(splits) > 1]
    told = told or data.leaking or any("more than one split" in note for note in data.notes)
    require(not shared or told or parts, "an image is in several splits", shared)


TARGET = Target(INPUTS, check, 250)
