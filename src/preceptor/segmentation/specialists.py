"""Specialists teach: networks that are dedicated to one modality each, and one that sees all modalities.

The joint network sees a random subset of a sample's modalities. Its teacher depends on the subset:

    one modality m      the specialist of m, from m alone
    several modalities  the full-modality network, from all that the sample has; without one, the specialists of the
                        visible modalities, each from its own, by the mean of their probabilities

The loss is that of `kd`: T^2 KL of every voxel's probability. This keeps LCKD's idea that the modality that is best on
its own teaches, but replaces its features by the logits of a network that spends all of its capacity on one modality.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from preceptor.config import Folder
from preceptor.data.segmentation.modalities import spelled_as
from preceptor.segmentation.kd import OutputTerm
from preceptor.segmentation.method import SegmentationMethod
from preceptor.segmentation.settings import FULL

if TYPE_CHECKING:
    from torch import nn

    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.method import Votes
    from preceptor.segmentation.model import MultimodalUNet
    from preceptor.task import Teacher


class SpecialistsConfig(SegmentationMethod):
    """Logits of networks that are dedicated to one modality each, and of a full-modality network."""

    name: Literal["specialists"] = "specialists"
    runs: Annotated[dict[str, Folder], Field(min_length=1)]
    """The trained run of each modality, by its name, and that of the full-modality network as `full`. A specialist has
    its modality alone (`data.modalities=[flair]`) or all of them; it only ever sees its own. The run of a modality may
    be left out if `full` is given, which then teaches it, and `full` if each modality has a run."""
    output: OutputTerm = OutputTerm()

    @model_validator(mode="after")
    def _runs_only(self) -> SpecialistsConfig:
        if self.teaching_run:
            raise ValueError("method.name=specialists has no method.teaching_run: give it as method.runs.full")
        return self

    def loss_terms(
        self, student: MultimodalUNet, votes: Votes | None = None, steps_per_epoch: float = 1.0
    ) -> list[LossTerm]:
        from preceptor.segmentation.losses import OutputLoss

        return [OutputLoss("output", self.output, self.output.temperature)]

    def without_distillation(self, modalities: Sequence[str]) -> str:
        return "" if self.output.weight > 0 else "method.output.weight is 0"

    def check_modalities(self, modalities: Sequence[str]) -> None:
        taught = spelled_as(modalities, self.runs)
        if unknown := sorted({*taught} - {*modalities, FULL}):
            raise ValueError(f"method.runs.{unknown[0]} is neither full nor among data.modalities {list(modalities)}")
        lacking = [m for m in modalities if m not in taught]
        if lacking and FULL not in self.runs:
            raise ValueError(
                f"method.runs has no teacher for {', '.join(lacking)}: give a run of each modality, or method.runs.full"
            )

    def teacher_runs(self) -> dict[str, str]:
        return {f"method.runs.{name}": run for name, run in self.runs.items()}

    def combine_teachers(self, networks: Mapping[str, MultimodalUNet], modalities: Sequence[str]) -> nn.Module:
        from preceptor.segmentation.specialist_networks import SpecialistNetworks

        names = spelled_as(modalities, [key.removeprefix("method.runs.") for key in networks])
        return SpecialistNetworks(dict(zip(names, networks.values(), strict=True)), modalities)

    def make_teacher(self, student: nn.Module, network: nn.Module | None, paths: Sequence[str]) -> Teacher | None:
        from preceptor.distill.task import HookedForward
        from preceptor.segmentation.specialist_networks import specialist_forward
        from preceptor.teachers.online import OnlineTeacher

        assert network is not None, "the specialists are trained before"
        return OnlineTeacher(network, HookedForward(specialist_forward, paths))

    def stage_settings(self, stage: str) -> dict[str, Any]:
        settings = super().stage_settings(stage)
        settings.pop("runs", None)  # the weights count, not their folders
        return settings
