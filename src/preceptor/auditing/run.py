"""Audit one data set, or what two data sets share, and write the findings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from preceptor.auditing.duplicates import COPY_CORRELATION, SAME, find_pairs
from preceptor.auditing.findings import SPLITS, TRAINING_SPLITS, Audit, Finding, Severity
from preceptor.auditing.images import ImageSummary, summarize_files
from preceptor.auditing.overlap import KINDS, ImageIndex, Place
from preceptor.auditing.page import render
from preceptor.auditing.rows import RESTATED, Match, asked_in_both, frames_of, restated, shared_groups
from preceptor.auditing.shortcuts import shortcuts
from preceptor.data.groups import counts_crossings
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.locations import FOLDERS
from preceptor.data.phash import ALIKE_BITS, BITS
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import load_data_config, read_data
from preceptor.vqa.protocols import protocols_for

MAX_PAIRS = 10_000  # in audit.json


def audit_data(
    name: str, overrides: list[str], against: str | None, root: Path | None, against_root: Path | None, output: Path
) -> dict[str, Any]:
    """Audit a data set, or what two data sets share, write the audit to `output` and return `audit.json`.

    Args:
        name: Name of a data set, or a table.
        overrides: Settings of the first data set (`data.key=value`) and of the second one (`against.key=value`).
        against: Name or table of the second data set.
        root: Folder of the first data set.
        against_root: Folder of the second data set.
        output: Output folder.

    Raises:
        UserError: a data set cannot be read, or a setting is invalid.
    """
    second_overrides = [override for override in overrides if override.startswith("against.")]
    if against is None and (second_overrides or against_root is not None):
        setting = second_overrides[0] if second_overrides else f"--against-root {against_root}"
        raise UserError(f"{setting} is a setting of a second data set; name that data set with --against")
    config = _named_data(name, root, [override for override in overrides if override not in second_overrides], "data")
    data = read_data(config, output / "data", needed=())
    other = None
    if against is not None:
        second = _named_data(against, against_root, second_overrides, "against")
        other = read_data(second, output / "against", needed=())
    limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
    # Unless set, answers are compared as in the data set's protocol, which the shipped recipe uses for its classes.
    given = "normaliser" in config.model_fields_set
    normaliser = config.normaliser if given else protocols_for(data)[0].normaliser
    result = audit(data, other, normaliser=normaliser, minimum_count=config.minimum_answer_count, **limits)
    return write_audit(result, output)


def _named_data(name: str, root: Path | None, overrides: list[str], section: str) -> DataConfig:
    path = Path(name)
    known = name.replace("_", "-") in (*FOLDERS, "phantom", "table")
    if path.suffix in (".csv", ".jsonl") or (path.is_dir() and not known):
        if root is not None:
            raise UserError(f"{name} is a table, so that the root {root} does not apply; remove it")
        return load_data_config("table", path, overrides, section)
    return load_data_config(name, root, overrides, section)


def audit(
    data: Dataset[Sample],
    against: Dataset[Sample] | None = None,
    *,
    normaliser: str = "mevf",
    minimum_count: int = 1,
    workers: int | None = None,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Audit:
    """Audit a data set, or what two data sets share.

    Args:
        data: A data set.
        against: A second data set.
        normaliser: Name of the answer normaliser.
        minimum_count: Number of training questions that an answer class needs, as in training.
        workers: Number of threads that decode images (default: one per core, at most 8).
        max_bytes: Largest accepted image file.
        max_pixels: Largest accepted number of pixels.

    Broken image files become findings and raise no error.
    """
    sets = [data] if against is None else [data, against]
    result = Audit(sets, ImageIndex.of(sets))
    summaries = summarize_files(list(result.index.numbers), workers=workers, max_bytes=max_bytes, max_pixels=max_pixels)
    result.index.pairs = find_pairs(summaries)
    if against is None:
        _audit_one(result, normaliser, minimum_count)
    else:
        _audit_two(result, normaliser, minimum_count)
    _check_files(result, summaries)
    return result


# One or two data sets


def _audit_one(result: Audit, normaliser: str, minimum_count: int) -> None:
    data, index = result.data[0], result.index
    test: list[Place] = [(0, "test")]
    training: list[Place] = [(0, "train"), (0, "validation")]
    _check_images(result, test, training)
    inner = index.overlap("validation", [(0, "validation")], "train", [(0, "train")])
    result.overlaps.append(inner)
    if inner.same:
        says = "These validation images are also training images; validation does not measure new images."
        result.findings.append(
            Finding("validation_images", "note", "validation images in training", inner.same, inner.images, says)
        )
    _add_findings_of_reader(result, data)
    rows = [sample for split in TRAINING_SPLITS for sample in data.split(split)]
    _check_rows(result, rows, data.split("test"), normaliser)
    vocabulary = _vocabulary(data, normaliser, minimum_count)
    _check_answers(result, vocabulary, data.split("test"), "training")
    result.shortcuts = shortcuts(data, normaliser)
    if result.shortcuts and not any(shortcut.name == "text_model" for shortcut in result.shortcuts):
        result.notes.append(
            "The text model was skipped because scikit-learn is missing: pip install 'preceptor[audit]'."
        )
    if data.split("test") and not data.split("train"):
        result.notes.append("There is no training split, so nothing can leak from it.")
    if not data.split("test"):
        result.notes.append("There is no test split, so nothing was checked for leaks into it.")


def _audit_two(result: Audit, normaliser: str, minimum_count: int) -> None:
    index, names = result.index, result.names
    all_places: list[list[Place]] = [[(side, split) for split in SPLITS] for side in (0, 1)]
    for data in result.data:
        _add_findings_of_reader(result, data)
    for side, other in ((0, 1), (1, 0)):
        test: list[Place] = [(side, "test")]
        training: list[Place] = [(other, "train"), (other, "validation")]
        _check_images(result, test, training)
        rows = [sample for split in TRAINING_SPLITS for sample in result.data[other].split(split)]
        held_out = result.data[side].split("test")
        # Groups of different data sets may have the same names by chance.
        groups = result.data[0].name == result.data[1].name
        _check_rows(result, rows, held_out, normaliser, f"{names[side]} ", f"{names[other]} ", groups=groups)
        vocabulary = _vocabulary(result.data[other], normaliser, minimum_count)
        _check_answers(result, vocabulary, held_out, names[other], main=side == 0)
    for side, other in ((0, 1), (1, 0)):
        result.overlaps.append(index.overlap(names[side], all_places[side], names[other], all_places[other]))
    overlap = result.overlaps[-2]
    says = f"Images of {names[0]} that are also in {names[1]}, in any split."
    ids = tuple(index.row(n, all_places[0])[1].id for n, kind in overlap.kinds.items() if kind != "alike")
    if overlap.same:
        result.findings.append(
            Finding("images", "note", "images in both sets", overlap.same, overlap.images, says, ids)
        )


# Checks


def _add_findings_of_reader(result: Audit, data: Dataset[Sample]) -> None:
    """Add what reading the rows has found, except groups and images in several splits: the audit counts them itself."""
    for found in data.findings:
        if counts_crossings(found):
            continue
        title = "patients in several splits" if found.leak else "rows with findings"
        severity: Severity = "leak" if found.leak else "suspicion" if found.severity == "warning" else "broken"
        ids = found.sample_ids
        result.findings.append(Finding("rows", severity, title, len(ids), len(data.samples), found.reason, ids))


def _check_images(result: Audit, test: list[Place], training: list[Place]) -> None:
    """Find the test images of a data set in training and validation of the same or of another data set."""
    test_name, other_name = (
        f"{result.names[places[0][0]]} " if len(result.data) > 1 else "" for places in (test, training)
    )
    overlap = result.index.overlap(f"{test_name}test", test, f"{other_name}train or validation", training)
    result.overlaps.append(overlap)
    result.overlaps += [
        result.index.overlap(f"{test_name}test", test, f"{other_name}{place[1]}", [place]) for place in training
    ]
    if not overlap.images:
        return
    descriptions = {
        "file": "the same file",
        "bytes": "equal bytes",
        "pixels": "equal pixels",
        "copy": "a copy with another size or encoding",
    }
    counts = overlap.counts
    listed = ", ".join(f"{counts[kind]} {description}" for kind, description in descriptions.items() if counts[kind])

    def ids(kinds: set[str]) -> tuple[str, ...]:
        return tuple(result.index.row(number, test)[1].id for number, kind in overlap.kinds.items() if kind in kinds)

    title = f"{overlap.of} images in {overlap.other}"
    if overlap.same:
        splits = ", ".join(f"{o.same} in {o.other}" for o in result.overlaps[-2:] if o.same)
        says = f"{listed}; {splits}."
        same = {"file", *SAME}
        result.findings.append(Finding("test_images", "leak", title, overlap.same, overlap.images, says, ids(same)))
    if alike := counts["alike"]:
        says = (
            "They resemble an image there but differ in detail. Most are adjacent slices of a scan, so the same "
            "patient, or altered copies. Check them by eye."
        )
        alike_title = f"{overlap.of} images that resemble one in {overlap.other}"
        result.findings.append(
            Finding("alike_images", "suspicion", alike_title, alike, overlap.images, says, ids({"alike"}))
        )


def _check_rows(
    result: Audit,
    training: Sequence[Sample],
    held_out: Sequence[Sample],
    normaliser: str,
    of: str = "",
    whose: str = "",
    *,
    groups: bool = True,
) -> None:
    if not training or not held_out:
        return
    classes = result.index.classes()

    def image(sample: Sample) -> int:
        return classes[sample.image]

    frame_matches = frames_of(training, held_out)
    equal_questions = asked_in_both(training, held_out, image)
    known = {sample.id for sample, _ in frame_matches + equal_questions}
    restated_questions = [m for m in restated(training, held_out, image, normaliser) if m[0].id not in known]
    checks: list[tuple[str, Severity, str, list[Match], str]] = [
        (
            "frames",
            "leak",
            f"{of}test questions whose frame is a {whose}training row",
            frame_matches,
            "The template form of the question is in training, with the same image and the same answer.",
        ),
        (
            "questions",
            "leak",
            f"{of}test questions that occur in {whose}training about the same image",
            equal_questions,
            "The words are equal, ignoring case and punctuation.",
        ),
        (
            "restated",
            "suspicion",
            f"{of}test questions restated in {whose}training",
            restated_questions,
            f"A training row has the same image, the same answer and at least {RESTATED:.0%} of the words.",
        ),
    ]
    if groups:
        shared = shared_groups(training, held_out)
        number = len({sample.group for sample, _ in shared})
        total = len({sample.group for sample in held_out})
        says = f"{number} of {total} test groups (patients, cases or images) are in training."
        checks.insert(0, ("groups", "leak", f"{of}test questions of groups in {whose}training", shared, says))
    for check, severity, title, matches, says in checks:
        if matches:
            ids = tuple(sample.id for sample, _ in matches)
            result.findings.append(
                Finding(check, severity, title, len(matches), len(held_out), says, ids, tuple(matches))
            )


def _vocabulary(data: Dataset[Sample], normaliser: str, minimum_count: int) -> AnswerVocabulary | None:
    """Return the answer classes of a training on a data set, or None if there are none."""
    train = [sample for sample in data.split("train") if sample.answers]
    try:
        return AnswerVocabulary.build(train, normaliser, minimum_count) if train else None
    except UserError:  # `doctor` says why
        return None


def _check_answers(
    result: Audit, vocabulary: AnswerVocabulary | None, test: Sequence[Sample], whose: str, *, main: bool = True
) -> None:
    if vocabulary is None or not test:
        return
    unseen = [sample for sample in test if vocabulary.encode(sample.answers) < 0]
    ceiling = vocabulary.ceiling(test)
    if main:
        result.ceiling = ceiling
    if unseen:
        says = f"No answer of {whose} is correct, so a classifier over these answers reaches at most {ceiling:.1%}."
        title = f"test answers that do not occur in {whose}"
        ids = tuple(sample.id for sample in unseen)
        result.findings.append(Finding("unseen_answers", "note", title, len(unseen), len(test), says, ids))


def _check_files(result: Audit, summaries: Sequence[ImageSummary]) -> None:
    index = result.index

    def add(check: str, severity: Severity, title: str, numbers: list[int], says: str) -> None:
        if numbers:
            ids = tuple(index.row(number)[1].id for number in numbers)
            result.findings.append(Finding(check, severity, title, len(numbers), len(summaries), says, ids))

    broken = [n for n, summary in enumerate(summaries) if summary.broken]
    reasons = sorted({summary.broken.partition(";")[0] for summary in summaries if summary.broken})
    add("broken", "broken", "image files that cannot be read", broken, f"{'; '.join(reasons[:5])}.")
    texts = [n for n, summary in enumerate(summaries) if summary.text]
    says = "Rows of small strokes near a border may be names or dates. Check them before you share images."
    add("burned_in_text", "suspicion", "images with burned-in text", texts, says)
    tags = sorted({tag for summary in summaries for tag in summary.tags})
    tagged = [n for n, summary in enumerate(summaries) if summary.tags]
    says = (
        f"These tags have values: {', '.join(tags)}. The values were not read. Remove headers before you share files."
    )
    add("identifying_tags", "suspicion", "image files with identifying headers", tagged, says)


# Files


def write_audit(result: Audit, folder: Path) -> dict[str, Any]:
    """Write `audit.json` and `audit.html` to `folder`, and return the content of `audit.json`."""
    document = as_document(result)
    write_text(folder / "audit.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "audit.html", render(result))
    return document


def as_document(result: Audit) -> dict[str, Any]:
    """Return the content of `audit.json`: counts, ids of rows and hash distances, but no file names and no groups."""
    return {
        "format": 1,
        "leaks": result.leaks,
        "data": [
            {
                "name": data.name,
                "variant": data.variant,
                "sha256": data.fingerprint(),
                "notes": data.notes,
                "rows": {split: len(data.split(split)) for split in SPLITS},
                "images": len({sample.image for sample in data.samples}),
            }
            for data in result.data
        ],
        "images": len(result.index.numbers),
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
            for f in result.findings
        ],
        "overlaps": [
            {"of": o.of, "in": o.other, "images": o.images, "same": o.same, **{k: o.counts[k] for k in KINDS}}
            for o in result.overlaps
        ],
        "ceiling": result.ceiling,
        "shortcuts": [{"title": shortcut.title, **asdict(shortcut)} for shortcut in result.shortcuts],
        "pairs": [
            {
                "kind": pair.kind,
                "bits": pair.bits,
                "correlation": round(pair.correlation, 4),
                **{
                    side: _describe_image(result, number)
                    for side, number in (("left", pair.left), ("right", pair.right))
                },
            }
            for pair in result.crossing()[:MAX_PAIRS]
        ],
        "notes": result.notes,
    }


def _describe_image(result: Audit, number: int) -> dict[str, str]:
    (side, split), sample = result.index.row(number)
    return {"data": result.names[side], "split": split, "id": sample.id}
