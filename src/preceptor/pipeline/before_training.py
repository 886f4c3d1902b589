"""Checks of all stages before the first one is trained: a mistake in the last must not be found after hours."""

from __future__ import annotations

from collections.abc import Iterator

from preceptor.config import TrainConfig
from preceptor.pipeline.experiment import Experiment
from preceptor.training.setup import require_trackers


def check_before_training(experiment: Experiment) -> None:
    """Raise UserError for a mistake that would stop a stage of the run.

    A package of a tracker is missing, a checkpoint does not exist, or a check of the task fails. A batch that is larger
    than all epochs together is a warning.
    """
    for key, config, rows in _trainings(experiment):
        require_trackers(config.trackers, key)
        if config.epochs * rows < config.batch_size and rows < config.batch_size:
            experiment.warn(
                f"{key}.batch_size={config.batch_size} is larger than the {rows} training samples times "
                f"{key}.epochs={config.epochs:g}, so the only step trains for {config.batch_size / rows:.3g} epochs."
            )
    experiment.require_checkpoints()


def _trainings(experiment: Experiment) -> Iterator[tuple[str, TrainConfig, int]]:
    """Yield the training settings that the stages use: their key, the settings and the samples of an epoch."""
    recipe, data = experiment.recipe, experiment.data
    labelled = len(data.split("train"))
    for role in dict.fromkeys("teacher" if stage == "teacher" else "student" for stage in recipe.stages):
        section = getattr(recipe, role, None)
        key, config = (f"{role}.train", section.train) if section is not None else ("train", recipe.train)
        yield key, config, (len(data.split("teacher")) or labelled if role == "teacher" else labelled)
