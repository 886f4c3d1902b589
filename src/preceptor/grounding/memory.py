"""Estimate the device memory for a phase of training before it starts, and warn if it is too large."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from preceptor.data.types import Dialogue
from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.grounding.checkpoint_files import load_image_processor, load_tokenizer, shrink_images
from preceptor.grounding.config import DialogueDataConfig, GroundingRecipe, VlmConfig, VlmRunConfig
from preceptor.grounding.dialogue_encoder import DialogueEncoder
from preceptor.grounding.memory_model import memory_estimate
from preceptor.grounding.model import stored_box_format
from preceptor.grounding.trained_weights import LoraSettings
from preceptor.hub import find_pretrained
from preceptor.pipeline.model_files import reading
from preceptor.training.fsdp import shard_settings
from preceptor.training.setup import uses_bf16

log = logging.getLogger("preceptor")
GIB = 2**30
SAMPLED = 64
"""Number of evenly spaced dialogues, of which the longest is used for the estimate."""


def estimate_memory(
    config: VlmRunConfig,
    model: Any,
    encoder: DialogueEncoder,
    rows: Sequence[Dialogue],
    teacher: Any = None,
) -> dict[str, int]:
    """Estimate the bytes on one device for training on `rows`, by part (see `memory_estimate`).

    `model` and `teacher` are configurations of transformers. A teacher counts if it is on the device during a step. A
    micro-batch is assumed to consist of dialogues as long as the longest of `SAMPLED` dialogues.
    """
    state, train = processes(), config.train
    sharded = shard_settings() is not None and state.num_processes > 1
    micro_batch = max(1, train.batch_size // (state.num_processes * train.gradient_accumulation_steps))
    encoded = [encoder.encode(row) for row in rows[:: max(1, len(rows) // SAMPLED)][:SAMPLED]]
    tokens = max(len(row.input_ids) for row in encoded)
    patches = max(0 if row.pixel_values is None else len(row.pixel_values) for row in encoded)
    bf16 = uses_bf16(train)
    lora, adapters = config.model.lora, config.model.training == "lora"
    return memory_estimate(
        model,
        training=config.model.training,
        lora=LoraSettings(lora.rank, lora.alpha, lora.dropout),
        tokens=micro_batch * tokens,
        patches=micro_batch * patches,
        dtype=torch.bfloat16 if adapters and lora.base == "bfloat16" else torch.float32,
        autocast=torch.bfloat16 if bf16 else None,
        optimizer=train.optimizer,
        checkpointing=config.model.gradient_checkpointing,
        teacher=teacher,
        shares=state.num_processes if sharded else 1,
    )


def load_model_config(
    config: VlmConfig, source: str, allow_downloads: bool, data: DialogueDataConfig
) -> tuple[Any, DialogueEncoder]:
    """Load configuration and encoder of a checkpoint without its weights. `data` has the limits of image files.

    Raises:
        UserError: the checkpoint does not exist or is incomplete.
    """
    from transformers import AutoConfig

    location = find_pretrained(source, allow_downloads=allow_downloads)
    if location is None:
        raise UserError(f"{source} is not available; its configuration is needed to estimate the memory")
    options = {"local_files_only": not allow_downloads, "trust_remote_code": False}
    with reading(source, "config.json"):
        model = AutoConfig.from_pretrained(location, **options)
    processor = load_image_processor(source, location, model, options)
    shrink_images(processor, config.max_pixels)
    tokenizer = load_tokenizer(source, location, model, options)
    name = stored_box_format(location, model, options) if config.box_format == "auto" else config.box_format
    return model, DialogueEncoder(
        tokenizer,
        processor,
        model.image_token_id,
        max_length=config.max_length,
        box_format=name,
        **data.image_limits,
    )


def available() -> int:
    """Return the bytes that this process can use: the free memory of its GPU, or its share of the main memory."""
    device = processes().device
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_memory(info: Path = Path("/proc/meminfo")) -> int:
    """Return the bytes of available main memory from `info`, or of all free pages if there is no such file."""
    try:
        lines = dict(line.split(":", 1) for line in info.read_text("utf-8").splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError, IndexError):
        names = ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES")
        name = next((name for name in names if name in os.sysconf_names), None)
        return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE") if name else 0


def sentence(title: str, parts: dict[str, int], available_bytes: int) -> str:
    """Describe an estimate in one sentence, in GiB."""
    named = ", ".join(f"{name} {_gib(size)}" for name, size in parts.items() if name != "total" and size)
    return f"{title}: about {_gib(parts['total'])} GiB of {_gib(available_bytes)} per device ({named})"


def warning(
    title: str, parts: dict[str, int], available_bytes: int, config: VlmRunConfig, recipe: GroundingRecipe
) -> str | None:
    """Return a warning with suggestions if the estimate exceeds the available memory, else None."""
    if not available_bytes or parts["total"] <= available_bytes:
        return None
    model = config.model
    role = "teacher" if config is recipe.teacher else "student"
    fixes = []
    if not model.gradient_checkpointing:
        fixes.append(f"{role}.model.gradient_checkpointing=true")
    if model.training != "lora":
        fixes.append(f"{role}.model.training=lora with {role}.model.lora.base=bfloat16")
    elif model.lora.base == "float32":
        fixes.append(f"{role}.model.lora.base=bfloat16")
    fixes.append(f"a smaller {role}.model.max_pixels than {model.max_pixels}")
    fixes.append(f"a {role}.train.gradient_accumulation_steps above {config.train.gradient_accumulation_steps}")
    if parts["teacher"]:
        online = recipe.method.pseudo_labels.logits == "online"
        fixes.append(
            "method.pseudo_labels.logits=cached with method.teacher_offload=cpu"
            if online
            else "method.teacher_offload=cpu"
        )
    if "gathered" not in parts:
        fixes.append("several processes with FSDP2 (docs/how-to/scale.md)")
    return (
        f"{title} is expected to need {_gib(parts['total'])} GiB, but the device has {_gib(available_bytes)}; try "
        f"{', '.join(fixes[:-1])} or {fixes[-1]}"
    )


def announce(
    title: str,
    recipe: GroundingRecipe,
    config: VlmRunConfig,
    model: Any,
    encoder: DialogueEncoder,
    rows: Sequence[Dialogue],
    teacher: Any = None,
) -> None:
    """Log the estimate of a phase of training, and a warning if the memory is insufficient."""
    parts, available_bytes = estimate_memory(config, model, encoder, rows, teacher), available()
    log.info(sentence(f"memory of {title}", parts, available_bytes))
    if (message := warning(title, parts, available_bytes, config, recipe)) is not None:
        log.warning(message)


def _gib(size: int) -> str:
    return f"{size / GIB:.1f}" if size >= GIB else f"{size / GIB:.2g}"
