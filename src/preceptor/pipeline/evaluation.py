"""A trained model evaluated again, on its own or on other data."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.config import BaseRecipe
from preceptor.data import provenance
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.pipeline import run_dir
from preceptor.pipeline.experiment import Experiment
from preceptor.pipeline.notes import without_training
from preceptor.pipeline.run import contaminated, exclusive


def evaluate_model(
    experiment_class: type[Experiment],
    recipe: BaseRecipe,
    model: Path,
    name: str,
    protocol: str | None,
    output: Path | None,
    images: Sequence[str] = (),
) -> dict[str, Any]:
    """Score the model of a folder on the test split of a recipe's data; return its results.

    The predictions go to `output` together with results.json. Without `output` they replace those of the model's stage,
    and so do the scores in its results.json. With `images`, the questions are asked again about other images, and the
    model card and the report are written again. `name` is that of the model in the results. Their notes are about the
    data, and do not tell how the model was trained, because the recipe need not be that of its training.

    Raises:
        UserError: the task does not know one of the `images`; `output` has results that no evaluation wrote; or there
            is no `output`, and results.json of the stage is about another model, other settings or other test data.
    """
    known = ("real", *experiment_class.other_images)
    for kind in images:
        if kind not in known:
            raise UserError(f"--images: {experiment_class.task} has no images {kind!r}; known: {', '.join(known)}")
    others = [kind for kind in dict.fromkeys(images) if kind != "real"]
    if output is not None:
        _require_own_folder(output)
    folder = run_dir.stage_folder(model) if output is None else output
    # A stage of several lies in the folder of its run, which has the log; a training locks that folder.
    run = folder.parent if output is None and (folder.parent / "log.txt").is_file() else folder
    with _removed_if_empty(run), exclusive(run):
        experiment = experiment_class.read(recipe, needed=("test",))
        stored = run_dir.read_results(folder) if output is None else None
        if stored is not None:
            run_dir.require_results_of(stored, model, folder)
            run_dir.require_same_evaluation(stored, experiment.evaluation_settings(), folder)
            run_dir.require_same_test_data(stored, experiment.describe_data(), folder)
        results, rows = _evaluate(experiment, model, name, protocol, others)
        if processes().is_main_process:
            run_dir.write_predictions(folder, rows)
            if output is not None:
                run_dir.write_results(folder, results)
            elif stored is not None:
                _replace_scores(stored, results)
                run_dir.write_results(folder, stored)
                if others:
                    write_text(model / "README.md", experiment.model_card(stored))
                    if (run / "report.html").is_file():
                        experiment.write_report(run)
        processes().wait_for_everyone()
        return results


def _require_own_folder(output: Path) -> None:
    """Raise UserError if a folder belongs to a training, or has a results.json that no evaluation wrote."""
    traces = [output / name for name in ("recipe.yaml", "log.txt", "model") if (output / name).exists()]
    if found := next(iter([*traces, *run_dir.seed_folders(output)]), None):
        raise UserError(f"{output} is a folder of a training, because it contains {found.name}; give another --output")
    results = run_dir.read_results(output)
    # A training also writes the seed and the weights.
    if results is not None and ("seed" in results or not results.keys() >= {"task", "stage", "protocols", "data"}):
        raise UserError(f"{output / 'results.json'} was not written by `preceptor evaluate`; give another --output")


@contextlib.contextmanager
def _removed_if_empty(folder: Path) -> Iterator[None]:
    """Remove a folder, and those above it, after an error if they did not exist before and are empty."""
    new = [one for one in (folder, *folder.parents) if not one.exists()] if processes().is_main_process else []
    try:
        yield
    except BaseException:
        for one in new:
            with contextlib.suppress(OSError):
                one.rmdir()
        raise


def _evaluate(
    experiment: Experiment, model: Path, name: str, protocol: str | None, images: Sequence[str]
) -> tuple[dict[str, Any], Mapping[str, Any]]:
    """Return the results of a model and its rows by protocol."""
    ids, seen = contaminated(experiment, provenance.read_provenance(model) or [])
    if ids:
        experiment.data.notes.append(
            f"The model was trained on {seen} of the test images, as part of another data set: these scores are "
            "too high."
        )
    loaded = experiment.load(model)
    evaluation = experiment.evaluate(loaded, protocol=protocol)
    if images:
        evaluation.extras["image_reliance"] = experiment.image_reliance(loaded, images, evaluation)
    results = {
        "task": experiment.task,
        "stage": name,
        "protocols": evaluation.scores,
        "evaluation": experiment.evaluation_settings(),
        "describes": evaluation.describes,
        "data": experiment.describe_data(),
        "notes": without_training(experiment.data.notes),
        "parameters": experiment.parameter_count(loaded),
        **evaluation.extras,
    }
    return results, evaluation.rows


def _replace_scores(stored: dict[str, Any], results: Mapping[str, Any]) -> None:
    """Replace the scores in the results of a stage."""
    for key in ("protocols", "describes", "image_reliance"):
        if key in results:
            stored[key] = stored.get(key, {}) | results[key]
