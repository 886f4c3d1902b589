"""Read trained models back from run folders. Damaged or inconsistent files are refused."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.config import BaseRecipe
from preceptor.errors import UserError, nearest
from preceptor.pipeline.run_dir import predictions_file, refuse_run_and_seeds, seed_folders
from preceptor.report.contents import check_results, get_nested, parse_strictly, read_prediction_rows
from preceptor.scores import Metrics, UnitScore, align
from preceptor.tasks import load_recipe, module

IGNORED_SECTIONS = {"output", "seed", "stages", "name", "description", "allow_downloads", "trust_remote_code", "resume"}
IGNORED_SECTIONS |= {"task", "report"}
IGNORED_KEYS = {"root", "images", "split_file", "workers", "max_image_bytes", "max_image_pixels", "max_voxels"}
IGNORED_KEYS |= {"train_share", "members", "cache", "store", "teaching_run", "teacher_offload"}
IGNORED_KEYS |= {"keep_checkpoints", "log_every", "trackers"}
"""Keys of a recipe, at any depth, that do not shape a model: locations, limits, logging, and what else was trained.
`seed` tells the models of a group apart, and `train_share` is treated separately."""


@dataclass(frozen=True)
class TrainedModel:
    """A trained model under one protocol.

    Args:
        source: run folder that was given.
        folder: folder of the stage.
        task: of the recipe.
        stage: name of the stage; all members of an ensemble of teachers are `teacher`.
        recipe_name: `name` of the recipe.
        seed: of the training.
        share: `data.train_share`.
        settings: the other keys of the recipe that shape the model, by dotted key.
        results: content of results.json.
        protocol: id of the protocol.
        scores: values of the test units; all models of a comparison have them in the same order.
        grouped: whether the predictions tell which units share an image or a patient.
    """

    source: Path
    folder: Path
    task: str
    stage: str
    recipe_name: str
    seed: int
    share: float
    settings: dict[str, Any]
    results: dict[str, Any]
    protocol: str
    scores: tuple[UnitScore, ...]
    grouped: bool = True

    @cached_property
    def values(self) -> np.ndarray:
        """(n,) the values of `scores`."""
        return np.array([score.value for score in self.scores], dtype=float)

    @property
    def name(self) -> str:
        """Run folder and stage, without the path above: results are shared, and paths may contain people's names."""
        root, folder = self.source.resolve(), self.folder.resolve()
        if folder == root:
            return f"{root.parent.name}/{root.name}" if root.name == self.results["stage"] else root.name
        return f"{root.name}/{folder.name}"


def read_models(runs: Sequence[Path], protocol: str | None = None) -> tuple[list[TrainedModel], list[str]]:
    """Read the trained models of run folders; return them and notes to print.

    Args:
        runs: run folders, folders of their stages, or folders of runs ``seed-N``. A repeated model is read once.
        protocol: id of a protocol; default: the main one of the first run.

    Raises:
        UserError: a folder is not a finished run, a file is missing or damaged, the predictions do not give the scores
            in results.json, or the models are of different tasks, data, test units or protocols.
    """
    models: list[TrainedModel] = []
    notes: list[str] = []
    for run in runs:
        refuse_run_and_seeds(run)
    for run in [run for given in runs for run in seed_folders(given) or [given]]:
        for folder, results in _stages(run):
            protocol = protocol or next(iter(results["protocols"]))
            if not any(model.folder.resolve() == folder.resolve() for model in models):
                models.append(_model(run, folder, results, protocol))
    for i, model in enumerate(models):
        first = models[0]
        if model.task != first.task:
            raise UserError(
                f"{first.folder} is a run of the task {first.task} and {model.folder} of {model.task}; compare runs of "
                "one task"
            )
        pair = f"{first.folder} and {model.folder}, protocol {protocol},"
        models[i] = replace(model, scores=tuple(align(model.scores, first.scores, pair)))
    for i, model in enumerate(models):
        for other in models[:i]:
            _refuse_other_data(other, model)
    return _without_repeats(models, notes), notes


def _stages(run: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Return the folders of a run's stages with their results."""
    if not run.is_dir():
        raise UserError(f"there is no run folder {run}; give the output folder of a training")
    if not (run / "results.json").is_file():
        finished = sorted(path.parent for path in run.glob("*/results.json"))
        if finished:
            raise UserError(
                f"{run} has no results.json: the run is not finished; finish the training, or compare its finished "
                f"stages: {' '.join(map(str, finished))}"
            )
        raise UserError(f"{run} is not a run folder: it has no results.json; give the output folder of a training")
    root = _results(run / "results.json")
    if isinstance(get_nested(root, "stages"), dict) and root["stages"]:
        return [(run / name, _checked(run / name / "results.json")) for name in root["stages"]]
    return [(run, _checked(run / "results.json"))]


def _checked(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing, so this stage cannot be compared; train it again, or omit the run")
    results = _results(path)
    for key, kind in (("stage", str), ("seed", int), ("protocols", dict), ("data", dict)):
        if not isinstance(results.get(key), kind):
            raise UserError(f"{path} has no {key!r}, so no training wrote it; give a folder that `train` wrote")
    if not results["protocols"]:
        raise UserError(f"{path} has no scores under 'protocols'; train the run again")
    return results


def _model(source: Path, folder: Path, results: dict[str, Any], protocol: str) -> TrainedModel:
    if protocol not in results["protocols"]:
        raise UserError(
            f"{folder} was not scored under protocol {protocol!r}{nearest(protocol, results['protocols'])}; runs are "
            "compared under one protocol that all of them have, see --protocol"
        )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} has no recipe.yaml, so its settings are unknown; omit it")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    stage = "teacher" if results["stage"].startswith("teacher-") else results["stage"]
    keys = module(recipe.task, "config").STAGE_KEYS.get(stage, ("",))
    rows = _rows(predictions_file(folder, protocol), module(recipe.task, "metrics"))
    return TrainedModel(
        source,
        folder,
        recipe.task,
        stage,
        recipe.name,
        results["seed"],
        recipe.data.train_share,
        _settings(recipe, keys),
        results,
        protocol,
        _scores(folder, rows, protocol, results["protocols"][protocol], module(recipe.task, "metrics")),
        all("group" in row for row in rows),
    )


def _settings(recipe: BaseRecipe, prefixes: tuple[str, ...]) -> dict[str, Any]:
    """Return the settings that shape a model. Paths in its run folder become relative, the same for all seeds."""
    own = (f"{recipe.output_folder}/", f"{recipe.output_folder.parent}/")
    settings = {}
    for key, value in _leaves(recipe.model_dump(mode="json")):
        if key.startswith(prefixes):
            for folder in own if isinstance(value, str) else ():
                value = value.removeprefix(folder)
            settings[key] = value
    return settings


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the settings by dotted key. Only the number of the runs that teach counts, or their keys."""
    for key, value in tree.items():
        if key in (IGNORED_KEYS if prefix else IGNORED_SECTIONS):
            continue
        if key == "runs":
            yield prefix + key, sorted(value) if isinstance(value, dict) else max(1, len(value))
        elif isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- files ------------------------------------------------------------------------------------------------------------


def _results(path: Path) -> dict[str, Any]:
    try:
        results = parse_strictly(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train or evaluate the run again") from error
    if not isinstance(results, dict):
        raise UserError(f"{path} is not a mapping of keys to values; train the run again")
    return check_results(results, path)


def _rows(path: Path, metrics: Metrics) -> list[dict[str, Any]]:
    """Return the rows of a predictions file, with the fields that `metrics` needs, each key once."""
    again = "evaluate the run again"
    if not path.is_file():
        raise UserError(f"{path} is missing; `preceptor evaluate {path.parent.parent}` writes the predictions again")
    rows = read_prediction_rows(path, metrics.ROW_FIELDS)
    lines_by_key: dict[tuple[Any, ...], int] = {}
    for number, row in enumerate(rows, 1):
        key = tuple(row.get(name, 1) for name in metrics.ROW_KEY)
        if key in lines_by_key:
            named = ", ".join(f"{name} {value!r}" for name, value in zip(metrics.ROW_KEY, key, strict=True))
            raise UserError(f"{path} contains {named} twice, in lines {lines_by_key[key]} and {number}; {again}")
        lines_by_key[key] = number
    return rows


def _scores(
    folder: Path, rows: list[dict[str, Any]], protocol: str, recorded: dict[str, Any], metrics: Metrics
) -> tuple[UnitScore, ...]:
    """Return the values of the units, after checking that the rows give the scores in results.json."""
    path = predictions_file(folder, protocol)
    for key, value in metrics.headline_scores(rows, protocol).items():
        expected = get_nested(recorded, *key.split("."))
        if key == "n" and value != expected:
            raise UserError(
                f"{path} contains {value} {metrics.UNIT}s, but results.json says {expected}; evaluate the run again"
            )
        same = value == expected or (
            isinstance(expected, (int, float)) and value is not None and math.isclose(value, expected, abs_tol=1e-9)
        )
        if not same:
            raise UserError(
                f"{path} gives {key} = {value}, but results.json says {expected}: another evaluation wrote the "
                "predictions; evaluate the run again on its own data"
            )
    return tuple(metrics.unit_scores(rows, protocol))


# --- what may be compared ---------------------------------------------------------------------------------------------


def _refuse_other_data(one: TrainedModel, other: TrainedModel) -> None:
    """Refuse other data. If `data.train_share` differs, so do the training rows, and only the test rows must agree.

    So do they if only one model also learned from rows without labels (`data.unlabelled`). Rows name their files, and
    the contents of the test files must agree, too. Runs of earlier versions do not record them.
    """
    used = [(model.share, model.settings.get("data.unlabelled")) for model in (one, other)]
    key = "sha256" if used[0] == used[1] else "test_sha256"
    ours, theirs = get_nested(one.results, "data", key), get_nested(other.results, "data", key)
    if ours != theirs:
        raise UserError(
            f"{one.folder} and {other.folder} were trained with different data (data.{key} {str(ours)[:12]}... and "
            f"{str(theirs)[:12]}...); compare runs on the same rows and split"
        )
    files = [get_nested(model.results, "data", "test_files_sha256") for model in (one, other)]
    if None not in files and files[0] != files[1]:
        raise UserError(
            f"{one.folder} and {other.folder} were tested on files with the same names and different contents "
            "(data.test_files_sha256); evaluate both on the same files"
        )


def _without_repeats(models: list[TrainedModel], notes: list[str]) -> list[TrainedModel]:
    """Return the models without copies (same settings, seed, share and weights), which would count as two seeds.

    Raises UserError if the weights of two such models differ.
    """
    kept: list[TrainedModel] = []
    for model in models:
        twin = next((other for other in kept if _same_training(model, other)), None)
        if twin is None:
            kept.append(model)
        elif get_nested(model.results, "weights_sha256") and _weights(model) == _weights(twin):
            notes.append(f"{model.name} has the weights of {twin.name} and is omitted.")
        else:
            raise UserError(
                f"{twin.folder} and {model.folder} have the same settings and the same seed {model.seed}, but not the "
                "same weights; omit one of them, for example by naming stages (RUN/distilled) instead of whole runs"
            )
    return kept


def _same_training(a: TrainedModel, b: TrainedModel) -> bool:
    return (a.stage, a.seed, a.share, a.settings) == (b.stage, b.seed, b.share, b.settings)


def _weights(model: TrainedModel) -> Any:
    return get_nested(model.results, "weights_sha256")
