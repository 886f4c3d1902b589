"""What a recipe's teacher says: its answers to training questions, and its words at each answer token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from preceptor.config_vlm import PseudoLabelConfig
from preceptor.dialogues.examples import Lesson
from preceptor.dialogues.stage import Seminar
from preceptor.distill.chunked_kl import HiddenTeacher
from preceptor.distill.curriculum import Curriculum
from preceptor.errors import UserError
from preceptor.files import json_lines, write_text
from preceptor.methods.clinkd import WordTeacher
from preceptor.models.grounded_vlm import GroundedVlm
from preceptor.processes import processes
from preceptor.run_folder import student_folder
from preceptor.task import Batch
from preceptor.teachers.source import weights_fingerprint


def load_teacher(room: Seminar) -> GroundedVlm:
    """Return the frozen teacher: `method.teaching_run`, or the stage `teacher` of this recipe."""
    recipe = room.recipe
    run = recipe.method.teaching_run
    folder = str(student_folder(Path(run))) if run and Path(run).is_dir() else run
    source = folder or str(recipe.output_folder / "teacher" / "student")
    config = recipe.teacher.model
    vlm = GroundedVlm.load(
        source, max_pixels=config.max_pixels, cut_off=config.cut_off, allow_downloads=recipe.allow_downloads
    )
    return vlm.to(processes().device).requires_grad_(False).eval()


def summary(lessons: Sequence[Lesson], config: PseudoLabelConfig, teacher: GroundedVlm | None) -> dict[str, Any]:
    """Return what results say of pseudo-labels: how sure the teacher was, and how many had entered by when."""
    confidence, margin = (torch.tensor([getattr(row, name) for row in lessons]) for name in ("confidence", "margin"))
    c = config.curriculum
    curriculum = Curriculum(c.begin, c.end, c.over, c.margin_weight, c.weigh)
    steps = [i / 10 for i in range(11)]
    return {
        "rows": len(lessons),
        "teacher": weights_fingerprint(teacher.base) if teacher is not None else str(config.store),
        "confidence": torch.histc(confidence, 20, 0, 1).int().tolist(),
        "margin": torch.histc(margin, 20, 0, 1).int().tolist(),
        "entered": [[at, float((curriculum.weights(confidence, margin, at) > 0).float().mean())] for at in steps],
    }  # fmt: skip


def pseudo_lessons(room: Seminar, teacher: GroundedVlm | None) -> list[Lesson]:
    """Return the teacher's answers to the training questions and to those without an answer, as lessons.

    They are read from `method.pseudo_labels.store`, or asked of `teacher` and kept in the output folder.
    """
    recipe = room.recipe
    rows = [*room.data.part("train"), *room.data.part("unlabelled")]
    assert teacher is not None
    identity = {"teacher": weights_fingerprint(teacher.base), "tokens": recipe.method.pseudo_labels.max_new_tokens,
                "rows": [room.data.fingerprint("train"), room.data.fingerprint("unlabelled")]}  # fmt: skip
    file = recipe.output_folder / "pseudo-labels.jsonl"
    known: list[dict[str, Any]] = []
    if file.is_file():
        first, *known = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        known = known if first == identity else []
    if not known:
        found = teacher.generate(
            rows, max_new_tokens=recipe.method.pseudo_labels.max_new_tokens, sureness=True,
            batch_size=recipe.answers.batch_size,
        )  # fmt: skip
        known = [
            {"answer": a.text, "confidence": a.confidence, "margin": a.margin, "ended": a.ended} for (a,) in found
        ]
        write_text(file, json_lines([identity, *known]))
    lessons = [
        Lesson(
            replace(row, turns=(*row.turns[:-1], (row.turns[-1][0], said["answer"]))), last=True,
            confidence=said["confidence"], margin=said["margin"],
        )
        for row, said in zip(rows, known, strict=True)
        if said["answer"] and said["ended"]
    ]  # fmt: skip
    if not lessons:
        raise UserError(
            f"none of the teacher's {len(rows):,} answers ended within method.pseudo_labels.max_new_tokens="
            f"{recipe.method.pseudo_labels.max_new_tokens}; train it longer, or raise that"
        )
    return lessons


class OnlineWords:
    """The teacher's hidden states, computed with every batch."""

    def __init__(self, teacher: GroundedVlm) -> None:
        self.teacher = teacher
        self.fingerprint = weights_fingerprint(teacher.base)

    def words(self, batch: Batch) -> HiddenTeacher:
        with torch.no_grad():
            self.teacher.eval()
            states = self.teacher(batch.tensors)
        return HiddenTeacher(states.hidden, self.teacher.lm_head_weight)


def word_teacher(teacher: GroundedVlm, config: PseudoLabelConfig) -> WordTeacher | None:
    """Return where the teacher's words come from; None with `logits: none`."""
    return None if config.logits == "none" else OnlineWords(teacher)
