"""The interface between the pipeline and a task: what to train, how to load it, how to score it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from torch.utils.data import DataLoader

from preceptor.config import BaseRecipe, TrainConfig
from preceptor.data.findings import Finding
from preceptor.data.provenance import Source
from preceptor.data.splits import FIX_SPLITS, empty_split
from preceptor.data.types import Split
from preceptor.data.volumes import content_hash
from preceptor.pipeline.speed import SpeedTest
from preceptor.scores import Metrics, UnitScore
from preceptor.task import Task
from preceptor.training.sampler import StepBatches

log = logging.getLogger("preceptor")

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
TRAINING_SPLITS: tuple[Split, ...] = ("train", "validation", "unlabelled", "teacher")
"""Splits of which a training reads files."""


@dataclass(frozen=True)
class Stage:
    """One model of a run.

    `kind` is the entry of `recipe.stages` that asks for it. `name` is the folder and the title; it differs from `kind`
    only for the members of an ensemble of teachers (`teacher`, `teacher-2`, ...), each with its own `seed`.
    """

    name: str
    kind: str
    seed: int


@dataclass
class Training:
    """One training of a stage: what `training.fit` needs, and what to write about it.

    Attributes:
        folder: where checkpoints, metrics and the `model` folder are written.
        title: shown with the progress bar.
        task: the student, its losses and its teacher.
        config: optimizer, schedule and number of epochs.
        loader: makes a loader from the lists of items of each step.
        samples: number of samples to draw from.
        epoch_samples: number of samples in an epoch; fewer than `samples` if only a teacher labels some of them.
        validate: returns metrics with a `score`, higher is better. Every process calls it.
        export: writes the model into a new folder. The main process alone calls it.
        resume_config: what must be the same when the training is resumed.
        resume_defaults: returns the values of keys of `resume_config` that checkpoints of earlier versions lack, for a
            training that such a version has begun.
        summary: returns the entries that this training adds to results.json.
    """

    folder: Path
    title: str
    task: Task
    config: TrainConfig
    loader: Callable[[StepBatches], DataLoader]
    samples: int
    epoch_samples: int
    validate: Callable[[Task], dict[str, float]]
    export: Callable[[Path], None]
    resume_config: dict[str, Any]
    resume_defaults: Callable[[], dict[str, Any]] = dict
    summary: Callable[[], dict[str, Any]] = dict


@dataclass
class Evaluation:
    """The scores of a model on the test split, one entry per protocol id.

    `rows` holds one JSON-able row per unit: the predictions that are written, with what they are scored against.
    `scores` is computed from `rows` and becomes `protocols` in results.json; `describes` has a sentence per protocol.
    `extras` are further entries of results.json.
    """

    rows: dict[str, list[Any]]
    scores: dict[str, dict[str, Any]]
    describes: dict[str, str]
    extras: dict[str, Any] = field(default_factory=dict)


class Experiment(ABC):
    """What a task brings to the pipeline. An object holds a recipe and its data for one run."""

    task: ClassVar[str]
    metrics: ClassVar[Metrics]
    """The module `metrics` of the task, which gives the score of each unit."""
    validation_metric: ClassVar[str]
    """Name of the score on validation data."""
    packages: ClassVar[tuple[str, ...]]
    """Packages whose versions results.json records, beside those that every run needs."""
    other_images: ClassVar[tuple[str, ...]] = ()
    """Kinds of images that `image_reliance` can show to a model instead of the real ones."""
    estimates_headroom: ClassVar[bool] = False
    """Whether `validation_answers` and `test_groups` exist, so that `doctor --teacher` is possible."""
    shared_folders: ClassVar[tuple[str, ...]] = ()
    """Folders of the run that several stages use; `resume=never` deletes them."""

    def __init__(self, recipe: Any, data: Any) -> None:
        self.recipe, self.data = recipe, data
        self._sha256_of_file: dict[Path, str] = {}

    @classmethod
    def read(cls, recipe: BaseRecipe, needed: tuple[Split, ...] = SPLITS) -> Self:
        """Return the experiment of a recipe. Raises UserError if the data cannot be read or a split is empty."""
        data = cls.read_data(recipe, needed)
        data.notes += [finding.reason for finding in data.findings if finding.reason not in data.notes]
        return cls(recipe, data)

    def warn(self, sentence: str) -> None:
        """Log a sentence and add it to the notes of the results, once."""
        if sentence not in self.data.notes:
            log.warning(sentence)
            self.data.add_note(sentence)

    @classmethod
    @abstractmethod
    def read_data(cls, recipe: Any, needed: tuple[Split, ...]) -> Any:
        """Return the data set of a recipe."""

    # Training

    def stages(self) -> list[Stage]:
        """Return the models to train, in order."""
        return [Stage(kind, kind, self.recipe.seed) for kind in self.recipe.stages]

    @abstractmethod
    def trainings(self, stage: Stage, folder: Path) -> Iterator[Training]:
        """Yield the trainings of a stage in order; the last one writes to `folder`.

        Each is run before the next is asked for, so that it may start from the weights before it.
        """

    @abstractmethod
    def stage_recipe(self, stage: Stage, folder: Path) -> BaseRecipe:
        """Return a recipe that trains this stage alone, into `folder`."""

    def starting_points(self, kinds: Collection[str]) -> dict[str, Path]:
        """Return earlier runs whose weights these kinds of stages start or learn from, by the key that names them."""
        return {}

    def has_teacher(self, kind: str) -> bool:
        """Return whether a stage of this kind learns from a teacher with weights of its own."""
        return False

    def teaching_folders(self, kind: str) -> list[Path]:
        """Return the runs or stages whose models teach a stage of this kind; none if it has no teacher of its own."""
        return []

    def evaluation_settings(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the settings of the recipe that change the results of `evaluate` and not the model, ready for JSON.

        `stage`: the stage of the run whose model is evaluated, as in `evaluate`.
        """
        return {}

    def validation(self, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
        """Return the entry `validation` of results.json: what tells whether a model can teach another one.

        Scores with equal `metric` and `sha256` (of the validation samples) are comparable. Without a `score` there is
        nothing to compare.

        Args:
            folder: of the stage.
            training: what the training adds to results.json.
        """
        kept = training["training"]["kept_step"]
        scores = [line["score"] for line in training["training"]["validations"] if line["step"] == kept]
        score = scores[-1] if scores else None
        return {"metric": self.validation_metric, "score": score, "sha256": self.data.fingerprint("validation")}

    def require_checkpoints(self) -> None:  # noqa: B027 - most tasks need none
        """Raise UserError if a checkpoint that a later stage needs does not exist."""

    # Provenance

    @abstractmethod
    def images(self, split: Split) -> dict[str, Sequence[Path]]:
        """Return the image files of each sample of a split, by sample id."""

    @abstractmethod
    def hash_images(self, paths: Sequence[Path]) -> dict[Path, tuple[str, str]]:
        """Return (SHA-256, perceptual hash or "") of every file that can be read."""

    def label_files(self, split: Split) -> dict[str, Path]:
        """Return the label map of each sample of a split that has one, by sample id."""
        return {}

    def files_sha256(self, splits: Iterable[Split]) -> str:
        """Return a SHA-256 over the contents of all image and label files of `splits`, in the order of the samples.

        Names of files have no part in it, and a file that cannot be read counts as one that is not there.
        """
        total = hashlib.sha256()
        for split in splits:
            labels = self.label_files(split)
            for id, images in self.images(split).items():
                files = [*images, *([labels[id]] if id in labels else [])]
                total.update(json.dumps([split, id, [self._sha256_or_none(file) for file in files]]).encode())
        return total.hexdigest()

    def training_files_not_in(self, known: Collection[str]) -> list[Path]:
        """Return the images of the training splits whose SHA-256 is not in `known`, each once."""
        paths = [path for split in TRAINING_SPLITS for files in self.images(split).values() for path in files]
        return [path for path in dict.fromkeys(paths) if self._sha256_or_none(path) not in known]

    def file_sha256(self, file: Path) -> str:
        """Return the SHA-256 of a file, or of a DICOM series, which is read once. Raises OSError if it cannot be."""
        if file not in self._sha256_of_file:
            self._sha256_of_file[file] = content_hash(file)
        return self._sha256_of_file[file]

    def _sha256_or_none(self, file: Path) -> str | None:
        with contextlib.suppress(OSError):
            return self.file_sha256(file)
        return None

    def training_images(self) -> Source:
        """Return the hashes of all images that the models may have seen."""
        paths = [path for split in TRAINING_SPLITS for files in self.images(split).values() for path in files]
        hashes = dict(sorted(self.hash_images(paths).values()))
        return Source(self.data.name, self.data.variant, self.data.fingerprint("test"), hashes)

    def exclusion_hint(self) -> str:
        """Return how to train an earlier run without the test images of this data set, as the end of a sentence."""
        return ""

    # Evaluation

    @abstractmethod
    def load(self, folder: Path) -> Any:
        """Return the trained model of a model folder, in eval mode, on the device of this process.

        Raises UserError if it does not fit the data.
        """

    @abstractmethod
    def evaluate(self, model: Any, *, protocol: str | None = None, stage: Stage | None = None) -> Evaluation:
        """Score a model on the test split, under one protocol or all.

        Raises:
            UserError: the protocol is unknown.
        """

    def describe_data(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the entry `data` of results.json: name, variant, fingerprints and the size of each split.

        Unlabelled samples are counted for the stages that learn from them.
        """
        data = self.data
        learns = stage is None or stage.kind not in ("teacher", "baseline")
        splits: tuple[Split, ...] = SPLITS + (("unlabelled",) if learns and data.split("unlabelled") else ())
        return {
            "name": data.name,
            "variant": data.variant,
            "sha256": data.fingerprint(),
            "test_sha256": data.fingerprint("test"),
            "test_files_sha256": self.files_sha256(("test",)),
            "leaking": data.leaking,
            **{split: len(data.split(split)) for split in splits},
        }

    def image_reliance(self, model: Any, images: Sequence[str], evaluation: Evaluation) -> dict[str, Any]:
        """Return, by protocol id (and task), what changes if the test questions are asked about other `images`.

        Only a task whose `other_images` are not empty has this.
        """
        raise NotImplementedError

    def validation_answers(self, model: Any) -> list[UnitScore]:
        """Return for every validation sample whether a model is right (1) or wrong (0)."""
        raise NotImplementedError

    def test_groups(self) -> list[str]:
        """Return the group of each unit of the main protocol; of the test split, only its size is used."""
        raise NotImplementedError

    @abstractmethod
    def parameter_count(self, model: Any) -> int:
        """Return the number of parameters of a model."""

    @abstractmethod
    def speed_test(self, model: Any) -> SpeedTest:
        """Return what to time of a model."""

    # Files

    @abstractmethod
    def write_figures(self, folder: Path, model: Any, evaluation: Evaluation) -> None:
        """Write the pictures of the report, which need the model or the images, into ``folder/figures``."""

    @abstractmethod
    def model_card(self, results: dict[str, Any]) -> str:
        """Return README.md of a model folder."""

    @abstractmethod
    def write_report(self, run: Path) -> Path:
        """Write the report page of a run; return its path."""

    # Commands beside training

    @classmethod
    def check(cls, recipe: Any) -> dict[str, Any]:
        """Return what `doctor` finds in the data of a recipe: `name`, `variant`, `notes`, `rows` and `findings`."""
        experiment = cls.for_check(recipe)
        data = experiment.data
        empty = [
            Finding((), None, f"{empty_split(data, split)}; {FIX_SPLITS}") for split in SPLITS if not data.split(split)
        ]
        findings = [
            {
                "severity": finding.severity,
                "ids": list(finding.sample_ids),
                "file": finding.file.name if finding.file else "",
                "reason": finding.reason,
            }
            for finding in [*data.findings, *empty, *experiment.findings()]
        ]
        reasons = {finding["reason"] for finding in findings}
        files = {path for split in SPLITS for paths in experiment.images(split).values() for path in paths}
        return {
            "name": data.name,
            "variant": data.variant,
            "notes": [note for note in data.notes if note not in reasons],
            "rows": {split: len(data.split(split)) for split in SPLITS},
            "images": len(files),
            "findings": findings,
        }

    @classmethod
    def for_check(cls, recipe: Any) -> Self:
        """Return the experiment whose data are checked; splits may be empty."""
        return cls.read(recipe, needed=())

    @abstractmethod
    def findings(self) -> list[Finding]:
        """Read all files and return what is wrong with them. Notes may be added to the data.

        What is wrong with the rows is cheap to find and therefore known after `read`, as `Dataset.findings`.
        """

    @classmethod
    def cache(cls, recipe: Any, verify: float) -> dict[str, Any]:
        """Build the teacher cache of a recipe that has one (`require_teacher_cache`), or verify a fraction of it."""
        raise NotImplementedError
