"""Class activation maps: where in the image a model found its answer to a question.

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
COLOURS = (0.1, 0.88)  # the part of the turbo colour map that stands out from grey; page.css shows the same scale


def activation_map(model: nn.Module, batch: Batch, class_index: int | None = None) -> np.ndarray:
    """Return the Grad-CAM map (side, side) in [0, 1] of one answer class, row 0 at the top of the image.

    `model` is a VqaTransformer, `batch` holds one sample; without `class_index` the map is that of the most probable
    class. The largest value is 1, unless nothing in the image speaks for the class: then the map is 0 everywhere.
    Gradients of parameters, and which modules are in training mode, are left as they are.
    """
    assert len(batch) == 1, f"one sample, not {len(batch)}"
    tapped: list[Tensor] = []

    def cut(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        # A leaf of its own: the backward pass ends here, whether or not the vision backbone is frozen.
        tapped.append(output.detach().requires_grad_())
        return tapped[0]

    modes = [(module, module.training) for module in model.modules()]
    handle = model.get_submodule("embed_image").register_forward_hook(cut)
    try:
        model.eval()
        with torch.enable_grad():
            logits_C = model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits[0]
            chosen = int(logits_C.argmax()) if class_index is None else class_index
            (gradient_1ID,) = torch.autograd.grad(logits_C[chosen], tapped)
    finally:
        handle.remove()
        for module, training in modes:
            module.training = training
    image_ID, gradient_ID = tapped[0].detach()[0].float(), gradient_1ID[0].float()
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


def overlay(image: Image.Image, activation: np.ndarray) -> Image.Image:
    """Return the RGB image with a map (side, side) in [0, 1] over it, bilinearly enlarged.

    Colour and opacity both rise with the map, so that the image stays plain where the map is 0.
    """
    from matplotlib import colormaps

    enlarged = Image.fromarray(activation.astype(np.float32)).resize(image.size, Image.Resampling.BILINEAR)
    strength_HW = np.clip(np.asarray(enlarged), 0, 1)
    low, high = COLOURS
    colour_HW3 = colormaps["turbo"](low + (high - low) * strength_HW)[..., :3] * 255
    opacity_HW1 = OPACITY * strength_HW[..., None]
    blended = np.asarray(image.convert("RGB")) * (1 - opacity_HW1) + colour_HW3 * opacity_HW1
    return Image.fromarray(np.round(blended).astype(np.uint8))


def place(activation: np.ndarray) -> str:
    """Return in words where a map is strongest, for readers who cannot see it."""
    if activation.max() <= 0:
        return "nothing in the image speaks for this answer"
    row, column = np.unravel_index(int(activation.argmax()), activation.shape)
    side = activation.shape[0]
    vertical = ("upper", "middle", "lower")[int(3 * (row + 0.5) / side)]
    horizontal = ("left", "centre", "right")[int(3 * (column + 0.5) / side)]
    where = "centre" if (vertical, horizontal) == ("middle", "centre") else f"{vertical} {horizontal}"
    return f"strongest in the {where} of the image"
