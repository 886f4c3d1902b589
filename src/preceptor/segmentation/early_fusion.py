"""Early fusion: the modalities are the channels of one residual U-Net, the baseline that needs no method.

A missing modality is a channel of zeros. One more channel per modality says whether it is there. With modalities
dropped in training, such networks are strong baselines for missing modalities (Feng et al. 2023). Levels, residual
units and decoder are those of the compact network.

Shapes: B batch, N modalities, R regions, D H W voxels.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from preceptor.segmentation.compact_unet import CompactDecoder, CompactEncoder
from preceptor.segmentation.layers import Pointwise, activate


class EarlyFusionUNet(nn.Module):
    """Residual U-Net on the concatenated modalities and their availability; `channels` of its levels."""

    def __init__(self, modalities: int, regions: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        # Instance normalisation would remove a constant channel. An activation before it makes the other channels
        # depend on the constant ones.
        self.stem = Pointwise(2 * modalities, channels[0], bias=True)
        self.encoder = CompactEncoder(channels, inside=channels[0])
        self.decoder = CompactDecoder(1, regions, channels)

    def forward(self, images_BNDHW: Tensor, available_BN: Tensor) -> Tensor:
        """Return the logits (B, R, D, H, W). Images of modalities that are not available are zero."""
        flags = available_BN[:, :, None, None, None].to(images_BNDHW.dtype).expand_as(images_BNDHW)
        features = self.encoder(activate(self.stem(torch.cat([images_BNDHW, flags], dim=1))))
        joined = [join(x[:, None]) for join, x in zip(self.decoder.joins, features, strict=True)]
        return self.decoder.finish(joined, cast(tuple[int, int, int], tuple(images_BNDHW.shape[2:])))
