"""Layers of the segmentation networks: normalisation, activation, residual units and joining of modalities.

Shapes: B batch, N modalities, M maps (any batch), C channels, D H W or d h w voxels.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOPE = 0.01
"""Negative slope of the leaky ReLU, as in the published LCKD network and in nnU-Net."""


def activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE, inplace=not torch.is_grad_enabled())


def add(x: Tensor, y: Tensor) -> Tensor:
    """Return x + y. Without gradients the sum is written to x, because new memory costs more than the addition."""
    return x + y if torch.is_grad_enabled() or x.dtype != y.dtype else x.add_(y)


def _normalised_for_export(x_MCDHW: Tensor) -> Tensor:
    """Return maps with mean 0 and variance 1, in steps that are exact in single precision in any program.

    The InstanceNormalization of onnxruntime 1.32 sums all voxels one after the other. For 80x160x160 voxels that costs
    1.5e-4 of a standard deviation, and 0.6 if they are all equal; means of means cost 1e-6 and take no longer.
    """

    def mean(x: Tensor) -> Tensor:
        return x.mean(4, keepdim=True).mean(3, keepdim=True).mean(2, keepdim=True)

    centred = x_MCDHW - mean(x_MCDHW)
    return centred / torch.sqrt(mean(centred.square()) + 1e-5)


class InstanceNorm(nn.Module):
    """Affine instance normalisation: mean 0 and variance 1 per channel and map, then scale and shift.

    Without gradients it runs as group normalisation with one channel per group, which is equivalent and nine times as
    fast on a CPU (1.7 instead of 14.8 ms for 16 channels of 64^3, one thread). With gradients both take the same time
    in float32, and instance normalisation is faster in bfloat16.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x_MCDHW: Tensor) -> Tensor:
        if torch.compiler.is_exporting():
            shape = (1, -1, 1, 1, 1)
            return _normalised_for_export(x_MCDHW) * self.weight.view(shape) + self.bias.view(shape)
        if torch.is_grad_enabled():
            return F.instance_norm(x_MCDHW, weight=self.weight, bias=self.bias)
        return F.group_norm(x_MCDHW, len(self.weight), self.weight.to(x_MCDHW.dtype), self.bias.to(x_MCDHW.dtype))


class ModalityNorm(nn.Module):
    """Instance normalisation with a separate scale and shift for each of N modalities.

    The scales and shifts are vectors, so that the weight decay of matrices does not apply to them.
    """

    def __init__(self, channels: int, modalities: int) -> None:
        super().__init__()
        self.weight = nn.ParameterList([torch.ones(channels) for _ in range(modalities)])
        self.bias = nn.ParameterList([torch.zeros(channels) for _ in range(modalities)])

    def forward(self, x_MCDHW: Tensor, modality_M: Tensor) -> Tensor:
        """Normalise M maps. `modality_M` has the index of the modality of each map."""
        # The branches are the same function, as in `InstanceNorm`.
        if torch.compiler.is_exporting():
            x = _normalised_for_export(x_MCDHW)
        elif torch.is_grad_enabled():
            x = F.instance_norm(x_MCDHW)
        else:
            x = F.group_norm(x_MCDHW, x_MCDHW.shape[1])
        scale, shift = (torch.stack(list(p))[modality_M, :, None, None, None] for p in (self.weight, self.bias))
        return torch.addcmul(shift.to(x.dtype), x, scale.to(x.dtype))


def standardised(weight: Tensor) -> Tensor:
    """Standardise weights to mean 0 and variance 1 per output filter (Weight Standardization, Qiao et al. 2019).

    The first axis indexes the filters. The variance is unbiased; as in the published LCKD code, 1e-12 is added to it.
    """
    rows = weight.flatten(1)
    centred = rows - rows.mean(dim=1, keepdim=True)
    # On a CPU torch.var is ten times as slow as the rest of this function.
    variance = torch.linalg.vector_norm(centred, dim=1, keepdim=True).square() / (rows.shape[1] - 1)
    return (centred / torch.sqrt(variance + 1e-12)).view_as(weight)


def pointwise(x_MCDHW: Tensor, weight_OC: Tensor) -> Tensor:
    """Apply a 1x1x1 convolution as a matrix product (M, O, D, H, W); the convolution of torch copies its input."""
    # matmul would merge the maps into one matrix and copy them.
    return torch.bmm(weight_OC.expand(len(x_MCDHW), -1, -1), x_MCDHW.flatten(2)).unflatten(2, x_MCDHW.shape[2:])


class Pointwise(nn.Module):
    """A 1x1x1 convolution with an optional bias, optionally standardised weights, and a stride."""

    def __init__(
        self, inside: int, outside: int, stride: int = 1, *, bias: bool = False, standardise: bool = False
    ) -> None:
        super().__init__()
        self.stride, self.standardise = stride, standardise
        self.weight = nn.Parameter(torch.empty(outside, inside))
        self.bias = nn.Parameter(torch.zeros(outside)) if bias else None

    def forward(self, x_MCDHW: Tensor) -> Tensor:
        x, s = x_MCDHW, self.stride
        y = pointwise(x[:, :, ::s, ::s, ::s], standardised(self.weight) if self.standardise else self.weight)
        return y if self.bias is None else y + self.bias.view(1, -1, 1, 1, 1)


def _in_float32_on_cpu(x: Tensor) -> bool:
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_exporting()
    )


_NATIVE_ELEMENTS = 20480
"""For a single float32 map with at most this many elements in C x D x H, torch (`use_mkldnn` in its Convolution.cpp)
does not choose oneDNN on a CPU but its own convolution, which is two to seven times as slow."""


_CHANNELS_LAST = range(2, 65)
"""Numbers of input channels with which training in float32 on a CPU uses the memory format channels_last_3d, the copies
to it and back included: a step of the compact network is 1.1 times as fast (bench/convolution_speed.py). With more
channels, and without gradients, convolutions are mostly slower in it."""


class Conv(nn.Conv3d):
    """A convolution without bias that keeps the size of a map, divided by the stride.

    On a CPU a single small map is convolved as a batch of two equal ones, of which the first is returned, and training
    in float32 convolves in the memory format channels_last_3d. Input and output are contiguous.
    """

    def __init__(
        self, inside: int, outside: int, kernel: int, stride: int | tuple[int, int, int] = 1, dilation: int = 1
    ) -> None:
        super().__init__(inside, outside, kernel, stride, dilation * (kernel - 1) // 2, dilation, bias=False)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self._is_slow_alone(input):
            return self._conv_forward(input.expand(2, -1, -1, -1, -1), weight, bias)[:1]
        if torch.is_grad_enabled() and input.shape[1] in _CHANNELS_LAST and _in_float32_on_cpu(input):
            last = torch.channels_last_3d
            input, weight = input.contiguous(memory_format=last), weight.contiguous(memory_format=last)
        return super()._conv_forward(input, weight, bias).contiguous()

    def _is_slow_alone(self, x_MCDHW: Tensor) -> bool:
        maps, channels, depth, height, _ = x_MCDHW.shape
        return (
            maps == 1
            and channels > 1  # otherwise torch's own convolution is as fast
            and channels * depth * height <= _NATIVE_ELEMENTS
            and self.kernel_size[0] <= 3
            and _in_float32_on_cpu(x_MCDHW)
        )


class StandardisedConv(Conv):
    """A convolution without bias whose weights are standardised in every forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        return self._conv_forward(input, standardised(self.weight), None)


class Join(nn.Module):
    """Linear map of the concatenated features of N modalities: a 1x1x1 or a 2x2x2 transposed convolution without bias.

    A linear map of a concatenation is the sum of one map per modality. `mixed` returns the terms of this sum, so that
    the features of a modality are mapped only once for all subsets that contain it.

    `weight` is (outside, N * inside) or, for a transposed convolution, (N * inside, outside, 2, 2, 2) as in torch.
    """

    def __init__(
        self,
        modalities: int,
        inside: int,
        outside: int,
        *,
        kind: Literal["pointwise", "up"] = "pointwise",
        standardise: bool = False,
    ) -> None:
        super().__init__()
        self.modalities, self.inside, self.outside = modalities, inside, outside
        self.kind, self.standardise = kind, standardise
        joined = modalities * inside
        self.weight = nn.Parameter(
            torch.empty((outside, joined) if kind == "pointwise" else (joined, outside, 2, 2, 2))
        )

    def forward(self, x_BNCdhw: Tensor) -> Tensor:
        """Map the concatenation of the features (B, N, C, d, h, w) to (B, outside, ...)."""
        x = x_BNCdhw.flatten(1, 2)
        return pointwise(x, self._ready_weight()) if self.kind == "pointwise" else self._up(x, self.weight)

    def by_mixes(self, x_BNCdhw: Tensor, mixes_BNN: Tensor) -> Tensor:
        """Return the sum of W_m x_j times ``mixes[b, j, m]``, (B, outside, ...), for a pointwise join.

        This fills in means without copying the features.
        """
        weights_BOC = self.mixed_weights(mixes_BNN.to(self.weight.dtype)).transpose(1, 2).flatten(2)
        return torch.matmul(weights_BOC, x_BNCdhw.flatten(1, 2).flatten(2)).unflatten(2, x_BNCdhw.shape[3:])

    def of_alike(self, x_MCdhw: Tensor) -> Tensor:
        """Return the terms (N, outside, ...) of all modalities, for N maps or for one map that all of them share."""
        units_NN = torch.eye(self.modalities, device=x_MCdhw.device, dtype=self.weight.dtype)
        return self.mixed(x_MCdhw, units_NN[None] if len(x_MCdhw) == 1 else units_NN[:, None]).flatten(0, 1)

    def mixed(self, x_MCdhw: Tensor, mixes_MQN: Tensor) -> Tensor:
        """Return (M, Q, outside, ...): for each map and each of its Q mixes, the weighted sum of the N terms.

        A unit vector as mix gives the term of the map in the place of that modality.
        """
        q = mixes_MQN.shape[1]
        if self.kind == "pointwise":
            weights_MOC = self.mixed_weights(mixes_MQN).flatten(1, 2)
            out = torch.bmm(weights_MOC, x_MCdhw.flatten(2))
            return out.view(len(x_MCdhw), q, self.outside, *x_MCdhw.shape[2:])
        blocks = self.weight.view(self.modalities, self.inside, self.outside, 2, 2, 2)
        weights = torch.tensordot(mixes_MQN, blocks, dims=1).transpose(1, 2).flatten(2, 3)
        out = torch.cat([self._up(x[None], weight) for x, weight in zip(x_MCdhw, weights, strict=True)])
        return out.view(len(x_MCdhw), q, self.outside, *out.shape[2:])

    def mixed_weights(self, mixes_MQN: Tensor) -> Tensor:
        """Return the matrices (M, Q, outside, inside) of `mixed` for a pointwise join."""
        blocks = self._ready_weight().view(self.outside, self.modalities, self.inside).transpose(0, 1)
        return torch.tensordot(mixes_MQN, blocks, dims=1)

    def _ready_weight(self) -> Tensor:
        return standardised(self.weight) if self.standardise else self.weight

    @staticmethod
    def _up(x: Tensor, weight: Tensor) -> Tensor:
        return F.conv_transpose3d(x, weight, stride=2)


def initialise(module: nn.Module) -> None:
    """Initialise all convolutions in `module` with the Kaiming normal distribution, fan out (He et al. 2015)."""
    for part in module.modules():
        if isinstance(part, (nn.Conv3d, nn.ConvTranspose3d, Pointwise, Join)):
            up = isinstance(part, nn.ConvTranspose3d) or (isinstance(part, Join) and part.kind == "up")
            # The first axis of a transposed convolution is the input, so that its fan out is what torch calls fan in.
            nn.init.kaiming_normal_(part.weight, SLOPE, "fan_in" if up else "fan_out", "leaky_relu")


class Decoder(nn.Module):
    """Base class of the decoders. A network defines `start`, `step` and `end`, of which `finish` consists.

    The last map passes through `features`, an identity, so that feature hooks can name it (``decoder.features``).
    """

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Identity()

    def finish(self, joined: list[Tensor], size: tuple[int, int, int]) -> Tensor:
        """Return the logits (B, R, D, H, W) from the outputs (B, C, d, h, w) of the joins."""
        x = self.start(joined[-1])
        for level in reversed(range(len(joined) - 1)):
            x = self.step(level, x, joined[level])
        return self.end(x, size)

    def start(self, joined: Tensor) -> Tensor:
        """Return the map of the deepest level from the output of its join."""
        raise NotImplementedError

    def step(self, level: int, x: Tensor, joined: Tensor) -> Tensor:
        """Return the map of a level from the map of the next deeper level and the output of the join."""
        raise NotImplementedError

    def end(self, x: Tensor, size: tuple[int, int, int]) -> Tensor:
        """Return the logits (B, R, D, H, W) from the map of the shallowest level."""
        raise NotImplementedError
