"""How much memory the training of a Qwen-VL model takes, before it starts: an estimate, in named parts."""

from __future__ import annotations

import re
from typing import Any, Literal, NamedTuple

import torch

from preceptor.distill.chunked_kl import CHUNK, HELD
from preceptor.errors import UserError, nearest
from preceptor.grounding.model import ADAPTED, LoraSettings, Training

Optimizer = Literal["adamw", "sgd", "none"]
ADAPTERS = LoraSettings()
_STATES = {"adamw": 2, "sgd": 1, "none": 0}


class ParameterCounts(NamedTuple):
    """`total` numbers of a model, tied ones once; `trained` of them, or of adapters beside them; `head` of the output
    weights, where they learn."""

    total: int
    trained: int
    head: int


def parameter_counts(
    config: Any,
    training: Training = "full",
    lora: LoraSettings = ADAPTERS,
) -> ParameterCounts:
    """Count the parameters of a configuration's model without making one (on the meta device)."""
    from transformers import AutoModelForImageTextToText

    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    total = sum(p.numel() for p in model.parameters())
    head = model.get_output_embeddings().weight.numel()
    if training == "lora":
        layers = [m for name, m in model.named_modules() if re.fullmatch(ADAPTED, name)]
        trained = sum(lora.rank * (layer.in_features + layer.out_features) for layer in layers)
        return ParameterCounts(total + trained, trained, 0)
    frozen = sum(p.numel() for p in model.model.visual.parameters()) if training == "frozen_vision" else 0
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
    """Return bytes by part on one device, and what is needed at once as `total`.

    With N parameters of which n learn, b bytes a number of `dtype`, c of the type computed in:

    - `weights`: N b. Adapters are in float32. Under `autocast` also the copies that are kept for the backward pass,
      N c.
    - `gradients`: n b; `optimizer`: n b times 2 for AdamW (two moments), 1 for SGD with momentum.
    - `activations`: what a layer keeps for its backward pass, per token of width D, inner width I, and A = heads times
      head width: ``c (4 D + 5 A + 4 I) + 8 D``. These are two normed states and their scaled copies, the float32 states
      inside both norms; q, k, v repeated to all heads, and attention's result twice; four states of the gated
      feed-forward. Attention's own table is not held (scaled_dot_product_attention). Qwen3-VL's norms of q and k add
      ``(4 + c) (A + K)``, K = key heads times head width. Adapters in float32 on layers in a half precision keep their
      inputs in float32, ``4 (5 D + A + I)``, instead of ``c (2 D + A + I)``. With `checkpointing`: c D a layer, and one
      layer in full. After the last layer ``(4 + c) D``. Of the vision tower, where it learns, for each patch
      ``c (12 D + 5 I)`` a layer.
    - `logits`: of the chunked losses, five tables of `chunk` tokens in float32, and in a half precision one of `HELD`
      chunks and, where the output weights learn, the float32 sum of their gradient.
    - `teacher`: a second model's weights, in the type that its configuration names, else in that computed in.
    - With `shares` processes that share out the student (FSDP2): weights, gradients and states over their number, and
      `gathered`, the whole weights N b. These are there while the model validates, answers or is saved, when nothing
      is kept for a backward pass: of the two the larger counts in `total`. While it trains, of the sharded layers one
      is gathered at a time, which is left out.

    The activations are an estimate, held to within a quarter of what is measured; framework and fragmentation take
    their share above. `tokens` are those of a batch with its padding, `patches` those of its images before merging
    (four times their tokens).

    Raises UserError for an unknown optimizer.
    """
    if optimizer not in _STATES:
        raise UserError(f"optimizer {optimizer!r} is not known{nearest(optimizer, _STATES)}")
    counts = parameter_counts(config, training, lora)
    size, computed = dtype.itemsize, (autocast or dtype).itemsize
    base = counts.total - (counts.trained if training == "lora" else 0)
    learnt = 4 if training == "lora" else size
    text, vision = config.text_config, config.vision_config
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    attention = head * text.num_attention_heads
    width, inner = text.hidden_size, text.intermediate_size
    layer = computed * (4 * width + 5 * attention + 4 * inner) + 8 * width
    if config.model_type == "qwen3_vl":
        layer += (4 + computed) * head * (text.num_attention_heads + text.num_key_value_heads)
    if training == "lora" and computed < 4:
        layer += 4 * (5 * width + attention + inner) - computed * (2 * width + attention + inner)
    kept = _layers(tokens, layer, computed * width, text.num_hidden_layers, checkpointing)
    kept += tokens * (4 + computed) * width
    if training == "full" and patches:
        wide = getattr(vision, "embed_dim", None) or vision.hidden_size
        inner = getattr(vision, "intermediate_size", None) or int(wide * vision.mlp_ratio)
        kept += _layers(patches, computed * (12 * wide + 5 * inner), computed * wide, vision.depth, checkpointing)
    held = base * size + (counts.total - base) * 4
    copies = base * computed if autocast and computed < size else 0
    parts = {
        "weights": held // shares + copies,
        "gradients": counts.trained * learnt // shares,
        "optimizer": counts.trained * learnt * _STATES[optimizer] // shares,
        "activations": kept,
        "logits": 5 * chunk * text.vocab_size * 4
        + (HELD * chunk * text.vocab_size * computed + counts.head * 4 if computed < 4 else 0),
        "teacher": parameter_counts(teacher).total * (getattr(teacher, "dtype", None) or autocast or dtype).itemsize
        if teacher is not None
        else 0,
    }
    total = sum(parts.values())
    if shares > 1:
        parts["gathered"] = held
        total += max(0, held - parts["activations"] - parts["logits"])
    return parts | {"total": total}


def _layers(tokens: int, layer: int, state: int, layers: int, checkpointing: bool) -> int:
    return tokens * (layers * state + layer if checkpointing else layers * layer)
