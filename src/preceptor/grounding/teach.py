"""The work of `preceptor teach`: read data sets, ask a teacher, store its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.errors import UserError
from preceptor.grounding.endpoint import EndpointTeacher, TokenEstimate, estimate_tokens
from preceptor.grounding.pseudo_labels import ContentHashes, Labeler, Prompt, teach
from preceptor.grounding.sources import READERS, read_dialogues
from preceptor.teachers.label_store import check_cache_key, holds_labels, read_labels


@dataclass(frozen=True)
class LabelingRequest:
    """Questions to ask: those of `dialogues`, a part of `data`. `notes` list what was left out."""

    data: GroundingDataset
    dialogues: list[Dialogue]
    hashes: ContentHashes
    notes: list[str]


def gather(
    names: Sequence[str], root: Path | None, split: Split | None, limit: int | None, questions: Sequence[str] = ()
) -> LabelingRequest:
    """Read the data sets `names` (`read_dialogues`) and choose the questions to ask.

    The default of `split` is `train` if any data set has training rows, else `unlabelled`. Dialogues about an image
    that is byte-equal to a validation or test image of any of the data sets are left out.

    Raises:
        UserError: as the readers, for another split, or if no question is left.
    """
    if split not in (None, "train", "unlabelled"):
        raise UserError(f"--split {split}: give train or unlabelled")
    if root is not None and len(names) > 1:
        raise UserError("--root is for one data set: set PRECEPTOR_DATA, or run the command once per data set")
    read = [read_dialogues(name, root, questions=questions) for name in names]
    # The name of a user's file or folder may be a patient's.
    labels = [one.name if name in READERS else "own data" for name, one in zip(names, read, strict=True)]
    whole = GroundingDataset(
        "+".join(labels), read[0].variant, read[0].root, [dialogue for one in read for dialogue in one.samples]
    )
    chosen = split or ("train" if whole.split("train") else "unlabelled")
    hashes = ContentHashes()
    held_out = {image for d in whole.samples if d.split in ("validation", "test") for image in hashes.of(d)}
    rows = whole.split(chosen)
    dialogues = [dialogue for dialogue in rows if not held_out & set(hashes.of(dialogue))]
    notes = [note for one in read for note in one.notes]
    if len(dialogues) < len(rows):
        notes.append(f"{len(rows) - len(dialogues)} dialogues about validation or test images were left out.")
    if not dialogues:
        raise UserError(f"{whole.name} has no {chosen} dialogues to ask about; see --split, and the split of the rows")
    return LabelingRequest(whole, dialogues if limit is None else dialogues[:limit], hashes, notes)


def estimate(request: LabelingRequest, folder: Path, teacher: EndpointTeacher) -> TokenEstimate:
    """Estimate the tokens of the questions whose answers the store in `folder` lacks.

    An earlier answer that is not known yet counts as the maximum number of tokens. Raises UserError if the store is of
    another teacher or other settings.
    """
    known: set[str] = set()
    if holds_labels(folder):
        check_cache_key(folder, teacher.cache_key)
        known = {label.key for label in read_labels(folder)}
    return estimate_tokens([p for p in _all_prompts(request) if p.key not in known], teacher.ask)


def _all_prompts(request: LabelingRequest) -> list[Prompt]:
    """Return every question once. An earlier answer that is not known is an empty text."""
    prompts: dict[str, Prompt] = {}
    for dialogue in request.dialogues:
        for turn, key in enumerate(request.hashes.keys(dialogue)):
            turns = (*dialogue.turns[:turn], (dialogue.turns[turn][0], ""))
            prompts.setdefault(key, Prompt(key, turn, replace(dialogue, turns=turns)))
    return list(prompts.values())


def run(
    request: LabelingRequest, folder: Path, teacher: Labeler, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Have the teacher answer the questions that the store lacks; return the summary that the command prints."""
    result = teach(folder, request.data, request.dialogues, teacher, hashes=request.hashes, progress=progress)
    labels = read_labels(folder)
    known = [label.confidence for label in labels if label.confidence is not None]
    return {
        "folder": str(folder),
        "data": request.data.name,
        "teacher": teacher.cache_key.teacher,
        **result.as_dict(),
        "labels": len(labels),
        "cut_off": sum(not label.ended for label in labels),
        "with_confidence": len(known),
        "mean_confidence": sum(known) / len(known) if known else None,
        "notes": request.notes,
    }
