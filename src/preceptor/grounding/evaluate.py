"""Dialogues answered by a model, greedily or by the choice among sampled answers, as rows that are scored."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from preceptor.data.grounding.image_marks import images_shown
from preceptor.data.grounding.med_grit import task_of_turn
from preceptor.data.types import Dialogue
from preceptor.distill.chunked_kl import chunked_cross_entropy
from preceptor.grounding.config import AnswerConfig
from preceptor.grounding.dataset import DialogueExamples
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.reflection_round import Ask
from preceptor.grounding.selection import Similarity, choose
from preceptor.grounding.settings import SelectionConfig
from preceptor.scores import number_groups


def scored_turns(dialogues: Sequence[Dialogue], tasks: Collection[str]) -> list[Dialogue]:
    """Return one dialogue per question, which ends with it: the earlier turns are its history, with their true answers.

    The task of a question is that of its turn, unless the file names one for the whole dialogue. Questions of other
    tasks than `tasks` are left out. A dialogue with one turn is returned as it is.
    """
    found = []
    for dialogue in dialogues:
        if len(dialogue.turns) == 1:
            found.append(dialogue)
            continue
        questions = [question for question, _ in dialogue.turns]
        for number in range(1, len(dialogue.turns) + 1):
            if (task := task_of_turn(dialogue, number - 1)) in tasks:
                images = images_shown(questions, dialogue.images, number)
                found.append(replace(dialogue, images=images, turns=dialogue.turns[:number], task=task))
    return found


def answer_greedily(
    vlm: GroundedVlm, dialogues: Sequence[Dialogue], config: AnswerConfig
) -> tuple[list[dict[str, Any]], float]:
    """Return (rows, seconds per answer): one row for each dialogue, its last question (see `scored_turns`)."""
    begun = time.perf_counter()
    found = vlm.generate(
        dialogues, max_new_tokens=config.max_new_tokens, with_confidence=True, batch_size=config.batch_size
    )
    seconds = (time.perf_counter() - begun) / max(1, len(dialogues))
    rows = [
        prediction_row(dialogue, answers[0].text) | {"confidence": answers[0].confidence, "ended": answers[0].ended}
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
        rows.append(
            prediction_row(dialogue, texts[choose(texts, similarity, selection.box_weight)]) | {"candidates": texts}
        )
    return rows, (time.perf_counter() - begun) / max(1, len(dialogues))


def prediction_row(dialogue: Dialogue, prediction: str) -> dict[str, Any]:
    """Return the row of the predictions file for the last answer of a dialogue."""
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


def with_groups(rows: Sequence[Mapping[str, Any]], dialogues: Sequence[Dialogue]) -> list[dict[str, Any]]:
    """Return the rows with the number of each dialogue's group: answers about one image are not independent."""
    groups = number_groups(dialogues)
    return [{"id": row["id"], "group": groups[row["id"]], **row} for row in rows]


@torch.inference_mode()
def mean_loss(vlm: GroundedVlm, examples: DialogueExamples, batch_size: int) -> float:
    """Return the mean cross-entropy of the answer tokens in nats."""
    training, total, count = vlm.training, 0.0, 0
    vlm.eval()
    for first in range(0, len(examples), batch_size):
        batch = examples.collate([examples[i] for i in range(first, min(first + batch_size, len(examples)))])
        states = vlm(batch.to(vlm.lm_head_weight.device).tensors)
        total += float(chunked_cross_entropy(states.hidden, vlm.lm_head_weight, states.targets))
        count += len(states.targets)
    vlm.train(training)
    return total / max(1, count)


def asker(vlm: GroundedVlm, max_new_tokens: int, batch_size: int) -> Ask:
    """Return the function by which `Reflector` samples answers of a model."""

    def ask(rows: Sequence[Dialogue], candidates: int, temperature: float, seed: int) -> list[list[str]]:
        answers = vlm.generate(
            rows,
            candidates=candidates,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=max(1, batch_size // candidates),
            seed=seed,
        )
        return [[answer.text for answer in row] for row in answers]

    return ask
