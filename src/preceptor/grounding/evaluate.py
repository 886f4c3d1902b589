"""Dialogues answered by a model, greedily or by the choice among sampled answers, as rows that are scored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from preceptor.data.types import Dialogue
from preceptor.grounding.clinkd import SelectionConfig
from preceptor.grounding.config import AnswerConfig
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.selection import Similarity, choose


def answer_greedily(
    vlm: GroundedVlm, dialogues: Sequence[Dialogue], config: AnswerConfig
) -> tuple[list[dict[str, Any]], float]:
    """Return (rows, seconds per answer): one row for each dialogue, its last question."""
    begun = time.perf_counter()
    found = vlm.generate(
        dialogues, max_new_tokens=config.max_new_tokens, with_confidence=True, batch_size=config.batch_size
    )
    seconds = (time.perf_counter() - begun) / max(1, len(dialogues))
    rows = [
        row(dialogue, answers[0].text) | {"confidence": answers[0].confidence, "ended": answers[0].ended}
        for dialogue, answers in zip(dialogues, found, strict=True)
    ]
    return rows, seconds


def answer_selectively(
    vlm: GroundedVlm,
    dialogues: Sequence[Dialogue],
    config: AnswerConfig,
    selection: SelectionConfig,
    similarity: Similarity,
    seed: int,
) -> tuple[list[dict[str, Any]], float]:
    """Return (rows, seconds per answer) of the answer of several that is most like the others (section 3.4)."""
    begun = time.perf_counter()
    found = vlm.generate(
        dialogues,
        candidates=selection.candidates,
        temperature=selection.temperature,
        max_new_tokens=config.max_new_tokens,
        batch_size=max(1, config.batch_size // selection.candidates),
        seed=seed,
    )
    rows = []
    for dialogue, answers in zip(dialogues, found, strict=True):
        texts = [answer.text for answer in answers]
        rows.append(row(dialogue, texts[choose(texts, similarity, selection.box_weight)]) | {"candidates": texts})
    return rows, (time.perf_counter() - begun) / max(1, len(dialogues))


def row(dialogue: Dialogue, prediction: str) -> dict[str, Any]:
    """Return what is written of an answer, and scored."""
    question, target = dialogue.turns[-1]
    return {
        "id": dialogue.id,
        "turn": len(dialogue.turns),
        "task": dialogue.task,
        "modality": dialogue.modality,
        "question": question,
        "target": target,
        "prediction": prediction,
    }
