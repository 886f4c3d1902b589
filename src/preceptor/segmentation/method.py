"""What every distillation method of segmentation has: the loss of the masks, modality dropout, a teacher, loss terms.

A method is a class like `LckdConfig` in `lckd.py` or `KdConfig` in `kd.py`: its settings, and `loss_terms`, which
returns the terms that it adds to the loss of the masks. Recipes are validated before torch is imported, so torch is
imported in functions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from preceptor.config import Folder, MethodConfig, TermConfig
from preceptor.data.segmentation.modalities import spelled_as
from preceptor.errors import UserError
from preceptor.segmentation.settings import ModalityDropoutConfig, SegmentationLoss

if TYPE_CHECKING:
    from torch import Tensor, nn

    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.model import MultimodalUNet
    from preceptor.segmentation.task import SegmentationTask
    from preceptor.task import Batch, Teacher

    Votes = Callable[[MultimodalUNet], Tensor]
    HeldOutBatch = Callable[[int], Batch]


class SegmentationMethod(MethodConfig):
    """Base class of the methods of segmentation."""

    loss: SegmentationLoss = SegmentationLoss()
    modality_dropout: ModalityDropoutConfig = ModalityDropoutConfig()
    teaching_run: Folder | None = None
    """A trained run that teaches, instead of a stage of this recipe."""

    def require_used_teaching_run(self) -> None:
        """Raise UserError before a training if `teaching_run` is given but no trained network teaches.

        It is not a validator, because finished runs of earlier versions have such a recipe and are still evaluated.
        """
        if self.teaching_run and not self.needs_teacher("distilled"):
            setting, fix = self.without_teacher
            raise UserError(
                f"{setting} has no other teacher, so method.teaching_run={self.teaching_run} is not used; remove it"
                + (f", or set {fix}" if fix else "")
            )

    def without_distillation(self, modalities: Sequence[str]) -> str:
        """Return the setting by which no term of the method has an effect on data with these modalities, or ""."""
        return ""

    @property
    def without_teacher(self) -> tuple[str, str]:
        """The setting by which no trained network teaches, and its value with which one does, or ""."""
        return f"method.name={self.name}", ""

    def loss_terms(
        self, student: MultimodalUNet, votes: Votes | None = None, steps_per_epoch: float = 1.0
    ) -> list[LossTerm]:
        """Return the terms that the stage `distilled` adds to the loss of the masks, in the order of their sum.

        ``votes(student)`` returns the soft Dice (N, R) of each modality alone on validation cases.
        """
        raise NotImplementedError

    def held_out_terms(
        self, student: MultimodalUNet, held_out: HeldOutBatch, steps_per_epoch: float = 1.0
    ) -> list[LossTerm]:
        """Return the terms that also need cases which the student does not train on, if `held_out_share` is above 0.

        ``held_out(n)`` returns batch number n of these cases.
        """
        return []

    @property
    def held_out_share(self) -> float:
        """Share of the training cases, by patient, that the stage `distilled` does not train the network on."""
        return 0.0

    def check_modalities(self, modalities: Sequence[str]) -> None:
        """Raise ValueError if the settings name a modality that is not among those of the data, or lack one."""

    def needs_teacher(self, stage: str) -> bool:
        """Return whether a stage needs a trained teacher: earlier runs (`teacher_runs`) or the `teaching_stage`."""
        return stage == "distilled"

    @property
    def teaching_stage(self) -> str:
        """The stage of the recipe that teaches if there are no earlier runs."""
        return "teacher"

    def teacher_runs(self) -> dict[str, str]:
        """Return the earlier runs that teach, by the key that names them; without any, the `teaching_stage` does."""
        return {"method.teaching_run": self.teaching_run} if self.teaching_run else {}

    def combine_teachers(self, networks: Mapping[str, MultimodalUNet], modalities: Sequence[str]) -> nn.Module:
        """Return the network that teaches, given those of `teacher_runs` by key and the modalities of the data.

        A network that was trained on some of the modalities is given those alone. Raises UserError if they do not fit
        the data.
        """
        from preceptor.segmentation.teachers import PartialNetwork, require_same

        ((key, network),) = networks.items()
        own = spelled_as(modalities, network.config.modalities)
        if set(own) < set(modalities) and not self.compares_features:
            return PartialNetwork(network, modalities)
        require_same(f"the network of {key}", "modalities", own, modalities)
        return network

    def make_teacher(self, student: nn.Module, network: nn.Module | None, paths: Sequence[str]) -> Teacher | None:
        """Return the teacher of the stage `distilled`.

        `network` is the result of `combine_teachers`, or None. The teacher's signal also holds the outputs of its
        modules at `paths`.
        """
        from preceptor.segmentation.teachers import full_modality_teacher

        return full_modality_teacher(network, paths) if network is not None else None

    @property
    def learns_without_masks(self) -> bool:
        """Whether the stage `distilled` can learn from cases without masks (`data.unlabelled`)."""
        return self.needs_teacher("distilled")

    @property
    def compares_features(self) -> bool:
        """Whether the features of the teacher are compared, so that both networks need the same layers."""
        return False

    @property
    def starts_from_teacher(self) -> bool:
        """Whether the student of the stage `distilled` starts from the teacher's weights, so that both are the same
        network."""
        return False

    def stage_settings(self, stage: str) -> dict[str, Any]:
        """Return the settings that a stage uses. They must not change when it is resumed."""
        if stage == "distilled":
            return self.model_dump(mode="json", exclude={"teaching_run"})
        settings = self.model_dump(mode="json", include={"loss", "modality_dropout"})
        return settings | ({"modality_dropout": "none"} if stage == "teacher" else {})

    def build_task(
        self,
        student: MultimodalUNet,
        *,
        stage: str,
        teacher: nn.Module | None = None,
        votes: Votes | None = None,
        held_out: HeldOutBatch | None = None,
        steps_per_epoch: float = 1.0,
        pretrained: frozenset[str] = frozenset(),
        seed: int = 0,
    ) -> SegmentationTask:
        """Return the training task of a stage.

        The stages `teacher`, in which no modality is dropped, and `baseline` learn from the masks alone.

        Args:
            student: the network to train.
            teacher: the network that teaches, if `needs_teacher(stage)`.
            votes: returns the soft Dice (N, R) of each modality alone on validation cases; LCKD's election needs it.
            held_out: returns batches of the cases that are held out of the training, if `held_out_share` is above 0.
            steps_per_epoch: optimiser steps per epoch.
            pretrained: names of the student's parameters that did not start from scratch.
            seed: seed of the initial weights of the terms' parameters, such as projectors.
        """
        from preceptor.distill.loss_term import own_losses
        from preceptor.distill.task import features_of
        from preceptor.segmentation.losses import BceLoss, DiceLoss
        from preceptor.segmentation.task import SegmentationTask

        terms: list[LossTerm] = [
            DiceLoss(TermConfig(weight=self.loss.dice)),
            BceLoss(TermConfig(weight=self.loss.bce), self.loss.bce_reduction),
        ]
        if stage != "distilled":
            modality_dropout = ModalityDropoutConfig(kind="none") if stage == "teacher" else self.modality_dropout
            return SegmentationTask(student, terms, modality_dropout=modality_dropout, pretrained=pretrained, seed=seed)
        terms += self.loss_terms(student, votes, steps_per_epoch)
        if held_out is not None:
            terms += self.held_out_terms(student, held_out, steps_per_epoch)
        terms += own_losses(self.losses)
        return SegmentationTask(
            student,
            terms,
            modality_dropout=self.modality_dropout,
            teacher=self.make_teacher(student, teacher, features_of(terms, "teacher")),
            # A moving average of the student, for example, has the student's configuration.
            teacher_config=getattr(teacher, "config", student.config),
            teacher_masks=teacher is not None,
            taught_by=getattr(teacher, "sees", None),
            pretrained=pretrained,
            seed=seed,
        )


def of_one_modality(modalities: Sequence[str]) -> str:
    """Return why no modality can teach another one, or "" if there are several."""
    return "" if len(modalities) > 1 else f"data.modalities={list(modalities)} has no modality that teaches another one"


def require_features(student: MultimodalUNet, key: str) -> None:
    """Raise UserError if the modalities have no features of their own in the student, which the term `key` compares."""
    if not student.config.widths:
        raise UserError(
            f"{key} compares features, and the network {student.config.net} returns none: set {key}.weight=0 or "
            "method.name=kd"
        )
