"""Predictions of a trained VQA model."""

from __future__ import annotations

import torch
from accelerate.utils import gather_object

from preceptor.data.types import Prediction
from preceptor.distributed import processes
from preceptor.normalizers import NORMALISERS
from preceptor.task import Batch
from preceptor.vqa.dataset import VqaExamples
from preceptor.vqa.model import VqaTransformer

BATCH_SIZE = 128


def predict(model: VqaTransformer, batch: Batch) -> list[Prediction]:
    """Return the most probable answer class of every question."""
    logits = model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits
    probabilities, classes = logits.softmax(-1).max(-1)
    answers: list[str] = model.config.answers
    return [
        Prediction(name, answers[c], p)
        for name, c, p in zip(batch.ids, classes.tolist(), probabilities.tolist(), strict=True)
    ]


def predict_examples(model: VqaTransformer, examples: VqaExamples) -> list[Prediction]:
    """Return one prediction per sample, on every process; the processes share the work.

    A sample whose broken image is skipped gets the empty answer, so it counts as wrong.
    """
    state = processes()
    indices = list(range(state.process_index, len(examples), state.num_processes))
    lists = [indices[i : i + BATCH_SIZE] for i in range(0, len(indices), BATCH_SIZE)]
    training = model.training
    model.eval()
    rows: list[tuple[str, str, float]] = []
    with torch.inference_mode():
        for batch in examples.loader(lists, 0):
            if len(batch):
                answers = predict(model, batch.to(next(model.parameters()).device))
                rows += [(p.id, p.answer, p.probability) for p in answers]
            rows += [(name, "", 0.0) for name in batch.skipped]
    model.train(training)
    return [Prediction(*row) for row in (gather_object(rows) if state.num_processes > 1 else rows)]


def accuracy(examples: VqaExamples, predictions: list[Prediction], normaliser: str) -> float:
    """Return the share of samples whose normalised answer is among the accepted ones."""
    normalise = NORMALISERS[normaliser]
    answers = {prediction.id: normalise(prediction.answer) for prediction in predictions}
    correct = sum(answers[s.id] in {normalise(answer) for answer in s.answers} for s in examples.samples)
    return correct / len(examples.samples)
