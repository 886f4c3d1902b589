"""A trained model on a split of a data set: predictions, scores, latency."""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from preceptor.data.types import Prediction, VqaData
from preceptor.distributed import processes
from preceptor.files import json_lines, write_text
from preceptor.normalizers import NORMALISERS
from preceptor.task import Batch
from preceptor.vqa.baselines import baselines
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import DataConfig
from preceptor.vqa.dataset import VqaExamples
from preceptor.vqa.metrics import Row, score
from preceptor.vqa.model import VqaTransformer
from preceptor.vqa.protocols import Protocol, protocols_for

BATCH = 128


def predict_part(model: VqaTransformer, examples: VqaExamples) -> list[Prediction]:
    """Return one prediction per row, on every process, shared out among the processes.

    A row whose broken image is skipped is answered with the empty text, so it counts as wrong.
    """
    state = processes()
    mine = list(range(state.process_index, len(examples), state.num_processes))
    lists = [mine[i : i + BATCH] for i in range(0, len(mine), BATCH)]
    training = model.training
    model.eval()
    found: list[tuple[str, str, float]] = []
    with torch.inference_mode():
        for batch in examples.loader(lists, 0):
            if len(batch):
                answers = predict(model, batch.to(next(model.parameters()).device))
                found += [(p.id, p.answer, p.probability) for p in answers]
            found += [(name, "", 0.0) for name in batch.skipped]
    model.train(training)
    return [Prediction(*row) for row in (gather_object(found) if state.num_processes > 1 else found)]


def predict(model: VqaTransformer, batch: Batch) -> list[Prediction]:
    """Return the most probable answer class of every question."""
    logits = model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits
    probabilities, classes = logits.softmax(-1).max(-1)
    answers: list[str] = model.config.answers
    return [
        Prediction(name, answers[c], p)
        for name, c, p in zip(batch.ids, classes.tolist(), probabilities.tolist(), strict=True)
    ]


def accuracy(examples: VqaExamples, predictions: list[Prediction], normaliser: str) -> float:
    """Return the share of rows whose normalised answer is among the accepted ones."""
    normalise = NORMALISERS[normaliser]
    said = {prediction.id: normalise(prediction.answer) for prediction in predictions}
    right = sum(said[s.id] in {normalise(answer) for answer in s.answers} for s in examples.samples)
    return right / len(examples.samples)


def evaluate_bundle(
    bundle: VqaBundle, data: VqaData, config: DataConfig, *, only: list[Protocol] | None = None
) -> tuple[dict[str, Any], dict[str, list[Row]]]:
    """Return (results, rows by protocol id) of a model on the test split of `data`.

    The results hold `protocols`, `describes`, `baselines` and `notes`.
    """
    samples = data.split("test")
    examples = VqaExamples(samples, bundle.tokenizer, bundle.vocabulary, bundle.preprocessing, config)
    predictions = predict_part(bundle.model, examples)
    blind = baselines(data, bundle.vocabulary.normaliser)
    results: dict[str, Any] = {"protocols": {}, "describes": {}, "baselines": {}, "notes": list(data.notes)}
    rows = {}
    for protocol in only or protocols_for(data):
        chosen = [sample for sample in samples if protocol.select(sample)]
        scores = replace(score(samples, predictions, protocol), ceiling=bundle.vocabulary.ceiling(chosen))
        results["protocols"][protocol.id] = scores.as_dict()
        results["describes"][protocol.id] = protocol.describes
        baseline_scores = {name: score(samples, answers, protocol) for name, answers in blind.items()}
        results["baselines"][protocol.id] = {
            name: {"accuracy": s.accuracy, "open": s.open, "closed": s.closed} for name, s in baseline_scores.items()
        }
        rows[protocol.id] = scores.rows()
    return results, rows


def write_predictions(folder: Path, rows: dict[str, list[Row]]) -> None:
    """Write ``predictions/ID.jsonl`` per protocol, slashes of the id as dashes."""
    for protocol, lines in rows.items():
        write_text(folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl", json_lines(lines))


def read_predictions(folder: Path, protocol: str) -> list[Row]:
    path = folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def latency_ms(bundle: VqaBundle, data: VqaData, config: DataConfig, questions: int) -> float | None:
    """Return the median milliseconds of the model for one question at a time, image decoding left out.

    None where no image of these questions can be read.
    """
    samples = data.split("test")[:questions]
    examples = VqaExamples(samples, bundle.tokenizer, bundle.vocabulary, bundle.preprocessing, config)
    device = next(bundle.model.parameters()).device
    batches = [batch for batch in examples.loader([[i] for i in range(len(samples))]) if len(batch)]
    times = []
    with torch.inference_mode():
        warm_up = batches[:3]
        for batch in [*warm_up, *batches]:
            batch = batch.to(device)
            begun = time.perf_counter()
            predict(bundle.model, batch)
            times.append(time.perf_counter() - begun)
    timed = times[len(warm_up) :]
    return round(1000 * statistics.median(timed), 3) if timed else None
