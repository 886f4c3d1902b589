"""One stage of a recipe: a model trained, chosen by validation, evaluated and written as a run folder."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from preceptor.data import provenance as seen
from preceptor.data.splits import cross_questions
from preceptor.data.types import VqaData
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.distributed import processes
from preceptor.environment import QUESTIONS, machine, versions
from preceptor.errors import UserError
from preceptor.files import sha256, write_text
from preceptor.pipeline.run_dir import model_folder, start_afresh
from preceptor.recipe import differences, dump_recipe
from preceptor.task import Task, Teacher
from preceptor.training.loop import FitArguments, fit
from preceptor.vqa.bundle import VqaBundle, build_bundle, choose_preprocessing, choose_tokenizer
from preceptor.vqa.config import RunModelConfig, Stage, VqaRecipe
from preceptor.vqa.dataset import Preprocessing, VqaExamples
from preceptor.vqa.evaluate import (
    accuracy,
    evaluate_bundle,
    latency_ms,
    predict_part,
    write_predictions,
)
from preceptor.vqa.method import VqaMethod
from preceptor.vqa.token_embeddings import inherit_token_embeddings
from preceptor.vqa.vision import remember_images


@dataclass
class Classroom:
    """What all stages of a recipe share: data, tokens, answer classes."""

    recipe: VqaRecipe
    data: VqaData

    @cached_property
    def vocabulary(self) -> AnswerVocabulary:
        config = self.recipe.data
        return AnswerVocabulary.build(self.data.split("train"), config.normaliser, config.minimum_answer_count)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokens, for the student too: hidden layers can only be compared token by token."""
        questions = [sample.question for sample in self.data.split("train")]
        runs = self.recipe.method.teaching.runs
        if runs:
            return VqaBundle.load(Path(runs[0])).tokenizer
        config = self.recipe.teacher.model
        return choose_tokenizer(config, questions, allow_downloads=self.recipe.allow_downloads)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        config = self.recipe.teacher.model
        return choose_preprocessing(config, self.recipe.data, allow_downloads=self.recipe.allow_downloads)

    def bundle(self, config: RunModelConfig, seed: int) -> VqaBundle:
        """Return a new model of these classes and tokens."""
        return build_bundle(
            config.model,
            self.tokenizer,
            self.preprocessing,
            self.vocabulary,
            seed=seed,
            allow_downloads=self.recipe.allow_downloads,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    @property
    def hash_cache(self) -> Path:
        return self.recipe.output_folder / seen.CACHE

    @property
    def limits(self) -> dict[str, int]:
        return {"max_bytes": self.recipe.data.max_image_bytes, "max_pixels": self.recipe.data.max_image_pixels}

    @cached_property
    def training_images(self) -> seen.Source:
        return seen.training_images(self.data, self.hash_cache, **self.limits)

    def refuse_known_tests(self) -> None:
        """Raise UserError where weights that this recipe starts from or is taught by know images of its test.

        Where a run does not say what it was trained on, that is noted.
        """
        for key, run in earlier_runs(self.recipe).items():
            sources = seen.read_provenance(model_folder(run))
            if sources is None:
                note = f"Not checked: {key} does not say which images it was trained on, so they may be test images."
                self.data.notes.append(note)
                continue
            if ids := seen.contaminated_test_ids(self.data, sources, self.hash_cache, **self.limits):
                total = len({sample.image for sample in self.data.split("test")})
                listed = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
                mine = self.data.root if self.data.name == "table" else self.data.name
                mine = f"{mine}/{self.data.variant}" if self.data.name == "vqa-med-2019" else mine
                raise UserError(
                    f"{key}={run} was trained on {len(ids)} of the {total} test images of {self.data.name} "
                    f"{self.data.variant} (rows {listed}); train it again with data.exclude_images_of=[{mine}], or "
                    "on this very data set and split"
                )

    def training_examples(self, seed: int, *, crossed: bool = False) -> VqaExamples:
        """Return the training rows; with `crossed`, the unlabelled ones and the recipe's cross questions after them."""
        rows = self.data.split("train")
        if crossed:
            every = rows + self.data.split("unlabelled")
            number = self.recipe.method.teaching.cross_questions
            rows = [row for row in every if row.question]
            rows += cross_questions(every, number, self.recipe.data.split_seed)
        return VqaExamples(
            rows,
            self.tokenizer,
            self.vocabulary,
            self.preprocessing,
            self.recipe.data,
            augmented=True,
            seed=seed,
        )

    def identity(
        self, config: RunModelConfig, seed: int, method: VqaMethod | None, teacher: str | None
    ) -> dict[str, Any]:
        """Return what must not change when a stage is resumed."""
        # What excluded images change is told by the rows.
        data = self.recipe.data.model_dump(
            mode="json", exclude={"root", "workers", "max_image_bytes", "max_image_pixels", "exclude_images_of"}
        )
        found: dict[str, Any] = {
            "data": {**data, "rows": self.data.fingerprint(), "answers": self.vocabulary.fingerprint()},
            "seed": seed,
            "model": config.model.model_dump(mode="json"),
            "train": config.train.model_dump(mode="json", exclude={"keep_checkpoints", "log_every", "trackers"}),
        }
        found["label"] = (method or self.recipe.method).label.model_dump(mode="json")
        if method is not None:
            # Who teaches is told by the weights, not by where they lie.
            found["method"] = method.model_dump(mode="json", exclude={"teaching": {"runs", "cache"}})
            found["teacher"] = teacher
        return json.loads(json.dumps(found))


def stage_recipe(recipe: VqaRecipe, stage: Stage, folder: Path, seed: int) -> VqaRecipe:
    """Return the recipe that runs this stage alone, into its own folder."""
    config = recipe.model_copy(deep=True)
    config.stages, config.output, config.seed = (stage,), str(folder), seed
    config.teacher.members = 1
    teaching = config.method.teaching
    if stage == "distilled" and teaching.kind != "ema":
        teaching.runs = [str(path) for path in teacher_folders(recipe)]
        if teaching.kind == "cached":
            teaching.cache = str(cache_folder(recipe))
    if recipe.data.name == "phantom" and recipe.data.root is None:
        config.data.root = str(recipe.output_folder / "data")
    return config


def cache_folder(recipe: VqaRecipe) -> Path:
    """Return where the teacher's cache of a recipe lies."""
    return Path(recipe.method.teaching.cache or recipe.output_folder / "teacher-cache")


def teacher_folders(recipe: VqaRecipe) -> list[Path]:
    """Return the folders of the runs that teach."""
    if recipe.method.teaching.runs:
        return [Path(run) for run in recipe.method.teaching.runs]
    names = ["teacher", *(f"teacher-{number}" for number in range(2, recipe.teacher.members + 1))]
    return [recipe.output_folder / name for name in names]


def earlier_runs(recipe: VqaRecipe) -> dict[str, Path]:
    """Return the runs of before whose weights this recipe starts from or is taught by, by the key that names them."""
    stages, found = set(recipe.stages), {}
    if "teacher" in stages and recipe.teacher.model.init:
        found["teacher.model.init"] = Path(recipe.teacher.model.init)
    if stages & {"baseline", "distilled"} and recipe.student.model.init:
        found["student.model.init"] = Path(recipe.student.model.init)
    if "distilled" in stages:
        runs = recipe.method.teaching.runs
        found |= {f"method.teaching.runs[{number}]": Path(run) for number, run in enumerate(runs)}
    return found


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return the results that a stage wrote, or None."""
    path = folder / "results.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def train_stage(
    name: Stage,
    folder: Path,
    room: Classroom,
    config: RunModelConfig,
    *,
    seed: int,
    title: str | None = None,
    method: VqaMethod | None = None,
    teacher: Teacher | None = None,
    teacher_config: Any = None,
    ema: bool = False,
    words: Tensor | None = None,
) -> dict[str, Any]:
    """Train a model into `folder` (or go on where it was stopped), evaluate it and return its results.

    `title` names one of several teachers. Without `method` the model learns from labels alone. A finished stage is
    read back, not trained again. `words` (V, E) are word embeddings for the model to start from.
    """
    from preceptor.vqa.model_card import model_card
    from preceptor.vqa.teachers import ema_teacher

    recipe, data = room.recipe, room.data
    state = processes()
    if recipe.resume == "never" and state.is_main_process:
        start_afresh(folder)
    state.wait_for_everyone()
    bundle = room.bundle(config, seed)
    if words is not None:
        inherit_token_embeddings(bundle.model, words)
    if ema:
        teacher, teacher_config = ema_teacher(bundle.model, recipe.method).to(state.device), bundle.model.config
    task = recipe.method.build_task(
        bundle.model, pretrained=bundle.pretrained, teacher=teacher, teacher_config=teacher_config, seed=seed
    )
    train = room.training_examples(seed, crossed=teacher is not None)
    if recipe.data.augment.repeats:
        remember_images(bundle.model)
    held_out = VqaExamples(
        data.split("validation"), bundle.tokenizer, bundle.vocabulary, bundle.preprocessing, recipe.data
    )

    def validate(task: Task) -> dict[str, float]:
        return {"score": accuracy(held_out, predict_part(bundle.model, held_out), bundle.vocabulary.normaliser)}

    earlier = [config.model.init] if config.model.init else []
    if teacher is not None and not ema:
        earlier += [str(run) for run in teacher_folders(recipe)]
    with state.main_process_first():
        known = [seen.read_provenance(model_folder(Path(run))) or [] for run in earlier]
        sources = seen.merge([room.training_images, *(source for run in known for source in run)])

    def export(task: Task, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        bundle.save(target)
        seen.write_provenance(target, sources)

    def start() -> None:
        write_text(folder / "recipe.yaml", dump_recipe(stage_recipe(recipe, name, folder, seed)))

    taught_by = None if teacher is None or ema else teacher.fingerprint  # a moving average changes as it goes
    job = FitArguments(
        folder=folder,
        loader=lambda batches: train.loader(batches, recipe.data.workers),
        samples=len(train),
        epoch_samples=len(data.split("train")),
        validate=validate,
        export=export,
        identity=room.identity(config, seed, method, taught_by),
        differences=differences,
        seed=seed,
        skip_limit=recipe.data.skip_limit,
        resume=recipe.resume == "auto",
        title=title or name,
        start=start,
    )
    progress = fit(task, job, config.train)
    weights = sha256(folder / "model" / "model.safetensors")
    finished = read_results(folder)
    if finished and (finished.get("weights_sha256"), finished["data"]["sha256"]) == (weights, data.fingerprint()):
        return finished
    best = VqaBundle.load(folder / "model")
    best.model.to(state.device)
    results, rows = evaluate_bundle(best, data, recipe.data)
    results = {"stage": title or name, **results}
    results |= {
        "provenance": bundle.provenance,
        "parameters": best.model.parameter_count(),
        "latency_ms": latency_ms(best, data, recipe.data, recipe.report.latency_questions),
        "latency": f"model alone, one question at a time, {best.model.dtype}, median".replace("torch.", ""),
        "seed": seed,
        "weights_sha256": weights,
        "versions": versions(*QUESTIONS),
        "machine": machine(),
        "data": {
            "name": data.name,
            "variant": data.variant,
            "sha256": data.fingerprint(),
            "test_sha256": data.fingerprint("test"),
            **{split: len(data.split(split)) for split in ("train", "validation", "test")},
            **(
                {"unlabelled": len(data.split("unlabelled"))}
                if teacher is not None and data.split("unlabelled")
                else {}
            ),
        },
        "training": progress.summary(config.train.batch_size),
    }
    if state.is_main_process:
        write_predictions(folder, rows)
        write_text(folder / "model" / "README.md", model_card(results, recipe))
        write_text(folder / "results.json", json.dumps(results, indent=1))
    state.wait_for_everyone()
    return results
