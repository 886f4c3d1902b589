"""Choose which weights of a Qwen-VL model are trained, and return the weights to save."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from preceptor.errors import UserError

Training = Literal["full", "lora", "frozen_vision"]
# Linear layers of the language model. The vision tower of Qwen2.5-VL has layers with the same names.
ADAPTED = r".*language_model\..*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


@dataclass(frozen=True)
class LoraSettings:
    """Low-rank adapters (Hu et al. 2022) on all linear layers of the language model: W + (alpha / rank) B A."""

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05


ADAPTERS = LoraSettings()
"""The default settings of adapters."""


def set_trainable(model: Any, training: Training, lora: LoraSettings) -> Any:
    """Freeze the weights of a transformers model that are not trained, and return it, in PEFT's wrapper with adapters.

    Raises UserError if the adapters of `lora` need a package that is not installed.
    """
    if training == "frozen_vision":
        pretrained_vision(model).requires_grad_(False)
    if training != "lora":
        return model
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError(
            "training=lora needs peft: pip install 'preceptor[lora]'; or set training=frozen_vision"
        ) from None

    adapted = get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,  # type: ignore[arg-type]
            lora_dropout=lora.dropout,
            target_modules=ADAPTED,
            modules_to_save=["merger"] if new_merger(model) else None,
        ),
    )
    if new_merger(model):
        model.model.visual.merger.modules_to_save.float()  # as PEFT does with the adapters
    return adapted


def new_merger(model: Any) -> bool:
    """Return whether the patch merger was not trained together with the vision tower, and must be trained."""
    return model.config.model_type == "qwen2_vl_dinov2"


def pretrained_vision(model: Any) -> nn.Module:
    """Return the part of the vision tower that `frozen_vision` freezes: all of it except a new merger."""
    return model.model.visual.dinov2 if new_merger(model) else model.model.visual


def base_weights(base: Any) -> dict[str, Tensor]:
    """Return the weights by name, tied weights under each name. `state_dict` would shard gathered weights again."""
    return {name: value.detach() for name, value in base.named_parameters(remove_duplicate=False)}


def merged_weights(base: Any) -> dict[str, Tensor]:
    """Return the weights with the adapters merged: base weights plus the product of the adapter matrices."""
    from peft.tuners.lora import LoraLayer

    unused = ("lora_", ".original_module.")  # the adapters, and what a trained merger replaces
    state = {name: value for name, value in base_weights(base).items() if not any(part in name for part in unused)}
    for name, layer in base.named_modules():
        if isinstance(layer, LoraLayer):
            weight = f"{name}.base_layer.weight"
            for adapter in layer.active_adapters:
                delta: Tensor = layer.get_delta_weight(adapter)  # type: ignore[operator,attr-defined]
                state[weight] = (state[weight].float() + delta.float()).to(state[weight].dtype)
    if new_merger(base):  # trained in float32
        state = {name: value.to(base.dtype) if ".merger." in name else value for name, value in state.items()}
    return {re.sub(r"\.(base_layer|modules_to_save\.\w+)\.", ".", name): value for name, value in state.items()}
