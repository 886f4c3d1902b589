"""The teacher of a recipe: its answers to training questions, and its token distributions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from preceptor.data.findings import Finding
from preceptor.data.types import Dialogue
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.grounding.answer_checks import FIXES, FIXES_OF_STAGE, most_common
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.context import RunContext
from preceptor.grounding.curriculum import Curriculum
from preceptor.grounding.dataset import TrainingExample
from preceptor.grounding.dialogue_encoder import IGNORED
from preceptor.grounding.evaluate import asker
from preceptor.grounding.label_page import PAGE
from preceptor.grounding.labeling import CheckSettings, teach
from preceptor.grounding.local_teacher import LocalTeacher, vlm_fingerprint
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.pseudo_labels import ContentHashes, PseudoLabels
from preceptor.grounding.reflection_round import Ask
from preceptor.grounding.topk_cache import TopKCache, TopKCacheKey, answers_key, topk_cache_key, write_topk_cache
from preceptor.grounding.vocabulary import require_same_vocabulary
from preceptor.pipeline.run_dir import model_folder
from preceptor.task import Batch, HiddenTeacher, Teacher, TeacherSignal

STORE, CACHE = "pseudo-labels", "teacher-cache"


def load_teacher(context: RunContext) -> GroundedVlm:
    """Return the frozen teacher: `method.teaching_run`, or the stage `teacher` of this recipe.

    With `method.teacher_offload=cpu` it stays on the CPU, and `on_device` moves it while it computes.
    """
    recipe = context.recipe
    run = recipe.method.teaching_run
    folder = str(model_folder(Path(run))) if run and Path(run).is_dir() else run
    source = folder or str(recipe.output_folder / "teacher" / "model")
    config = recipe.teacher.model
    vlm = GroundedVlm.load(
        source,
        max_pixels=config.max_pixels,
        max_length=config.max_length,
        box_format=None if config.box_format == "auto" else config.box_format,
        allow_downloads=recipe.allow_downloads,
        **recipe.data.image_limits,
    )
    vlm.requires_grad_(False).eval()
    return vlm if recipe.method.teacher_offload == "cpu" else vlm.to(processes().device)


@contextlib.contextmanager
def on_device(teacher: GroundedVlm, offload: str) -> Iterator[None]:
    """With `offload` cpu, move a teacher to the device of the training and back to the CPU afterwards."""
    if offload == "none":
        yield
        return
    device = processes().device
    teacher.to(device)
    try:
        yield
    finally:
        teacher.to("cpu")
        if device.type == "cuda":
            torch.cuda.empty_cache()  # otherwise the allocator keeps the memory, and the training's peak grows by it


def corrector(context: RunContext, teacher: GroundedVlm) -> Ask:
    """Return the function by which the teacher writes corrections in rounds of reflection."""
    recipe = context.recipe
    ask = asker(teacher, recipe.method.reflection.max_new_tokens, recipe.answers.batch_size)

    def correct(rows: Sequence[Dialogue], candidates: int, temperature: float, seed: int) -> list[list[str]]:
        with on_device(teacher, recipe.method.teacher_offload):
            return ask(rows, candidates, temperature, seed)

    return correct


def label_folder(context: RunContext) -> Path:
    """Return the folder of a recipe's pseudo-labels: `method.pseudo_labels.store`, or one in the output folder."""
    store = context.recipe.method.pseudo_labels.store
    return Path(store) if store else context.recipe.output_folder / STORE


def pseudo_labelled_examples(context: RunContext, teacher: GroundedVlm | None) -> list[TrainingExample]:
    """Return the training and unlabelled questions with the teacher's answers.

    Without `method.pseudo_labels.store`, `teacher` first answers the questions whose answers are missing in the output
    folder. Raises UserError as `read_pseudo_labels`.
    """
    recipe = context.recipe
    config = recipe.method.pseudo_labels
    if not config.store:
        assert teacher is not None
        local = LocalTeacher(teacher, max_tokens=config.max_new_tokens, batch_size=recipe.answers.batch_size)
        dialogues = [*context.readable("train"), *context.readable("unlabelled")]
        if processes().is_main_process:
            with on_device(teacher, recipe.method.teacher_offload):
                teach(label_folder(context), context.data, dialogues, local, checks=CheckSettings(page=True))
        processes().wait_for_everyone()
    return read_pseudo_labels(context)


def uses_store(recipe: GroundingRecipe) -> bool:
    """Return whether a stage of a recipe learns from the labels in `method.pseudo_labels.store`."""
    config = recipe.method.pseudo_labels
    return bool(config.store) and config.share > 0 and not {"distilled", "clinkd"}.isdisjoint(recipe.stages)


FEW_USABLE = 0.9
"""Fraction of usable answers below which `doctor` warns."""


def store_findings(context: RunContext) -> list[Finding]:
    """Return what is wrong with the labels in `method.pseudo_labels.store`."""
    try:
        read_pseudo_labels(context)
        labels = PseudoLabels.open(label_folder(context), context.data)
    except UserError as error:
        return [Finding((), None, f"method.pseudo_labels.store: {error}", "error")]
    answered = len(labels.labelled) + sum(labels.unusable.values())
    if len(labels.labelled) >= FEW_USABLE * answered:
        return []
    reason = (
        f"only {len(labels.labelled):,} of {answered:,} answers of the teacher are usable "
        f"({most_common(labels.unusable)}); look at {label_folder(context) / PAGE}"
    )
    return [Finding((), None, reason, "warning")]


def read_pseudo_labels(context: RunContext) -> list[TrainingExample]:
    """Return the questions that have a pseudo-label, and add a note to the data.

    Raises UserError as `PseudoLabels.open`, if a confidence is unknown, and if too few answers are usable
    (`method.pseudo_labels.min_usable`) or none.
    """
    folder, config = label_folder(context), context.recipe.method.pseudo_labels
    labels = PseudoLabels.open(folder, context.data)
    labels.require_usable(config.min_usable, folder, FIXES if config.store else FIXES_OF_STAGE)
    context.data.add_note(labels.note())
    if not labels.labelled:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(labels.left_out.items()))
        raise UserError(
            f"no answer of the teacher is usable ({reasons}): train it longer, raise "
            "method.pseudo_labels.max_new_tokens, or set method.pseudo_labels.share=0"
        )
    confidence, margin = labels.confidence_and_margin()
    return [
        TrainingExample(row.dialogue, confidence=float(c), margin=float(m))
        for row, c, m in zip(labels.labelled, confidence, margin, strict=True)
    ]


class OnlineTokenTeacher:
    """A language model whose hidden states at the answer tokens are computed with every batch."""

    def __init__(self, teacher: GroundedVlm, student: GroundedVlm, offload: str = "none") -> None:
        """`offload` is `method.teacher_offload`. Raises UserError if the two vocabularies differ."""
        require_same_vocabulary(
            student.encoder.tokenizer,
            teacher.encoder.tokenizer,
            len(student.lm_head_weight),
            len(teacher.lm_head_weight),
        )
        self.teacher, self.offload = teacher, offload
        self.fingerprint = vlm_fingerprint(teacher)

    def signal(self, batch: Batch) -> TeacherSignal:
        with torch.no_grad(), on_device(self.teacher, self.offload):
            states = self.teacher.eval()(batch.tensors)
            # Detached, because a parameter itself would return to the CPU with its module.
            return TeacherSignal(tokens=HiddenTeacher(states.hidden, self.teacher.lm_head_weight.detach()))

    def to(self, device: torch.device | str) -> Self:
        self.teacher.to(device)
        return self


class CachedTokenTeacher:
    """The teacher's most likely tokens, read from a cache."""

    def __init__(self, cache: TopKCache) -> None:
        self.cache = cache
        self.fingerprint = cache.cache_key.teacher

    def signal(self, batch: Batch) -> TeacherSignal:
        targets_T = batch["labels"][:, 1:]
        return TeacherSignal(tokens=self.cache.gather(batch.keys, targets_T[targets_T != IGNORED]))

    def to(self, device: torch.device | str) -> Self:
        """Return the teacher itself: signals are on the batch's device."""
        return self


def token_cache_key(context: RunContext, teacher: GroundedVlm, student: GroundedVlm) -> TopKCacheKey:
    """Return the key of a recipe's cache of tokens. Raises UserError as `topk_cache_key`."""
    config, vocab_size = context.recipe.method.pseudo_labels, len(student.lm_head_weight)
    return topk_cache_key(
        teacher,
        student.encoder.tokenizer,
        vocab_size,
        context.data.fingerprint(),
        k=min(config.top_k, vocab_size),
        temperature=config.temperature,
        dtype="float32",
    )


def token_teacher(
    context: RunContext, teacher: GroundedVlm, student: GroundedVlm, examples: Sequence[TrainingExample]
) -> Teacher | None:
    """Return the teacher that gives token distributions; None with `logits: none`. A missing cache is written.

    Raises UserError if the vocabularies of teacher and student differ: only pseudo-labels are possible then.
    """
    config = context.recipe.method.pseudo_labels
    if config.logits == "none":
        return None
    if config.logits == "online":
        return OnlineTokenTeacher(teacher, student, context.recipe.method.teacher_offload)
    dialogues = [example.dialogue for example in examples]
    cache_key = token_cache_key(context, teacher, student)
    folder, hashes = context.recipe.output_folder / CACHE, ContentHashes()
    if processes().is_main_process and not _is_complete(folder, cache_key, dialogues, hashes):
        with on_device(teacher, context.recipe.method.teacher_offload):
            write_topk_cache(
                folder, teacher, dialogues, cache_key, hashes, batch_size=context.recipe.answers.batch_size
            )
    processes().wait_for_everyone()
    return CachedTokenTeacher(TopKCache.open(folder, cache_key))


def _is_complete(folder: Path, cache_key: TopKCacheKey, dialogues: Sequence[Dialogue], hashes: ContentHashes) -> bool:
    """Return whether `folder` holds a cache of all these dialogues for `cache_key`."""
    try:
        return not TopKCache.open(folder, cache_key).missing([answers_key(dialogue, hashes) for dialogue in dialogues])
    except UserError:
        return False


def summary(context: RunContext, examples: Sequence[TrainingExample], teacher: GroundedVlm | None) -> dict[str, Any]:
    """Return the entry `pseudo_labels` of results.json: histograms of confidence and margin, and the curriculum.

    `left_out` counts the dialogues without usable answers by reason, and `boxes` is how the teacher wrote boxes.
    `entered` are pairs of the share of the training and the fraction of the examples that the curriculum uses then.
    """
    config = context.recipe.method.pseudo_labels
    labels = PseudoLabels.open(label_folder(context), context.data)
    confidence, margin = (torch.tensor([getattr(row, name) for row in examples]) for name in ("confidence", "margin"))
    c = config.curriculum
    curriculum = Curriculum(c.begin, c.end, c.over, c.margin_weight, c.weigh)
    steps = [i / 10 for i in range(11)]
    return {
        "rows": len(examples),
        "left_out": labels.left_out,
        "boxes": labels.boxes,
        "teacher": vlm_fingerprint(teacher) if teacher is not None else str(config.store),
        "confidence": torch.histc(confidence, 20, 0, 1).int().tolist(),
        "margin": torch.histc(margin, 20, 0, 1).int().tolist(),
        "entered": [[at, float((curriculum.weights(confidence, margin, at) > 0).float().mean())] for at in steps],
    }
