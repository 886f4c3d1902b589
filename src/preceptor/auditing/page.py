"""The page of an audit. It holds thumbnails of some images, and the ids, questions and answers of some rows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from preceptor.auditing.duplicates import COPY_CORRELATION, Pair
from preceptor.auditing.findings import SPLITS, Audit
from preceptor.auditing.overlap import KINDS
from preceptor.data.images import ImageError, load_image
from preceptor.data.phash import ALIKE_BITS, BITS
from preceptor.report.format import NONE, SPACE, percent
from preceptor.report.page import Bar, Bars, Fragment, Page, Section, Text
from preceptor.report.pictures import as_uri, encode_png
from preceptor.report.tables import Table

MOST_SHOWN = 12  # pairs of a kind, rows of a check
LONGEST_SIDE = 200  # pixels of a picture
VERDICTS = {"leak": "Leak", "broken": "Broken", "suspicion": "Suspicion", "note": "Note"}
TITLES = {
    "bytes": "Equal files",
    "pixels": "Equal pixels",
    "copy": "Copies: resized or encoded again",
    "alike": "Alike: probably the same scan",
}
LEAK = "Leakage: some of the test set is known from training."


def render(audit: Audit) -> str:
    """Return the HTML page."""
    facts = []
    for name, data in zip(audit.names, audit.data, strict=True):
        counts = ", ".join(f"{len(data.split(split))} {split}" for split in SPLITS if data.split(split))
        facts.append(f"{name}: {counts} questions, {len({sample.image for sample in data.samples})} images")
    sections = [
        Section("findings", "Findings", _findings(audit)),
        Section("images", "Shared images", [_overlaps(audit)]),
        Section("pairs", "Pairs of images", [Fragment("auditing/templates/pairs.html.j2", _pairs(audit))]),
        Section("rows", "Rows that give test rows away", _matches(audit)),
        Section("shortcuts", "Answers without the image", _shortcuts(audit)),
        Section("reading", "How to read this", _reading()),
    ]
    notes = [*audit.notes, *(note for data in audit.data for note in data.notes)]
    title, leak = f"Audit of {' against '.join(audit.names)}", LEAK if audit.leaks else ""
    return Page(title, facts, sections, notes, leak, "auditing/templates/page.css").render()


def _findings(audit: Audit) -> list[Any]:
    if not audit.findings:
        return [Text("Nothing was found. This is not a proof: see below what these checks cannot see.")]
    found = sorted(audit.findings, key=lambda finding: list(VERDICTS).index(finding.severity))
    rows = [
        [
            f"{VERDICTS[finding.severity]}: {finding.title}",
            f"{finding.count} of {finding.of}",
            percent(finding.count / finding.of if finding.of else None, unit=True),
            finding.says,
        ]
        for finding in found
    ]
    columns = ["Finding", "Count", "Share", "Meaning"]
    return [Table("Rows or images concerned", columns, rows, keys=[finding.severity for finding in found])]


def _overlaps(audit: Audit) -> Table:
    columns = ["Images of", "Images", "Compared with", "In both", "Same file"]
    columns += ["Equal bytes", "Equal pixels", "Copy", "Only alike"]
    rows = [
        [o.of, str(o.images), o.other, str(o.same), *(str(o.counts[kind]) for kind in KINDS)]
        for o in audit.overlaps
        if o.images
    ]
    return Table("Each image counts once, by its most certain kind", columns, rows)


def _pairs(audit: Audit) -> list[dict[str, Any]]:
    kinds: defaultdict[str, list[Pair]] = defaultdict(list)
    for pair in audit.crossing():
        kinds[pair.kind].append(pair)
    paths = list(audit.index.numbers)
    found = []
    for kind, title in TITLES.items():
        chosen = _spread(kinds[kind])
        if chosen:
            number = (
                f"{len(chosen)} of {len(kinds[kind])} shown" if len(chosen) < len(kinds[kind]) else str(len(chosen))
            )
            pairs = [_pair(audit, pair, paths) for pair in chosen]
            found.append({"title": f"{title} ({number})", "pairs": pairs})
    return found


def _spread(pairs: Sequence[Pair]) -> list[Pair]:
    """Return some pairs from the most to the least certain."""
    if len(pairs) <= MOST_SHOWN:
        return list(pairs)
    return [pairs[round(n * (len(pairs) - 1) / (MOST_SHOWN - 1))] for n in range(MOST_SHOWN)]


def _pair(audit: Audit, pair: Pair, paths: Sequence[Path]) -> dict[str, Any]:
    sides = []
    for number in (pair.left, pair.right):
        (side, split), sample = audit.index.row(number)
        place = f"{audit.names[side]} {split}" if len(audit.data) > 1 else split
        sides.append({"id": sample.id, "place": place, "picture": _picture(paths[number])})
    return {"sides": sides, "about": f"{pair.bits} of {BITS} bits differ, correlation {pair.correlation:.3f}"}


def _picture(path: Path) -> str:
    try:
        return as_uri(encode_png(load_image(path).convert("L"), LONGEST_SIDE))
    except ImageError:
        return ""


def _matches(audit: Audit) -> list[Table]:
    tables = []
    for finding in audit.findings:
        if finding.check == "groups":
            continue
        rows = [
            [
                test.id,
                f"{test.question}  \u2192  {test.answer}",
                f"{train.id}: {train.question}  \u2192  {train.answer}",
            ]
            for test, train in finding.matches[:MOST_SHOWN]
        ]
        title = f"{finding.title}: {len(rows)} of {len(finding.matches)}"
        tables.append(Table(title, ["Test row", "Test question and answer", "Training row"], rows))
    return tables


def _shortcuts(audit: Audit) -> list[Any]:
    bars = [Bar(shortcut.title, "blind", shortcut.accuracy) for shortcut in audit.shortcuts]
    caption = "Share of test questions answered correctly without an image; learnt from the training split only."
    if audit.ceiling is not None:
        caption += f" The dashed line is the answer ceiling, {percent(audit.ceiling, unit=True)}."
    rows = [
        [shortcut.title, *map(percent, (shortcut.accuracy, shortcut.open, shortcut.closed)), shortcut.reads or NONE]
        for shortcut in audit.shortcuts
    ]
    about = (
        "A model that sees the image must be better than these. If the look-up on the same image file is far above "
        "that on all files, the split gives answers away through its images."
    )
    table = Table(f"Accuracy in{SPACE}%", ["Shortcut", "All", "Open", "Closed", "Also reads"], rows)
    return [Bars(bars, caption, audit.ceiling), replace(table, notes=[about])] if audit.shortcuts else []


def _reading() -> list[Text]:
    sentences = (
        f"Candidates are images whose {BITS}-bit perceptual hashes differ in at most {ALIKE_BITS} bits. They count as "
        f"copies if the fine detail correlates to {COPY_CORRELATION} or more, otherwise as alike. The checks recognise "
        "images that were resized down to 128 pixels, compressed with JPEG, or changed in brightness and contrast. "
        "They do not recognise cropping, borders, rotation and mirroring.",
        "A leak is certain if files, pixels or rows are equal. A copy is sometimes the next slice of the same scan. A "
        "suspicion must be looked at: alike images are mostly adjacent slices, and burned-in text is guessed from "
        "small strokes near the border.",
        "Finding nothing is not a proof: patients are known only if the data set names groups, and text may be in the "
        "middle of an image.",
    )
    return [Text(sentence) for sentence in sentences]
