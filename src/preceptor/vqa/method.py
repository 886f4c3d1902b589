"""What every distillation method of visual question answering has: a teacher, the answers' loss, loss terms.

A method is a class like `MhkdConfig` in `mhkd.py` or `KdConfig` in `kd.py`: its settings, and `loss_terms`, which
returns its loss as a list of terms. Recipes are validated before torch is imported, so torch is imported in functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from preceptor.config import Folder, MethodConfig, Section, TermConfig

if TYPE_CHECKING:
    from torch import nn

    from preceptor.distill.loss_term import LossTerm
    from preceptor.task import Batch, Teacher, TeacherSignal
    from preceptor.vqa.model import VqaTransformer
    from preceptor.vqa.task import VqaTask

Layers = Literal["uniform", "last"] | list[tuple[int, int]]


class LabelTerm(TermConfig):
    weight: Annotated[float, Field(ge=0)] = 1.0
    kind: Literal["ce", "bce"] = "ce"
    """Cross-entropy over the classes, or binary cross-entropy per class."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Label smoothing of `ce`."""

    def unused_setting(self) -> str:
        if self.kind == "bce" and self.label_smoothing:
            return f"label_smoothing={self.label_smoothing:g} is not used with kind=bce; set it to 0"
        return ""


class TeachingConfig(Section):
    kind: Literal["online", "cached", "ema"] = "online"
    """online: the teacher runs on every batch. cached: its outputs are read from a cache, which is written on first
    use. ema: the teacher is a moving average of the student; there is no other one."""
    runs: list[Folder] = Field(default_factory=list)
    """Trained runs that are the teacher instead of this recipe's teacher stage. Several form an ensemble."""
    cache: Folder | None = None
    """Folder of the cache; default: `teacher-cache` in the output folder."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] = 0.999
    """Decay of the moving average of `kind: ema`; smaller in the first steps."""
    cross_questions: Annotated[int, Field(ge=0, le=20)] = 0
    """For each training or unlabelled row, this many questions of other training rows are asked about its image; only
    the teacher answers them. The number of steps stays the same: an epoch is one pass over the labelled rows."""


class VqaMethod(MethodConfig):
    """Base class of the methods of visual question answering."""

    teaching: TeachingConfig = TeachingConfig()
    label: LabelTerm = LabelTerm()
    """Loss against the answers of the data set. The stages `teacher` and `baseline` have this term only."""
    inherit_token_embeddings: bool = False
    """Initialize the student's token embeddings with the principal components of the (first) teacher's. Both models
    need the same tokens, and the student's embedding must not be wider. Not with `teaching.kind: ema`."""

    def loss_terms(self, student_layers: int, teacher_layers: int) -> list[LossTerm]:
        """Return the loss terms of the stage `distilled`, that of the answers included, in the order of their sum.

        The arguments are the numbers of fusion layers of the two models.
        """
        raise NotImplementedError

    def label_loss(self, factor: float = 1.0) -> LossTerm:
        """Return the loss term of the data set's answers, its weight times `factor`."""
        from preceptor.vqa.losses import LabelLoss

        schedule = self.label.model_copy(update={"weight": factor * self.label.weight})
        return LabelLoss(schedule, self.label.kind, self.label.label_smoothing)

    def term_weights(self) -> dict[str, float]:
        """Return the weights of the loss terms by name, at the end of their ramps, for the model card."""
        weights = {name: term.weight for name, term in self if isinstance(term, TermConfig) and term.weight > 0}
        return weights | {term.loss: term.weight for term in self.losses}

    def needs_teacher(self, stage: str) -> bool:
        """Return whether a stage needs a teacher that was trained before."""
        return stage == "distilled" and self.teaching.kind != "ema"

    def stage_settings(self, stage: str) -> dict[str, Any]:
        """Return the settings that a stage uses. They must not change when it is resumed.

        The teacher's weights identify it, not their path.
        """
        if stage == "distilled":
            return self.model_dump(mode="json", exclude={"teaching": {"runs", "cache"}})
        return self.model_dump(mode="json", include={"label"})

    def teacher_forward(
        self, student_layers: int, teacher_layers: int, *, features: bool = True
    ) -> Callable[[nn.Module, Batch], TeacherSignal]:
        """Return the function that runs a teacher on a batch: its logits and the features that the terms use.

        With `features` off only the logits are returned, as for the members of an ensemble after the first.
        """
        from preceptor.distill.task import HookedForward
        from preceptor.vqa.task import vqa_forward

        return HookedForward(vqa_forward, self.teacher_features(student_layers, teacher_layers) if features else [])

    def teacher_features(self, student_layers: int, teacher_layers: int) -> list[str]:
        """Return the paths of the teacher's modules whose outputs the loss terms use. A cache stores them."""
        from preceptor.distill.task import features_of

        return features_of(self._every_term(student_layers, teacher_layers), "teacher")

    def build_task(
        self,
        student: VqaTransformer,
        *,
        teacher: Teacher | None = None,
        teacher_config: Any = None,
        pretrained: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> VqaTask:
        """Return the training task of a student. Without a teacher it learns from the answers alone.

        Args:
            student: the model to train.
            teacher_config: the `VqaTransformerConfig` of the teacher; of the first member of an ensemble.
            pretrained: names of the student's parameters that did not start from scratch.
            seed: seed of the projectors' initial weights.

        Raises:
            UserError: the teacher has other answer classes, or lacks a module whose output a term uses.
        """
        from preceptor.vqa.task import VqaTask

        if teacher is None:
            return VqaTask(student, [self.label_loss()], pretrained=pretrained)
        terms = self._every_term(student.config.layers, teacher_config.layers)
        return VqaTask(student, terms, teacher=teacher, teacher_config=teacher_config, pretrained=pretrained, seed=seed)

    def _every_term(self, student_layers: int, teacher_layers: int) -> list[LossTerm]:
        from preceptor.distill.loss_term import own_losses

        return [*self.loss_terms(student_layers, teacher_layers), *own_losses(self.losses)]
