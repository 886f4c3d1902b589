"""Qwen2-VL with DINOv2 (Oquab et al., 2023) as its vision tower, for a small language model.

Both have patches of 14 pixels, so that image processor, image tokens and rotary positions are those of Qwen2-VL. The
final patch tokens of DINOv2 go through the patch merger of Qwen2-VL, which has new weights: it maps each 2 x 2 tokens
to one token of the language model. Transformers' Auto classes load a saved folder after `import preceptor`.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Dinov2Config,
    Dinov2Model,
    Dinov2PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen2VLModel,
    Qwen2VLPreTrainedModel,
    Qwen2VLTextModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import PatchMerger

MEMORY = 2**30
"""Limit for the remembered features of a frozen DINOv2 in bytes, per model and process."""

log = logging.getLogger("preceptor")


class Dinov2VisionConfig(Dinov2Config):
    """Configuration of DINOv2, and of what Qwen2-VL adds: the merging of patches and the width of the language model.

    `temporal_patch_size` is that of the image processor, which repeats an image to two equal frames.
    """

    model_type = "qwen2_vl_dinov2_vision"
    base_config_key = "vision_config"
    attribute_map = {"in_channels": "num_channels", "depth": "num_hidden_layers"}  # noqa: RUF012

    out_hidden_size: int = 384
    spatial_merge_size: int = 2
    temporal_patch_size: int = 2
    use_mask_token: bool = False


class Qwen2VLDinov2Config(Qwen2VLConfig):
    model_type = "qwen2_vl_dinov2"
    sub_configs_defaults = {"vision_config": Dinov2VisionConfig, "text_config": Qwen2VLTextConfig}  # type: ignore[dict-item]  # noqa: RUF012


class Dinov2Tower(Dinov2PreTrainedModel):
    """DINOv2 and the patch merger, with the interface of Qwen2-VL's vision tower.

    While no weight of DINOv2 is trainable, the features of each image are computed once on a CPU and remembered, up to
    MEMORY bytes: images occur in several dialogues and in every epoch. The merger is not part of what is remembered.
    """

    config_class = Dinov2VisionConfig
    # A sharded tower gathers the merger, which every step computes exactly once. The number of calls of DINOv2 depends
    # on the images of a process, so that its layers belong to the unit that is gathered once per step.
    _no_split_modules = ["PatchMerger"]  # noqa: RUF012

    def __init__(self, config: Dinov2VisionConfig) -> None:
        super().__init__(config)
        self.spatial_merge_size = config.spatial_merge_size
        self.dinov2 = Dinov2Model(config)
        for module in self.dinov2.modules():
            if hasattr(module, "_no_split_modules"):
                module._no_split_modules = None  # type: ignore[assignment]
        self.merger = PatchMerger(config.out_hidden_size, config.hidden_size, config.spatial_merge_size)
        self._known: dict[tuple[Any, ...], Tensor] = {}
        self._bytes = 0
        self.post_init()

    @property
    def frozen(self) -> bool:
        """Whether no weight of DINOv2 is trainable."""
        return not any(parameter.requires_grad for parameter in self.dinov2.parameters())

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return the patch tokens (N, D) as `last_hidden_state`, and the merged tokens (N / 4, W) as `pooler_output`.

        Args:
            hidden_states: Patches (N, channels * 2 * 14 * 14) in the order of Qwen2-VL's image processor: blocks of
                2 x 2 patches, row by row.
            grid_thw: Patches in time, rows and columns of every image (images, 3). Of the two frames of a patch, the
                first is used; those of an image are equal.
        """
        tokens_ND = self.features(hidden_states, grid_thw)
        # Beside frozen weights in half precision, the merger is trained in float32.
        merged_MW = self.merger(tokens_ND.to(self.merger.ln_q.weight.dtype))
        return BaseModelOutputWithPooling(last_hidden_state=tokens_ND, pooler_output=merged_MW)

    def features(self, patches_NC: Tensor, grid_thw: Tensor) -> Tensor:
        """Return the final patch tokens (N, D) of DINOv2 in the order of the patches."""
        sizes = [(height, width) for frames, height, width in grid_thw.tolist() for _ in range(frames)]
        images = patches_NC.split([height * width for height, width in sizes])
        if self.frozen and patches_NC.device.type == "cpu":
            # One image at a time: the result must not depend on which images are known, because a resumed run starts
            # without any and must compute the same numbers.
            return torch.cat([self._recall(image, size) for image, size in zip(images, sizes, strict=True)])
        self.forget()
        found: dict[int, Tensor] = {}
        for size in dict.fromkeys(sizes):  # images of the same size in one batch
            numbers = [number for number, other in enumerate(sizes) if other == size]
            tokens_BND = self._compute(torch.stack([images[number] for number in numbers]), size)
            found |= dict(zip(numbers, tokens_BND, strict=True))
        return torch.cat([found[number] for number in range(len(sizes))])

    def forget(self) -> None:
        """Forget the features of all images."""
        self._known.clear()
        self._bytes = 0

    def _load_from_state_dict(self, *args: Any) -> None:
        self.forget()
        super()._load_from_state_dict(*args)

    def _recall(self, image_NC: Tensor, size: tuple[int, int]) -> Tensor:
        setting = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), image_NC.dtype, size)
        content = image_NC.detach().contiguous().view(torch.uint8).numpy().data
        key = (*setting, hashlib.blake2b(content, digest_size=16).digest())
        if (known := self._known.get(key)) is not None:
            return known
        # Features that are computed in inference mode could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            features = self._compute(image_NC[None].clone(), size)[0]
        if self._bytes + features.nbytes <= MEMORY:
            self._known[key] = features
            self._bytes += features.nbytes
        elif self._bytes < MEMORY:
            self._bytes = MEMORY  # reported once
            log.warning(
                "the features of %d images fill the memory of the frozen DINOv2 (%d MiB); those of others are computed "
                "again whenever they are needed: lower max_pixels",
                len(self._known),
                MEMORY >> 20,
            )
        return features

    def _compute(self, images_BNC: Tensor, size: tuple[int, int]) -> Tensor:
        """Return the final patch tokens (B, N, D) of images of `size` = (rows, columns) in patches."""
        config, merge = self.config, self.spatial_merge_size
        (rows, columns), side = size, config.patch_size
        blocks = (rows // merge, columns // merge, merge, merge)
        patches = images_BNC.unflatten(2, (config.num_channels, config.temporal_patch_size, side, side))[:, :, :, 0]
        patches = patches.unflatten(1, blocks)  # batch, block row, block column, row, column, channel, y, x
        pixels = patches.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(-1, config.num_channels, rows * side, columns * side)
        tokens = self.dinov2(pixels).last_hidden_state[:, 1:]  # without the class token
        tokens = tokens.unflatten(1, (blocks[0], merge, blocks[1], merge)).transpose(2, 3)
        return tokens.flatten(1, 4)


class Qwen2VLDinov2Model(Qwen2VLModel):
    config_class = Qwen2VLDinov2Config

    def __init__(self, config: Qwen2VLDinov2Config) -> None:
        # That of Qwen2VLModel would build the vision tower of Qwen2-VL.
        Qwen2VLPreTrainedModel.__init__(self, config)
        self.visual = Dinov2Tower._from_config(config.vision_config)
        self.language_model = Qwen2VLTextModel._from_config(config.text_config)
        self.rope_deltas = None
        self.post_init()


class Qwen2VLDinov2ForConditionalGeneration(Qwen2VLForConditionalGeneration):
    config_class = Qwen2VLDinov2Config

    def __init__(self, config: Qwen2VLDinov2Config) -> None:
        Qwen2VLPreTrainedModel.__init__(self, config)
        self.model = Qwen2VLDinov2Model(config)
        text: Any = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()


# After this import, AutoConfig and AutoModelForImageTextToText load folders of this model.
AutoConfig.register(Qwen2VLDinov2Config.model_type, Qwen2VLDinov2Config, exist_ok=True)
AutoModelForImageTextToText.register(Qwen2VLDinov2Config, Qwen2VLDinov2ForConditionalGeneration, exist_ok=True)
