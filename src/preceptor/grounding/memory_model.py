"""Estimate the memory for the training of a Qwen-VL model before it starts, by named parts."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import torch

from preceptor.distill.chunked_kl import CHUNK, HELD
from preceptor.errors import UserError, nearest
from preceptor.grounding.trained_weights import ADAPTED, ADAPTERS, LoraSettings, Training, new_merger, pretrained_vision

Optimizer = Literal["adamw", "sgd", "none"]
_STATES = {"adamw": 2, "sgd": 1, "none": 0}


class ParameterCounts(NamedTuple):
    """Numbers of parameters.

    Attributes:
        total: All parameters, tied ones once, including adapters.
        trained: Trainable parameters.
        head: Trainable parameters of the output layer.
    """

    total: int
    trained: int
    head: int


def parameter_counts(
    config: Any,
    training: Training = "full",
    lora: LoraSettings = ADAPTERS,
) -> ParameterCounts:
    """Count the parameters of the model of a configuration on the meta device."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    if training == "lora":
        layers = [m for name, m in model.named_modules() if re.fullmatch(ADAPTED, name)]
        trained = sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)
        if new_merger(model):  # a copy of it is trained
            trained += sum(p.numel() for p in model.model.visual.merger.parameters())
        return ParameterCounts(total + trained, trained, 0)
    frozen = sum(p.numel() for p in pretrained_vision(model).parameters()) if training == "frozen_vision" else 0
    return ParameterCounts(total, total - frozen, head)


def memory_estimate(
    config: Any,
    *,
    training: Training = "full",
    lora: LoraSettings = ADAPTERS,
    tokens: int,
    patches: int = 0,
    dtype: torch.dtype = torch.bfloat16,
    autocast: torch.dtype | None = None,
    optimizer: Optimizer = "adamw",
    checkpointing: bool = False,
    teacher: Any = None,
    chunk: int = CHUNK,
    shares: int = 1,
) -> dict[str, int]:
    """Estimate the memory on one device in bytes, by part, and the largest amount at one time as `total`.

    Let N be the number of parameters, n the number of trainable ones, b the bytes per number of `dtype`, and c those of
    the type that is computed in.

    - `weights`: N b. Adapters are in float32. With `autocast`, also the copies for the backward pass, N c.
    - `gradients`: n b. `optimizer`: n b times 2 for AdamW (two moments) or 1 for SGD with momentum.
    - `activations`: for the backward pass, per layer and token, ``c (4 D + 5 A + 4 I) + 8 D``, where D is the width, I
      the inner width, and A the number of heads times the head width. The terms are two normalised states and their
      scaled copies, the float32 states inside both norms, q, k, v repeated for all heads, the result of attention
      twice, and four states of the gated feed-forward. The attention matrix is not stored
      (scaled_dot_product_attention). The norms of q and k in Qwen3-VL add ``(4 + c) (A + K)``, where K is the number of
      key heads times the head width. Float32 adapters on layers in half precision store their inputs in float32, ``4 (5
      D + A + I)``, instead of ``c (2 D + A + I)``. With `checkpointing`: c D per layer, and one complete layer. After
      the last layer: ``(4 + c) D``. A trainable vision tower adds ``c (12 D + 5 I)`` per layer and patch.
    - `logits`: for the chunked losses, five float32 tables of `chunk` tokens. In half precision, also a table of `HELD`
      chunks and, if the output layer is trained, its float32 gradient.
    - `teacher`: the weights of a second model, in the type of its configuration, else in the type computed in.
    - With `shares` processes that shard the student (FSDP2), weights, gradients and optimizer states are divided by
      their number, and `gathered` is the size of all weights, N b. They are gathered for validation, generation and
      saving, when there are no activations; `total` contains the larger of the two. During training one sharded layer
      at a time is gathered, which is neglected.

    The estimate of the activations is within a quarter of measured values; framework and fragmentation need additional
    memory. `tokens` are those of a micro-batch including padding, `patches` those of its images before merging (four
    times their tokens).

    Raises:
        UserError: the optimizer is unknown.
    """
    if optimizer not in _STATES:
        raise UserError(f"optimizer {optimizer!r} is not known{nearest(optimizer, _STATES)}")
    counts = parameter_counts(config, training, lora)
    size, computed = dtype.itemsize, (autocast or dtype).itemsize
    base = counts.total - (counts.trained if training == "lora" else 0)
    trained_size = 4 if training == "lora" else size
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = head * text.num_attention_heads
    width, inner = text.hidden_size, text.intermediate_size
    layer = computed * (4 * width + 5 * attention + 4 * inner) + 8 * width
    if config.model_type == "qwen3_vl":
        layer += (4 + computed) * head * (text.num_attention_heads + text.num_key_value_heads)
    if training == "lora" and computed < 4:
        layer += 4 * (5 * width + attention + inner) - computed * (2 * width + attention + inner)
    activations = _layers(tokens, layer, computed * width, text.num_hidden_layers, checkpointing)
    activations += tokens * (4 + computed) * width
    if training == "full" and patches:
        vision_width = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or int(vision_width * vision.mlp_ratio)
        activations += _layers(
            patches, computed * (12 * vision_width + 5 * inner), computed * vision_width, vision.depth, checkpointing
        )
    weights = base * size + (counts.total - base) * 4
    copies = base * computed if autocast and computed < size else 0
    parts = {
        "weights": weights // shares + copies,
        "gradients": counts.trained * trained_size // shares,
        "optimizer": counts.trained * trained_size * _STATES[optimizer] // shares,
        "activations": activations,
        "logits": 5 * chunk * text.vocab_size * 4
        + (HELD * chunk * text.vocab_size * computed + counts.head * 4 if computed < 4 else 0),
        "teacher": parameter_counts(teacher).total * (getattr(teacher, "dtype", None) or autocast or dtype).itemsize
        if teacher is not None
        else 0,
    }
    total = sum(parts.values())
    if shares > 1:
        parts["gathered"] = weights
        total += max(0, weights - parts["activations"] - parts["logits"])
    return parts | {"total": total}


def _layers(tokens: int, layer: int, state: int, layers: int, checkpointing: bool) -> int:
    return tokens * (layers * state + layer if checkpointing else layers * layer)
