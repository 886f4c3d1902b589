"""Grounded visual question answering as an experiment: its stages, models, scores and files."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Self

from preceptor.config import TrainConfig
from preceptor.data import provenance
from preceptor.data.findings import Finding
from preceptor.data.grounding.check import check_dialogues
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.distributed import processes
from preceptor.errors import UserError, nearest
from preceptor.files import scratch_folder, sha256
from preceptor.grounding import metrics
from preceptor.grounding.clinkd import ClinkdConfig
from preceptor.grounding.config import STAGE_ADDS, GroundingRecipe, VlmRunConfig
from preceptor.grounding.context import RunContext, guidance_of
from preceptor.grounding.data import describe_dialogues, read_recipe_dialogues
from preceptor.grounding.dataset import DialogueExamples, TrainingExample
from preceptor.grounding.evaluate import (
    answer_greedily,
    answer_selectively,
    asker,
    mean_loss,
    prediction_row,
    scored_turns,
    with_groups,
)
from preceptor.grounding.figures import write_figures
from preceptor.grounding.image_reliance import OtherImages, reliance_by_task
from preceptor.grounding.memory import announce, available, estimate_memory, load_model_config, sentence, warning
from preceptor.grounding.metrics import DESCRIBES, score_rows
from preceptor.grounding.model import GUIDANCE_FILE, GroundedVlm
from preceptor.grounding.model_card import model_card
from preceptor.grounding.reflection import Correction
from preceptor.grounding.reflection_round import Ask, Reflector, correction_dialogue
from preceptor.grounding.report import write_report
from preceptor.grounding.teacher_cache import cache_teacher
from preceptor.grounding.teachers import (
    CACHE,
    STORE,
    OnlineTokenTeacher,
    corrector,
    load_teacher,
    pseudo_labelled_examples,
    store_findings,
    summary,
    token_teacher,
    uses_store,
)
from preceptor.grounding.vision_init import find_dinov2
from preceptor.hub import find_pretrained, public_name
from preceptor.pipeline.experiment import SPLITS, Evaluation, Experiment, Stage, Training
from preceptor.pipeline.image_reliance import IMAGES
from preceptor.pipeline.run_dir import model_folder
from preceptor.pipeline.speed import SpeedTest
from preceptor.scores import Metrics
from preceptor.task import Task, Teacher

PRIOR = "prior"
"""Folder of the training phase on pseudo-labels; all stages that distil start from its model."""


@dataclass
class TrainingPhase:
    """One phase of a stage's training: its examples, its initial weights and its steps.

    Attributes:
        steps: number of steps.
        share: `method.pseudo_labels.share`, or the rest of it for the data set's answers.
        epoch: number of dialogues in an epoch; the labelled ones for every student, whatever the phase draws from.
        prior: whether the answers are pseudo-labels, which enter by the curriculum.
        teacher_on_device: configuration of a teacher that is on the device during training, for the memory estimate.
    """

    name: str
    folder: Path
    source: str
    examples: Sequence[TrainingExample]
    steps: int
    share: float
    epoch: int
    prior: bool = False
    teacher: Teacher | None = None
    corrector: Ask | None = None
    teacher_on_device: Any = None


def phase_steps(train: TrainConfig, epoch: int, share: float) -> tuple[int, int]:
    """Return the number of steps on pseudo-labels and on the data set's answers; `share` does not change their sum.

    Args:
        train: settings with the number of epochs.
        epoch: number of dialogues in an epoch.
        share: fraction of the steps that train on pseudo-labels.
    """
    total = max(1, round(train.epochs * epoch / train.batch_size))
    prior = round(share * total)
    return prior, total - prior


class GroundingExperiment(Experiment):
    """Dialogues about images with boxes, by a Qwen-VL model with guided rotary positions."""

    task = "grounding"
    metrics: ClassVar[Metrics] = metrics
    validation_metric = "likelihood per answer token"
    packages = ("transformers", "tokenizers", "pillow")
    other_images = IMAGES[1:]
    shared_folders = (STORE, CACHE, PRIOR, "new-teacher", "new-student")
    recipe: GroundingRecipe
    data: GroundingDataset

    @classmethod
    def read_data(cls, recipe: GroundingRecipe, needed: tuple[Split, ...] = SPLITS) -> GroundingDataset:
        # An evaluation does not learn, so the recipe of a stage without pseudo-labels reads the data of its run.
        unanswered = recipe.learns_from_pseudo_labels or "train" not in needed
        return read_recipe_dialogues(recipe.data, recipe.output_folder / "data", needed=needed, unanswered=unanswered)

    @cached_property
    def context(self) -> RunContext:
        return RunContext(self.recipe, self.data)

    # Training

    def require_checkpoints(self) -> None:
        recipe = self.recipe
        sources = {"student.model.source": recipe.student.model.source, "method.teaching_run": self._teaching_run()}
        if "teacher" in recipe.stages:
            sources["teacher.model.source"] = recipe.teacher.model.source
        for key, source in sources.items():
            if source is None or (key == "method.teaching_run" and Path(source).is_dir()):
                continue
            if find_pretrained(source, allow_downloads=recipe.allow_downloads) is None:
                raise UserError(
                    f"{key}: {source} is neither a folder with a config.json nor in the local hub cache; give the "
                    "folder of a Qwen-VL checkpoint, or set allow_downloads=true"
                )
        for model in [recipe.student.model] + [recipe.teacher.model] * ("teacher" in recipe.stages):
            if model.source is None and model.new.vision is not None:
                find_dinov2(model.new.vision)
        if recipe.method.selection.candidates > 1 or (
            "clinkd" in recipe.stages and recipe.method.reflection.rounds > 0
        ):
            assert self.context.similarity is not None  # refuses a model that does not exist
        self._require_same_box_format()
        self._require_usable_labels()

    def _require_usable_labels(self) -> None:
        """Raise UserError if the labels in `method.pseudo_labels.store` cannot be used."""
        found = store_findings(self.context) if uses_store(self.recipe) else []
        errors = [finding.reason for finding in found if finding.severity == "error"]
        if errors:
            raise UserError(errors[0])

    def _require_same_box_format(self) -> None:
        """Raise UserError if a student learns tokens of a teacher that writes boxes in another format."""
        recipe, method = self.recipe, self.recipe.method
        learns = method.pseudo_labels.share > 0 and method.pseudo_labels.logits != "none"
        if not learns or {"distilled", "clinkd"}.isdisjoint(recipe.stages):
            return
        run = self._teaching_run()
        source = str(model_folder(Path(run))) if run and Path(run).is_dir() else run
        teacher = self.context.box_format(recipe.teacher.model, source)
        student = self.context.box_format(recipe.student.model)
        if teacher != student:
            raise UserError(
                f"the teacher writes boxes in the format {teacher} and the student in {student}, so that their tokens "
                f"differ; set student.model.box_format={teacher}, or method.pseudo_labels.logits=none"
            )

    def trainings(self, stage: Stage, folder: Path) -> Iterator[Training]:
        recipe, context, data = self.recipe, self.context, self.data
        method = recipe.method.for_stage(stage.kind)
        role = "teacher" if stage.kind == "teacher" else "student"
        config = recipe.teacher if role == "teacher" else recipe.student
        with processes().main_process_first():
            source = context.source(config.model, role)
        separate = data.split("teacher") if role == "teacher" else []
        epoch = len(separate) or len(data.split("train"))
        share = method.pseudo_labels.share
        prior_steps, main_steps = phase_steps(config.train, epoch, share)
        if (prior_steps > 0, main_steps > 0) != (share > 0, share < 1):
            self.warn(
                f"method.pseudo_labels.share={share} of the {prior_steps + main_steps} steps of the stage {stage.name} "
                f"is rounded to {prior_steps} steps"
            )
        if not prior_steps:
            method.pseudo_labels.share = share = 0.0
        teacher = load_teacher(context) if method.needs_teacher(stage.kind) else None
        on_device = teacher.config if teacher is not None and recipe.method.teacher_offload == "none" else None
        pseudo_labels: dict[str, Any] | None = None
        if prior_steps:
            examples = pseudo_labelled_examples(context, teacher)
            pseudo_labels = summary(context, examples, teacher)
            # It does not depend on what a stage adds, so it is trained once for all of them. If nothing follows, its
            # model is that of the stage.
            prior_method = recipe.method.for_stage("distilled")
            tokens = None
            if teacher is not None:
                student = context.load(source, config.model, None, recipe.seed)
                tokens = token_teacher(context, teacher, student, examples)
            prior = TrainingPhase(
                PRIOR,
                recipe.output_folder / PRIOR if main_steps else folder,
                source,
                examples,
                prior_steps,
                share,
                epoch,
                prior=True,
                teacher=tokens,
                teacher_on_device=tokens.teacher.config if isinstance(tokens, OnlineTokenTeacher) else on_device,
            )
            yield self._training(prior, config, prior_method, pseudo_labels=pseudo_labels)
            source = str(prior.folder / "model")
        if not main_steps:
            return
        main = TrainingPhase(
            stage.name,
            folder,
            source,
            [TrainingExample(row) for row in separate or data.split("train")],
            main_steps,
            1 - share,
            epoch,
            corrector=corrector(context, teacher) if teacher is not None else None,
            teacher_on_device=on_device,
        )
        yield self._training(main, config, method, pseudo_labels=pseudo_labels)

    def _training(
        self,
        phase: TrainingPhase,
        config: VlmRunConfig,
        method: ClinkdConfig,
        *,
        pseudo_labels: dict[str, Any] | None = None,
    ) -> Training:
        recipe, context, data = self.recipe, self.context, self.data
        # A table that the phase on pseudo-labels has trained is trained further.
        learned = method.guidance.learnable and Path(phase.source).parent == recipe.output_folder / PRIOR
        vlm = context.load(phase.source, config.model, None if learned else guidance_of(method), recipe.seed)
        examples = DialogueExamples(phase.examples, vlm.encoder, skip_broken=recipe.data.broken == "skip")
        questions = scored_turns(data.split("train"), recipe.data.tasks)
        asked = {(row.id, row.turns[-1][0]): row for row in questions}

        def corrections_batch(corrections: Sequence[Correction]) -> Any:
            rows = [
                TrainingExample(correction_dialogue(asked[c.id, c.question], c, method.reflection.form), last=True)
                for c in corrections
            ]
            return examples.collate([examples.read(row) for row in rows])

        reflector = None
        if method.reflection.rounds > 0:
            student = asker(vlm, method.reflection.max_new_tokens, recipe.answers.batch_size)
            corrects = student if method.reflection.corrector == "student" else phase.corrector
            readable = scored_turns(context.readable("train"), recipe.data.tasks)
            reflector = Reflector(student, corrects, readable, method.reflection, context.similarity, recipe.seed)
        task = method.build_task(
            vlm,
            pseudo_labels=phase.prior,
            teacher=phase.teacher,
            reflect=reflector.round if reflector else None,
            collate=corrections_batch,
            seed=recipe.seed,
        )
        held_out = DialogueExamples(
            [TrainingExample(row) for row in data.split("validation")],
            vlm.encoder,
            skip_broken=recipe.data.broken == "skip",
        )

        def validate(_: Task) -> dict[str, float]:
            loss = mean_loss(vlm, held_out, recipe.answers.batch_size)
            return {"score": math.exp(-loss), "loss": loss}

        def extras() -> dict[str, Any]:
            # That of the exported model: the weights in memory are those of the last step, and may be sharded.
            guidance = json.loads((phase.folder / "model" / GUIDANCE_FILE).read_text("utf-8"))
            found: dict[str, Any] = {
                "trained_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
                "provenance": {"guidance": guidance, "training": config.model.training},
            }
            if config.model.source is None and config.model.new.vision is not None:
                found["provenance"]["vision"] = f"DINOv2 of {public_name(config.model.new.vision)}"
            if pseudo_labels is not None:
                found["pseudo_labels"] = pseudo_labels
            if task.buffer.rounds:
                kept = task.buffer.corrections[-20:]
                rows = [asdict(c) | {"truth": asked[c.id, c.question].turns[-1][1]} for c in kept]
                found["reflection"] = {"rounds": task.buffer.rounds, "examples": rows}
            return found

        dialogues = [e.dialogue for e in phase.examples if e.dialogue.id not in context.broken_ids]
        announce(phase.name, recipe, config, vlm.config, vlm.encoder, dialogues, phase.teacher_on_device)
        return Training(
            folder=phase.folder,
            title=phase.name,
            task=task,
            config=config.train.model_copy(update={"epochs": phase.steps * config.train.batch_size / phase.epoch}),
            loader=lambda batches: examples.loader(batches, recipe.data.workers),
            samples=len(examples),
            epoch_samples=phase.epoch,
            validate=validate,
            export=vlm.save,
            resume_config=self._resume_config(phase, config, method),
            summary=extras,
        )

    def _resume_config(self, phase: TrainingPhase, config: VlmRunConfig, method: ClinkdConfig) -> dict[str, Any]:
        recipe = self.recipe
        rows = [[row.dialogue.id, row.dialogue.turns, row.confidence, row.margin] for row in phase.examples]
        weights = Path(phase.source) / "model.safetensors"
        found = {
            "data": recipe.data.resume_settings(),
            "seed": recipe.seed,
            "rows": hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest(),
            "model": config.model.model_dump(mode="json", exclude={"source"}),
            "start": sha256(weights) if weights.is_file() else phase.source,
            "train": config.train.model_dump(mode="json", exclude={"keep_checkpoints", "log_every", "trackers"}),
            "share": phase.share,
            "method": method.resume_settings(),
            "teacher": phase.teacher.fingerprint if phase.teacher else None,
        }
        return json.loads(json.dumps(found))

    def stage_recipe(self, stage: Stage, folder: Path) -> GroundingRecipe:
        recipe, root = self.recipe.model_copy(deep=True), self.recipe.output_folder
        recipe.stages, recipe.output, recipe.seed = (stage.kind,), str(folder), stage.seed  # type: ignore[assignment]
        if recipe.data.name == "phantom-grounding" and recipe.data.root is None:
            recipe.data.root = str(root / "data")
        role, config = ("teacher", recipe.teacher) if stage.kind == "teacher" else ("student", recipe.student)
        if config.model.source is None:
            config.model.source = str(root / f"new-{role}")
        if self.has_teacher(stage.kind):
            recipe.method.teaching_run = self._teaching_run() or str(root / "teacher")
            if recipe.method.pseudo_labels.share > 0 and recipe.method.pseudo_labels.store is None:
                recipe.method.pseudo_labels.store = str(root / STORE)
        return recipe

    def teaching_folders(self, kind: str) -> list[Path]:
        return [Path(self._teaching_run() or self.recipe.output_folder / "teacher")] if self.has_teacher(kind) else []

    def validation(self, folder: Path, training: dict[str, Any]) -> dict[str, Any]:
        """A likelihood per token is comparable only between models with one tokenizer."""
        found = super().validation(folder, training)
        tokenizer = folder / "model" / "tokenizer.json"
        if not tokenizer.is_file():
            return found | {"score": None}
        return found | {"metric": f"{self.validation_metric}, tokenizer {sha256(tokenizer)[:8]}"}

    def _teaching_run(self) -> str | None:
        return self.recipe.method.teaching_run

    def starting_points(self, kinds: Collection[str]) -> dict[str, Path]:
        recipe, found = self.recipe, {}
        sources = {}
        if "teacher" in kinds:
            sources["teacher.model.source"] = recipe.teacher.model.source
        if not {"teacher"}.issuperset(kinds):
            sources["student.model.source"] = recipe.student.model.source
        if any(self.has_teacher(kind) for kind in kinds):
            sources["method.teaching_run"] = self._teaching_run()
        for key, source in sources.items():
            if source is not None and Path(source).is_dir():
                found[key] = Path(source)
        return found

    def has_teacher(self, kind: str) -> bool:
        method = self.recipe.method.for_stage(kind)
        return method.reflection.needs_teacher or method.pseudo_labels.share > 0

    # Provenance

    def images(self, split: Split) -> dict[str, Sequence[Path]]:
        return {row.id: row.images for row in self.data.split(split)}

    def hash_images(self, paths: Sequence[Path]) -> dict[Path, tuple[str, str]]:
        config = self.recipe.data
        return provenance.hash_images(
            paths,
            self.recipe.output_folder / provenance.CACHE,
            max_bytes=config.max_image_bytes,
            max_pixels=config.max_image_pixels,
        )

    # Evaluation

    def load(self, folder: Path) -> GroundedVlm:
        recipe = self.recipe
        # A recipe of one stage writes to the output folder itself, one of several to a folder per stage.
        is_teacher = recipe.stages == ("teacher",) or folder.parent == recipe.output_folder / "teacher"
        config = (recipe.teacher if is_teacher else recipe.student).model
        vlm = GroundedVlm.load(
            folder,
            max_pixels=config.max_pixels,
            max_length=config.max_length,
            modality_rows=self.context.modality_rows,
            **recipe.data.image_limits,
        )
        return vlm.requires_grad_(False).to(processes().device).eval()

    def evaluate(self, model: GroundedVlm, *, protocol: str | None = None, stage: Stage | None = None) -> Evaluation:
        recipe, data = self.recipe, self.data
        ids = {f"{data.name}/{data.variant}/{name}": name for name in DESCRIBES}
        if protocol is not None:
            if protocol not in ids:
                raise UserError(f"protocol {protocol!r} is not known{nearest(protocol, ids)}")
            ids = {protocol: ids[protocol]}
        test = self._questions()
        unreadable = [row for row in data.split("test") if row.id in self.context.broken_ids]
        empty = [prediction_row(row, "") for row in scored_turns(unreadable, recipe.data.tasks)]
        rows, seconds = answer_greedily(model, test, recipe.answers)
        rows = with_groups(rows + empty, data.split("test"))
        found = Evaluation(
            rows=dict.fromkeys(ids, rows),
            scores={id: score_rows(rows, name) for id, name in ids.items()},
            describes={id: DESCRIBES[name] for id, name in ids.items()},
            extras={"adds": STAGE_ADDS[stage.kind]} if stage else {},
        )
        selection = recipe.method.selection
        if stage is not None and self._is_last(stage) and selection.candidates > 1:
            chosen, slower = answer_selectively(
                model, test, recipe.answers, selection, self.context.similarity, recipe.seed
            )
            chosen = with_groups(chosen + empty, data.split("test"))
            found.extras["selection"] = {
                "candidates": selection.candidates,
                "temperature": selection.temperature,
                "seconds_per_answer": slower,
                "greedy_seconds_per_answer": seconds,
                "protocols": {id: score_rows(chosen, name) for id, name in ids.items()},
            }
            found.rows |= {f"{id}/selected": chosen for id in ids}
        return found

    def _questions(self) -> list[Dialogue]:
        """Return the questions of the test split whose images can be read, each with its history."""
        return scored_turns(self.context.readable("test"), self.recipe.data.tasks)

    def _is_last(self, stage: Stage) -> bool:
        return stage.kind == self.recipe.stages[-1]

    def evaluation_settings(self, stage: Stage | None = None) -> dict[str, Any]:
        method = self.recipe.method
        found: dict[str, Any] = {"answers": self.recipe.answers.model_dump(mode="json", exclude={"batch_size"})}
        if stage is not None and self._is_last(stage):
            found["method"] = method.model_dump(mode="json", include={"selection", "similarity"})
        return found

    def image_reliance(self, model: GroundedVlm, images: Sequence[str], evaluation: Evaluation) -> dict[str, Any]:
        test, encoder = self._questions(), model.encoder
        rows = {"real": next(iter(evaluation.rows.values()))}
        known = encoder.modality_rows
        with scratch_folder() as scratch:
            other = OtherImages(scratch, encoder.image_processor.image_mean, self.recipe.data)

            def modalities(dialogue: Dialogue) -> Any:
                """Return those of the files that the images were made from."""
                assert known is not None
                return known(replace(dialogue, images=tuple(other.sources[image] for image in dialogue.images)))

            try:
                encoder.modality_rows = modalities if known is not None else None
                unreadable = [row for row in rows["real"] if row["id"] in self.context.broken_ids]
                for kind in images:
                    answered, _ = answer_greedily(model, other.dialogues(kind, test), self.recipe.answers)
                    rows[kind] = with_groups([*answered, *unreadable], self.data.split("test"))
            finally:
                encoder.modality_rows = known
        return {id: reliance_by_task(rows, id.rpartition("/")[2]) for id in evaluation.rows}

    def describe_data(self, stage: Stage | None = None) -> dict[str, Any]:
        return describe_dialogues(self.data) | {"test_files_sha256": self.files_sha256(("test",))}

    def parameter_count(self, model: GroundedVlm) -> int:
        return sum(parameter.numel() for parameter in model.base.parameters())

    def speed_test(self, model: GroundedVlm) -> SpeedTest:
        answers = self.recipe.answers
        rows = self._questions()[: answers.batch_size]
        few = rows[:4]

        def generate(dialogues: Sequence[Dialogue], batch_size: int) -> None:
            model.forget_images()  # an answer about a new image is timed
            model.generate(dialogues, max_new_tokens=answers.max_new_tokens, batch_size=batch_size)

        return SpeedTest(
            "answer", lambda: generate(few, 1), len(few), lambda: generate(rows, answers.batch_size), len(rows)
        )

    # Files

    def write_figures(self, folder: Path, model: GroundedVlm, evaluation: Evaluation) -> None:
        write_figures(folder, self.data, self.recipe, evaluation.rows)

    def model_card(self, results: dict[str, Any]) -> str:
        return model_card(results, self.recipe)

    def write_report(self, run: Path) -> Path:
        return write_report(run)

    # Commands beside training

    @classmethod
    def for_check(cls, recipe: GroundingRecipe) -> Self:
        data = recipe.data
        if data.boxes == "refuse":  # read on, so that every faulty box is listed
            data = data.model_copy(update={"boxes": "repair"})
        learns = recipe.learns_from_pseudo_labels
        return cls(recipe, read_recipe_dialogues(data, recipe.output_folder / "data", needed=(), unanswered=learns))

    def findings(self) -> list[Finding]:
        config = self.recipe.data
        found = check_dialogues(
            self.data, config.boxes, max_bytes=config.max_image_bytes, max_pixels=config.max_image_pixels
        )
        if uses_store(self.recipe):
            found += store_findings(self.context)
        if self.data.split("train") and not any(finding.severity == "error" for finding in found):
            notes, doubts = self._check_memory()
            self.data.notes += notes
            found += [Finding((), None, doubt, "warning") for doubt in doubts]
        return found

    def _check_memory(self) -> tuple[list[str], list[str]]:
        """Return the memory that each model's training needs on a device, and warnings about it."""
        recipe, rows = self.recipe, self.data.split("train")
        teacher: Any = None
        notes: list[str] = []
        doubts: list[str] = []
        distils = not {"distilled", "clinkd"}.isdisjoint(recipe.stages)
        stays = recipe.method.teacher_offload == "none" or recipe.method.pseudo_labels.logits == "online"
        with scratch_folder() as scratch:
            context = RunContext(recipe.model_copy(update={"output": str(scratch)}), self.data)
            for role, config in (("teacher", recipe.teacher), ("student", recipe.student)):
                run = self._teaching_run() if role == "teacher" else None
                if role == "teacher" and "teacher" not in recipe.stages and not (run and distils):
                    continue
                try:
                    source = str(model_folder(Path(run))) if run and Path(run).is_dir() else run
                    source = source or context.source(config.model, role)
                    model, encoder = load_model_config(config.model, source, recipe.allow_downloads, recipe.data)
                    if role == "student" or "teacher" in recipe.stages:
                        on_device = teacher if distils and stays else None
                        parts = estimate_memory(config, model, encoder, rows, on_device)
                        notes.append(sentence(f"memory to train the {role}", parts, available()))
                        doubt = warning(f"training the {role}", parts, available(), config, recipe)
                        doubts += [doubt] if doubt else []
                except UserError as error:
                    doubts.append(f"the memory that the {role} needs is not estimated: {error}")
                    continue
                teacher = model if role == "teacher" else teacher
        return notes, doubts

    @classmethod
    def cache(cls, recipe: GroundingRecipe, verify: float) -> dict[str, Any]:
        return cache_teacher(recipe, verify)


EXPERIMENT = GroundingExperiment
