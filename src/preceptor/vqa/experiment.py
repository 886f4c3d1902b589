"""Visual question answering as an experiment: its stages, models, scores and files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from preceptor.data import provenance
from preceptor.data.findings import Finding
from preceptor.data.types import Dataset, Prediction, Sample, Split
from preceptor.data.vqa.check import check_images
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.pipeline.experiment import SPLITS, Evaluation, Experiment, Stage, Training
from preceptor.pipeline.image_reliance import IMAGES, image_reliance
from preceptor.pipeline.speed import SpeedTest
from preceptor.scores import Metrics, UnitScore, number_groups
from preceptor.task import Task, Teacher
from preceptor.teachers.array_store import REWRITE, require_place
from preceptor.teachers.cache import CachedTeacher
from preceptor.teachers.cache import verify as verify_cache
from preceptor.teachers.online import OnlineTeacher
from preceptor.vqa import metrics
from preceptor.vqa.baselines import baselines
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.context import RunContext
from preceptor.vqa.data import read_data
from preceptor.vqa.dataset import check_questions
from preceptor.vqa.evaluate import accuracy, predict, predict_examples
from preceptor.vqa.figures import write_figures
from preceptor.vqa.image_reliance import examples_with
from preceptor.vqa.linear_baseline import linear_baseline
from preceptor.vqa.metrics import Scores, score, unit_scores
from preceptor.vqa.model_card import model_card
from preceptor.vqa.protocols import Protocol, protocol_named, protocols_for
from preceptor.vqa.report import write_report
from preceptor.vqa.teachers import (
    cached_teacher,
    compare_rows,
    ema_teacher,
    every_view,
    online_teacher,
    require_same_inputs,
    signal_cache_key,
)
from preceptor.vqa.token_embeddings import inherit_token_embeddings
from preceptor.vqa.vision import remember_images


class VqaExperiment(Experiment):
    """Medical visual question answering with a classifier over the answers of the training split."""

    task = "vqa"
    metrics: ClassVar[Metrics] = metrics
    validation_metric = "accuracy"
    packages = ("transformers", "tokenizers", "pillow")
    other_images = IMAGES[1:]
    estimates_headroom = True
    shared_folders = ("teacher-cache",)
    recipe: VqaRecipe
    data: Dataset[Sample]

    @classmethod
    def read_data(cls, recipe: VqaRecipe, needed: tuple[Split, ...] = SPLITS) -> Dataset[Sample]:
        return read_data(recipe.data, recipe.output_folder / "data", needed=needed)

    @cached_property
    def context(self) -> RunContext:
        return RunContext(self.recipe, self.data)

    @cached_property
    def _long_questions(self) -> list[Finding]:
        """A finding about the questions that are truncated, with the tokenizer of the run."""
        return check_questions(self.data.samples, self.context.tokenizer, self.recipe.data.max_question_tokens)

    # Training

    def require_checkpoints(self) -> None:
        recipe, method = self.recipe, self.recipe.method
        if "distilled" in recipe.stages and method.teaching.kind == "ema" and method.inherit_token_embeddings:
            raise UserError(
                "method.inherit_token_embeddings=true needs a trained teacher, and with method.teaching.kind=ema there "
                "is none; set method.inherit_token_embeddings=false"
            )
        runs: list[VqaBundle] = []
        if any(self.has_teacher(kind) for kind in recipe.stages):
            for run in method.teaching.runs:
                runs.append(VqaBundle.load(Path(run)))
                require_same_inputs(Path(run), runs[-1], self.context)
            if method.teaching.kind == "cached":
                require_place(self.cache_folder())
        if len(recipe.stages) > 1:  # a single stage is built at once
            self._build_every_stage(runs)

    def _build_every_stage(self, runs: Sequence[VqaBundle]) -> None:
        """Build the models and the task of every stage and discard them. Raises UserError for what does not fit."""
        recipe, method = self.recipe, self.recipe.method
        teacher = runs[0] if runs else None
        if "teacher" in recipe.stages:
            new = self.context.new_bundle(recipe.teacher, recipe.seed)
            teacher = teacher or new
        student = self.context.new_bundle(recipe.student, recipe.seed)
        if "distilled" not in recipe.stages:
            return
        source: Teacher = ema_teacher(student.model, method)
        config = student.model.config
        if teacher is not None and method.teaching.kind != "ema":
            config = teacher.model.config
            if method.inherit_token_embeddings:
                inherit_token_embeddings(student.model, teacher.model.text.get_input_embeddings().weight.detach())
            source = OnlineTeacher(teacher.model, method.teacher_forward(student.model.config.layers, config.layers))
        method.build_task(student.model, teacher=source, teacher_config=config, seed=recipe.seed)

    def stages(self) -> list[Stage]:
        found = []
        for kind in self.recipe.stages:
            found.append(Stage(kind, kind, self.recipe.seed))
            if kind == "teacher":
                members = range(2, self.recipe.teacher.members + 1)
                found += [Stage(f"teacher-{n}", kind, self.recipe.seed + 1000 * (n - 1)) for n in members]
        return found

    def trainings(self, stage: Stage, folder: Path) -> Iterator[Training]:
        recipe, context = self.recipe, self.context
        for finding in self._long_questions:
            self.warn(finding.reason)
        teaches = stage.kind == "distilled"
        source, teacher_config = self._teacher() if teaches else (None, None)
        config = recipe.teacher if stage.kind == "teacher" else recipe.student
        bundle = context.new_bundle(config, stage.seed)
        method = recipe.method
        if teaches and method.inherit_token_embeddings:
            first = VqaBundle.load(self.teacher_folders()[0]).model
            inherit_token_embeddings(bundle.model, first.text.get_input_embeddings().weight.detach())
        if teaches and method.teaching.kind == "ema":
            source, teacher_config = ema_teacher(bundle.model, method), bundle.model.config
        if source is not None:
            source = source.to(processes().device)
        task = method.build_task(
            bundle.model,
            pretrained=bundle.pretrained,
            teacher=source,
            teacher_config=teacher_config,
            seed=stage.seed,
        )
        train = context.training_examples(stage.seed, model=config.model, with_teacher=source is not None)
        if recipe.data.augment.repeats:
            remember_images(bundle.model)
        held_out = bundle.examples(self.data.split("validation"), recipe.data)

        def validate(_: Task) -> dict[str, float]:
            answers = predict_examples(bundle.model, held_out)
            return {"score": accuracy(held_out, answers, bundle.vocabulary.normaliser)}

        yield Training(
            folder=folder,
            title=stage.name,
            task=task,
            config=config.train,
            loader=lambda batches: train.loader(batches, recipe.data.workers),
            samples=len(train),
            epoch_samples=len(self.data.split("train")),
            validate=validate,
            export=bundle.save,
            resume_config=self._resume_config(stage, source, bundle),
            summary=lambda: {"provenance": bundle.provenance},
        )

    def _teacher(self) -> tuple[Teacher | None, Any]:
        """Return (teacher, its model configuration) of the distilled stage; (None, None) for a moving average."""
        recipe, teaching = self.recipe, self.recipe.method.teaching
        if teaching.kind == "ema":
            return None, None
        source, config = online_teacher(self.teacher_folders(), self.context)
        if teaching.kind == "online":
            return source, config
        paths = recipe.method.teacher_features(recipe.student.model.layers, config.layers)
        return cached_teacher(self.cache_folder(), self.context, source, paths), config

    def _resume_config(self, stage: Stage, teacher: Teacher | None, bundle: VqaBundle) -> dict[str, Any]:
        recipe = self.recipe
        config = recipe.teacher if stage.kind == "teacher" else recipe.student
        # The rows tell what excluded images change.
        excluded = {"root", "workers", "max_image_bytes", "max_image_pixels", "exclude_images_of"}
        data = recipe.data.model_dump(mode="json", exclude=excluded)
        found: dict[str, Any] = {
            "data": {**data, "rows": self.data.fingerprint(), "answers": self.context.vocabulary.fingerprint()},
            "seed": stage.seed,
            "model": config.model.model_dump(mode="json"),
            "train": config.train.model_dump(mode="json", exclude={"keep_checkpoints", "log_every", "trackers"}),
            "method": recipe.method.stage_settings(stage.kind),
            "teacher": teacher.fingerprint if teacher and recipe.method.needs_teacher(stage.kind) else None,
        }
        # Refuses runs of earlier versions, which did not apply train.pretrained_lr_scale to these weights.
        if config.model.init:
            found["pretrained_parameters"] = len(bundle.pretrained)
        return json.loads(json.dumps(found))

    def cache_folder(self) -> Path:
        """Return the folder of the teacher's cache."""
        return Path(self.recipe.method.teaching.cache or self.recipe.output_folder / "teacher-cache")

    def teaching_folders(self, kind: str) -> list[Path]:
        return self.teacher_folders() if self.has_teacher(kind) else []

    def validation(self, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
        found = super().validation(folder, training)
        return found | {"metric": f"{self.validation_metric}, normaliser {self.recipe.data.normaliser}"}

    def teacher_folders(self) -> list[Path]:
        """Return the runs that teach: those of the recipe, or its own teacher stage."""
        if self.recipe.method.teaching.runs:
            return [Path(run) for run in self.recipe.method.teaching.runs]
        names = ["teacher", *(f"teacher-{number}" for number in range(2, self.recipe.teacher.members + 1))]
        return [self.recipe.output_folder / name for name in names]

    def stage_recipe(self, stage: Stage, folder: Path) -> VqaRecipe:
        recipe = self.recipe.model_copy(deep=True)
        recipe.stages, recipe.output, recipe.seed = (stage.kind,), str(folder), stage.seed  # type: ignore[assignment]
        recipe.teacher.members = 1
        teaching = recipe.method.teaching
        if stage.kind == "distilled" and teaching.kind != "ema":
            teaching.runs = [str(path) for path in self.teacher_folders()]
            if teaching.kind == "cached":
                teaching.cache = str(self.cache_folder())
        if recipe.data.name == "phantom" and recipe.data.root is None:
            recipe.data.root = str(self.recipe.output_folder / "data")
        return recipe

    def starting_points(self, kinds: Collection[str]) -> dict[str, Path]:
        recipe, found = self.recipe, {}
        if "teacher" in kinds and recipe.teacher.model.init:
            found["teacher.model.init"] = Path(recipe.teacher.model.init)
        if not {"baseline", "distilled"}.isdisjoint(kinds) and recipe.student.model.init:
            found["student.model.init"] = Path(recipe.student.model.init)
        if "distilled" in kinds:
            runs = recipe.method.teaching.runs
            found |= {f"method.teaching.runs[{number}]": Path(run) for number, run in enumerate(runs)}
        return found

    def has_teacher(self, kind: str) -> bool:
        return self.recipe.method.needs_teacher(kind)

    # Provenance

    def images(self, split: Split) -> dict[str, Sequence[Path]]:
        return {sample.id: [sample.image] for sample in self.data.split(split)}

    def hash_images(self, paths: Sequence[Path]) -> dict[Path, tuple[str, str]]:
        config = self.recipe.data
        return provenance.hash_images(
            paths,
            self.recipe.output_folder / provenance.CACHE,
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
        )

    def exclusion_hint(self) -> str:
        name = self.data.root if self.data.name == "table" else self.data.name
        variant = f"/{self.data.variant}" if self.data.name == "vqa-med-2019" else ""
        return f" (data.exclude_images_of=[{name}{variant}])"

    # Evaluation

    def load(self, folder: Path) -> VqaBundle:
        bundle = VqaBundle.load(folder)
        bundle.model.to(processes().device)
        return bundle

    @cached_property
    def _baselines(self) -> dict[str, tuple[list[Prediction], dict[str, str]]]:
        """The (test predictions, description) of the baselines by name; those of all stages are the same."""
        normaliser = self.recipe.data.normaliser
        found: dict[str, tuple[list[Prediction], dict[str, str]]] = {
            name: (predictions, {}) for name, predictions in baselines(self.data, normaliser).items()
        }
        if linear := linear_baseline(self.recipe, self.data, normaliser):
            backbone, predictions = linear
            found["linear"] = predictions, {"features": backbone}
        return found

    def evaluate(self, model: VqaBundle, *, protocol: str | None = None, stage: Stage | None = None) -> Evaluation:
        samples = self.data.split("test")
        if stage is None:  # the training of a stage has noted them for all splits
            for finding in check_questions(samples, model.tokenizer, model.preprocessing.max_question_tokens):
                self.warn(finding.reason)
        predictions = predict_examples(model.model, model.examples(samples, self.recipe.data))
        found = Evaluation({}, {}, {}, {"baselines": {}})
        for one in [protocol_named(self.data, protocol)] if protocol else protocols_for(self.data):
            chosen = [sample for sample in samples if one.select(sample)]
            scores = replace(score(samples, predictions, one), ceiling=model.vocabulary.ceiling(chosen))
            found.rows[one.id] = scores.rows()
            found.scores[one.id] = scores.as_dict() | {"interval": scores.interval()}
            found.describes[one.id] = one.describes
            found.extras["baselines"][one.id] = {
                name: _summary(score(samples, answers, one)) | described
                for name, (answers, described) in self._baselines.items()
            }
        return found

    def image_reliance(self, model: VqaBundle, images: Sequence[str], evaluation: Evaluation) -> dict[str, Any]:
        samples = self.data.split("test")
        examples = {kind: examples_with(kind, model, samples, self.recipe.data) for kind in images}
        predictions = {kind: predict_examples(model.model, one) for kind, one in examples.items()}
        found = {}
        for id, real in evaluation.rows.items():
            protocol = protocol_named(self.data, id)
            scored = {kind: score(samples, answers, protocol).rows() for kind, answers in predictions.items()}
            found[id] = image_reliance({"real": real, **scored})
        return found

    def validation_answers(self, model: VqaBundle) -> list[UnitScore]:
        samples = self.data.split("validation")
        everything = Protocol("validation/right", self.recipe.data.normaliser, lambda sample: True, "")
        rows = score(samples, predict_examples(model.model, model.examples(samples, self.recipe.data)), everything)
        return unit_scores(rows.rows(), everything.id)

    def test_groups(self) -> list[str]:
        main, samples = protocols_for(self.data)[0], self.data.split("test")
        groups = number_groups(samples)
        return [groups[sample.id] for sample in samples if main.select(sample)]

    def parameter_count(self, model: VqaBundle) -> int:
        return model.model.parameter_count()

    def speed_test(self, model: VqaBundle) -> SpeedTest:
        samples, most = self.data.split("test"), self.recipe.report.latency_questions
        examples = model.examples(samples, self.recipe.data)
        device = next(model.model.parameters()).device
        # Of questions whose image can be read: with data.broken=skip, the batch of another one is empty.
        each = enumerate(examples.loader([[i] for i in range(len(samples))]))
        readable = list(itertools.islice(((i, batch.to(device)) for i, batch in each if len(batch)), most))
        if not readable:
            return SpeedTest("question", list, 0)
        singles = [batch for _, batch in readable]
        together = next(iter(examples.loader([[i for i, _ in readable]]))).to(device)

        def one_by_one() -> None:
            for batch in singles:
                predict(model.model, batch)

        return SpeedTest("question", one_by_one, len(singles), lambda: predict(model.model, together), len(together))

    # Files

    def write_figures(self, folder: Path, model: VqaBundle, evaluation: Evaluation) -> None:
        write_figures(folder, model, self.data, self.recipe, evaluation.rows)

    def model_card(self, results: dict[str, Any]) -> str:
        return model_card(results, self.recipe)

    def write_report(self, run: Path) -> Path:
        return write_report(run)

    # Commands beside training

    def findings(self) -> list[Finding]:
        config = self.recipe.data
        found = check_images(self.data.samples, max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels)
        try:
            found += self._long_questions
        except (UserError, OSError) as error:  # the tokenizer is that of a run or a folder
            found.append(Finding((), None, f"the length of the questions was not checked: {error}", "warning"))
        return found

    @classmethod
    def cache(cls, recipe: VqaRecipe, verify: float) -> dict[str, Any]:
        """Build the teacher cache of a recipe if it is missing or stale. With `verify > 0`, verify that fraction.

        A cache that is verified is never written first; `mismatches` and `damage` describe what is wrong with it. Rows
        that the data lack, and data that the cache lacks, are damage.
        Raises UserError if there is none to verify.
        """
        with processes().main_process_first():
            experiment = cls.read(recipe)
        source, config = online_teacher(experiment.teacher_folders(), experiment.context)
        folder = experiment.cache_folder()
        paths = recipe.method.teacher_features(recipe.student.model.layers, config.layers)
        if verify > 0:
            cached = CachedTeacher.open(folder, signal_cache_key(experiment.context, source, ["logits", *paths]))
        else:
            cached = cached_teacher(folder, experiment.context, source, paths, renew=True)
        rows, batches = every_view(experiment.context)
        report = {"folder": str(folder), "rows": rows, "checked": 0, "worst": 0.0, "mismatches": [], "damage": ""}
        if verify > 0:
            damage = []
            try:
                cached.store.verify_files()
            except UserError as error:
                damage.append(str(error))
            checked = verify_cache(cached, source, batches, fraction=verify, seed=recipe.seed)
            missing, _ = compare_rows(cached.store, experiment.context)
            stale = []
            if missing:
                stale.append(f"it lacks {len(missing)} of {rows} rows, such as that of sample {missing[0]!r}")
            if checked.absent:
                stale.append(f"{checked.absent} of {checked.checked + checked.absent} drawn rows belong to no sample")
            if stale:
                damage.append(
                    f"The teacher cache {folder} is not that of the data: {'; '.join(stale)}. Fix: {REWRITE}."
                )
            report |= {"checked": checked.checked, "worst": checked.worst, "mismatches": checked.mismatched}
            report["damage"] = " ".join(damage)
        return report


def _summary(scores: Scores) -> dict[str, Any]:
    found = scores.as_dict()
    return {key: found[key] for key in ("accuracy", "open", "closed", "n")} | {"interval": scores.interval()}


EXPERIMENT = VqaExperiment
