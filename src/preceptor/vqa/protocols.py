"""Protocols: which questions are scored, and when two answers are the same. Every published number names one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from preceptor.data.types import Dataset, Sample
from preceptor.errors import UserError, nearest

Metric = Literal["accuracy", "bleu", "soft"]


def _type(sample: Sample) -> str:
    return sample.question_type


def _type_or_yes_no(sample: Sample) -> str:
    return "yes/no" if sample.answer_type == "closed" else sample.question_type


@dataclass(frozen=True)
class Protocol:
    """How a data set is scored.

    Args:
        id: name of the protocol, as in ``vqa-rad/clean/451``.
        normaliser: key of `NORMALISERS`; answers are compared after normalisation.
        select: whether a sample is scored.
        describes: one sentence for tables and reports.
        metric: the score of a question: exact match, ImageCLEF's BLEU, or the VQA score of several annotators' votes.
        category: the question type that a sample counts for.
    """

    id: str
    normaliser: str
    select: Callable[[Sample], bool]
    describes: str
    metric: Metric = "accuracy"
    category: Callable[[Sample], str] = _type


def _test(sample: Sample) -> bool:
    return sample.split == "test"


def _test_freeform(sample: Sample) -> bool:
    return sample.split == "test" and sample.tags.get("phrase_type") == "test_freeform"


def _test_in(language: str) -> Callable[[Sample], bool]:
    return lambda sample: sample.split == "test" and sample.tags.get("language") == language


def protocols_for(data: Dataset[Sample]) -> list[Protocol]:
    """Return the protocols that `data` can be scored with; the first is the main one.

    VQA-RAD is scored in two ways: all 451 test questions (conditional reasoning, MMBERT, M3AE, MUMC, MHKD-MVQA), or
    the 308 of them in free form, without the 143 paraphrases (MEVF, MMQ, VQAMix). VQA-Med 2019 has strict accuracy and
    BLEU; on the official validation split their ids contain `val`. Its question types are those of published tables
    (CGMVQA, MMBERT): yes/no questions, which the files list under modality and abnormality, are a type of their own.
    """
    label = "; the split leaks test rows into training" if data.leaking else ""
    if data.name == "vqa-rad":
        prefix = f"{data.name}/{data.variant}"
        everything = f"all test questions, MEVF normaliser, split {data.variant!r}{label}"
        freeform = f"free-form test questions without paraphrases, MEVF normaliser, split {data.variant!r}{label}"
        protocols = [Protocol(f"{prefix}/451", "mevf", _test, everything)]
        if data.variant != "hub":  # The hub's copy does not tell which questions are paraphrases.
            protocols.append(Protocol(f"{prefix}/freeform308", "mevf", _test_freeform, freeform))
        return protocols
    if data.name == "vqa-med-2019":
        prefix, split = (data.name, "test") if data.variant == "test" else (f"{data.name}/val", "official validation")
        about = f"all {split} questions, lower case, any of the alternatives counts{label}"
        bleu = f"all {split} questions, BLEU as ImageCLEF computes it, the best alternative counts{label}"
        return [
            Protocol(f"{prefix}/strict", "lower", _test, about, category=_type_or_yes_no),
            Protocol(f"{prefix}/bleu", "lower", _test, bleu, metric="bleu", category=_type_or_yes_no),
        ]
    if data.name == "slake":
        language, _, published = data.variant.partition("-")
        suffix = f"/{published}" if published else ""
        return [
            Protocol(f"slake-{one}{suffix}", "mevf", _test_in(one), f"test questions in {name}, MEVF normaliser{label}")
            for one, name in (("en", "English"), ("zh", "Chinese"))
            if language in (one, "both")
        ]
    everything = f"all test questions, MEVF normaliser{label}"
    if data.name == "path-vqa":
        return [Protocol("path-vqa", "mevf", _test, everything)]
    return [Protocol(f"{data.name}/{data.variant or 'test'}", "mevf", _test, everything)]


def settings_for(id: str) -> dict[str, str] | None:
    """Return the keys of a recipe's `data` that a protocol id of a public data set implies; None for other ids."""
    name, *rest = id.split("/")
    if name == "vqa-rad" and len(rest) == 2:
        return {"name": name, "variant": rest[0]}
    if name == "vqa-med-2019" and rest:
        return {"name": name, "variant": "val" if rest[0] == "val" else "test"}
    if name in ("slake-en", "slake-zh"):
        language = name.removeprefix("slake-")
        # Only training and validation differ by language and variant.
        return {"name": "slake", "language": "both" if rest else language, "variant": rest[0] if rest else "clean"}
    return {"name": name} if id == "path-vqa" else None


def metric_of(id: str) -> Metric:
    """Return the metric of a protocol id."""
    return "bleu" if id.startswith("vqa-med-2019/") and id.endswith("/bleu") else "accuracy"


def protocol_named(data: Dataset[Sample], id: str) -> Protocol:
    """Return the protocol of `data` with that id. Raises UserError with the nearest id if there is none."""
    known = {protocol.id: protocol for protocol in protocols_for(data)}
    if id not in known:
        raise UserError(f"data set {data.name!r} has no protocol {id!r}{nearest(id, known)}")
    return known[id]
