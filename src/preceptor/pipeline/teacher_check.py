"""Whether a teacher has something to teach: its validation score against that of the baseline."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.pipeline import run_dir
from preceptor.pipeline.experiment import Experiment, Stage
from preceptor.report.contents import get_nested


def nothing_to_teach(experiment: Experiment, stage: Stage, results: Mapping[str, Mapping[str, Any]]) -> str:
    """Return a warning if no teacher of a stage is better than the baseline on validation data, else "".

    Of several teachers the best one counts. Without a baseline in `results` (those of the stages before, by name), or
    if any of the scores is of other data or of another metric, there is no warning.
    """
    baseline = _validation(results.get("baseline"))
    teachers = [_validation(_results_of(folder)) for folder in experiment.teaching_folders(stage.kind)]
    same = [one for one in teachers if one and baseline and all(one[k] == baseline[k] for k in ("metric", "sha256"))]
    if not baseline or not teachers or len(same) < len(teachers):
        return ""
    best = max(one["score"] for one in same)
    if best > baseline["score"]:
        return ""
    who = "The teacher is no" if len(same) == 1 else f"None of the {len(same)} teachers is"
    return (
        f"{who} better than the baseline on validation data, so there may be nothing to teach: "
        f"{experiment.validation_metric} {100 * best:.1f} % against {100 * baseline['score']:.1f} %. Train the teacher "
        "longer or with more data, or choose another one."
    )


def _results_of(folder: Path) -> Mapping[str, Any] | None:
    """Return the results of the stage that a run folder or model folder stands for; None for a hub model."""
    try:
        return run_dir.read_results(run_dir.model_folder(folder).parent)
    except (UserError, OSError, ValueError):
        return None


def _validation(results: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    found = get_nested(results, "validation")
    return found if isinstance(get_nested(found, "score"), float) and get_nested(found, "sha256") else None
