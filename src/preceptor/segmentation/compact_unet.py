"""A small residual U-Net for a single GPU or a CPU, with one encoder pass per modality.

Each level halves the sides. The encoder has two 3x3x3 convolutions per level, the decoder one. With N modalities the
encoder is more expensive than the decoder, which is what the evaluation of all subsets saves; and the encoder has to
provide features that can be averaged and distilled.

In training with bfloat16 autocast, contiguous memory was faster than channels_last_3d (16 channels of 64^3, forward and
backward pass of convolution, normalisation and activation, one thread with AVX512-BF16: 0.31 instead of 0.31 to
0.73 s). In float32 only the convolutions use channels_last_3d (`layers.Conv`): the normalisation of torch takes twice
as long in this format, and without gradients it is off by 3e-4.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn

from preceptor.segmentation.layers import Conv, Decoder, InstanceNorm, Join, ModalityNorm, Pointwise, activate, add


class _Unit(nn.Module):
    """Residual unit: conv, norm, activation, conv, norm, addition of the shortcut, activation (He et al. 2016)."""

    def __init__(self, inside: int, outside: int, stride: int, norms_for: int = 0) -> None:
        super().__init__()

        def norm() -> nn.Module:
            return ModalityNorm(outside, norms_for) if norms_for else InstanceNorm(outside)

        self.first, self.norm1 = Conv(inside, outside, 3, stride), norm()
        self.second, self.norm2 = Conv(outside, outside, 3), norm()
        self.shortcut = Pointwise(inside, outside, stride)

    def forward(self, x: Tensor, modality_M: Tensor | None = None) -> Tensor:
        of = () if modality_M is None else (modality_M,)
        y = activate(self.norm1(self.first(x), *of))
        return activate(add(self.norm2(self.second(y), *of), self.shortcut(x)))


class CompactEncoder(nn.Module):
    """Encoder (M, inside, D, H, W) -> one map per level, (M, channels[l], D / 2^l, H / 2^l, W / 2^l).

    With `norms_for` above 0, each of so many modalities has its own scales and shifts of the normalisation. The encoder
    then needs the modality of every image.
    """

    def __init__(self, channels: tuple[int, ...], inside: int = 1, norms_for: int = 0) -> None:
        super().__init__()
        before = (inside, *channels[:-1])
        self.norms_for = norms_for
        self.levels = nn.ModuleList(
            [
                _Unit(c, d, 2 if level else 1, norms_for)
                for level, (c, d) in enumerate(zip(before, channels, strict=True))
            ]
        )

    def forward(self, images_M1DHW: Tensor, with_zero: bool = False, modality_M: Tensor | None = None) -> list[Tensor]:
        """Return the features of each image. With `with_zero` the skips have one more map at the end, that of a zero
        image; the bottleneck has not. `modality_M` has the modality of each image, if it matters (`norms_for`)."""
        x = images_M1DHW
        skips = self._skips(torch.cat([x, x.new_zeros(1, *x.shape[1:])]) if with_zero else x, modality_M)
        return [*skips, self.levels[-1](skips[-1][: len(images_M1DHW)], modality_M)]

    def zero_skips(self, size: tuple[int, int, int]) -> list[Tensor]:
        """Return the skips (1, C, d, h, w) of a zero image with `size` voxels. Its bottleneck is not needed.

        With `norms_for` there is one map for each of these modalities.
        """
        weight = next(self.parameters())
        every = torch.arange(self.norms_for, device=weight.device) if self.norms_for else None
        return self._skips(weight.new_zeros(max(1, self.norms_for), 1, *size), every)

    def _skips(self, x: Tensor, modality_M: Tensor | None) -> list[Tensor]:
        skips = []
        for level in list(self.levels)[:-1]:
            x = level(x, modality_M)
            skips.append(x)
        return skips


class CompactDecoder(Decoder):
    """Decoder. `joins` map the filled features of N modalities, shallow to deep; `finish` computes the logits."""

    def __init__(self, modalities: int, regions: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.joins = nn.ModuleList([Join(modalities, c, c) for c in channels])
        self.norms = nn.ModuleList([InstanceNorm(c) for c in channels])
        pairs = list(pairwise(channels))
        self.ups = nn.ModuleList([nn.ConvTranspose3d(deep, shallow, 2, 2, bias=False) for shallow, deep in pairs])
        self.convs = nn.ModuleList([Conv(c, c, 3) for c in channels[:-1]])
        self.conv_norms = nn.ModuleList([InstanceNorm(c) for c in channels[:-1]])
        self.head = Pointwise(channels[0], regions, bias=True)

    def start(self, joined: Tensor) -> Tensor:
        return activate(self.norms[-1](joined))

    def step(self, level: int, x: Tensor, joined: Tensor) -> Tensor:
        """Return the map of a level from the map of the next deeper level and the output of the join."""
        x = add(activate(self.norms[level](joined)), self.ups[level](x))
        return activate(add(self.conv_norms[level](self.convs[level](x)), x))

    def end(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        assert x.shape[2:] == size, f"{tuple(x.shape[2:])} voxels, not {size}"
        return self.head(self.features(x))
