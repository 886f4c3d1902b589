"""What a recipe's teacher says: its answers to training questions, and its words at each answer token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import torch

from preceptor.data.types import Dialogue
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.grounding.context import RunContext
from preceptor.grounding.curriculum import Curriculum
from preceptor.grounding.dataset import TrainingExample
from preceptor.grounding.dialogue_encoder import IGNORED
from preceptor.grounding.evaluate import asker
from preceptor.grounding.local_teacher import LocalTeacher, vlm_fingerprint
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.pseudo_labels import ContentHashes, PseudoLabels, teach
from preceptor.grounding.reflection_round import Ask
from preceptor.grounding.settings import PseudoLabelConfig
from preceptor.grounding.topk_cache import TopKCache, TopKCacheKey, answers_key, topk_cache_key, write_topk_cache
from preceptor.grounding.vocabulary import same_vocabulary
from preceptor.pipeline.run_dir import model_folder
from preceptor.task import Batch, HiddenTeacher, Teacher, TeacherSignal

STORE, CACHE = "pseudo-labels", "teacher-cache"


def load_teacher(context: RunContext) -> GroundedVlm:
    """Return the frozen teacher: `method.teaching_run`, or the stage `teacher` of this recipe.

    With `method.teacher_offload=cpu` it is on the CPU; `at_work` has it on the device.
    """
    recipe = context.recipe
    run = recipe.method.teaching_run
    folder = str(model_folder(Path(run))) if run and Path(run).is_dir() else run
    source = folder or str(recipe.output_folder / "teacher" / "model")
    config = recipe.teacher.model
    vlm = GroundedVlm.load(
        source, max_pixels=config.max_pixels, cut_off=config.cut_off, allow_downloads=recipe.allow_downloads
    )
    vlm.requires_grad_(False).eval()
    return vlm if recipe.method.teacher_offload == "cpu" else vlm.to(processes().device)


@contextlib.contextmanager
def at_work(teacher: GroundedVlm, offload: str) -> Iterator[None]:
    """Have a teacher on the device that computes; with `offload` cpu it was not there, and leaves it again."""
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
            torch.cuda.empty_cache()  # else what it took stays this process's, and the training's peak lies above it


def corrector(context: RunContext, teacher: GroundedVlm) -> Ask:
    """Return what writes corrections in rounds of reflection."""
    recipe = context.recipe
    ask = asker(teacher, recipe.method.reflection.max_new_tokens, recipe.answers.batch_size)

    def working(rows: Sequence[Dialogue], candidates: int, temperature: float, seed: int) -> list[list[str]]:
        with at_work(teacher, recipe.method.teacher_offload):
            return ask(rows, candidates, temperature, seed)

    return working


def pseudo_lessons(context: RunContext, teacher: GroundedVlm | None) -> list[TrainingExample]:
    """Return the teacher's answers to the training questions and to those without an answer, as lessons.

    They are those of `method.pseudo_labels.store`; without one `teacher` is asked, and its answers are kept in the
    output folder. Raises UserError as `PseudoLabels.open`, where answers are not known to be sure or not, and where
    none is left to learn from.
    """
    recipe, data = context.recipe, context.data
    config = recipe.method.pseudo_labels
    folder = Path(config.store) if config.store else recipe.output_folder / STORE
    if not config.store:
        assert teacher is not None
        local = LocalTeacher(teacher, max_tokens=config.max_new_tokens, batch_size=recipe.answers.batch_size)
        # The others would each want to write it, and ask again what could not be answered.
        if processes().is_main_process:
            with at_work(teacher, recipe.method.teacher_offload):
                teach(folder, data, [*data.split("train"), *data.split("unlabelled")], local)
        processes().wait_for_everyone()
    labels = PseudoLabels.open(folder, data)
    if (note := labels.note()) not in data.notes:
        data.notes.append(note)
    if not labels.labelled:
        reasons = ", ".join(f"{count} {reason}" for reason, count in sorted(labels.left_out.items()))
        raise UserError(
            f"no answer of the teacher can be learnt from ({reasons}): train it longer, raise "
            "method.pseudo_labels.max_new_tokens, or do without (method.pseudo_labels.share=0)"
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
        same_vocabulary(
            student.encoder.tokenizer,
            teacher.encoder.tokenizer,
            len(student.lm_head_weight),
            len(teacher.lm_head_weight),
        )
        self.teacher, self.offload = teacher, offload
        self.fingerprint = vlm_fingerprint(teacher)

    def signal(self, batch: Batch) -> TeacherSignal:
        with torch.no_grad(), at_work(self.teacher, self.offload):
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
    context: RunContext, teacher: GroundedVlm, student: GroundedVlm, lessons: Sequence[TrainingExample]
) -> Teacher | None:
    """Return the teacher that gives token distributions; None with `logits: none`. A missing cache is written.

    Raises UserError if the vocabularies of teacher and student differ: only pseudo-labels are possible then.
    """
    config = context.recipe.method.pseudo_labels
    if config.logits == "none":
        return None
    if config.logits == "online":
        return OnlineTokenTeacher(teacher, student, context.recipe.method.teacher_offload)
    dialogues = [lesson.dialogue for lesson in lessons]
    cache_key = token_cache_key(context, teacher, student)
    folder, hashes = context.recipe.output_folder / CACHE, ContentHashes()
    with processes().main_process_first():
        if not _is_complete(folder, cache_key, dialogues, hashes):
            with at_work(teacher, context.recipe.method.teacher_offload):
                write_topk_cache(
                    folder, teacher, dialogues, cache_key, hashes, batch_size=context.recipe.answers.batch_size
                )
    return CachedTokenTeacher(TopKCache.open(folder, cache_key))


def _is_complete(folder: Path, cache_key: TopKCacheKey, dialogues: Sequence[Dialogue], hashes: ContentHashes) -> bool:
    """Return whether `folder` holds a cache of all these dialogues for `cache_key`."""
    try:
        return not TopKCache.open(folder, cache_key).missing([answers_key(dialogue, hashes) for dialogue in dialogues])
    except UserError:
        return False


def summary(
    lessons: Sequence[TrainingExample], config: PseudoLabelConfig, teacher: GroundedVlm | None
) -> dict[str, Any]:
    """Return what results say of pseudo-labels: how sure the teacher was, and how many had entered by when."""
    confidence, margin = (torch.tensor([getattr(row, name) for row in lessons]) for name in ("confidence", "margin"))
    c = config.curriculum
    curriculum = Curriculum(c.begin, c.end, c.over, c.margin_weight, c.weigh)
    steps = [i / 10 for i in range(11)]
    return {
        "rows": len(lessons),
        "teacher": vlm_fingerprint(teacher) if teacher is not None else str(config.store),
        "confidence": torch.histc(confidence, 20, 0, 1).int().tolist(),
        "margin": torch.histc(margin, 20, 0, 1).int().tolist(),
        "entered": [[at, float((curriculum.weights(confidence, margin, at) > 0).float().mean())] for at in steps],
    }
