"""What `preceptor teach` does: data sets, a teacher, a store."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.errors import UserError
from preceptor.grounding.endpoint import EndpointTeacher, TokenEstimate, estimate_tokens
from preceptor.grounding.pseudo_labels import ContentHashes, Prompt, Teacher, teach
from preceptor.grounding.sources import READERS, read_dialogues
from preceptor.teachers.label_store import MANIFEST, check_identity, read_labels, read_manifest


@dataclass(frozen=True)
class LabelingRequest:
    """Questions to ask: `dialogues` of `data`; `notes` say what was left out."""

    data: GroundingDataset
    dialogues: list[Dialogue]
    hashes: ContentHashes
    notes: list[str]


def gather(
    names: Sequence[str], root: Path | None, split: Split | None, limit: int | None, questions: Sequence[str] = ()
) -> LabelingRequest:
    """Read the data sets `names` (`read_dialogues`) and choose what to ask.

    `split` is by default `train` where any data set has training rows, else `unlabelled`. Dialogues about an image that
    is a validation or test image of any of the data sets, byte for byte, are left out.

    Raises:
        UserError: as the readers, for another split, and where nothing is left to ask.
    """
    if split not in (None, "train", "unlabelled"):
        raise UserError(f"--split {split} is not taught from: give train or unlabelled")
    if root is not None and len(names) > 1:
        raise UserError("--root is for one data set: set PRECEPTOR_DATA, or give the data sets one after the other")
    read = [read_dialogues(name, root, questions=questions) for name in names]
    # A file or folder of one's own may be named after a patient.
    called = [one.name if name in READERS else "own data" for name, one in zip(names, read, strict=True)]
    whole = GroundingDataset(
        "+".join(called), read[0].variant, read[0].root, [dialogue for one in read for dialogue in one.samples]
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


def estimate(lesson: LabelingRequest, folder: Path, teacher: EndpointTeacher) -> TokenEstimate:
    """Estimate the tokens of what the store in `folder` lacks; earlier answers of the teacher count as the most tokens.

    Raises UserError where the store is of another teacher or other settings.
    """
    known: set[str] = set()
    if (folder / MANIFEST).is_file():
        check_identity(folder, read_manifest(folder), teacher.identity)
        known = {label.key for label in read_labels(folder)}
    return estimate_tokens([p for p in _all_prompts(lesson) if p.key not in known], teacher.ask)


def _all_prompts(lesson: LabelingRequest) -> list[Prompt]:
    """Return every question once; where an earlier answer is not known it is an empty text."""
    found: dict[str, Prompt] = {}
    for dialogue in lesson.dialogues:
        for turn, key in enumerate(lesson.hashes.keys(dialogue)):
            asked = (*dialogue.turns[:turn], (dialogue.turns[turn][0], ""))
            found.setdefault(key, Prompt(key, turn, replace(dialogue, turns=asked)))
    return list(found.values())


def run(
    lesson: LabelingRequest, folder: Path, teacher: Teacher, progress: Callable[[int, int], None] | None = None
) -> dict[str, Any]:
    """Have the teacher answer what the store lacks; return the summary that the command prints."""
    taught = teach(folder, lesson.data, lesson.dialogues, teacher, hashes=lesson.hashes, progress=progress)
    labels = list(read_labels(folder))
    known = [label.confidence for label in labels if label.confidence is not None]
    return {
        "folder": str(folder),
        "data": lesson.data.name,
        "teacher": teacher.identity.teacher,
        **taught.as_dict(),
        "labels": len(labels),
        "cut_off": sum(not label.ended for label in labels),
        "with_confidence": len(known),
        "mean_confidence": sum(known) / len(known) if known else None,
        "notes": lesson.notes,
    }
