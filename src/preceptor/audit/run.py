"""An audit from data sets to findings, and the findings to files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from preceptor.audit.duplicates import COPY_CORRELATION, SAME, Pair, find_pairs
from preceptor.audit.images import Look, look_at
from preceptor.audit.overlap import KINDS, Atlas, Overlap, Place
from preceptor.audit.rows import RESTATED, Match, asked_in_both, frames_of, restated, shared_groups
from preceptor.audit.shortcuts import Shortcut, shortcuts
from preceptor.data.images import MAX_BYTES, MAX_PIXELS
from preceptor.data.locations import FOLDERS
from preceptor.data.phash import ALIKE_BITS, BITS
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import load_data_config, read_data

Severity = Literal["leak", "broken", "suspicion", "note"]
SPLITS: tuple[Split, ...] = ("train", "validation", "test")
LEARNT: tuple[Split, ...] = ("train", "validation")
MOST_PAIRS = 10_000  # in audit.json


@dataclass(frozen=True)
class Finding:
    """`count` of `of` rows or images. A `leak` fails the audit; a `suspicion` wants a look; a `note` says what to know.

    `ids` are those of the rows concerned, of an image the first row about it. `matches` are pairs of a held-out row
    and the row that gives it away.
    """

    check: str
    severity: Severity
    title: str
    count: int
    of: int
    says: str
    ids: tuple[str, ...] = ()
    matches: tuple[Match, ...] = ()


@dataclass
class Audit:
    """What was found in one data set, or between two."""

    data: list[Dataset[Sample]]
    atlas: Atlas
    findings: list[Finding] = field(default_factory=list)
    overlaps: list[Overlap] = field(default_factory=list)
    shortcuts: list[Shortcut] = field(default_factory=list)
    ceiling: float | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def leaks(self) -> bool:
        return any(finding.severity == "leak" for finding in self.findings)

    @property
    def names(self) -> list[str]:
        """What the data sets are called: by name and split, and by number where that is the same."""
        names = [" ".join(split for split in (data.name, data.variant) if split) for data in self.data]
        return names if len(set(names)) == len(names) else [f"{name} ({n})" for n, name in enumerate(names, 1)]

    def crossing(self) -> list[Pair]:
        """Return the pairs of images that a leak can go through: of different splits, or of the two data sets."""

        def sides(number: int) -> set[Any]:
            places = self.atlas.rows[number]
            return {side for side, _ in places} if len(self.data) > 1 else set(places)

        return [pair for pair in self.atlas.pairs if sides(pair.left) != sides(pair.right)]


def audit_data(
    name: str, overrides: list[str], against: str | None, root: Path | None, against_root: Path | None, output: Path
) -> dict[str, Any]:
    """Audit a data set, or what two share, into `output`; return what `audit.json` holds.

    A data set is a name or a table. Overrides of the second begin with `against.` instead of `data.`.
    """
    theirs = [override for override in overrides if override.startswith("against.")]
    if against is None and (theirs or against_root is not None):
        given = theirs[0] if theirs else f"--against-root {against_root}"
        raise UserError(f"{given} is for a second data set; name it with --against")
    config = _named_data(name, root, [override for override in overrides if override not in theirs], "data")
    data = read_data(config, output / "data", needed=())
    other = None
    if against is not None:
        second = _named_data(against, against_root, theirs, "against")
        other = read_data(second, output / "against", needed=())
    limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
    return write_audit(audit(data, other, normaliser=config.normaliser, **limits), output)


def _named_data(name: str, root: Path | None, overrides: list[str], section: str) -> DataConfig:
    path = Path(name)
    known = name.replace("_", "-") in (*FOLDERS, "phantom", "table")
    if path.suffix in (".csv", ".jsonl") or (path.is_dir() and not known):
        if root is not None:
            raise UserError(f"{name} is a table and says where it lies; leave out the root {root}")
        return load_data_config("table", path, overrides, section)
    return load_data_config(name, root, overrides, section)


def audit(
    data: Dataset[Sample],
    against: Dataset[Sample] | None = None,
    *,
    normaliser: str = "mevf",
    workers: int | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Audit:
    """Audit a data set, or what two data sets share.

    `workers` is the number of threads that decode images (default: one per core, at most 8). Broken files are
    findings; nothing is raised for them.
    """
    sets = [data] if against is None else [data, against]
    found = Audit(sets, Atlas.of(sets))
    looks = look_at(list(found.atlas.numbers), workers=workers, max_bytes=max_bytes, max_pixels=max_pixels)
    found.atlas.pairs = find_pairs(looks)
    if against is None:
        _one(found, normaliser)
    else:
        _two(found, normaliser)
    _files(found, looks)
    return found


# --- one data set -----------------------------------------------------------------------------------------------------


def _one(found: Audit, normaliser: str) -> None:
    data, atlas = found.data[0], found.atlas
    test: list[Place] = [(0, "test")]
    learnt: list[Place] = [(0, "train"), (0, "validation")]
    _images(found, test, learnt)
    inner = atlas.overlap("validation", [(0, "validation")], "train", [(0, "train")])
    found.overlaps.append(inner)
    if inner.same:
        says = "Validation images that are training images: validation then measures known images."
        found.findings.append(
            Finding("validation_images", "note", "validation images in training", inner.same, inner.images, says)
        )
    rows = [sample for split in LEARNT for sample in data.split(split)]
    _rows(found, rows, data.split("test"), normaliser)
    _answers(found, data.split("train"), data.split("test"), normaliser, "training")
    found.shortcuts = shortcuts(data, normaliser)
    if found.shortcuts and not any(shortcut.name == "text_model" for shortcut in found.shortcuts):
        found.notes.append("Without scikit-learn the text model is left out: pip install 'preceptor[audit]'.")
    if data.split("test") and not data.split("train"):
        found.notes.append("There is no training split, so nothing can leak from it.")
    if not data.split("test"):
        found.notes.append("There is no test split, so nothing was checked for leaks into it.")


def _two(found: Audit, normaliser: str) -> None:
    atlas, names = found.atlas, found.names
    every: list[list[Place]] = [[(side, split) for split in SPLITS] for side in (0, 1)]
    for side, other in ((0, 1), (1, 0)):
        test: list[Place] = [(side, "test")]
        learnt: list[Place] = [(other, "train"), (other, "validation")]
        _images(found, test, learnt)
        rows = [sample for split in LEARNT for sample in found.data[other].split(split)]
        held_out = found.data[side].split("test")
        # Groups of different data sets may have the same names by chance.
        groups = found.data[0].name == found.data[1].name
        _rows(found, rows, held_out, normaliser, f"{names[side]} ", f"{names[other]} ", groups=groups)
        _answers(found, found.data[other].split("train"), held_out, normaliser, names[other], main=side == 0)
    for side, other in ((0, 1), (1, 0)):
        found.overlaps.append(atlas.overlap(names[side], every[side], names[other], every[other]))
    whole = found.overlaps[-2]
    says = f"Images of {names[0]} that are in {names[1]}, whatever the split."
    ids = tuple(atlas.row(n, every[0])[1].id for n, kind in whole.found.items() if kind != "alike")
    if whole.same:
        found.findings.append(Finding("images", "note", "images in both sets", whole.same, whole.images, says, ids))


# --- checks -----------------------------------------------------------------------------------------------------------


def _images(found: Audit, test: list[Place], learnt: list[Place]) -> None:
    """Look for the test images of one data set in training and validation of another or of the same."""
    of, whose = (f"{found.names[places[0][0]]} " if len(found.data) > 1 else "" for places in (test, learnt))
    overlap = found.atlas.overlap(f"{of}test", test, f"{whose}train or validation", learnt)
    found.overlaps.append(overlap)
    found.overlaps += [found.atlas.overlap(f"{of}test", test, f"{whose}{place[1]}", [place]) for place in learnt]
    if not overlap.images:
        return
    how = {
        "file": "the same file",
        "bytes": "equal bytes",
        "pixels": "equal pixels",
        "copy": "a copy in another size or encoding",
    }
    counts = overlap.counts
    listed = ", ".join(f"{counts[kind]} {what}" for kind, what in how.items() if counts[kind])

    def ids(wanted: set[str]) -> tuple[str, ...]:
        return tuple(found.atlas.row(number, test)[1].id for number, kind in overlap.found.items() if kind in wanted)

    where = f"{overlap.of} images in {overlap.among}"
    if overlap.same:
        splits = ", ".join(f"{o.same} in {o.among}" for o in found.overlaps[-2:] if o.same)
        says = f"{listed}; {splits}."
        same = {"file", *SAME}
        found.findings.append(Finding("test_images", "leak", where, overlap.same, overlap.images, says, ids(same)))
    if alike := counts["alike"]:
        says = (
            "They look like an image there, but differ in detail: adjacent slices of a scan, so the same patient, or "
            "altered copies. Look at them."
        )
        title = f"{overlap.of} images alike one in {overlap.among}"
        found.findings.append(Finding("alike_images", "suspicion", title, alike, overlap.images, says, ids({"alike"})))


def _rows(
    found: Audit,
    learnt: Sequence[Sample],
    held_out: Sequence[Sample],
    normaliser: str,
    of: str = "",
    whose: str = "",
    *,
    groups: bool = True,
) -> None:
    if not learnt or not held_out:
        return
    classes = found.atlas.classes()

    def image(sample: Sample) -> int:
        return classes[sample.image]

    framed = frames_of(learnt, held_out)
    asked = asked_in_both(learnt, held_out, image)
    known = {sample.id for sample, _ in framed + asked}
    again = [m for m in restated(learnt, held_out, image, normaliser) if m[0].id not in known]
    checks: list[tuple[str, Severity, str, list[Match], str]] = [
        (
            "frames",
            "leak",
            f"{of}test questions whose frame is a {whose}training row",
            framed,
            "The template form of the question is learnt, with the same image and the same answer.",
        ),
        (
            "questions",
            "leak",
            f"{of}test questions asked of the same image in {whose}training",
            asked,
            "The same words, letters' case and punctuation aside.",
        ),
        (
            "restated",
            "suspicion",
            f"{of}test questions restated in {whose}training",
            again,
            f"Another training row has the image, the answer and at least {RESTATED:.0%} of the words.",
        ),
    ]
    if groups:
        shared = shared_groups(learnt, held_out)
        number = len({sample.group for sample, _ in shared})
        total = len({sample.group for sample in held_out})
        says = f"{number} of {total} groups (patient, case or image, as the data set says) of the test are in training."
        checks.insert(0, ("groups", "leak", f"{of}test questions of groups in {whose}training", shared, says))
    for check, severity, title, matches, says in checks:
        if matches:
            ids = tuple(sample.id for sample, _ in matches)
            found.findings.append(
                Finding(check, severity, title, len(matches), len(held_out), says, ids, tuple(matches))
            )


def _answers(
    found: Audit, train: Sequence[Sample], test: Sequence[Sample], normaliser: str, whose: str, *, main: bool = True
) -> None:
    if not train or not test:
        return
    as_train = [sample for sample in train if sample.answers]
    vocabulary = AnswerVocabulary.build(as_train, normaliser)
    unseen = [sample for sample in test if vocabulary.encode(sample.answers) < 0]
    ceiling = 1 - len(unseen) / len(test)
    if main:
        found.ceiling = ceiling
    if unseen:
        says = f"No answer of {whose} is right: a classifier over those answers reaches {ceiling:.1%} at most."
        title = f"test answers unseen in {whose}"
        ids = tuple(sample.id for sample in unseen)
        found.findings.append(Finding("unseen_answers", "note", title, len(unseen), len(test), says, ids))


def _files(found: Audit, looks: Sequence[Look]) -> None:
    atlas = found.atlas

    def add(check: str, severity: Severity, title: str, numbers: list[int], says: str) -> None:
        if numbers:
            ids = tuple(atlas.row(number)[1].id for number in numbers)
            found.findings.append(Finding(check, severity, title, len(numbers), len(looks), says, ids))

    broken = [n for n, look in enumerate(looks) if look.broken]
    reasons = sorted({look.broken.partition(";")[0] for look in looks if look.broken})
    add("broken", "broken", "image files that cannot be read", broken, f"{'; '.join(reasons[:5])}.")
    texts = [n for n, look in enumerate(looks) if look.text]
    says = "Lines of small strokes near a border, which may be names or dates: look before you share images."
    add("burned_in_text", "suspicion", "images with burned-in text", texts, says)
    tags = sorted({tag for look in looks for tag in look.tags})
    tagged = [n for n, look in enumerate(looks) if look.tags]
    says = f"Filled in are: {', '.join(tags)}. The values were not read; strip headers before you share files."
    add("identifying_tags", "suspicion", "image files with identifying headers", tagged, says)


# --- files ------------------------------------------------------------------------------------------------------------


def write_audit(found: Audit, folder: Path) -> dict[str, Any]:
    """Write `audit.json` and `audit.html` into `folder` and return the former as a document."""
    from preceptor.audit.page import render

    document = as_document(found)
    write_text(folder / "audit.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "audit.html", render(found))
    return document


def as_document(found: Audit) -> dict[str, Any]:
    """Return what `audit.json` holds: counts, ids of rows and hash distances; no file names, no groups."""
    return {
        "format": 1,
        "leaks": found.leaks,
        "data": [
            {
                "name": data.name,
                "variant": data.variant,
                "sha256": data.fingerprint(),
                "notes": data.notes,
                "rows": {split: len(data.split(split)) for split in SPLITS},
                "images": len({sample.image for sample in data.samples}),
            }
            for data in found.data
        ],
        "images": len(found.atlas.numbers),
        "thresholds": {"hash_bits": BITS, "alike_bits": ALIKE_BITS, "copy_correlation": COPY_CORRELATION},
        "findings": [
            {
                "check": f.check,
                "severity": f.severity,
                "title": f.title,
                "count": f.count,
                "of": f.of,
                "says": f.says,
                "ids": list(f.ids),
                "given_away_by": [row.id for _, row in f.matches],
            }
            for f in found.findings
        ],
        "overlaps": [
            {"of": o.of, "in": o.among, "images": o.images, "same": o.same, **{k: o.counts[k] for k in KINDS}}
            for o in found.overlaps
        ],
        "ceiling": found.ceiling,
        "shortcuts": [{"title": shortcut.title, **asdict(shortcut)} for shortcut in found.shortcuts],
        "pairs": [
            {
                "kind": pair.kind,
                "bits": pair.bits,
                "correlation": round(pair.correlation, 4),
                **{side: _where(found, number) for side, number in (("left", pair.left), ("right", pair.right))},
            }
            for pair in found.crossing()[:MOST_PAIRS]
        ],
        "notes": found.notes,
    }


def _where(found: Audit, number: int) -> dict[str, str]:
    (side, split), sample = found.atlas.row(number)
    return {"data": found.names[side], "split": split, "id": sample.id}
