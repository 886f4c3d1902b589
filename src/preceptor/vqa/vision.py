"""Vision backbones that return tokens from several depths."""

from __future__ import annotations

import hashlib
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from preceptor.errors import UserError
from preceptor.extension import construct, load_trusted

MEMORY = 512 * 2**20  # bytes of features that a frozen backbone remembers


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

    `config` has the `config` of the model and the `depths` of the hidden states to use. The output (B, I, W) has the
    mean of each chosen depth, followed by the tokens of the last chosen depth.
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
        self._known: dict[tuple[Any, ...], list[Tensor]] | None = None
        self._bytes = 0
        self.train()
        with torch.no_grad():
            *means, last = self._features(torch.zeros(1, 3, config["image_size"], config["image_size"]))
        self.width = last.shape[-1]
        self.lift = nn.ModuleList(nn.Linear(mean.shape[-1], self.width) for mean in means)
        self._tokens = len(means) + last.shape[1]

    def train(self, mode: bool = True) -> TransformersVision:
        """Set the training mode, but keep a frozen backbone and all batch norms in eval mode.

        The statistics of small batches are worse than the pretrained ones, and would make a step depend on how it is
        divided into micro-batches and processes.
        """
        super().train(mode)
        for module in [self.model] if self.frozen else self.model.modules():
            if self.frozen or isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    @property
    def frozen(self) -> bool:
        return not any(parameter.requires_grad for parameter in self.model.parameters())

    def remember(self) -> None:
        """Cache the features of a frozen backbone for every distinct image, up to MEMORY bytes.

        This pays off on a CPU if images repeat: several questions per image, or a finite number of views. It has no
        effect on a trainable backbone or on other devices.
        """
        self._known = {} if self.frozen else None

    def _features(self, pixels: Tensor) -> list[Tensor]:
        """Return the mean (B, w) of each chosen depth, and the tokens (B, n, w) of the last one."""
        hidden = self.model(pixels, output_hidden_states=True, **self.options).hidden_states
        chosen = [hidden[depth] for depth in self.depths]
        states = [h.flatten(2).transpose(1, 2) if h.dim() == 4 else h for h in chosen]
        return [*(state.mean(1) for state in states), states[-1]]

    def _cached_features(self, pixels: Tensor, cache: dict[tuple[Any, ...], list[Tensor]]) -> list[Tensor]:
        setting = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), tuple(pixels.shape[1:]))
        rows = []
        for image in pixels.detach():
            key = (*setting, hashlib.blake2b(image.contiguous().numpy(), digest_size=16).digest())
            features = cache.get(key)
            if features is None:
                # One image at a time: the result must not depend on which images are missing, because a resumed run
                # starts with an empty cache and must compute the same numbers.
                with torch.no_grad():
                    features = [feature[0] for feature in self._features(image[None])]
                size = sum(feature.nbytes for feature in features)
                if self._bytes + size <= MEMORY:
                    cache[key] = features
                    self._bytes += size
            rows.append(features)
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    def tokens(self, image_size: int) -> int:
        return self._tokens

    def forward(self, pixels: Tensor) -> Tensor:
        if self._known is None or pixels.device.type != "cpu" or not len(pixels):
            *means, last = self._features(pixels)
        else:
            *means, last = self._cached_features(pixels, self._known)
        # A linear map of the mean equals the mean of the maps, and early depths have many cells.
        glimpses = [lift(mean)[:, None] for lift, mean in zip(self.lift, means, strict=True)]
        return torch.cat([*glimpses, self.lift[-1](last)], dim=1)


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


def remember_images(model: nn.Module) -> None:
    """Make every frozen backbone in `model` cache its features (see TransformersVision.remember)."""
    for module in model.modules():
        if isinstance(module, TransformersVision):
            module.remember()
