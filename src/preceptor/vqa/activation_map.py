"""Class activation maps: the parts of the image that raise the logit of an answer.

Grad-CAM (Selvaraju et al., ICCV 2017) on the image tokens that enter the fusion, A (I, D): the weight of channel d is
the mean over the tokens of the gradient of the answer's logit, and the map is ReLU(sum over d of weight_d A_id). The
question enters through the gradient, so the same image has another map for another question.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from preceptor.task import Batch
from preceptor.vqa.vision import ConvVision

OPACITY = 0.65  # of the overlay where the map is 1
COLORS = (0.1, 0.88)  # the part of the turbo colour map that stands out from grey; report.css shows the same scale


def activation_map(model: nn.Module, batch: Batch, class_index: int | None = None) -> np.ndarray:
    """Return the Grad-CAM map (side, side) in [0, 1] of one answer class, row 0 at the top of the image.

    `model` is a VqaTransformer and `batch` holds one sample. Without `class_index` the map is that of the most probable
    class. The largest value is 1. If no part of the image raises the logit, the map is 0 everywhere.
    Gradients of parameters and the training mode of modules do not change.
    """
    assert len(batch) == 1, f"one sample, not {len(batch)}"
    image_tokens: list[Tensor] = []

    def detach(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # The backward pass ends at this leaf, whether or not the vision backbone is frozen.
        image_tokens.append(output.detach().requires_grad_())
        return image_tokens[0]

    modes = [(module, module.training) for module in model.modules()]
    handle = model.get_submodule("embed_image").register_forward_hook(detach)
    try:
        model.eval()
        with torch.enable_grad():
            logits_C = model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits[0]
            chosen = int(logits_C.argmax()) if class_index is None else class_index
            (gradient_1ID,) = torch.autograd.grad(logits_C[chosen], image_tokens)
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    image_ID, gradient_ID = image_tokens[0].detach()[0].float(), gradient_1ID[0].float()
    start, side = token_grid(model.get_submodule("vision"), batch["pixels"].shape[-1], len(image_ID))
    cells = slice(start, start + side * side)
    weights_D = gradient_ID[cells].mean(0)
    map_N = torch.relu(image_ID[cells] @ weights_D)
    peak = map_N.max()
    return (map_N / peak if peak > 0 else map_N).reshape(side, side).cpu().numpy()


def token_grid(vision: nn.Module, image_size: int, tokens: int) -> tuple[int, int]:
    """Return (start, side): the image tokens from `start` on are a square grid of `side` cells, row by row.

    ConvVision: the grid of its deepest token stage, which comes last. Any other backbone: the largest square of tokens
    at the end, after global, classification and register tokens.
    """
    if isinstance(vision, ConvVision):
        side = image_size // 4
        for _ in range(vision.token_stages[-1]):
            side = (side + 1) // 2
    else:
        side = math.isqrt(tokens - len(getattr(vision, "lift", ())))
    return tokens - side * side, side


def color_map(activation: np.ndarray, side: int) -> Image.Image:
    """Return a map in [0, 1] as an RGBA image of `side` x `side` pixels, to be laid over the image.

    The map is enlarged bilinearly. Colour and opacity both rise with it, so that the image stays plain where it is 0.
    """
    from matplotlib import colormaps

    enlarged = Image.fromarray(activation.astype(np.float32)).resize((side, side), Image.Resampling.BILINEAR)
    strength_HW = np.clip(np.asarray(enlarged), 0, 1)
    low, high = COLORS
    rgba_HW4 = colormaps["turbo"](low + (high - low) * strength_HW)
    rgba_HW4[..., 3] = OPACITY * strength_HW
    return Image.fromarray(np.round(255 * rgba_HW4).astype(np.uint8))


def describe_peak(activation: np.ndarray) -> str:
    """Describe where a map is strongest, for readers who cannot see it."""
    if activation.max() <= 0:
        return "no part of the image speaks for this answer"
    row, column = np.unravel_index(int(activation.argmax()), activation.shape)
    side = activation.shape[0]
    vertical = ("upper", "middle", "lower")[int(3 * (row + 0.5) / side)]
    horizontal = ("left", "centre", "right")[int(3 * (column + 0.5) / side)]
    where = "centre" if (vertical, horizontal) == ("middle", "centre") else f"{vertical} {horizontal}"
    return f"strongest in the {where} of the image"
