"""One stage of a run: trained, reloaded, evaluated and written. No other module does this, whatever the task."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.data import provenance
from preceptor.distributed import broadcast_from_main, processes
from preceptor.environment import machine, versions
from preceptor.files import write_text
from preceptor.pipeline import run_dir
from preceptor.pipeline.experiment import TRAINING_SPLITS, Experiment, Stage, Training
from preceptor.recipe import differences, dump_recipe
from preceptor.training.loop import FitArguments, TrainState, fit

FILES = "data_files_sha256"
"""Key of the contents of the training files among what must not change on resume."""


def run_stage(experiment: Experiment, stage: Stage, folder: Path) -> dict[str, Any]:
    """Train a model into `folder` (or resume), evaluate it and return its results.

    A finished stage is read back if neither its weights nor the data have changed.
    """
    state, recipe = processes(), experiment.recipe
    if recipe.resume == "never" and state.is_main_process:
        run_dir.clear_stage(folder)
    state.wait_for_everyone()
    progress, summary = TrainState(), {}
    for training in experiment.trainings(stage, folder):
        progress = run_training(experiment, stage, training)
        summary = {"training": progress.summary(training.config.batch_size)} | training.summary()
    weights = run_dir.weights_sha256(folder / "model")
    # Every process must take the same branch: a process that returned early would leave the others waiting.
    finished = broadcast_from_main(_finished(experiment, folder, weights) if state.is_main_process else None)
    if finished is not None:
        run_dir.require_same_evaluation(finished, experiment.evaluation_settings(stage), folder)
        if state.is_main_process:  # training again replaces the model, and with it its card
            write_text(folder / "model" / "README.md", experiment.model_card(finished))
        return finished
    model = experiment.load(folder / "model")
    evaluation = experiment.evaluate(model, stage=stage)
    results = {
        "task": experiment.task,
        "stage": stage.name,
        "protocols": evaluation.scores,
        "evaluation": experiment.evaluation_settings(stage),
        "describes": evaluation.describes,
        "notes": list(experiment.data.notes),
        "data": experiment.describe_data(stage),
        "parameters": experiment.parameter_count(model),
        "seed": stage.seed,
        "weights_sha256": weights,
        "versions": versions(*experiment.packages),
        "machine": machine(),
        **evaluation.extras,
        **summary,
        "validation": experiment.validation(folder, summary),
    }
    if state.is_main_process:
        run_dir.write_predictions(folder, evaluation.rows)
        experiment.write_figures(folder, model, evaluation)
        write_text(folder / "model" / "README.md", experiment.model_card(results))
        run_dir.write_results(folder, results)
    return broadcast_from_main(results)


def _finished(experiment: Experiment, folder: Path, weights: str) -> dict[str, Any] | None:
    """Return the results of a stage, None if they are of other weights or other data."""
    results = run_dir.read_results(folder)
    if results is None or results.get("weights_sha256") != weights:
        return None
    data = results.get("data")
    if not isinstance(data, dict) or data.get("sha256") != experiment.data.fingerprint():
        return None
    return results if data.get("test_files_sha256") == experiment.files_sha256(("test",)) else None


def run_training(experiment: Experiment, stage: Stage, training: Training) -> TrainState:
    """Run one training of a stage; its folder then holds the model, its provenance and the recipe of the stage."""
    recipe = experiment.recipe
    # With `resume=never`, `run` deletes the folders that stages share at the start, so a training in one is a new one.
    shared = training.folder in [recipe.output_folder / name for name in experiment.shared_folders]
    with processes().main_process_first():
        sources = provenance_of(experiment, stage)
    files = broadcast_from_main(experiment.files_sha256(TRAINING_SPLITS) if processes().is_main_process else None)

    def export(_: Any, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        training.export(target)
        provenance.write_provenance(target, sources)

    def start() -> None:
        write_text(training.folder / "recipe.yaml", dump_recipe(experiment.stage_recipe(stage, training.folder)))

    arguments = FitArguments(
        folder=training.folder,
        loader=training.loader,
        samples=training.samples,
        epoch_samples=training.epoch_samples,
        validate=training.validate,
        export=export,
        resume_config=training.resume_config | {FILES: files},
        differences=lambda old, new: _differences(experiment, training, old, new),
        seed=stage.seed,
        skip_limit=recipe.data.skip_limit,
        resume=shared or recipe.resume == "auto",
        title=training.title,
        start=start,
    )
    return fit(training.task, arguments, training.config)


def _differences(
    experiment: Experiment, training: Training, old: Mapping[str, Any], new: Mapping[str, Any]
) -> list[str]:
    """Return one entry per setting that differs. Changed images are named if the stage has a model."""
    old = _with_defaults(old, training.resume_defaults())
    settings, new_settings = ({key: value for key, value in one.items() if key != FILES} for one in (old, new))
    found = differences(settings, new_settings)
    if old.get(FILES) == new[FILES]:
        return found
    sources = provenance.read_provenance(training.folder / "model") or []
    known = {digest for source in sources for digest in source.images}
    # A broken image that is skipped has no record.
    changed = [] if experiment.recipe.data.broken == "skip" or not known else experiment.training_files_not_in(known)
    names = f": {', '.join(path.name for path in changed[:3])}{', ...' * (len(changed) > 3)}" if changed else ""
    return [*found, f"image or label files have changed{names}"]


def _with_defaults(values: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested `values` with those of `defaults` for the keys that they lack."""
    merged = {**defaults, **values}
    for key, default in defaults.items():
        if isinstance(default, Mapping) and isinstance(merged[key], Mapping):
            merged[key] = _with_defaults(merged[key], default)
    return merged


def provenance_of(experiment: Experiment, stage: Stage) -> list[provenance.Source]:
    """Return the images that the model of a stage has seen, itself or through the weights that it starts from."""
    kinds = {stage.kind, "teacher"} if experiment.has_teacher(stage.kind) else {stage.kind}
    earlier = [
        source
        for run in experiment.starting_points(kinds).values()
        for source in provenance.read_provenance(run_dir.model_folder(run)) or []
    ]
    return provenance.merge([experiment.training_images(), *earlier])
