"""What a recipe's teacher says: its answers to training questions, and its words at each answer token."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.config_vlm import ClinkdConfig, PseudoLabelConfig
from preceptor.dialogues.examples import Lesson
from preceptor.dialogues.stage import Seminar
from preceptor.distill.curriculum import Curriculum
from preceptor.models.grounded_vlm import AnswerStates, GroundedVlm
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
