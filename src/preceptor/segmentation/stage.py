"""One stage of a segmentation recipe: a network trained, chosen by validation, evaluated and written as a folder."""

from __future__ import annotations

import json
import shutil
import statistics
import time
from pathlib import Path
from typing import Any

from preceptor.data.types import CaseData
from preceptor.distributed import processes
from preceptor.environment import VOLUMES, machine, versions
from preceptor.files import json_lines, sha256, write_text
from preceptor.pipeline.run_dir import start_afresh
from preceptor.recipe import differences, dump_recipe
from preceptor.segmentation.config import SegmentationRecipe, SegmentationStage
from preceptor.segmentation.data import examples
from preceptor.segmentation.evaluate import mean_of, predict_case, score_cases, validation_scores, votes, write_worst
from preceptor.segmentation.metrics import DESCRIBES, table
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.task import SegmentationTask, full_modality_teacher
from preceptor.task import Task
from preceptor.training.loop import FitArguments, fit

INFERENCE_CONFIG = "segmentation.json"


def build_network(recipe: SegmentationRecipe, data: CaseData, seed: int) -> MultimodalUNet:
    """Return a new network; its weights depend on `seed` alone. Raises UserError for sizes that do not fit it."""
    m = recipe.model
    config = MultimodalUNetConfig(
        modalities=tuple(data.modalities),
        regions=tuple(data.regions),
        net=m.net,
        encoder=m.encoder,
        channels=m.channels,
        fill=m.fill,
    )
    network = MultimodalUNet(config, seed=seed)
    network.check_size(recipe.data.patch_size, "data.patch_size")
    return network


def train_stage(
    name: SegmentationStage, folder: Path, recipe: SegmentationRecipe, data: CaseData, full: MultimodalUNet | None
) -> dict[str, Any]:
    """Train a network into `folder` (or go on where it was stopped), evaluate it and return its results.

    `full` is the teacher that sees all modalities. A finished stage is read back, not trained again.
    """
    state = processes()
    if recipe.resume == "never" and state.is_main_process:
        start_afresh(folder)
    state.wait_for_everyone()
    labelled, held_out = len(data.split("train")), examples(recipe, data, "validation", recipe.seed)
    train = examples(recipe, data, "train", recipe.seed, unlabelled=name == "distilled")
    network = build_network(recipe, data, recipe.seed)
    task = recipe.method.build_task(
        network,
        stage=name,
        teacher=full_modality_teacher(full).to(state.device) if full is not None else None,
        votes=lambda student: votes(student, held_out, recipe),
        steps_per_epoch=labelled / recipe.train.batch_size,
    )
    promised: dict[str, dict[str, float]] = {}

    def validate(_: Task) -> dict[str, float]:
        network.eval()
        promised.clear()
        promised.update(validation_scores(network, held_out, recipe))
        network.train()
        by_region = {
            region: float(statistics.fmean(scores[region] for scores in promised.values())) for region in data.regions
        }
        return {"score": mean_of(promised), **by_region}

    def export(_: Task, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        network.save(target)
        write_text(target / INFERENCE_CONFIG, json.dumps(facts(recipe, data, promised), indent=1))

    def start() -> None:
        own = recipe.model_copy(deep=True)
        own.stages, own.output = (name,), str(folder)
        write_text(folder / "recipe.yaml", dump_recipe(own))

    job = FitArguments(
        folder=folder,
        loader=lambda batches: train.loader(batches, recipe.data.workers),
        samples=len(train),
        epoch_samples=labelled,
        validate=validate,
        export=export,
        identity=identity(recipe, data, name, task),
        differences=differences,
        seed=recipe.seed,
        skip_limit=recipe.data.skip_limit,
        resume=recipe.resume == "auto",
        title=name,
        start=start,
    )
    progress = fit(task, job, recipe.train)
    weights = sha256(folder / "model" / "model.safetensors")
    if (folder / "results.json").is_file():
        finished = json.loads((folder / "results.json").read_text("utf-8"))
        if (finished.get("weights_sha256"), finished["data"]["sha256"]) == (weights, data.fingerprint()):
            return finished
    best = MultimodalUNet.load(folder / "model").to(state.device).eval()
    results, rows = evaluate(best, recipe, data)
    results = {"stage": name, **results}
    results |= {
        "elections": task.results().get("elections", []),
        "validation_subsets": json.loads((folder / "model" / INFERENCE_CONFIG).read_text("utf-8"))["validation"],
        "parameters": sum(parameter.numel() for parameter in best.parameters()),
        "latency_ms": latency_ms(best, recipe, data),
        "latency": "one case with all its modalities, read from memory, float32",
        "seed": recipe.seed,
        "weights_sha256": weights,
        "versions": versions(*VOLUMES),
        "machine": machine(),
        "training": progress.summary(recipe.train.batch_size),
    }
    if state.is_main_process:
        from preceptor.segmentation.model_card import segmentation_card

        write_rows(folder, rows)
        worst = next(iter(rows.values()))
        write_worst(folder / "predictions" / "masks", best, examples(recipe, data, "test", 0), recipe, worst)
        write_text(folder / "model" / "README.md", segmentation_card(results, recipe))
        write_text(folder / "results.json", json.dumps(results, indent=1))
    state.wait_for_everyone()
    return results


def facts(recipe: SegmentationRecipe, data: CaseData, validation: dict[str, dict[str, float]]) -> dict[str, Any]:
    """Return what prediction must know beside the weights: preparation, labels, and what validation promises."""
    d, e = recipe.data, recipe.evaluation
    return {
        "regions": {name: list(values) for name, values in data.regions.items()},
        "preparation": {"spacing": d.spacing, "intensity": d.intensity, "patch_size": list(d.patch_size)},
        "inference": e.model_dump(mode="json"),
        "data": {"name": data.name, "variant": data.variant, "validation": len(data.split("validation"))},
        "validation": validation,
    }


def identity(recipe: SegmentationRecipe, data: CaseData, stage: str, task: SegmentationTask) -> dict[str, Any]:
    """Return what must not change when a stage is resumed."""
    kept = recipe.data.model_dump(mode="json", exclude={"root", "workers", "max_voxels", "split_file"})
    return json.loads(
        json.dumps(
            {
                "data": {**kept, "rows": data.fingerprint()},
                "seed": recipe.seed,
                "model": recipe.model.model_dump(mode="json"),
                "train": recipe.train.model_dump(mode="json", exclude={"keep_checkpoints", "log_every", "trackers"}),
                "method": recipe.method.stage_settings(stage),
                "full": task.teacher.fingerprint if task.teacher else None,
            }
        )
    )


def evaluate(
    network: MultimodalUNet, recipe: SegmentationRecipe, data: CaseData
) -> tuple[dict[str, Any], dict[str, list[dict[str, Any]]]]:
    """Return (results, rows by protocol id) of a network on the test split."""
    test = examples(recipe, data, "test", 0)
    found = score_cases(network, test, recipe)
    rows = {f"{data.name}/{data.variant}/{key}": value for key, value in found.items()}
    results = {
        "protocols": {id: table(value) for id, value in rows.items()},
        "describes": {id: DESCRIBES[id.rpartition("/")[2]] for id in rows},
        "notes": list(data.notes),
        "modalities": list(data.modalities),
        "regions": list(data.regions),
        "data": {
            "name": data.name,
            "variant": data.variant,
            "sha256": data.fingerprint(),
            "test_sha256": data.fingerprint("test"),
            **{split: len(data.split(split)) for split in ("train", "validation", "test")},
            **({"unlabelled": len(data.split("unlabelled"))} if data.split("unlabelled") else {}),
        },
    }
    return results, rows


def write_rows(folder: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Write ``predictions/ID.jsonl`` per protocol: Dice and HD95 of each case, subset and region."""
    for protocol, lines in rows.items():
        write_text(folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl", json_lines(lines))


def latency_ms(network: MultimodalUNet, recipe: SegmentationRecipe, data: CaseData, repeats: int = 3) -> float:
    """Return the median milliseconds for a test case with all the modalities that it has."""
    case = examples(recipe, data, "test", 0).whole(0)
    only = [tuple(bool(a) for a in case.available)]
    times = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        predict_case(network, case, recipe.evaluation, recipe.data.patch_size, only=only)
        times.append(time.perf_counter() - begun)
    return round(1000 * statistics.median(times[1:]), 1)
