"""Trained models read back from run folders, strictly: a comparison must not rest on half a file."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.errors import UserError, nearest
from preceptor.report.contents import get_nested
from preceptor.tasks import load_recipe
from preceptor.vqa.metrics import Row

FIELDS = {"id": str, "target": str, "prediction": str, "correct": bool, "answer_type": str, "question_type": str}
# What shapes no model: where things lie, how often something is written, and what is asked after the training.
# `seed` tells the models of a group apart; `stages` and `members` say what else was trained.
SILENT = {
    "output",
    "seed",
    "stages",
    "name",
    "description",
    "allow_downloads",
    "trust_remote_code",
    "resume",
    "report",
    "data.root",
    "data.workers",
    "data.max_image_bytes",
    "data.max_image_pixels",
    "data.train_share",
    "teacher.members",
    "method.teaching.runs",
    "method.teaching.cache",
    *(
        f"{model}.train.{key}"
        for model in ("teacher", "student")
        for key in ("keep_checkpoints", "log_every", "trackers")
    ),
}
# What a stage reads of a recipe. A student alone takes tokens and image size of the teacher's model, and the labels.
READS = {
    "teacher": ("data.", "teacher.", "method.label."),
    "baseline": ("data.", "student.", "teacher.model.", "method.label."),
}


@dataclass(frozen=True)
class TrainedModel:
    """One trained model under one protocol.

    `settings` are the recipe's leaves that shape it, by dotted key; `share` is `data.train_share`. `rows` are its
    scored questions in the order of their ids. `source` is the run that was given on the command line.
    """

    source: Path
    folder: Path
    stage: str
    recipe_name: str
    seed: int
    share: float
    settings: dict[str, Any]
    results: dict[str, Any]
    protocol: str
    rows: tuple[Row, ...]

    @cached_property
    def hits(self) -> np.ndarray:
        """(n,) 1.0 where the answer is correct, else 0.0."""
        return np.array([row["correct"] for row in self.rows], dtype=float)

    @property
    def name(self) -> str:
        """Run folder and stage, without the path above: a page is passed on, and paths may name people."""
        root = self.source.resolve()
        folder = self.folder.resolve()
        if folder == root:
            return f"{root.parent.name}/{root.name}" if root.name == self.results["stage"] else root.name
        return f"{root.name}/{folder.name}"

    @property
    def accuracy(self) -> float:
        return float(self.hits.mean())


def read_models(runs: Sequence[Path], protocol: str | None = None) -> tuple[list[TrainedModel], list[str]]:
    """Read the trained models of run folders, of one stage or of several; return them and notes to print.

    `protocol` defaults to the main one of the first run. A model that occurs twice is read once. Raises UserError for
    a folder that is no finished run, a file that is missing or damaged, rows that do not give the accuracy in
    results.json, and models that were scored on other questions, other data or not under this protocol.
    """
    models: list[TrainedModel] = []
    notes: list[str] = []
    for run in runs:
        for folder, results in _stages(run):
            protocol = protocol or next(iter(results["protocols"]))
            if not any(model.folder.resolve() == folder.resolve() for model in models):
                models.append(_model(run, folder, results, protocol))
    for model in models:
        _refuse_other_questions(models[0], model)
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
                f"{run} has no results.json: the run is not finished; train it to its end, or compare its finished "
                f"parts: {' '.join(map(str, finished))}"
            )
        raise UserError(f"{run} is no run folder: it holds no results.json; give the output folder of a training")
    root = _results(run / "results.json")
    if isinstance(get_nested(root, "stages"), dict) and root["stages"]:
        return [(run / name, _checked(run / name / "results.json")) for name in root["stages"]]
    return [(run, _checked(run / "results.json"))]


def _checked(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing, so this stage cannot be compared; train it again, or leave the run out")
    results = _results(path)
    for key, kind in (("stage", str), ("seed", int), ("protocols", dict), ("data", dict)):
        if not isinstance(results.get(key), kind):
            raise UserError(f"{path} has no {key!r}, so it is not of a training; give a folder that `train` wrote")
    if not results["protocols"]:
        raise UserError(f"{path} holds no scores under 'protocols'; train the run again")
    return results


def _model(source: Path, folder: Path, results: dict[str, Any], protocol: str) -> TrainedModel:
    if protocol not in results["protocols"]:
        raise UserError(
            f"{folder} was not scored under protocol {protocol!r}{nearest(protocol, results['protocols'])}; runs are "
            "compared under one protocol that all of them have, see --protocol"
        )
    if not (folder / "recipe.yaml").is_file():
        raise UserError(f"{folder} has no recipe.yaml, so it is not known what it was trained with; leave it out")
    recipe = load_recipe(str(folder / "recipe.yaml"))
    stage = "teacher" if results["stage"].startswith("teacher-") else results["stage"]
    settings = dict(_leaves(recipe.model_dump(mode="json")))
    teaching = recipe.method.teaching
    settings["method.teaching.teachers"] = 0 if teaching.kind == "ema" else max(1, len(teaching.runs))
    reads = READS.get(stage, ("",))
    return TrainedModel(
        source,
        folder,
        stage,
        recipe.name,
        results["seed"],
        recipe.data.train_share,
        {key: value for key, value in settings.items() if key.startswith(reads)},
        results,
        protocol,
        _rows(folder, protocol, results["protocols"][protocol]),
    )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Any:
    for key, value in tree.items():
        if prefix + key in SILENT:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


# --- files ------------------------------------------------------------------------------------------------------------


def _results(path: Path) -> dict[str, Any]:
    try:
        found = _strict(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); train or evaluate the run again") from error
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a mapping of keys to values; train the run again")
    return found


def _rows(folder: Path, protocol: str, scores: dict[str, Any]) -> tuple[Row, ...]:
    """Return the scored questions in the order of their ids, having checked that they give the recorded scores."""
    path = folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
    if not path.is_file():
        raise UserError(f"{path} is missing; `preceptor evaluate {folder}` writes the predictions again")
    rows: list[Row] = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; evaluate the run again") from error
    for number, line in enumerate(lines, 1):
        try:
            row = _strict(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged ({error}); evaluate the run again") from error
        for key, kind in FIELDS.items():
            if not isinstance(get_nested(row, key), kind):
                raise UserError(
                    f"{path}, line {number}: {key} is {get_nested(row, key)!r}, not {kind.__name__}; "
                    "evaluate the run again"
                )
        rows.append(row)
    rows.sort(key=lambda row: row["id"])
    for row, following in pairwise(rows):
        if row["id"] == following["id"]:
            raise UserError(f"{path} holds id {row['id']!r} twice; evaluate the run again")
    if (metric := get_nested(scores, "metric") or "accuracy") != "accuracy":
        raise UserError(
            f"{path} is scored by {metric}, and runs are compared by right and wrong answers; choose another --protocol"
        )
    n, accuracy = get_nested(scores, "n"), get_nested(scores, "accuracy")
    if not rows or len(rows) != n:
        raise UserError(f"{path} holds {len(rows)} questions, but results.json says {n}; evaluate the run again")
    found = sum(row["correct"] for row in rows) / len(rows)
    if not isinstance(accuracy, (int, float)) or not math.isclose(found, accuracy, abs_tol=1e-9):
        raise UserError(
            f"{path} gives an accuracy of {found:.4f}, but results.json says {accuracy}: the predictions were written "
            "by another evaluation; evaluate the run again on its own data"
        )
    return tuple(rows)


def _strict(text: str) -> Any:
    """Return parsed JSON; unlike `json.loads`, refuse NaN and infinities, which JSON does not have."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    return json.loads(text, parse_constant=refuse)


# --- what may be compared ---------------------------------------------------------------------------------------------


def _refuse_other_questions(first: TrainedModel, model: TrainedModel) -> None:
    ours, theirs = ({row["id"]: row for row in m.rows} for m in (first, model))
    for a, b, here, there in ((first, model, ours, theirs), (model, first, theirs, ours)):
        if missing := [id for id in here if id not in there]:
            raise UserError(
                f"{first.folder} and {model.folder} were scored on different questions under protocol "
                f"{first.protocol}: {len(missing)} of {a.folder} are not in {b.folder}, the first is {missing[0]!r}; "
                "evaluate both on the same data"
            )
    for id, row in ours.items():
        other = theirs[id]
        # The target is the answer that was matched, of several accepted ones; it is fixed where both are wrong.
        same_target = row["correct"] or other["correct"] or row["target"] == other["target"]
        same_kinds = all(row[key] == other[key] for key in ("answer_type", "question_type"))  # type: ignore[literal-required]
        if not (same_target and same_kinds):
            raise UserError(
                f"question {id!r} has another answer or type in {first.folder} than in {model.folder}, so they were "
                "scored on different data; evaluate both on the same data"
            )


def _refuse_other_data(one: TrainedModel, other: TrainedModel) -> None:
    """Refuse other data. Where the recipes differ in `data.train_share`, so do the training rows: the test rows count.

    Runs from before the hash of the test rows was written are held to their questions and answers.
    """
    key = "sha256" if one.share == other.share else "test_sha256"
    ours, theirs = get_nested(one.results, "data", key), get_nested(other.results, "data", key)
    if ours != theirs and (key == "sha256" or (ours and theirs)):
        raise UserError(
            f"{one.folder} and {other.folder} were made with different data (data.{key} {str(ours)[:12]}... and "
            f"{str(theirs)[:12]}...); compare runs on the same rows and split"
        )


def _without_repeats(models: list[TrainedModel], notes: list[str]) -> list[TrainedModel]:
    """Return the models without those that say the same thing twice: same settings, seed, share and weights.

    They would count as two seeds. Raises UserError where the weights differ.
    """
    kept: list[TrainedModel] = []
    for model in models:
        twin = next((other for other in kept if _same_training(model, other)), None)
        if twin is None:
            kept.append(model)
        elif get_nested(model.results, "weights_sha256") and _weights(model) == _weights(twin):
            notes.append(f"{model.name} has the weights of {twin.name} and is left out.")
        else:
            raise UserError(
                f"{twin.folder} and {model.folder} have the same settings and the same seed {model.seed}, but not the "
                "same weights; leave one out, for instance by naming stages (RUN/distilled) instead of whole runs"
            )
    return kept


def _same_training(a: TrainedModel, b: TrainedModel) -> bool:
    return (a.stage, a.seed, a.share, a.settings) == (b.stage, b.seed, b.share, b.settings)


def _weights(model: TrainedModel) -> Any:
    return get_nested(model.results, "weights_sha256")
