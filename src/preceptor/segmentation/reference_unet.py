"""The network of the published LCKD code: a weight-standardised 3-D ResNet-50 with ASPP and an additive decoder.

The implementation follows facts about the code, which has no licence: blocks 3, 4, 6, 3 with planes 64, 128, 256, 320
and expansion 4, a stem 7x7x7 with stride (1, 2, 2), an ASPP of 256 channels with dilations 1, 2, 4, 8 and a global
branch, decoder channels 256, 128, 64, 32. A crop of 80x160x160 gives skips 64 @ 80^3, 256 @ 40^3, 512 @ 20^3,
1024 @ 10^3 and a bottleneck of 256 @ 5^3. With four modalities and three regions there are 43.66 M parameters: 35.13 M
in the encoder (ASPP 5.77 M) and 8.53 M in the decoder. Such a crop of four modalities takes 754 GFLOPs (a
multiplication and an addition count as two).

Choices that the facts do not determine: the transposed convolutions are neither standardised nor biased; the
convolution before the ASPP and the head are standardised like all others; residual blocks have the activation after the
sum.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preceptor.segmentation.layers import Decoder, InstanceNorm, Join, Pointwise, StandardisedConv, activate, add

STRIDES = (16, 32, 32)
SKIPS = (64, 256, 512, 1024)
BOTTLENECK = 256
_DECODER = (32, 64, 128, 256)
_BLOCKS, _PLANES, _EXPANSION = (3, 4, 6, 3), (64, 128, 256, 320), 4


class _ConvNorm(nn.Module):
    def __init__(self, inside: int, outside: int, kernel: int, stride=1, dilation: int = 1) -> None:
        super().__init__()
        self.conv: nn.Module
        if kernel == 1:
            self.conv = Pointwise(inside, outside, stride, standardise=True)
        else:
            self.conv = StandardisedConv(inside, outside, kernel, stride, dilation)
        self.norm = InstanceNorm(outside)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class _Bottleneck(nn.Module):
    def __init__(self, inside: int, planes: int, stride: int) -> None:
        super().__init__()
        outside = planes * _EXPANSION
        self.reduce = _ConvNorm(inside, planes, 1)
        self.spatial = _ConvNorm(planes, planes, 3, stride)
        self.expand = _ConvNorm(planes, outside, 1)
        self.shortcut = _ConvNorm(inside, outside, 1, stride) if stride > 1 or inside != outside else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = activate(self.spatial(activate(self.reduce(x))))
        return activate(add(self.expand(y), self.shortcut(x)))


class _Basic(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.second = _ConvNorm(channels, channels, 3), _ConvNorm(channels, channels, 3)

    def forward(self, x: Tensor) -> Tensor:
        return activate(add(self.second(activate(self.first(x))), x))


class Aspp(nn.Module):
    """Atrous spatial pyramid pooling (Chen et al. 2018) with a global branch, `channels` in and out.

    The global branch exists for the same weights as published but has no effect. The normalisation of its single voxel
    leaves a constant per channel, and the normalisation after `merge` removes constants.
    """

    def __init__(self, channels: int = BOTTLENECK, dilations: tuple[int, ...] = (2, 4, 8)) -> None:
        super().__init__()
        self.branches = nn.ModuleList(
            [_ConvNorm(channels, channels, 1), *(_ConvNorm(channels, channels, 3, dilation=d) for d in dilations)]
        )
        self.whole = _ConvNorm(channels, channels, 1)
        self.merge = _ConvNorm((len(dilations) + 2) * channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        # The normalisation of a single voxel leaves only the shift; the layer of torch refuses such maps. The term
        # times zero keeps the unused weights in the graph, as distributed training requires.
        mean = self.whole.conv(x.mean(dim=(2, 3, 4), keepdim=True))
        constant = activate(0.0 * mean + self.whole.norm.bias.view(1, -1, 1, 1, 1).to(mean.dtype))
        outputs = [activate(branch(x)) for branch in self.branches]
        return activate(self.merge(torch.cat([*outputs, constant.expand(outputs[0].shape)], dim=1)))


class ReferenceEncoder(nn.Module):
    """Encoder (M, 1, D, H, W) -> channels @ scale: 64 @ 1/(1,2,2), 256 @ 1/(2,4,4), 512 @ 1/(4,8,8), 1024 @
    1/(8,16,16), 256 @ 1/(16,32,32)."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = _ConvNorm(1, 64, 7, (1, 2, 2))
        stages, inside = [], 64
        for number, (blocks, planes) in enumerate(zip(_BLOCKS, _PLANES, strict=True)):
            stage = []
            for block in range(blocks):
                stage.append(_Bottleneck(inside, planes, 2 if number and not block else 1))
                inside = planes * _EXPANSION
            stages.append(nn.Sequential(*stage))
        self.stages = nn.ModuleList(stages)
        self.reduce = _ConvNorm(inside, BOTTLENECK, 1)
        self.aspp = Aspp()

    def forward(self, images_M1DHW: Tensor, with_zero: bool = False) -> list[Tensor]:
        """Return the features of each image. With `with_zero` the skips have one more map at the end, that of a zero
        image; the bottleneck has not."""
        x = activate(self.stem(images_M1DHW))
        skips = self._skips(torch.cat([x, self._zero_stem(x.shape[2:]).to(x.dtype)]) if with_zero else x)
        deep = self.stages[3](skips[-1][: len(images_M1DHW)])
        return [*skips, self.aspp(activate(self.reduce(deep)))]

    def zero_skips(self, size: tuple[int, int, int]) -> list[Tensor]:
        """Return the skips (1, C, d, h, w) of a zero image with `size` voxels. Its bottleneck is not needed."""
        depth, height, width = size
        return self._skips(self._zero_stem((depth, (height + 1) // 2, (width + 1) // 2)))

    def _zero_stem(self, size: Sequence[int]) -> Tensor:
        """Return the stem of a zero image. Without a bias it is the shift of the normalisation."""
        return activate(self.stem.norm.bias.view(1, -1, 1, 1, 1).expand(-1, -1, *size).clone())

    def _skips(self, x: Tensor) -> list[Tensor]:
        skips = [x]
        x = F.max_pool3d(x, 3, stride=2, padding=1)
        for stage in list(self.stages)[:3]:
            x = stage(x)
            skips.append(x)
        return skips


class ReferenceDecoder(Decoder):
    """Decoder. `joins` map the filled features of N modalities, shallow to deep; `finish` computes the logits."""

    def __init__(self, modalities: int, regions: int) -> None:
        super().__init__()
        skips = [
            Join(modalities, skip, channels, standardise=True) for skip, channels in zip(SKIPS, _DECODER, strict=True)
        ]
        self.joins = nn.ModuleList([*skips, Join(modalities, BOTTLENECK, _DECODER[-1], kind="up")])
        self.norms = nn.ModuleList([InstanceNorm(channels) for channels in _DECODER])
        self.ups = nn.ModuleList(
            [nn.ConvTranspose3d(deep, shallow, 2, 2, bias=False) for shallow, deep in pairwise(_DECODER)]
        )
        self.blocks = nn.ModuleList([_Basic(channels) for channels in _DECODER])
        self.head = Pointwise(_DECODER[0], regions, standardise=True)

    def start(self, joined: Tensor) -> Tensor:
        return joined

    def step(self, level: int, x: Tensor, joined: Tensor) -> Tensor:
        """Return the map of a level from the map of the next deeper level and the output of the join."""
        if level < len(self.ups):
            x = self.ups[level](x)
        return self.blocks[level](add(activate(self.norms[level](joined)), x))

    def end(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        return F.interpolate(self.head(self.features(x)), size=size, mode="trilinear", align_corners=False)
