"""A small run folder with three untrained models, as `preceptor train` writes it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.recipe import dump_recipe
from preceptor.statistics import mcnemar, paired_bootstrap
from preceptor.vqa.bundle import VqaBundle, build_bundle, make_tokenizer
from preceptor.vqa.config import ConvVisionConfig, ModelConfig, ScratchTextConfig, TextConfig, VisionConfig, VqaRecipe
from preceptor.vqa.dataset import Preprocessing
from preceptor.vqa.figures import write_figures
from preceptor.vqa.metrics import score
from preceptor.vqa.protocols import protocols_for

HOSTILE = "<script>alert('x')</script> & \"is\" there a <b>mass</b>?"
ANSWERS = ["yes", "no", "left", "right", "ct", "<img src=x onerror=alert(1)>"]


def make_data(folder: Path, *, test: int = 24, leaking: bool = False) -> Dataset[Sample]:
    """Return data with two questions per generated image; one question and one answer hold HTML."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    samples = []
    for part, count in (("train", 24), ("validation", 6), ("test", test)):
        for number in range(count):
            path = folder / f"patient-smith-{part}-{number // 2}.png"
            if not path.exists():
                yy, xx = np.mgrid[:40, :60]
                disc = (yy - rng.integers(8, 32)) ** 2 + (xx - rng.integers(8, 52)) ** 2 < 49
                Image.fromarray((60 + 150 * disc).astype(np.uint8)).save(path)
            closed = number % 2 == 0
            answer = ANSWERS[number % 2] if closed else ANSWERS[2 + number % 4]
            question = HOSTILE if number == 0 else f"Where is the disc in view {number}?"
            samples.append(
                Sample(
                    f"{part}-{number}",
                    path,
                    question,
                    (answer,),
                    "closed" if closed else "open",
                    path.stem,
                    part,
                    ("PRES", "POS", "MODALITY")[number % 3],
                )
            )
    notes = ["VQA-RAD published: 63 % of the test rows have a reworded twin in training."] if leaking else []
    return Dataset("toy", "published", folder, samples, notes, leaking)


def make_bundle(data: Dataset[Sample], width: int, seed: int) -> VqaBundle:
    config = ModelConfig(
        vision=VisionConfig(conv=ConvVisionConfig(channels=[8, 12], blocks=[1, 1], token_stages=[1])),
        text=TextConfig(scratch=ScratchTextConfig(embedding=8, width=16, layers=1, heads=2)),
        width=width,
        layers=1,
        heads=2,
    )
    train = data.split("train")
    tokenizer = make_tokenizer([sample.question for sample in train])
    vocabulary = AnswerVocabulary.build(train)
    return build_bundle(config, tokenizer, Preprocessing(image_size=32), vocabulary, seed=seed)


def make_stage(
    folder: Path, data: Dataset[Sample], bundle: VqaBundle, recipe: VqaRecipe, accuracy: float, seed: int
) -> dict:
    """Write a stage folder whose predictions are right with the chance `accuracy`; return its results."""
    rng = np.random.default_rng(seed)
    bundle.save(folder / "model")
    (folder / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
    answers = bundle.vocabulary.answers
    said = [
        Prediction(
            s.id, s.answer if rng.random() < accuracy else str(rng.choice(answers)), float(rng.uniform(0.3, 0.99))
        )
        for s in data.split("test")
    ]
    (protocol,) = protocols_for(data)
    scores = replace(score(data.split("test"), said, protocol), ceiling=0.958)
    (folder / "predictions").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in scores.rows())
    (folder / "predictions" / f"{protocol.id.replace('/', '-')}.jsonl").write_text(lines, "utf-8")
    steps, lines = 60 if folder.name == "teacher" else 40, []
    for step in range(1, steps + 1):
        fall = float(np.exp(-step / 15) + rng.normal(0, 0.03))
        line = {
            "step": step,
            "epoch": step / 4,
            "lr": 1e-3,
            "grad_norm": 1.0,
            "loss": 3 * fall,
            "label": 2 * fall + 0.2,
        }
        if folder.name == "distilled":
            line |= {"output": fall + 0.1, "embedding/image": 0.4 * fall + 0.3, "hidden/0-1": 0.6 * fall + 0.2}
        lines.append(line | {"samples/s": 512.0})
        if step % 4 == 0:
            lines.append({"step": step, "validation/score": accuracy * (1 - 0.6 * float(np.exp(-step / 12)))})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    blind = {"majority": 0.29, "question_only": 0.333, "look_up": 0.375, "look_up_same_image": 0.417}
    results = {
        "stage": folder.name,
        "protocols": {protocol.id: scores.as_dict() | {"interval": scores.interval()}},
        "describes": {protocol.id: protocol.describes},
        "baselines": {protocol.id: {name: {"accuracy": a, "open": a / 2, "closed": a} for name, a in blind.items()}},
        "notes": list(data.notes),
        "provenance": {"text": "from scratch", "vision": "from scratch"},
        "parameters": bundle.model.parameter_count(),
        "latency_ms": 12.345,
        "seed": seed,
        "latency": "model alone, one question at a time, float32, median",
        "versions": {"python": "3.11.2", "preceptor": "0.1.0", "torch": "2.13.0"},
        "machine": {"processor": "Xeon", "threads": 2},
        "data": {
            "name": data.name,
            "variant": data.variant,
            "leaking": data.leaking,
            "sha256": data.fingerprint(),
            **{part: len(data.split(part)) for part in ("train", "validation", "test")},
        },
        "training": {
            "steps": steps,
            "best_step": steps - 4,
            "kept_step": steps - 4,
            "seconds": 93.4,
            "samples_per_second": 512.0,
            "skipped": [],
            "validations": [],
        },
    }
    (folder / "results.json").write_text(json.dumps(results), "utf-8")
    write_figures(folder, bundle, data, recipe, {protocol.id: scores.rows()})
    return results


@dataclass
class MadeRun:
    folder: Path
    data: Dataset[Sample]
    recipe: VqaRecipe


def make_run(root: Path, data: Dataset[Sample]) -> MadeRun:
    recipe = VqaRecipe.model_validate(
        {
            "name": "toy-<run>",
            "output": str(root),
            "description": "A toy",
            "data": {"image_size": 32, "root": str(data.root)},
        }
    )
    stages = {}
    for seed, (name, width, accuracy) in enumerate(
        (("teacher", 32, 0.8), ("baseline", 16, 0.55), ("distilled", 16, 0.7))
    ):
        (root / name).mkdir(parents=True)
        stages[name] = make_stage(root / name, data, make_bundle(data, width, seed), recipe, accuracy, seed)
    (protocol,) = stages["distilled"]["protocols"]
    read = (root / name / "predictions" / "toy-published.jsonl" for name in ("distilled", "baseline"))
    a, b = (np.array([json.loads(line)["correct"] for line in path.read_text("utf-8").splitlines()]) for path in read)
    paired = paired_bootstrap(a, b)
    entry = {"difference": paired.mean, "low": paired.low, "high": paired.high, "p": mcnemar(a, b), "n": len(a)}
    entry["interval"] = "95 %, paired bootstrap over questions, one seed"
    accuracies = {name: results["protocols"][protocol]["accuracy"] for name, results in stages.items()}
    kept = accuracies["distilled"] / accuracies["teacher"]
    results = {
        "stages": stages,
        "protocols": stages["distilled"]["protocols"],
        "comparison": {protocol: {"distilled - baseline": entry, "distilled / teacher": kept}},
        "seed": 0,
        "versions": {"preceptor": "0.1.0", "torch": "2.13.0"},
        "notes": list(data.notes),
    }
    (root / "results.json").write_text(json.dumps(results), "utf-8")
    (root / "recipe.yaml").write_text(dump_recipe(recipe), "utf-8")
    return MadeRun(root, data, recipe)


@pytest.fixture(scope="session")
def made_run(tmp_path_factory: pytest.TempPathFactory) -> MadeRun:
    """A finished run; tests that change it copy it first."""
    root = tmp_path_factory.mktemp("reports")
    return make_run(root / "run", make_data(root / "images"))
