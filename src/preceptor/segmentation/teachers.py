"""Teachers of segmentation. They see all modalities that a case has, while the student sees some of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from preceptor.data.segmentation.modalities import spelled_as
from preceptor.distill.task import Forward, HookedForward
from preceptor.errors import UserError
from preceptor.segmentation.model import MultimodalUNet, Segmentation
from preceptor.task import Batch, TeacherSignal
from preceptor.teachers.online import OnlineTeacher


def segmentation_forward(model: nn.Module, batch: Batch) -> TeacherSignal:
    """Run a network on the `visible` modalities of a batch, or on all `available` ones if none were dropped.

    The signal holds the logits (B, R, D, H, W) and the features ``level.0``, ..., shallow to deep, each
    (B, N, C, d, h, w) and zero where a modality is missing. ``bottleneck`` is the deepest one.
    """
    visible = batch.tensors.get("visible", batch["available"])
    output: Segmentation = model(batch["images"], visible)
    levels = {f"level.{number}": features for number, features in enumerate(output.features)}
    if output.features:
        levels["bottleneck"] = output.features[-1]
    return TeacherSignal(output.logits, levels)


def full_forward(model: nn.Module, batch: Batch) -> TeacherSignal:
    """Run a network on all available modalities of a batch, whichever the student sees."""
    return segmentation_forward(model, replace(batch, tensors={**batch.tensors, "visible": batch["available"]}))


def hooked_full_forward(paths: Sequence[str] = ()) -> Forward:
    """Return `full_forward`, whose signal also holds the outputs of the modules at `paths`."""
    return HookedForward(full_forward, paths)


def full_modality_teacher(network: nn.Module, paths: Sequence[str] = ()) -> OnlineTeacher:
    """Return a frozen teacher that sees all available modalities of a batch.

    Its signal also holds the outputs of the modules at `paths`.
    """
    return OnlineTeacher(network, hooked_full_forward(paths))


class PartialNetwork(nn.Module):
    """A network that was trained on some of the modalities of the data. It is given these, and never the others.

    `modalities` are those of the data, in order. The features of its signal are those of its own modalities. The output
    of a sample without any of these means nothing (`sees`).
    """

    def __init__(self, network: MultimodalUNet, modalities: Sequence[str]) -> None:
        super().__init__()
        self.network, self.config = network, network.config
        names = spelled_as(modalities, network.config.modalities)
        self.places = [list(modalities).index(name) for name in names]

    def forward(self, images_BNDHW: Tensor, available_BN: Tensor) -> Segmentation:
        # The network needs a modality. A sample that it does not see is all zero, and its output is not used.
        available = available_BN[:, self.places] | ~self.sees(available_BN)[:, None]
        return self.network(images_BNDHW[:, self.places], available)

    def sees(self, available_BN: Tensor) -> Tensor:
        """Return (B,) bool: whether a sample has a modality of the network."""
        return available_BN[:, self.places].any(dim=1)


class SelfTeacher:
    """The student itself, with its current weights, in eval mode and without gradients."""

    fingerprint = "student"
    """There are no other weights than those that are trained."""

    def __init__(self, student: nn.Module, forward: Forward) -> None:
        self.student, self.forward = student, forward

    def signal(self, batch: Batch) -> TeacherSignal:
        training = self.student.training
        self.student.eval()
        try:
            with torch.no_grad():
                return self.forward(self.student, batch)
        finally:
            self.student.train(training)

    def to(self, device: torch.device | str) -> Self:
        return self


def require_same(what: str, name: str, of_network: Iterable[str], of_data: Iterable[str]) -> None:
    """Raise UserError if the modalities or regions (`name`) of a network and of the data differ, also in their order.

    `what` names the network in the message.
    """
    its, own = list(of_network), list(of_data)
    if its != own:
        raise UserError(f"{what} has the {name} {its}, and the data have {own}")
