"""Check the rows and images of a VQA data set. Problems are returned, not raised.

Every run checks the rows, which is cheap, and adds the findings to its notes. `preceptor doctor` also checks the image
files.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from pathlib import Path
from typing import Literal

from preceptor.data.findings import Finding
from preceptor.data.images import ImageError, load_image
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.texts import MISSING
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.normalizers import NORMALISERS, plain


def check_images(
    samples: Iterable[Sample], *, workers: int = 0, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS
) -> list[Finding]:
    """Decode every distinct image once and return a finding for each unusable one, in the order of the samples.

    `workers` is the number of decoding threads; with 0 the calling thread decodes.
    """
    ids_by_image: dict[Path, list[str]] = {}
    for sample in samples:
        ids_by_image.setdefault(sample.image, []).append(sample.id)

    def decoding_error(path: Path) -> str | None:
        try:
            load_image(path, max_bytes=max_bytes, max_pixels=max_pixels)
        except ImageError as error:
            return str(error)
        return None

    if workers:
        with ThreadPoolExecutor(workers) as pool:
            reasons = list(pool.map(decoding_error, ids_by_image))
    else:
        reasons = [decoding_error(path) for path in ids_by_image]
    return [
        Finding(tuple(ids), path, reason)
        for (path, ids), reason in zip(ids_by_image.items(), reasons, strict=True)
        if reason is not None
    ]


def check_data(data: Dataset[Sample], normaliser: str = "mevf", minimum_count: int = 1) -> list[Finding]:
    """Check the rows of a data set; `check_images` checks the image files.

    Errors are duplicate ids, empty questions or answers, and answers that are printed lists. Warnings count answers
    that look like a missing value or a truth value, numbers that are written in two ways or that the normaliser
    changes, answer classes that contain answers with different signs (HER2+ and HER2-), questions with a mark for an
    image, texts with an escaped control character, and the test questions without an accepted answer among the answer
    classes, which `normaliser` and `minimum_count` define as in training.
    """
    repeated = [id for id, count in Counter(sample.id for sample in data.samples).items() if count > 1]
    findings = [Finding((id,), None, f"several rows have the id {id!r}; make ids unique") for id in repeated]
    for sample in data.samples:
        if sample.split == "unlabelled":
            continue
        if not sample.question.strip():
            findings.append(Finding((sample.id,), None, "the question is empty"))
        if not any(answer.strip() for answer in sample.answers):
            findings.append(Finding((sample.id,), None, "the answer is empty"))
    marked = tuple(sample.id for sample in data.samples if "<image>" in sample.question)
    if marked:
        reason = f"{len(marked)} questions contain <image>, which is read as text; remove it"
        findings.append(Finding(marked, None, reason, "warning"))
    escaped = {
        sample.id: found[0]
        for sample in data.samples
        if (found := _ESCAPED.search("\n".join((sample.question, *sample.answers))))
    }
    if escaped:
        reason = (
            f"{len(escaped)} questions or answers contain {next(iter(escaped.values()))}, a control character as Excel "
            "writes it, which is read as text; remove it"
        )
        findings.append(Finding(tuple(escaped), None, reason, "warning"))
    normalise = NORMALISERS.get(normaliser, str)
    findings += _check_answers(data.samples, normalise) + _check_signs(data.samples, normalise)

    train, test = [sample for sample in data.split("train") if sample.answers], data.split("test")
    try:
        vocabulary = AnswerVocabulary.build(train, normaliser, minimum_count) if train else None
    except UserError as error:
        return [*findings, Finding((), None, str(error))]
    if vocabulary and test and (ceiling := vocabulary.ceiling(test)) < 1:
        reason = (
            f"{round(len(test) * (1 - ceiling))} of {len(test)} test questions have answers that are not among the "
            f"{len(vocabulary)} answer classes of the training split; the accuracy of a classifier is at most "
            f"{ceiling:.1%}"
        )
        findings.append(Finding((), None, reason, "warning"))
    return findings


# "None" is a usual answer.
_MISSING = MISSING - {"none"} | {"n.a.", "#n/a", "#n/d", "#nv", "undefined", "-", "--", "?"}
_ERROR_VALUE = re.compile(r"#[\w/]+[!?]")
"""Errors of spreadsheets in any language: #REF!, #DIV/0!, #NAME?, #WERT!"""
_ESCAPED = re.compile(r"_x[0-9a-fA-F]{4}_")
"""A control character as Excel writes it into its files: _x000D_ for the end of a line."""
_PRINTED = re.compile(
    r"\[.*\]|\{.*\}|\(\s*['\"].*\)|b'.*'|b\".*\"|(?:(?:np|numpy|torch|pd|pandas)\.\w+|array|dtype|tensor|Timestamp|Decimal|datetime"
    r"\.\w+)\(.*",
    re.DOTALL,
)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?(?:e[+-]?\d{1,3})?", re.IGNORECASE)
_DECIMAL_COMMA = re.compile(r"(?<=\d),(?=\d{1,2}(?!\d))")
_THOUSANDS_COMMA = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
_NUMBER_INSIDE = re.compile(r"(?:(?<![\w.)])(?<!\d\s)-)?\d+(?:\.\d+)?(?:e[+-]?\d{1,3}(?!\w))?", re.IGNORECASE)
"""A number inside a text. A minus after a number, a letter or a bracket is a hyphen or a dash, as in 5-10 and PD-1."""
_RAISED = re.compile("(?<=\\d)(?=[\u00b2\u00b3\u00b9\u2070-\u2079\u00bc-\u00be\u2150-\u215e])")
"""Between a digit and a superscript or a fraction, which Unicode normalisation joins to it: 10² becomes 102."""


_SIGN = re.compile(r"[+<>=]|(?<!\w)-(?=\w)|(?<=\w)-(?!\w)|-(?=\W*$)")
"""A sign that changes the meaning of an answer. Hyphens between letters, as in x-ray, and spaced dashes do not."""


def numbers_in(text: str) -> list[Decimal]:
    """Return the numbers inside a text in order; 1,5 is 1.5, 1,500 is 1500, and a power is a number of its own."""
    text = _DECIMAL_COMMA.sub(".", _THOUSANDS_COMMA.sub("", plain(_RAISED.sub(" ", text))))
    return [Decimal(number) for number in _NUMBER_INSIDE.findall(text)]


def changes_number(text: str, normalised: str) -> bool:
    """Return whether a normaliser changes a number: -1 and 1, 1,5 cm and 15 cm, 10² and 102 become one class.

    A normaliser may add numbers, because it writes number words as digits.
    """
    if not any(sign.isnumeric() for sign in text):
        return False
    found = iter(numbers_in(normalised))
    return not all(number in found for number in numbers_in(text))


def written_by_program(text: str) -> Literal["missing", "printed", "truth", ""]:
    """Return what a program has written in the place of an answer: a missing value, a printed list, a truth value."""
    text = text.strip()
    if text.lower() in _MISSING or _ERROR_VALUE.fullmatch(text):
        return "missing"
    if _PRINTED.fullmatch(text):
        return "printed"
    return "truth" if text.lower() in ("true", "false") else ""


def _check_answers(samples: Sequence[Sample], normalise: Callable[[str], str]) -> list[Finding]:
    """Return findings for texts that a program has written in the place of an answer, and for ambiguous numbers."""
    missing: dict[str, list[str]] = {}
    printed: dict[str, list[str]] = {}
    truth_values: dict[str, list[str]] = {}
    by_kind = {"missing": missing, "printed": printed, "truth": truth_values}
    changed: dict[str, list[str]] = {}
    spellings: defaultdict[Decimal, dict[str, list[str]]] = defaultdict(dict)
    for sample in samples:
        for answer in sample.answers:
            text = answer.strip()
            if kind := written_by_program(text):
                by_kind[kind].setdefault(text, []).append(sample.id)
            number = normalise(text)
            if changes_number(text, number):
                changed.setdefault(text, []).append(sample.id)
            elif _NUMBER.fullmatch(number):
                spellings[Decimal(number)].setdefault(number, []).append(sample.id)
    findings = []
    severity: Literal["error", "warning"]
    for found, what, severity in (
        (printed, "are printed lists or structures; write texts, and several answers as a list in JSONL", "error"),
        (
            missing,
            "look like a missing value or an error of a spreadsheet; fill them in or delete the rows, unless the text "
            "is meant",
            "warning",
        ),
        (truth_values, "look like truth values, but count as open; write yes and no, unless they are meant", "warning"),
        (
            changed,
            "contain numbers whose sign, decimal comma, power or fraction the normaliser of answers drops",
            "warning",
        ),
    ):
        ids = tuple(dict.fromkeys(id for of_text in found.values() for id in of_text))
        if ids:
            count = sum(map(len, found.values()))
            reason = f"{count} answers, such as {min(found)!r:.60}, {what}"
            findings.append(Finding(ids, None, reason, severity))
    twice = [texts for texts in spellings.values() if len(texts) > 1]
    if twice:
        ids = tuple(dict.fromkeys(id for texts in twice for of_text in texts.values() for id in of_text))
        reason = (
            f"{len(twice)} numbers are written in several ways, such as {' and '.join(sorted(twice[0]))}, and are "
            "different answers; write each number in one way"
        )
        findings.append(Finding(ids, None, reason, "warning"))
    return findings


def _check_signs(samples: Sequence[Sample], normalise: Callable[[str], str]) -> list[Finding]:
    """Return a finding for answers of one class that differ in signs, such as HER2+ and HER2-."""
    ids: defaultdict[str, list[str]] = defaultdict(list)
    for sample in samples:
        for answer in sample.answers:
            ids[answer.strip()].append(sample.id)
    classes: defaultdict[str, dict[str, list[str]]] = defaultdict(dict)  # texts by class and signs
    for text in ids:
        if not changes_number(text, normalised := normalise(text)):
            classes[normalised].setdefault("".join(_SIGN.findall(plain(text))), []).append(text)
    merged = [by_signs for by_signs in classes.values() if len(by_signs) > 1]
    if not merged:
        return []
    affected = dict.fromkeys(
        id for by_signs in merged for texts in by_signs.values() for text in texts for id in ids[text]
    )
    examples = " and ".join(f"{texts[0]!r:.60}" for texts in list(merged[0].values())[:2])
    reason = (
        f"{len(merged)} answer classes contain answers that differ in signs such as + - < > =, for example {examples}, "
        "because the normaliser of answers drops them; write the difference in words, unless they mean the same"
    )
    return [Finding(tuple(affected), None, reason, "warning")]
