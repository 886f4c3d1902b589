"""Find boxes in texts, in whatever way they are written, without an interpretation of their numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Syntax = Literal["corners", "list", "bbox_2d", "box_2d", "named", "polygon", "loc1024", "loc1000", "unknown"]
"""How a box is written: ``(x,y),(x,y)`` | ``[a, b, c, d]`` | JSON with one of two keys | JSON whose keys name the
numbers, which are returned as corners | a chain of at least three points, whose bounding box is returned | location
tokens of PaliGemma | of Florence-2 | boxes or points that no format reads."""

BIRD_MARKS = ("<ref>", "</ref>", "<box>", "</box>")
QWEN2_MARKS = ("<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>")
_DEEPSEEK = ("<|ref|>", "<|/ref|>", "<|det|>", "<|/det|>")
MARKS = (QWEN2_MARKS, BIRD_MARKS, _DEEPSEEK)
"""Marks before and after a name, before and after a box."""

_N = r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBER = re.compile(_N)
CORNERS = re.compile(rf"\(\s*({_N})\s*,\s*({_N})\s*\)\s*,\s*\(\s*({_N})\s*,\s*({_N})\s*\)")
_QUAD = rf"{_N}\s*,\s*{_N}\s*,\s*{_N}\s*,\s*{_N}"
_PAIR = rf"\[\s*{_N}\s*,\s*{_N}\s*\]"
_ITEM = rf"\[\s*{_QUAD}\s*,?\s*\]|\(\s*{_QUAD}\s*\)|\[\s*{_PAIR}\s*,\s*{_PAIR}\s*,?\s*\]"
_LIST = re.compile(_ITEM)
_LISTS = re.compile(rf"\[\s*(?:{_ITEM})(?:\s*,\s*(?:{_ITEM}))*\s*,?\s*\]|{_ITEM}|{_QUAD}|{_N}\s+{_N}\s+{_N}\s+{_N}")
MARKED = re.compile("|".join(f"{re.escape(m[2])}(.*?){re.escape(m[3])}" for m in MARKS), re.DOTALL)
_UNCLOSED = re.compile("(?:" + "|".join(re.escape(m[2]) for m in MARKS) + r")([^<]*)")
MARKED_OR_UNCLOSED = re.compile(f"{MARKED.pattern}|{_UNCLOSED.pattern}", re.DOTALL)
REFERENCE = re.compile("|".join(f"{re.escape(m[0])}(.*?){re.escape(m[1])}" for m in MARKS), re.DOTALL)
_STRING = r'"(?:[^"\\]|\\.)*+"'
_BOX_KEY = r"[\"'](?:bbox|box|bounding_?box|boundingBox|rect|region|coordinates|coords)[\"']"
_OBJECT = re.compile(rf'\{{(?:{_BOX_KEY}\s*:\s*\{{[^{{}}]*\}}|[^{{}}"]|{_STRING})*+\}}|\{{[^{{}}]*\Z', re.DOTALL)
_KEY = re.compile(
    r"[\"'](bbox_2d|box_2d|bbox_3d|point_2d|bbox|box|bounding_box|boundingBox|bounding_poly)[\"']\s*:\s*[\"']?(.*)",
    re.DOTALL,
)
_LAYOUT_KEY = re.compile(
    rf"[\"'](?:(?:bbox|box|boxes|bounding_?box)_?)?(xyxy|xywh|cxcywh|yxyx|ltrb|ltwh|tlbr|tlwh)n?(?:_?(?:abs|rel|norm\w*|"
    rf"pixels?))?[\"']\s*:\s*[\"']?\s*(\[\s*{_QUAD}\s*\])",
    re.IGNORECASE,
)
_POINTS_KEY = re.compile(
    r"[\"'](?:polygons?|segmentation|segments?|points|poly|quad|vertices|contour|outline|coordinates)[\"']\s*:\s*(\[[-+\d.,eE\s\[\]()]*\])"
)
_POINT = rf"(?:\[\s*{_N}\s*,\s*{_N}\s*\]|\(\s*{_N}\s*,\s*{_N}\s*\))"
_CHAIN = rf"{_POINT}(?:[\s,;]*{_POINT}){{2,}}"
_POINTS = re.compile(rf"\[\s*{_CHAIN}\s*,?\s*\]|{_CHAIN}")
_POINT_TAGS = re.compile(r"<(?P<tag>quad|poly|polygon)>(?P<points>[-+\d.,\s()\[\]]*)</(?P=tag)>")
_BARE_KEY = re.compile(rf"\b(bbox_2d|box_2d)[\"']?\s*[:=]\s*({_ITEM}|\[[-+\d.,\s]*(?:\]|\Z))")
_NAMED = tuple(
    tuple(re.compile(rf"[\"']{name}[\"']\s*:\s*[\"']?({_N})") for name in names)
    for names in (
        ("x_?1", "y_?1", "x_?2", "y_?2"),
        ("x_?min", "y_?min", "x_?max", "y_?max"),
        ("x_?0", "y_?0", "x_?1", "y_?1"),
        ("left", "top", "right", "bottom"),
    )
)
_NUMBERED = re.compile(rf"[\"'](x|y)_?(\d+)[\"']\s*:\s*[\"']?({_N})")
_SIDES = tuple(
    (layout, tuple(re.compile(rf"[\"'](?:{name})[\"']\s*:\s*[\"']?({_N})", re.IGNORECASE) for name in names))
    for layout, names in (
        ("xywh", ("x|left|x_?min|x_?1|x_?0", "y|top|y_?min|y_?1|y_?0", "w|width", "h|height")),
        ("cxcywh", (*(f"c_?{a}|{a}_?c|{a}_?cent(?:er|re)|cent(?:er|re)_?{a}" for a in "xy"), "w|width", "h|height")),
    )
)
_LABEL = re.compile(rf"[\"'](?:label|name|class|category|object|text_content)[\"']\s*:\s*({_STRING}|'[^']*')")
_LOC1024 = re.compile(r"(?:<loc\d{4}>)+(?:\s*(?:<seg\d{3}>)+)?")
_LOC1024_LABEL = re.compile(r"[ \t]*([^;<>\n]*[^;<>\s])")
_LOC1000 = re.compile(r"(?:<loc_\d+>)+")
_OTHER = re.compile(
    r"(?:<patch_index_\d+>)+|\{(?:<\d+>){4}\}"
    r"|<(?:quad|poly|obb)>(?:[^<]|<(?!/?(?:quad|poly|obb)>))*+</(?:quad|poly|obb)>"
)
_CUT_LIST = re.compile(rf"\[\s*{_N}\s*,(?:\s*{_N}\s*,?){{0,3}}\s*\Z")
_MORE = re.compile(rf"[\s,;]*{_N}")
_BETWEEN = re.compile(r"[\s,;]*")
_HINT = re.compile(r"[\[({]|<(?:loc|patch_index|box|\||quad|poly|obb)|bbox_2d|box_2d")


_ASCII = str.maketrans(
    dict(zip("（）［］｛｝，：；．－\u2212\u2010\u2011\u2012\u2013", "()[]{},:;.------", strict=True))  # noqa: RUF001
    | {chr(0xFF10 + digit): str(digit) for digit in range(10)}
)
"""Signs of other keyboards between and in numbers. Every sign stays one sign, so that positions do not change."""
_NUMBERS = re.compile(r"[\d\s()\[\],.;\-" + re.escape("".join(map(chr, _ASCII))) + "]{7,}")
_QUADS = re.compile(rf"{_N}%?(?:\s*[,;]\s*|\s+){_N}%?(?:\s*[,;]\s*|\s+){_N}%?(?:\s*[,;]\s*|\s+){_N}")
_MAYBE = re.compile(
    # numbers only between brackets: per cent, in quotes, with other separators; at least four
    rf"[\[({{<]\s*[\"']?{_N}\s*%?[\"']?(?:[\s,;]+[\"']?{_N}\s*%?[\"']?){{3,}}\s*[\])}}>]"
    # a chain of at least two points
    rf"|(?:[\[(]\s*{_N}\s*[,;]\s*{_N}\s*[\])](?:[^\[\](){{}}\d]{{0,20}})){{2,}}"
    # named coordinates, and keys and tags of other markup
    rf"|\bx(?:_?(?:min|1|0))?[\"']?\s*[:=]\s*[\"']?{_N}.{{0,20}}\by(?:_?(?:min|1|0))?[\"']?\s*[:=]"
    rf"|\bc_?x[\"']?\s*[:=]\s*[\"']?{_N}"
    rf"|[\"'](?:polygon|segmentation|points?|bbox|box|bounding_box|coordinates)[\"']\s*:\s*[\[\"'{{]"
    rf"|<(?:points?|coords?|coordinates|rect|polygon|poly)\b[^<>]*\d"
    rf"|\b(?:cent(?:er|re)|corner|point)\b[^.\d]{{0,20}}[\[(]\s*{_N}\s*,\s*{_N}"
    rf"|\b(?:box|bbox|coordinates?)\b[^\d\n]{{0,30}}{_QUADS.pattern}"
    rf"|\A\W*(?:{_N}%?[\s,;]+){{3,}}{_N}%?\W*\Z",
    re.IGNORECASE,
)


def ascii_numbers(text: str) -> str:
    """Return a text of the same length in which full-width signs of four or more numbers in a row are ASCII."""
    if text.isascii():
        return text

    def translate(match: re.Match[str]) -> str:
        run = match[0].translate(_ASCII)
        return run if len(_NUMBER.findall(run)) >= 4 else match[0]

    return _NUMBERS.sub(translate, text)


def as_corners(numbers: Sequence[float], layout: str) -> tuple[float, float, float, float]:
    """Return four numbers as corners (x0, y0, x1, y1).

    Args:
        numbers: the numbers (4,) in any unit.
        layout: ``xyxy`` or ``yxyx`` for corners, ``xywh`` for the upper left corner, width and height, ``cxcywh`` for
            the centre, width and height.
    """
    a, b, c, d = numbers
    match layout:
        case "yxyx":
            return b, a, d, c
        case "xywh":
            return a, b, a + c, b + d
        case "cxcywh":
            return a - c / 2, b - d / 2, a + c / 2, b + d / 2
    return a, b, c, d


def bounding_box(numbers: Sequence[float]) -> tuple[float, float, float, float]:
    """Return the box around points x, y, x, y, ..."""
    xs, ys = numbers[::2], numbers[1::2]
    return min(xs), min(ys), max(xs), max(ys)


_LAYOUTS = {"ltrb": "xyxy", "ltwh": "xywh", "tlbr": "yxyx", "tlwh": "tlwh"}


@dataclass(frozen=True)
class Item:
    text: str
    numbers: tuple[float, ...] | None
    label: str = ""


@dataclass(frozen=True)
class Passage:
    """Adjacent boxes of one syntax in a text, with their names and everything around them that is syntax only."""

    start: int
    end: int
    syntax: Syntax
    items: tuple[Item, ...]
    marked: bool = False
    json: bool = False


def find_passages(text: str) -> list[Passage]:
    """Return the boxes of a text in every syntax, in order, without overlaps. Full-width signs count as ASCII."""
    text = ascii_numbers(text)
    if not _HINT.search(text):
        return []
    found: list[Passage] = []

    def add(passages: Iterable[Passage]) -> None:
        taken = [(p.start, p.end) for p in found]
        found.extend(p for p in passages if all(p.end <= start or end <= p.start for start, end in taken))

    # A box belongs to the first of these that finds it.
    for find in (_find_marked, _find_objects, _find_keys, _find_points, _find_tokens, _find_bare):
        add(find(text))
    found.sort(key=lambda passage: passage.start)
    return _join(text, [_with_reference(text, passage) for passage in found])


def may_hold_other_boxes(text: str) -> bool:
    """Return whether a text may contain a box or a polygon in a way of writing that `find_passages` does not find."""
    rest = list(ascii_numbers(text))
    for passage in find_passages(text):
        rest[passage.start : passage.end] = " " * (passage.end - passage.start)
    return _MAYBE.search("".join(rest)) is not None


def _find_marked(text: str) -> Iterator[Passage]:
    end = 0
    for match in MARKED.finditer(text):
        yield from _find_unclosed(text, end, match.start())
        inner = next(group for group in match.groups() if group is not None)
        yield Passage(match.start(), match.end(), *read_marked(inner), marked=True)
        end = match.end()
    yield from _find_unclosed(text, end, len(text))


def _find_unclosed(text: str, start: int, end: int) -> Iterator[Passage]:
    for match in _UNCLOSED.finditer(text, start, end):
        yield Passage(match.start(), match.end(), *read_marked(match[1]), marked=True)


def read_marked(inner: str) -> tuple[Syntax, tuple[Item, ...]]:
    inner = ascii_numbers(inner).strip()
    if corners := CORNERS.fullmatch(inner):
        return "corners", (Item(inner, tuple(map(float, corners.groups()))),)
    if _LISTS.fullmatch(inner):
        numbers = [float(number) for number in _NUMBER.findall(inner)]
        boxes = [tuple(numbers[i : i + 4]) for i in range(0, len(numbers), 4)]
        return "list", tuple(Item(inner if len(boxes) == 1 else str(list(box)), box) for box in boxes)
    return "corners", (Item(inner, None),)


def _find_objects(text: str) -> Iterator[Passage]:
    for match in _OBJECT.finditer(text):
        item = match[0]
        label = _read_label(item)
        if (numbers := _named_numbers(item)) is not None:
            yield Passage(match.start(), match.end(), "named", (Item(item, numbers or None, label),), json=True)
        elif (points := _POINTS_KEY.search(item)) and (box := _read_points(points[1], "rectangle" in item)):
            yield Passage(match.start(), match.end(), "polygon", (Item(points[1], box, label),), json=True)
        elif key := _KEY.search(item):
            name, value = key[1], key[2]
            list_ = _LISTS.match(value)
            quoted = list_ is not None and not value.startswith(("[", "("))
            if list_ and _MORE.match(value, list_.end()):  # eight numbers are four points
                list_ = None
            numbers = tuple(float(n) for n in _NUMBER.findall(list_[0])) if list_ else None
            if name in ("bbox_3d", "point_2d", "bounding_poly"):
                yield Passage(match.start(), match.end(), "unknown", (Item(item, None, label),), json=True)
            elif name in ("bbox_2d", "box_2d") or value.startswith("[") or quoted:
                syntax: Syntax = "bbox_2d" if name == "bbox_2d" else "box_2d" if name == "box_2d" else "list"
                boxes: list[tuple[float, ...] | None] = [None]
                if numbers is not None:
                    boxes = [numbers[i : i + 4] for i in range(0, len(numbers), 4)]
                items = tuple(Item(list_[0] if list_ else item, box, label) for box in boxes)
                yield Passage(match.start(), match.end(), syntax, items, json=True)


def _named_numbers(item: str) -> tuple[float, ...] | None:
    """Return the corners of a JSON object whose keys name its numbers or their layout, or None.

    More than two numbered points are a polygon, of which the bounding box is returned, or () if a number is missing.
    """
    if key := _LAYOUT_KEY.search(item):
        layout = _LAYOUTS.get(key[1].lower(), key[1].lower())
        a, b, c, d = (float(number) for number in _NUMBER.findall(key[2]))
        return as_corners((b, a, d, c), "xywh") if layout == "tlwh" else as_corners((a, b, c, d), layout)
    points = {(axis, int(number)): float(value) for axis, number, value in _NUMBERED.findall(item)}
    if len(indices := {number for _, number in points}) > 2:
        complete = item.endswith("}") and len(points) == 2 * len(indices)
        return bounding_box([points[axis, number] for number in indices for axis in "xy"]) if complete else ()
    for layout, names in (*(("xyxy", names) for names in _NAMED), *_SIDES):
        values = [name.search(item) for name in names]
        if all(values):
            return as_corners([float(value[1]) for value in values if value], layout)
    return None


def _read_points(text: str, rectangle: bool = False) -> tuple[float, ...] | None:
    """Return the box around at least three points (two corners of a `rectangle`) in lists of any depth, or None.

    The segmentation of an object in COCO may have several parts, which are one object.
    """
    numbers = [float(number) for number in _NUMBER.findall(text)]
    fewest = 4 if rectangle else 6
    return bounding_box(numbers) if len(numbers) >= fewest and len(numbers) % 2 == 0 else None


def _read_label(item: str) -> str:
    match = _LABEL.search(item)
    if match is None:
        return ""
    if match[1].startswith("'"):
        return match[1][1:-1].strip()
    try:
        return str(json.loads(match[1], strict=False)).strip()
    except ValueError:
        return match[1][1:-1].strip()


def _find_keys(text: str) -> Iterator[Passage]:
    for match in _BARE_KEY.finditer(text):
        numbers = tuple(float(n) for n in _NUMBER.findall(match[2])) if _LIST.fullmatch(match[2]) else None
        syntax: Syntax = "bbox_2d" if match[1] == "bbox_2d" else "box_2d"
        start = match.start() - (text[match.start() - 1 : match.start()] in ('"', "'"))
        yield Passage(start, match.end(), syntax, (Item(match[2], numbers),))


def _find_tokens(text: str) -> Iterator[Passage]:
    for syntax, pattern in (("loc1024", _LOC1024), ("loc1000", _LOC1000)):
        for match in pattern.finditer(text):
            tokens = [float(token) for token in re.findall(r"<loc_?(\d+)>", match[0])]
            groups = [tokens[i : i + 4] for i in range(0, len(tokens), 4)]
            end, label = match.end(), ""
            # A name ends before a box in another syntax.
            if syntax == "loc1024" and (name := _LOC1024_LABEL.match(text, end)) and not CORNERS.search(name[0]):
                end, label = name.end(), name[1].strip()
            items = tuple(Item(match[0], tuple(group) if len(group) == 4 else None, label) for group in groups)
            yield Passage(match.start(), end, syntax, items)  # type: ignore[arg-type]
    for match in _OTHER.finditer(text):
        yield Passage(match.start(), match.end(), "unknown", (Item(match[0], None),))


def _find_points(text: str) -> Iterator[Passage]:
    for match in _POINT_TAGS.finditer(text):
        if box := _read_points(match["points"]):
            yield Passage(match.start(), match.end(), "polygon", (Item(match["points"], box),))
    for match in _POINTS.finditer(text):
        # An even number of points in round brackets is a number of boxes, and separate lists are no polygon.
        nested = re.match(r"\[\s*[\[(]", match[0]) is not None
        if nested or (match[0].startswith("(") and len(re.findall(_POINT, match[0])) % 2):
            yield Passage(match.start(), match.end(), "polygon", (Item(match[0], _read_points(match[0])),))


def _find_bare(text: str) -> Iterator[Passage]:
    for match in CORNERS.finditer(text):
        yield Passage(match.start(), match.end(), "corners", (Item(match[0], tuple(map(float, match.groups()))),))
    for match in _LIST.finditer(text):
        numbers = tuple(float(number) for number in _NUMBER.findall(match[0]))
        yield Passage(match.start(), match.end(), "list", (Item(match[0], numbers),))
    if cut := _CUT_LIST.search(text):
        yield Passage(cut.start(), cut.end(), "list", (Item(cut[0], None),))


def _with_reference(text: str, passage: Passage) -> Passage:
    """Add the marked name that stands before a marked box."""
    if not passage.marked:
        return passage
    before = text[: passage.start].rstrip()
    for marks in MARKS:
        if before.endswith(marks[1]) and (start := before.rfind(marks[0])) >= 0:
            label = before[start + len(marks[0]) : -len(marks[1])].strip()
            if not REFERENCE.search(label):
                items = tuple(replace(item, label=label) for item in passage.items)
                return replace(passage, start=start, items=items)
    return passage


def _join(text: str, passages: Sequence[Passage]) -> list[Passage]:
    """Join adjacent boxes of one syntax, and include the brackets and fences around JSON."""
    joined: list[Passage] = []
    for passage in passages:
        last = joined[-1] if joined else None
        same = last is not None and (last.syntax, last.marked, last.json) == (
            passage.syntax,
            passage.marked,
            passage.json,
        )
        if last is not None and same and _BETWEEN.fullmatch(text, last.end, passage.start):
            items = passage.items
            if passage.marked and not any(item.label for item in items):
                items = tuple(replace(item, label=last.items[-1].label) for item in items)
            joined[-1] = replace(last, end=passage.end, items=last.items + items)
        else:
            joined.append(passage)
    joined = [_unwrap(text, passage) for passage in joined]
    return [p for i, p in enumerate(joined) if i == 0 or p.start >= joined[i - 1].end]


_FENCE = re.compile(r"```[a-zA-Z]*\s*\Z")
_FENCE_END = re.compile(r"\s*```")


def _unwrap(text: str, passage: Passage) -> Passage:
    """Extend a passage over the brackets, the JSON document and the code fence that contain nothing else."""
    if passage.marked or not (passage.json or passage.syntax in ("list", "bbox_2d", "box_2d")):
        return passage
    start, end = passage.start, passage.end
    while (left := re.search(r"\[\s*\Z", text[:start])) and (
        (right := re.match(r"\s*,?\s*\]", text[end:])) or (passage.json and not text[end:].strip(" \n\t,`"))
    ):
        start, end = left.start(), end + (right.end() if right else 0)
    fence = None
    for match in re.finditer(r"```[a-zA-Z]*\s*(.*?)\s*(?:```|\Z)", text, re.DOTALL):
        if match.start() <= start and end <= match.end():
            fence = match
    begin, stop = (fence.start(1), fence.end(1)) if fence else (len(text) - len(text.lstrip()), len(text.rstrip()))
    if passage.json and begin <= start and end <= stop and (begin, stop) != (start, end):
        try:  # an object around the list of boxes, such as {"objects": [...]}
            json.loads(text[begin:stop])
            start, end = begin, stop
        except (ValueError, RecursionError):
            pass
    if fence and (begin, stop) == (start, end):
        start, end = fence.start(), fence.end()
    return replace(passage, start=start, end=end)
