"""MHKD-MVQA: hierarchical knowledge distillation for medical visual question answering (Wang et al., BIBM 2022).

The student learns the answers, and from its teacher the output and the intermediate layers of a shared image-text
space. The paper names these levels; no code and no layer map, weights or distances were published, so each of those is
a setting here (docs/paper_index.md). Terms, each the mean over samples:

    label      CE(y, s)  or BCE                                   what every VQA model learns
    output     T^2 KL(softmax(t/T) || softmax(s/T))               Hinton et al. 2015
    embedding  d(P s_image, t_image), d(P s_question, t_question) the shared space before fusion
    hidden     d(P s_l, t_m) for mapped fusion layers (l, m)      FitNets, TinyBERT
    attention  KL(a_t || a_s) for mapped fusion layers            TinyBERT, MiniLM
    relation   |sim(s) - sim(t)|^2 over the batch                 Tung and Mori 2019
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from preceptor.config import TermConfig
from preceptor.distill import losses as terms
from preceptor.distill import projectors as align
from preceptor.distill.feature_hooks import FeatureHooks
from preceptor.errors import UserError
from preceptor.task import Batch, LossTerms, Task, Teacher, TeacherSignal
from preceptor.teachers.online import EmaTeacher
from preceptor.vqa.config import MhkdConfig
from preceptor.vqa.model import VqaTransformer


def schedule(term: TermConfig, progress: float) -> float:
    """Return the weight of a term at a share of the training: 0 before `start` and after `end`, a ramp between."""
    if progress < term.start or progress > term.end:
        return 0.0
    risen = 1.0 if term.ramp == 0 else min(1.0, (progress - term.start) / term.ramp)
    return term.weight * risen


class LayerMap:
    """Which layers of the student learn from which of the teacher, and the module paths to tap on either side."""

    def __init__(self, config: MhkdConfig, student_layers: int, teacher_layers: int) -> None:
        self.embedding = ["embed_image", "embed_question"] if config.embedding.weight else []
        self.hidden, self.attention = [], []
        if config.hidden.weight:
            self.hidden = align.layer_pairs(student_layers, teacher_layers, config.hidden.layers)
        if config.attention.weight:
            self.attention = align.layer_pairs(student_layers, teacher_layers, config.attention.layers)
        self.relation = bool(config.relation.weight)
        self.student_paths = self._paths(0, student_layers)
        self.teacher_paths = self._paths(1, teacher_layers)

    def _paths(self, side: int, layers: int) -> list[str]:
        numbers = {pair[side] for pair in self.hidden} | ({layers - 1} if self.relation else set())
        maps = {pair[side] for pair in self.attention}
        return [
            *self.embedding,
            *(f"fusion.{n}" for n in sorted(numbers)),
            *(f"fusion.{n}.attention.probabilities" for n in sorted(maps)),
        ]


TOKEN_AXES = {"embed_question": (1,), "fusion": (1,), "probabilities": (2, 3)}
"""Axes of the tapped tensors along which the length of the question counts."""


def token_axes(path: str) -> tuple[int, ...]:
    """Return the axes of a tapped feature that grow with the batch's longest question."""
    kind = path.rsplit(".", 1)[-1] if path.endswith("probabilities") else path.split(".", 1)[0]
    return TOKEN_AXES.get(kind, ())


def teacher_forward(paths: list[str]) -> Callable[[nn.Module, Batch], TeacherSignal]:
    """Return the function by which an online teacher answers: logits, and the outputs of the modules at `paths`."""
    taps: dict[int, FeatureHooks] = {}

    def forward(model: nn.Module, batch: Batch) -> TeacherSignal:
        if paths and id(model) not in taps:
            taps[id(model)] = FeatureHooks(model, paths)
        if not paths:
            output = model(batch["pixels"], batch["input_ids"], batch["attention_mask"])
            return TeacherSignal(output.logits, {}, output.mask)
        with taps[id(model)].capture() as features:
            output = model(batch["pixels"], batch["input_ids"], batch["attention_mask"])
            return TeacherSignal(output.logits, dict(features), output.mask)

    return forward


class MhkdTask(Task):
    """A student, its projectors and, unless it learns from labels alone, its teacher."""

    student: VqaTransformer

    def __init__(
        self,
        student: VqaTransformer,
        config: MhkdConfig,
        *,
        pretrained: frozenset[str] = frozenset(),
        teacher: Teacher | None = None,
        teacher_config=None,
        seed: int = 0,
    ) -> None:
        """`teacher_config` is the VqaTransformerConfig of the teacher (of its first member in an ensemble).

        Raises UserError where teacher and student do not fit: other answer classes, other tokens.
        """
        super().__init__()
        self.student, self.config, self.teacher = student, config, teacher
        self.pretrained_parameters = {f"student.{name}" for name in pretrained}
        self.progress = 0.0
        self.lesson: LayerMap | None = None
        if teacher is not None:
            own = student.config
            if own.answers != teacher_config.answers:
                raise UserError(
                    f"the teacher knows {teacher_config.num_labels} answers and the student {own.num_labels}, or in "
                    "another order; both must be trained on the same data and split (data.name, data.variant, ...)"
                )
            self.lesson = LayerMap(config, own.layers, teacher_config.layers)
            self.taps = FeatureHooks(student, self.lesson.student_paths) if self.lesson.student_paths else None
            pairs = {}
            for name in self.lesson.embedding:
                pairs[f"embedding.{name}"] = (own.width, teacher_config.width)
            for s, t in self.lesson.hidden:
                pairs[f"hidden.{s}-{t}"] = (own.width, teacher_config.width)
            self.projectors = align.Projectors(pairs, seed=seed)

    def forward(self, batch: Batch) -> LossTerms:
        loss = LossTerms()
        if self.teacher is None or self.lesson is None:
            self._label(loss, self._run(batch).logits, batch)
            return loss
        signal = self.teacher.signal(batch)
        assert signal.logits is not None
        if self.taps is None:
            output, features = self._run(batch), {}
        else:
            with self.taps.capture() as captured:
                output = self._run(batch)
                features = dict(captured)
        self._label(loss, output.logits, batch)
        c, lesson = self.config, self.lesson
        if c.output.weight:
            kl = terms.kl_divergence(output.logits, signal.logits, c.output.temperature)
            loss.add("output", kl, self._weight(c.output))
        for name in lesson.embedding:
            mask = batch["attention_mask"] if name == "embed_question" else None
            distance = self._distance(
                c.embedding.kind, f"embedding.{name}", features[name], signal.features[name], mask
            )
            loss.add(f"embedding/{name.removeprefix('embed_')}", distance, self._weight(c.embedding) / 2)
        for s, t in lesson.hidden:
            mine, theirs = features[f"fusion.{s}"], signal.features[f"fusion.{t}"]
            distance = self._distance(c.hidden.kind, f"hidden.{s}-{t}", mine, theirs, output.mask)
            loss.add(f"hidden/{s}-{t}", distance, self._weight(c.hidden) / len(lesson.hidden))
        for s, t in lesson.attention:
            mine = features[f"fusion.{s}.attention.probabilities"]
            theirs = signal.features[f"fusion.{t}.attention.probabilities"]
            self._same_tokens(mine, theirs, 2)
            distance = terms.attention(mine, theirs, output.mask, kind=c.attention.kind)
            loss.add(f"attention/{s}-{t}", distance, self._weight(c.attention) / len(lesson.attention))
        if lesson.relation:
            mine = features[f"fusion.{self.student.config.layers - 1}"][:, 0]
            last = max(int(path.split(".")[1]) for path in lesson.teacher_paths if path.startswith("fusion."))
            loss.add(
                "relation", terms.relation(mine, signal.features[f"fusion.{last}"][:, 0]), self._weight(c.relation)
            )
        return loss

    def _run(self, batch: Batch):
        return self.student(batch["pixels"], batch["input_ids"], batch["attention_mask"])

    def _weight(self, term: TermConfig) -> float:
        return schedule(term, self.progress)

    def _label(self, loss: LossTerms, logits: Tensor, batch: Batch) -> None:
        term = self.config.label
        if term.kind == "bce":
            scores = torch.zeros_like(logits)
            known = batch["labels"] >= 0
            scores[known, batch["labels"][known]] = 1.0
            total = terms.binary_cross_entropy(logits, scores)
            loss.add("label", total, self._weight(term), "samples")
        else:
            total = terms.cross_entropy(logits, batch["labels"], term.label_smoothing)
            loss.add("label", total, self._weight(term), "labelled")

    def _distance(self, kind: str, pair: str, mine: Tensor, theirs: Tensor, mask: Tensor | None) -> Tensor:
        self._same_tokens(mine, theirs, 1)
        projected = self.projectors(pair, mine)
        if kind == "cosine":
            return terms.cosine(projected, theirs, mask)
        return terms.mse(projected, theirs, mask, normalise=True)

    def _same_tokens(self, mine: Tensor, theirs: Tensor, axis: int) -> None:
        if mine.shape[axis] != theirs.shape[axis]:
            raise UserError(
                f"the student has {mine.shape[axis]} tokens and the teacher {theirs.shape[axis]}, so hidden, embedding "
                "and attention terms cannot compare them: give both models the same data.image_size and "
                "vision.conv.token_stages, or set those terms' weight to 0"
            )

    def units(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch), "labelled": int((batch.tensors["labels"] >= 0).sum())}

    def on_interval(self, progress: float) -> None:
        self.progress = progress

    def after_step(self, step: int) -> None:
        if isinstance(self.teacher, EmaTeacher):
            self.teacher.update(self.student)

    def task_state(self) -> dict[str, Tensor]:
        return self.teacher.state_dict() if isinstance(self.teacher, EmaTeacher) else {}

    def load_task_state(self, state: dict[str, Tensor]) -> None:
        if isinstance(self.teacher, EmaTeacher):
            self.teacher.load_state_dict(state)
