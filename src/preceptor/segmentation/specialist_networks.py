"""The networks of the method `specialists` as one teacher, which depends on the modalities that the student sees.

Shapes: B batch, N modalities, R regions, D H W voxels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preceptor.data.segmentation.modalities import spelled_as
from preceptor.errors import UserError
from preceptor.segmentation.model import MultimodalUNet
from preceptor.segmentation.settings import FULL
from preceptor.segmentation.teachers import require_same
from preceptor.task import Batch, TeacherSignal


class SpecialistNetworks(nn.Module):
    """Networks by the name of their modality, and the one that sees all modalities as `full`.

    `modalities` are those of the data, in order. Raises UserError for a network that does not fit them.
    """

    def __init__(self, networks: Mapping[str, MultimodalUNet], modalities: Sequence[str]) -> None:
        super().__init__()
        self.modalities = tuple(modalities)
        names = [name for name in (*self.modalities, FULL) if name in networks]
        for name in names:
            key, own = f"method.runs.{name}", spelled_as(modalities, networks[name].config.modalities)
            if name == FULL:
                require_same(f"the network of {key}", "modalities", own, modalities)
            elif name not in own or not set(own) <= set(modalities):
                raise UserError(
                    f"the network of {key} has the modalities {list(own)}; it must have {name}, and all of its "
                    f"modalities must be among those of the data: {list(modalities)}"
                )
        # A modality may have a name that a ModuleDict does not accept, such as "type".
        self.networks, self.names = nn.ModuleList([networks[name] for name in names]), names
        self.regions = networks[names[0]].config.regions

    def forward(self, images_BNDHW: Tensor, visible_BN: Tensor, available_BN: Tensor) -> Tensor:
        """Return the logits (B, R, D, H, W) of the teacher of each sample."""
        alone_B = visible_BN.sum(dim=1) == 1
        specialised_N = torch.tensor([m in self.names for m in self.modalities], device=visible_BN.device)
        if FULL in self.names:
            by_specialist_B = alone_B & (visible_BN & specialised_N).any(dim=1)
        else:
            by_specialist_B = torch.ones_like(alone_B)
        rows = (~by_specialist_B).nonzero()[:, 0]
        parts = [(rows, self._network(FULL)(images_BNDHW[rows], available_BN[rows]).logits)] if len(rows) else []
        shape = (len(images_BNDHW), len(self.regions), *images_BNDHW.shape[2:])
        # log of the sum of the probabilities of foreground and background over the specialists of a sample
        logs = images_BNDHW.new_full((2, *shape), -torch.inf, dtype=torch.float32)
        for place, name in enumerate(self.modalities):
            speaking = (by_specialist_B & visible_BN[:, place]).nonzero()[:, 0]
            if len(speaking):
                x = self._alone(name, images_BNDHW[speaking]).float()
                logs[0, speaking] = torch.logaddexp(logs[0, speaking], F.logsigmoid(x))
                logs[1, speaking] = torch.logaddexp(logs[1, speaking], F.logsigmoid(-x))
        logits = torch.where(by_specialist_B[:, None, None, None, None], logs[0] - logs[1], logs.new_zeros(()))
        for rows, full in parts:
            logits[rows] = full.float()
        return logits

    def _network(self, name: str) -> MultimodalUNet:
        return cast(MultimodalUNet, self.networks[self.names.index(name)])

    def _alone(self, name: str, images_BNDHW: Tensor) -> Tensor:
        """Return the logits of the specialist of a modality, from this modality."""
        network = self._network(name)
        own = spelled_as(self.modalities, network.config.modalities)
        places = [self.modalities.index(m) for m in own]
        only = torch.tensor([m == name for m in own], device=images_BNDHW.device)
        return network(images_BNDHW[:, places], only.expand(len(images_BNDHW), -1)).logits


def specialist_forward(model: nn.Module, batch: Batch) -> TeacherSignal:
    """Run the networks on the modalities that the student sees, and the full one on all of a batch."""
    return TeacherSignal(model(batch["images"], batch["visible"], batch["available"]))
