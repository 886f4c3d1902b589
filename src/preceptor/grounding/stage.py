"""One stage of a ClinKD recipe: a vision-language model trained, evaluated and written as a run folder."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from preceptor.data.types import Dialogue, DialogueData
from preceptor.distill.chunked_kl import chunked_cross_entropy
from preceptor.distributed import broadcast_from_main, processes
from preceptor.environment import QUESTIONS, machine, versions
from preceptor.files import json_lines, sha256, write_text
from preceptor.grounding.clinkd import ClinkdConfig
from preceptor.grounding.config import STAGE_ADDS, GroundingRecipe, VlmConfig, VlmRunConfig, VlmStage
from preceptor.grounding.data import describe_dialogues
from preceptor.grounding.dataset import DialogueExamples, TrainingExample
from preceptor.grounding.dialogue_encoder import ModalityRows
from preceptor.grounding.evaluate import answer_greedily, answer_selectively
from preceptor.grounding.guided_rope import MODALITIES, Guidance
from preceptor.grounding.memory import announce
from preceptor.grounding.metrics import DESCRIBES, score_rows
from preceptor.grounding.modality_clip import ModalityClip, modality_probabilities
from preceptor.grounding.model import GroundedVlm, LoraSettings
from preceptor.grounding.reflection import Correction
from preceptor.grounding.reflection_round import Ask, Reflector, correction_dialogue
from preceptor.grounding.selection import Similarity
from preceptor.grounding.sentence_similarity import choose_similarity
from preceptor.grounding.task import ClinkdTask, WordTeacher
from preceptor.recipe import differences, dump_recipe
from preceptor.task import Task
from preceptor.teachers.online import weights_fingerprint
from preceptor.training.loop import FitArguments, TrainState, fit

PROTOCOLS = ("birdeval", "strict")


@dataclass
class Seminar:
    """What all stages of a recipe share: data, how texts are compared, the checkpoints that models start from."""

    recipe: GroundingRecipe
    data: DialogueData

    @cached_property
    def similarity(self) -> Similarity:
        return choose_similarity(self.recipe.method.similarity, allow_downloads=self.recipe.allow_downloads)

    @cached_property
    def modality_rows(self) -> ModalityRows | None:
        """What says which modality an image is, where a CLIP-like model is named; else the data set's own word."""
        scorer = self.recipe.method.guidance.scorer
        if self.recipe.method.guidance.kind != "clip" or scorer is None:
            return None
        clip = ModalityClip.load(scorer, allow_downloads=self.recipe.allow_downloads)
        paths = list(dict.fromkeys(image for row in self.data.dialogues for image in row.images))
        with processes().main_process_first():
            found = modality_probabilities(paths, clip, file=self.recipe.output_folder / "modalities.json")
        known = dict(zip(paths, found, strict=True))
        return lambda dialogue: torch.stack([known[image] for image in dialogue.images])

    def source(self, config: VlmConfig, name: str) -> str:
        """Return the checkpoint that a model starts from; a new one is made in the output folder where none is named.

        Its words are those of the training texts, the same for teacher and students.
        """
        if config.source is not None:
            return config.source
        from preceptor.grounding.new_vlm import new_vlm

        folder = self.recipe.output_folder / f"new-{name}"
        if not (folder / "preprocessor_config.json").is_file():
            shutil.rmtree(folder, ignore_errors=True)
            new = config.new
            new_vlm(
                folder,
                corpus(self.data),
                family=new.family,
                size=new.size,
                seed=self.recipe.seed,
                vocabulary_size=new.vocabulary_size,
                max_pixels=config.max_pixels,
                language_model=new.language_model,
            )
        return str(folder)

    def load(self, source: str, config: VlmConfig, guidance: Guidance | None, seed: int) -> GroundedVlm:
        """Return a model to train. New adapters are drawn from `seed`."""
        half = config.training == "lora" and config.lora.base == "bfloat16"
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            vlm = GroundedVlm.load(
                source,
                training=config.training,
                guidance=guidance,
                max_pixels=config.max_pixels,
                lora=LoraSettings(config.lora.rank, config.lora.alpha, config.lora.dropout),
                cut_off=config.cut_off,
                dtype=torch.bfloat16 if half else torch.float32,
                allow_downloads=self.recipe.allow_downloads,
                modality_rows=self.modality_rows,
            )
        if config.gradient_checkpointing:
            vlm.checkpoint_activations()
        return vlm


def corpus(data: DialogueData) -> list[str]:
    """Return the texts of the training parts, in their order: what new words are learnt from."""
    return [text for row in data.dialogues if row.split in ("train", "teacher") for turn in row.turns for text in turn]


def guidance_of(config: ClinkdConfig) -> Guidance:
    """Return the guidance that a recipe asks for."""
    g = config.guidance
    if g.kind == "none":
        return Guidance("none")
    plain = (g.gap, g.row_step, g.column_step)
    if g.kind == "fixed":
        return Guidance("fixed", gap=g.gap, row_step=g.row_step, column_step=g.column_step)
    return Guidance("clip", table=[g.table.get(name, plain) for name in MODALITIES], learnable=g.learnable)


@dataclass
class Part:
    """One part of a stage's training: what is drawn from, for which share of the steps, and what it starts from."""

    name: str
    folder: Path
    source: str
    lessons: Sequence[TrainingExample]
    share: float
    epoch: int
    """Dialogues that an epoch is: for all students as many as have answers, whatever a part draws from."""
    prior: bool = False
    teacher: WordTeacher | None = None
    corrector: Ask | None = None
    beside: Any = None
    """Configuration of a teacher that is on the device while the part is trained."""


def train_part(
    part: Part, room: Seminar, config: VlmRunConfig, method: ClinkdConfig
) -> tuple[GroundedVlm, ClinkdTask, TrainState]:
    """Train a part into its folder, or go on where it was stopped; return the model that was kept."""
    recipe, data = room.recipe, room.data
    train = config.train.model_copy(update={"epochs": config.train.epochs * part.share})
    guidance = guidance_of(method)
    vlm = room.load(part.source, config.model, guidance, recipe.seed)
    examples = DialogueExamples(part.lessons, vlm.encoder)
    by_id = {row.id: row for row in data.dialogues}

    def lessons(corrections: Sequence[Correction]) -> Any:
        taught = [
            TrainingExample(correction_dialogue(by_id[c.id], c, method.reflection.form), last=True) for c in corrections
        ]
        return examples.collate([examples.read(one) for one in taught])

    reflector = None
    if part.corrector is not None and method.reflection.rounds > 0:
        rows = data.split("train")
        own = asker(vlm, method.reflection.max_new_tokens, recipe.answers.batch_size)
        corrector = own if method.reflection.corrector == "student" else part.corrector
        reflector = Reflector(own, corrector, rows, method.reflection, room.similarity, recipe.seed)
    task = method.build_task(
        vlm,
        pseudo_labels=part.prior,
        teacher=part.teacher,
        reflect=reflector.round if reflector else None,
        collate=lessons,
        seed=recipe.seed,
    )
    held_out = DialogueExamples([TrainingExample(row) for row in data.split("validation")], vlm.encoder)

    def validate(_: Task) -> dict[str, float]:
        loss = mean_loss(vlm, held_out, recipe.answers.batch_size)
        return {"score": math.exp(-loss), "loss": loss}

    def export(_: Task, target: Path) -> None:
        shutil.rmtree(target, ignore_errors=True)
        vlm.save(target)

    def start() -> None:
        write_text(part.folder / "recipe.yaml", dump_recipe(recipe))

    announce(part.name, recipe, config, vlm.config, vlm.encoder, [one.dialogue for one in part.lessons], part.beside)
    job = FitArguments(
        folder=part.folder,
        loader=lambda batches: examples.loader(batches, recipe.data.workers),
        samples=len(examples),
        epoch_samples=part.epoch,
        validate=validate,
        export=export,
        identity=identity(recipe, part, config, method, examples),
        differences=differences,
        seed=recipe.seed,
        resume=recipe.resume == "auto",
        title=part.name,
        start=start,
    )
    progress = fit(task, job, train)
    kept = GroundedVlm.load(
        part.folder / "model",
        max_pixels=config.model.max_pixels,
        cut_off=config.model.cut_off,
        modality_rows=room.modality_rows,
    )
    return kept.to(processes().device), task, progress


@torch.inference_mode()
def mean_loss(vlm: GroundedVlm, examples: DialogueExamples, batch_size: int) -> float:
    """Return the mean cross-entropy of the answers' tokens, in nats."""
    training, total, count = vlm.training, 0.0, 0
    vlm.eval()
    for first in range(0, len(examples), batch_size):
        batch = examples.collate([examples[i] for i in range(first, min(first + batch_size, len(examples)))])
        states = vlm(batch.to(vlm.lm_head_weight.device).tensors)
        total += float(chunked_cross_entropy(states.hidden, vlm.lm_head_weight, states.targets))
        count += len(states.targets)
    vlm.train(training)
    return total / max(1, count)


def asker(vlm: GroundedVlm, max_new_tokens: int, batch_size: int) -> Ask:
    """Return what answers dialogues as `Reflector` asks."""

    def ask(rows: Sequence[Dialogue], candidates: int, temperature: float, seed: int) -> list[list[str]]:
        found = vlm.generate(
            rows,
            candidates=candidates,
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            batch_size=max(1, batch_size // candidates),
            seed=seed,
        )
        return [[answer.text for answer in answers] for answers in found]

    return ask


def identity(
    recipe: GroundingRecipe, part: Part, config: VlmRunConfig, method: ClinkdConfig, examples: DialogueExamples
) -> dict[str, Any]:
    """Return what must not change when a part is resumed."""
    data = recipe.data.model_dump(
        mode="json", exclude={"root", "images", "workers", "max_image_bytes", "max_image_pixels"}
    )
    rows = [[row.dialogue.id, row.dialogue.turns, row.confidence, row.margin] for row in examples.lessons]
    weights = Path(part.source) / "model.safetensors"
    return json.loads(
        json.dumps(
            {
                "data": data,
                "seed": recipe.seed,
                "rows": hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest(),
                "model": config.model.model_dump(mode="json", exclude={"source"}),
                "start": sha256(weights) if weights.is_file() else part.source,
                "train": config.train.model_dump(mode="json", exclude={"keep_checkpoints", "log_every", "trackers"}),
                "share": part.share,
                "method": method.stage_settings("clinkd"),
                "teacher": part.teacher.fingerprint if part.teacher else None,
            }
        )
    )


def finish_stage(
    name: VlmStage,
    folder: Path,
    room: Seminar,
    vlm: GroundedVlm,
    task: ClinkdTask,
    progress: TrainState,
    *,
    selective: bool,
    taught: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Answer the test part with the model that was kept, score it, write the run folder and return its results.

    With `selective` several answers are sampled too, and the choice among them is scored beside. `taught` is what
    results say of pseudo-labels.
    """
    recipe, data = room.recipe, room.data
    config = recipe.teacher if name == "teacher" else recipe.student
    weights = weights_fingerprint(vlm.base)
    file = folder / "results.json"
    finished = broadcast_from_main(json.loads(file.read_text("utf-8")) if file.is_file() else None)
    found = (weights, data.fingerprint())
    if finished is not None and (finished.get("weights_sha256"), finished["data"]["sha256"]) == found:
        return finished
    vlm.eval()
    test = data.split("test")
    rows, seconds = answer_greedily(vlm, test, recipe.answers)
    ids = {f"{data.name}/{data.variant}/{protocol}": protocol for protocol in PROTOCOLS}
    results: dict[str, Any] = {
        "stage": name,
        "adds": STAGE_ADDS[name],
        "protocols": {id: score_rows(rows, protocol) for id, protocol in ids.items()},
        "describes": {id: DESCRIBES[protocol] for id, protocol in ids.items()},
        "notes": list(data.notes),
        "data": describe_dialogues(data),
        "parameters": sum(parameter.numel() for parameter in vlm.base.parameters()),
        "trained_parameters": sum(p.numel() for p in task.parameters() if p.requires_grad),
        "latency_ms": round(1000 * seconds, 1),
        "latency": f"an answer, {recipe.answers.batch_size} dialogues at a time",
        "seed": recipe.seed,
        "weights_sha256": weights,
        "versions": versions(*QUESTIONS),
        "machine": machine(),
        "provenance": {"guidance": vlm.guidance.settings(), "training": config.model.training},
        "training": progress.summary(config.train.batch_size),
    }
    if taught is not None:
        results["pseudo_labels"] = taught
    if task.buffer.rounds:
        kept = task.buffer.corrections[-20:]
        by_id = {row.id: row for row in data.split("train")}
        examples = [asdict(c) | {"truth": by_id[c.id].turns[-1][1]} for c in kept]
        results["reflection"] = {"rounds": task.buffer.rounds, "examples": examples}
    written = dict.fromkeys(ids, rows)
    if selective and recipe.method.selection.candidates > 1:
        chosen, slower = answer_selectively(
            vlm, test, recipe.answers, recipe.method.selection, room.similarity, recipe.seed
        )
        results["selection"] = {
            "candidates": recipe.method.selection.candidates,
            "temperature": recipe.method.selection.temperature,
            "seconds_per_answer": slower,
            "greedy_seconds_per_answer": seconds,
            "protocols": {id: score_rows(chosen, protocol) for id, protocol in ids.items()},
        }
        written |= {f"{id}/selected": chosen for id in ids}
    if processes().is_main_process:
        from preceptor.grounding.model_card import grounding_card

        for id, lines in written.items():
            write_text(folder / "predictions" / f"{id.replace('/', '-')}.jsonl", json_lines(lines))
        write_text(folder / "model" / "README.md", grounding_card(results, recipe))
        write_text(folder / "results.json", json.dumps(results, indent=1))
    processes().wait_for_everyone()
    return results
