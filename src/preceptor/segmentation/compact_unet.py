"""A small residual U-Net with one encoder pass per modality, for machines without an accelerator.

Each level halves the sides. The encoder has two 3x3x3 convolutions a level, the decoder one: with N modalities the
encoder costs more than the decoder, which is what the evaluation of all subsets saves on, and features good enough to
be averaged and distilled come from the encoder.

In training with bfloat16 autocast, contiguous memory was quicker than channels_last_3d (16 channels of 64^3, forward
and backward of convolution, normalisation and activation, one thread with AVX512-BF16: 0.31 against 0.31 to 0.73 s;
float32 1.03 and 0.73 s), and torch's normalisation of channels_last_3d maps is off by 3e-4 without gradients.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from preceptor.segmentation.layers import InstanceNorm, Join, Pointwise, activate, add


def _conv(inside: int, outside: int, stride: int = 1) -> nn.Conv3d:
    return nn.Conv3d(inside, outside, 3, stride, 1, bias=False)


class _Unit(nn.Module):
    """conv, norm, activation, conv, norm, plus the shortcut, activation (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.first, self.norm1 = _conv(inside, outside, stride=stride), InstanceNorm(outside)
        self.second, self.norm2 = _conv(outside, outside), InstanceNorm(outside)
        self.shortcut = Pointwise(inside, outside, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = activate(self.norm1(self.first(x)))
        return activate(add(self.norm2(self.second(y)), self.shortcut(x)))


class CompactEncoder(nn.Module):
    """(M, 1, D, H, W) -> one map a level, (M, channels[l], D / 2^l, H / 2^l, W / 2^l)."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        before = (1, *channels[:-1])
        self.levels = nn.ModuleList(
            [_Unit(c, d, 2 if level else 1) for level, (c, d) in enumerate(zip(before, channels, strict=True))]
        )

    def forward(self, images_M1DHW: Tensor, with_zero: bool = False) -> list[Tensor]:
        """Return the features of each image; with `with_zero` the skips, not the bottleneck, have one more map at the
        end, that of an image of zeros."""
        x = images_M1DHW
        skips = self._skips(torch.cat([x, x.new_zeros(1, *x.shape[1:])]) if with_zero else x)
        return [*skips, self.levels[-1](skips[-1][: len(images_M1DHW)])]

    def zero_skips(self, size: tuple[int, int, int]) -> list[Tensor]:
        """Return the skips (1, C, d, h, w) of an image of zeros with `size` voxels; its bottleneck is not needed."""
        # Two alike: for a single small map torch takes a slow convolution, which also rounds differently.
        return [x[:1] for x in self._skips(next(self.parameters()).new_zeros(2, 1, *size))]

    def _skips(self, x: Tensor) -> list[Tensor]:
        skips = []
        for level in list(self.levels)[:-1]:
            x = level(x)
            skips.append(x)
        return skips


class CompactDecoder(nn.Module):
    """`joins` take the filled features of the N modalities, shallow to deep; `finish` makes logits of their outputs."""

    def __init__(self, modalities: int, regions: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.joins = nn.ModuleList([Join(modalities, c, c) for c in channels])
        self.norms = nn.ModuleList([InstanceNorm(c) for c in channels])
        pairs = list(pairwise(channels))
        self.ups = nn.ModuleList([nn.ConvTranspose3d(deep, shallow, 2, 2, bias=False) for shallow, deep in pairs])
        self.convs = nn.ModuleList([_conv(c, c) for c in channels[:-1]])
        self.conv_norms = nn.ModuleList([InstanceNorm(c) for c in channels[:-1]])
        self.head = Pointwise(channels[0], regions, bias=True)

    def finish(self, joined: list[Tensor], size: tuple[int, int, int]) -> Tensor:
        """Return (B, R, D, H, W) logits; `joined` holds (B, C, d, h, w) of each join."""
        x = self.start(joined[-1])
        for level in reversed(range(len(joined) - 1)):
            x = self.step(level, x, joined[level])
        return self.end(x, size)

    def start(self, joined: Tensor) -> Tensor:
        return activate(self.norms[-1](joined))

    def step(self, level: int, x: Tensor, joined: Tensor) -> Tensor:
        """Return the map of a level, from that of the next deeper one and the join's output."""
        x = add(activate(self.norms[level](joined)), self.ups[level](x))
        return activate(add(self.conv_norms[level](self.convs[level](x)), x))

    def end(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        assert x.shape[2:] == size, f"{tuple(x.shape[2:])} voxels, not {size}"
        return self.head(x)
