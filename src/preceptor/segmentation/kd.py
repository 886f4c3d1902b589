"""Logit distillation from a teacher that sees all modalities to a student that sees some of them.

    loss = Dice(y, s) + BCE(y, s) + w T^2 KL(sigmoid(t/T) || sigmoid(s/T))

The last term is Hinton et al. (2015, section 2) for overlapping regions: each voxel holds one Bernoulli distribution
per region. It is the mean over regions and voxels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from preceptor.config import TermConfig
from preceptor.segmentation.method import SegmentationMethod

if TYPE_CHECKING:
    from torch import Tensor

    from preceptor.distill.loss_term import LossTerm
    from preceptor.segmentation.model import MultimodalUNet


class OutputTerm(TermConfig):
    weight: Annotated[float, Field(ge=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both distributions; the term is scaled by T squared."""


class KdConfig(SegmentationMethod):
    """Plain knowledge distillation (Hinton et al. 2015) from a full-modality teacher's logits."""

    name: Literal["kd"] = "kd"
    output: OutputTerm = OutputTerm()

    def loss_terms(
        self,
        student: MultimodalUNet,
        votes: Callable[[MultimodalUNet], Tensor] | None = None,
        steps_per_epoch: float = 1.0,
    ) -> list[LossTerm]:
        from preceptor.segmentation.losses import OutputLoss

        return [OutputLoss("output", self.output, self.output.temperature)]
