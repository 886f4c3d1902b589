"""Protocols: which questions are scored, and what counts as the same answer. Every published number names one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from preceptor.errors import UserError, nearest
from preceptor.types import Sample, VqaData


@dataclass(frozen=True)
class Protocol:
    """`select` says which samples are scored, `normaliser` (a key of `NORMALISERS`) how answers are compared.

    `describes` is one sentence for tables and reports.
    """

    id: str
    normaliser: str
    select: Callable[[Sample], bool]
    describes: str


def _test(sample: Sample) -> bool:
    return sample.part == "test"


def _test_freeform(sample: Sample) -> bool:
    return sample.part == "test" and sample.tags.get("phrase_type") == "test_freeform"


def protocols_for(data: VqaData) -> list[Protocol]:
    """Return the protocols that `data` can be scored with; the first is the main one.

    VQA-RAD has two customs: all 451 test questions (conditional reasoning, MMBERT, M3AE, MUMC, MHKD-MVQA) and the 308
    of them asked in free form, without the 143 paraphrases (MEVF, MMQ, VQAMix).
    """
    label = "; the split leaks test rows into training" if data.leaking else ""
    if data.name == "vqa-rad":
        prefix = f"{data.name}/{data.split}"
        everything = f"all test questions, MEVF normaliser, split {data.split!r}{label}"
        freeform = f"free-form test questions without paraphrases, MEVF normaliser, split {data.split!r}{label}"
        return [
            Protocol(f"{prefix}/451", "mevf", _test, everything),
            Protocol(f"{prefix}/freeform308", "mevf", _test_freeform, freeform),
        ]
    everything = f"all test questions, MEVF normaliser{label}"
    return [Protocol(f"{data.name}/{data.split or 'test'}", "mevf", _test, everything)]


def protocol_named(data: VqaData, id: str) -> Protocol:
    """Return the protocol of `data` with that id; raises UserError naming the nearest one."""
    known = {protocol.id: protocol for protocol in protocols_for(data)}
    if id not in known:
        raise UserError(f"data set {data.name!r} has no protocol {id!r}{nearest(id, known)}")
    return known[id]
