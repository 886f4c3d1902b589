"""The work of `preceptor teach`: read data sets, ask a teacher, store its answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from preceptor.data.grounding.box_formats import BOX_FORMATS, Size, find_boxes
from preceptor.data.images import image_size
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.errors import UserError
from preceptor.grounding.box_convention import BoxSettings, mentions_box, true_boxes
from preceptor.grounding.endpoint import EndpointTeacher, TokenEstimate, estimate_tokens
from preceptor.grounding.label_page import PAGE
from preceptor.grounding.labeling import CheckSettings, teach
from preceptor.grounding.pseudo_labels import ContentHashes, Labeler, Prompt, prompt_of
from preceptor.grounding.sources import READERS, read_dialogues
from preceptor.teachers.label_store import check_cache_key, holds_labels, read_boxes, read_labels


@dataclass(frozen=True)
class LabelingRequest:
    """Questions to ask: those of `dialogues`, a part of `data`. `notes` list what was left out.

    `known` are training dialogues whose first answer is a box, in random order, those of `dialogues` first. The
    teacher's way to write boxes is measured on them.
    """

    data: GroundingDataset
    dialogues: list[Dialogue]
    hashes: ContentHashes
    notes: list[str]
    known: list[Dialogue] = field(default_factory=list)


def gather(
    names: Sequence[str],
    root: Path | None,
    split: Split | None,
    limit: int | None,
    questions: Sequence[str] = (),
    data_box_format: str = "auto",
) -> LabelingRequest:
    """Read the data sets `names` (`read_dialogues` with `data_box_format`) and choose the questions to ask.

    The default of `split` is `train` if any data set has training rows, else `unlabelled`. Dialogues about an image
    that is byte-equal to a validation or test image of any of the data sets are left out.

    Raises:
        UserError: as the readers, for another split, or if no question is left.
    """
    if split not in (None, "train", "unlabelled"):
        raise UserError(f"--split {split}: give train or unlabelled")
    if root is not None and len(names) > 1:
        raise UserError("--root is for one data set: set PRECEPTOR_DATA, or run the command once per data set")
    try:
        read = [read_dialogues(name, root, questions=questions, box_format=data_box_format) for name in names]
    except UserError as error:  # the readers name the setting of a recipe
        raise UserError(str(error).replace("data.box_format", "--data-box-format")) from None
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
    asked = dialogues if limit is None else dialogues[:limit]
    first = {id(dialogue) for dialogue in asked}
    known = [
        dialogue
        for dialogue in whole.split("train")
        if true_boxes(dialogue.turns[0][1])
        and not find_boxes(dialogue.turns[0][0])
        and len(dialogue.images) == 1
        and not held_out & set(hashes.of(dialogue))
    ]
    known.sort(key=lambda dialogue: (id(dialogue) not in first, hashes.keys(dialogue)[0]))
    return LabelingRequest(whole, asked, hashes, notes, known)


def box_settings(
    request: LabelingRequest,
    folder: Path,
    box_format: str | None,
    measure: int,
    min_iou: float,
    size_sent: Callable[[Path], Size] = image_size,
    candidates: Sequence[str] = tuple(BOX_FORMATS),
) -> BoxSettings:
    """Return how the boxes of the teacher's answers are read; without `box_format` they are measured on `measure`
    questions, unless the store in `folder` knows the format already.

    Raises UserError if boxes are asked for, `box_format` is None and the data have too few known boxes.
    """
    unknown = box_format is None and not (holds_labels(folder) and read_boxes(folder))
    measures = unknown and any(mentions_box(prompt) for prompt in _all_prompts(request))
    settings = BoxSettings(box_format, request.known[:measure] if measures else [], min_iou, candidates, size_sent)
    if measures:
        settings.require_measurable()
    return settings


def estimate(
    request: LabelingRequest, folder: Path, teacher: EndpointTeacher, boxes: BoxSettings, agreement: float = 0.0
) -> TokenEstimate:
    """Estimate the tokens of the questions whose answers the store in `folder` lacks.

    An earlier answer that is not known yet counts as the maximum number of tokens. Raises UserError if the store is of
    another teacher or other settings.
    """
    known: set[str] = set()
    if holds_labels(folder):
        check_cache_key(folder, teacher.cache_key)
        known = {label.key for label in read_labels(folder)}
    prompts = _all_prompts(replace(request, dialogues=[*request.dialogues, *boxes.measured]))
    found = estimate_tokens([prompt for prompt in prompts if prompt.key not in known], teacher.ask)
    return found.times(1 + agreement)


def _all_prompts(request: LabelingRequest) -> list[Prompt]:
    """Return every question once. An earlier answer that is not known is an empty text."""
    prompts: dict[str, Prompt] = {}
    for dialogue in request.dialogues:
        for turn, key in enumerate(request.hashes.keys(dialogue)):
            prompts.setdefault(key, prompt_of(dialogue, turn, key, dialogue.turns[:turn]))
    return list(prompts.values())


def run(
    request: LabelingRequest,
    folder: Path,
    teacher: Labeler,
    progress: Callable[[int, int], None] | None = None,
    *,
    boxes: BoxSettings | None = None,
    checks: CheckSettings | None = None,
) -> dict[str, Any]:
    """Have the teacher answer the questions that the store lacks; return the summary that the command prints."""
    result = teach(
        folder,
        request.data,
        request.dialogues,
        teacher,
        hashes=request.hashes,
        progress=progress,
        boxes=boxes,
        checks=checks,
    )
    labels = read_labels(folder)
    known = [label.confidence for label in labels if label.confidence is not None]
    return {
        "folder": str(folder),
        "data": request.data.name,
        "teacher": teacher.cache_key.teacher,
        **result.as_dict(),
        "labels": len(labels),
        "page": str(folder / PAGE),
        "cut_off": sum(not label.ended for label in labels),
        "with_confidence": len(known),
        "mean_confidence": sum(known) / len(known) if known else None,
        "notes": request.notes,
    }
