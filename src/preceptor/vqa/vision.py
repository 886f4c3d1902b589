"""Vision backbones that return tokens from several depths."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from preceptor.errors import UserError
from preceptor.extension import construct, load_trusted

MEMORY = 2**30
"""Limit for cached features of a frozen backbone in memory, in bytes per model and process."""

log = logging.getLogger("preceptor")


def _norm(channels: int) -> nn.GroupNorm:
    # Group statistics do not depend on how a step is divided into micro-batches and processes; batch statistics do.
    groups = next(g for g in (8, 6, 4, 3, 2, 1) if channels % g == 0)
    return nn.GroupNorm(groups, channels)


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions with a shortcut (He et al. 2016) and group normalisation; the first may have stride 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = _norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = _norm(outputs)
        self.shortcut = nn.Sequential() if inputs == outputs and stride == 1 else nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ConvVision(nn.Module):
    """Residual network trained from scratch. `config` has `channels`, `blocks`, `token_stages` (see ConvVisionConfig).

    The output (B, I, W) has one global token per stage (its mean), followed by all cells of each token stage, row by
    row. Linear layers project the features of all stages to the width W of the last one.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        channels: list[int] = list(config["channels"])
        blocks: list[int] = list(config["blocks"])
        self.width = channels[-1]
        self.token_stages = sorted({stage % len(channels) for stage in config["token_stages"]})
        self.stem = nn.Sequential(nn.Conv2d(3, channels[0], 4, 4), _norm(channels[0]))
        stages, previous = [], channels[0]
        for number, (width, count) in enumerate(zip(channels, blocks, strict=True)):
            layers = [
                ResidualBlock(previous if i == 0 else width, width, 2 if i == 0 and number > 0 else 1)
                for i in range(count)
            ]
            stages.append(nn.Sequential(*layers))
            previous = width
        self.stages = nn.ModuleList(stages)
        self.lift_global = nn.ModuleList(nn.Linear(width, self.width) for width in channels)
        self.lift_cells = nn.ModuleList(nn.Linear(channels[stage], self.width) for stage in self.token_stages)

    def tokens(self, image_size: int) -> int:
        side, count = image_size // 4, len(self.stages)
        for number in range(len(self.stages)):
            side = side if number == 0 else (side + 1) // 2
            count += side * side if number in self.token_stages else 0
        return count

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.stem(pixels.contiguous(memory_format=torch.channels_last))
        glimpses, cells = [], []
        for number, stage in enumerate(self.stages):
            x = stage(x)
            glimpses.append(self.lift_global[number](x.mean(dim=(2, 3)))[:, None])
            if number in self.token_stages:
                cells.append(self.lift_cells[self.token_stages.index(number)](x.flatten(2).transpose(1, 2)))
        return torch.cat(glimpses + cells, dim=1)


class TransformersVision(nn.Module):
    """Vision model of transformers (ViT, DINOv2, SigLIP, ResNet, ConvNeXt, ...).

    `config` has the `config` of the model, the `depths` of the hidden states to use, and the `grid` to which the last
    one is averaged, or None. The output (B, I, W) has one global token of each chosen depth, followed by the tokens of
    the last chosen depth.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        from transformers import AutoConfig, AutoModel

        inner = dict(config["config"])
        self.model = AutoModel.from_config(AutoConfig.for_model(inner.pop("model_type"), **inner))
        if hasattr(self.model, "vision_model"):  # CLIP-like models: use the vision tower
            self.model = self.model.vision_model
        # ViT, CLIP and SigLIP need an option to accept image sizes that differ from pretraining; DINOv2 does not.
        accepts = inspect.signature(self.model.forward).parameters
        self.options = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in accepts else {}
        self.depths: list[int] = list(config.get("depths", [-1]))
        self.grid: int | None = config.get("grid")
        self._known: dict[tuple[Any, ...], list[Tensor]] | None = None
        self._start: _FrozenStart | None = None
        self._image_size: int = config["image_size"]
        self._bytes = 0
        self.train()
        with torch.no_grad():
            *means, last = self._features(torch.zeros(1, 3, config["image_size"], config["image_size"]))
        self.width = last.shape[-1]
        self.lift = nn.ModuleList(nn.Linear(mean.shape[-1], self.width) for mean in means)
        self._tokens = len(means) + last.shape[1]

    def train(self, mode: bool = True) -> TransformersVision:
        """Set the training mode, but keep modules without trainable parameters and all batch norms in eval mode.

        The statistics of small batches are worse than the pretrained ones, and would make a step depend on how it is
        divided into micro-batches and processes.
        """
        super().train(mode)
        for module in self.model.modules():
            if _is_frozen(module) or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.model.parameters())

    def remember(self) -> None:
        """Cache what a frozen backbone computes for every distinct image, up to MEMORY bytes.

        Of a backbone whose last blocks are trainable, the input of the first of these is cached. This pays off on a CPU
        if images repeat: several questions per image, or a finite number of views. It has no effect on a backbone whose
        first block is trainable, or whose layout is unusual, and on other devices.
        """
        self.train(self.training)
        self._start = None if self.frozen else self._frozen_start()
        self._known = {} if self.frozen or self._start is not None else None
        self._bytes = 0

    def _states(self, pixels: Tensor) -> list[Tensor]:
        """Return the hidden state of each chosen depth, (B, n, w) or (B, w, h, w')."""
        hidden = self.model(pixels, output_hidden_states=True, **self.options).hidden_states
        return [hidden[depth] for depth in self.depths]

    def _reduce(self, states: list[Tensor]) -> list[Tensor]:
        """Return the global feature (B, w) of each state, and the tokens (B, n, w) of the last one."""
        *means, last = [state.flatten(2).mean(2) if state.dim() == 4 else state.mean(1) for state in states]
        final = states[-1]
        if self.grid is not None and final.dim() == 3:
            side = math.isqrt(final.shape[1])
            extra = final.shape[1] - side * side  # the class token, and registers
            last = final[:, 0] if extra else last
            final = final[:, extra:].transpose(1, 2).unflatten(2, (side, side))
        if self.grid is not None:
            final = F.adaptive_avg_pool2d(final, self.grid)
        return [*means, last, final.flatten(2).transpose(1, 2) if final.dim() == 4 else final]

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """Return the global feature (B, w) of each chosen depth, and the tokens (B, n, w) of the last one."""
        return self._reduce(self._states(pixels))

    def _frozen_start(self) -> _FrozenStart | None:
        """Return the part of the backbone before its first trainable block, or None if it cannot be run alone."""
        embeddings = getattr(self.model, "embeddings", None)
        blocks: list[nn.Module] = next((list(m) for m in self.model.modules() if isinstance(m, nn.ModuleList)), [])
        count = next((n for n, block in enumerate(blocks) if not _is_frozen(block)), len(blocks))
        if embeddings is None or not 0 < count < len(blocks) or not _is_frozen(embeddings):
            return None
        size = self._image_size
        image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
        with torch.enable_grad():
            states = self._states(image)
        start = _FrozenStart(embeddings, blocks[:count], blocks[count], [not s.requires_grad for s in states])
        if start.fixed[-1]:
            return None
        with torch.no_grad():
            try:
                rest = self._finish(self._begin(image, start), start)
            except Exception:  # a layout that `skipping` does not fit fails in its own way
                return None
            whole = self._features(image)
        same = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-4) for a, b in zip(rest, whole, strict=True))
        return start if same else None

    def _begin(self, pixels: Tensor, start: _FrozenStart) -> list[Tensor]:
        """Return the input of the first trainable block, and the global features of the states before it."""
        inputs: list[Tensor] = []
        hook = start.next.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
        try:
            features = self._features(pixels)
        finally:
            hook.remove()
        return [inputs[0], *(feature for feature, fixed in zip(features, start.fixed, strict=False) if fixed)]

    def _finish(self, begun: list[Tensor], start: _FrozenStart) -> list[Tensor]:
        """Return `_features` from what `_begin` returned."""
        hidden, *known = begun
        size = self._image_size
        with start.skipping(hidden):
            features = self._features(hidden.new_zeros(len(hidden), 3, size, size))
        remaining = iter(known)
        return [next(remaining) if n < len(start.fixed) and start.fixed[n] else f for n, f in enumerate(features)]

    def _cached_features(self, pixels: Tensor, cache: dict[tuple[Any, ...], list[Tensor]]) -> list[Tensor]:
        """Return `_features`, or what `_begin` returns if only the start of the backbone is frozen."""
        setting = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), tuple(pixels.shape[1:]))
        rows = []
        for image in pixels.detach():
            key = (*setting, hashlib.blake2b(image.contiguous().numpy(), digest_size=16).digest())
            features = cache.get(key)
            if features is None:
                # One image at a time: the result must not depend on which images are missing, because a resumed run
                # starts with an empty cache and must compute the same numbers.
                with torch.no_grad():
                    one = image[None]
                    new = self._features(one) if self._start is None else self._begin(one, self._start)
                features = [feature[0] for feature in new]
                size = sum(feature.nbytes for feature in features)
                if self._bytes + size <= MEMORY:
                    cache[key] = features
                    self._bytes += size
                elif self._bytes < MEMORY:
                    self._bytes = MEMORY  # reported once
                    log.warning(
                        "the features of %d images fill the cache of the frozen backbone (%d MiB); those of others are "
                        "computed in every epoch: use fewer data.augment.views or a smaller vision.grid",
                        len(cache),
                        MEMORY >> 20,
                    )
            rows.append(features)
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def tokens(self, image_size: int) -> int:
        return self._tokens

    def forward(self, pixels: Tensor) -> Tensor:
        if self._known is None or pixels.device.type != "cpu" or not len(pixels):
            *means, last = self._features(pixels)
        elif self._start is None:
            *means, last = self._cached_features(pixels, self._known)
        else:
            *means, last = self._finish(self._cached_features(pixels, self._known), self._start)
        # A linear map of the mean equals the mean of the maps, and early depths have many cells.
        glimpses = [lift(mean)[:, None] for lift, mean in zip(self.lift, means, strict=True)]
        return torch.cat([*glimpses, self.lift[-1](last)], dim=1)


@dataclass
class _FrozenStart:
    """The part of a backbone before its first trainable block `next`.

    `fixed` tells of each chosen depth whether its hidden state depends on this part alone.
    """

    embeddings: nn.Module
    blocks: list[nn.Module]
    next: nn.Module
    fixed: list[bool]

    @contextlib.contextmanager
    def skipping(self, hidden: Tensor) -> Iterator[None]:
        """Let the modules of this part return `hidden`, the input of `next`, instead of computing."""
        modules: list[Any] = [self.embeddings, *self.blocks]
        for module in modules:
            module.forward = lambda *args, **kwargs: hidden
        try:
            yield
        finally:
            for module in modules:
                del module.forward


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


class OwnVision(nn.Module):
    """A backbone of the user's; `config` holds `module` (``module:Class``), `arguments` and `image_size`.

    The class maps images (B, 3, H, W) to tokens (B, L, D) and has the attribute `width` = D. Its initial weights are
    left as they are. Raises UserError if it does not fit this description.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        reference, size = config["module"], config["image_size"]
        kind = load_trusted(reference, "vision.module", nn.Module)
        self.model = construct(kind, config.get("arguments", {}), "vision.arguments")
        for module in self.model.modules():
            module._is_hf_initialized = True  # type: ignore[assignment]  # transformers draws no new weights then
        self.model.eval()
        try:
            with torch.no_grad():
                tokens = self.model(torch.zeros(1, 3, size, size))
        except Exception as error:
            raise UserError(
                f"vision.module {reference} fails on images (1, 3, {size}, {size}): {type(error).__name__}: {error}"
            ) from error
        self.model.train()
        width = getattr(self.model, "width", None)
        if not isinstance(tokens, Tensor) or tokens.dim() != 3 or tokens.shape[-1] != width:
            shape = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
            raise UserError(
                f"vision.module {reference} must return tokens (B, L, D) and have the attribute width = D; it returns "
                f"{shape} and has width {width}"
            )
        self.width: int = width
        self._tokens = tokens.shape[1]

    def tokens(self, image_size: int) -> int:
        return self._tokens

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model(pixels)


VISION: dict[str, type[ConvVision] | type[TransformersVision] | type[OwnVision]] = {
    "conv": ConvVision,
    "transformers": TransformersVision,
    "module": OwnVision,
}


def renormalise_pixels(vision: nn.Module, scale: Tensor, shift: Tensor) -> None:
    """Let a backbone compute ``scale * pixels + shift`` first, with a factor and an offset (3, 1, 1) per channel.

    Both become buffers, so the fingerprint of a teacher contains them.
    """
    vision.register_buffer("pixel_scale", scale)
    vision.register_buffer("pixel_shift", shift)
    vision.register_forward_pre_hook(lambda module, inputs: module.pixel_scale * inputs[0] + module.pixel_shift)


def remember_images(model: nn.Module) -> None:
    """Make every frozen backbone in `model` cache its features (see TransformersVision.remember)."""
    for module in model.modules():
        if isinstance(module, TransformersVision):
            module.remember()
