"""Tokenizer, image processor and other files of a Qwen-VL checkpoint, held against its configuration."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.grounding.dialogue_encoder import MARKS
from preceptor.grounding.new_vlm import CHAT_TEMPLATE


def load_tokenizer(source: str | Path, place: str, config: Any, options: dict[str, Any]) -> Any:
    """Return the tokenizer with the checkpoint's chat template, or ours where it has none.

    `source` is what the user named, `place` what `from_pretrained` loads. Raises UserError where the tokenizer is not
    there, lacks a token of images or boxes, or numbers the placeholder otherwise than `config`.
    """
    from transformers import AutoTokenizer

    tokenizer = read_part(source, "a tokenizer", lambda: AutoTokenizer.from_pretrained(place, **options))
    missing = [token for token in MARKS if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id or missing:
        raise UserError(
            f"the tokenizer of {source} lacks {missing[0] if missing else '<|image_pad|>'!r}, or numbers it otherwise "
            "than config.json; copy tokenizer.json and tokenizer_config.json from the checkpoint again"
        )
    # Where a processor has a template of its own, the tokenizer's may know no images.
    file = checkpoint_file(place, "chat_template.jinja", options)
    old = checkpoint_file(place, "chat_template.json", options)
    if file is None and old is not None:
        tokenizer.chat_template = json.loads(old.read_text("utf-8"))["chat_template"]
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


def load_image_processor(source: str | Path, place: str, config: Any, options: dict[str, Any]) -> Any:
    """Return transformers' PIL image processor; raise UserError where it is not there or does not fit `config`."""
    from transformers import AutoImageProcessor

    processor = read_part(
        source,
        "an image processor (preprocessor_config.json)",
        lambda: AutoImageProcessor.from_pretrained(place, backend="pil", **options),
    )
    vision = config.vision_config
    wanted = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for name, value in wanted.items():
        if getattr(processor, name, None) != value:
            raise UserError(
                f"preprocessor_config.json of {source} says {name} {getattr(processor, name, None)}, its config.json "
                f"{value}; copy both from the checkpoint again"
            )
    return processor


def shrink_images(processor: Any, max_pixels: int) -> None:
    """Let an image processor shrink images to at most `max_pixels`; raise UserError below one token's."""
    least = (processor.patch_size * processor.merge_size) ** 2
    if max_pixels < least:
        raise UserError(f"max_pixels {max_pixels} is less than one token of an image has; give at least {least}")
    shortest = min(processor.size["shortest_edge"], max_pixels)
    processor.size = type(processor.size)(shortest_edge=shortest, longest_edge=max_pixels)


def read_part(source: str | Path, part: str, read: Callable[[], Any]) -> Any:
    """Return what `read` returns; what a damaged or missing file makes it raise is a UserError."""
    from safetensors import SafetensorError

    try:
        return read()
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = str(error).strip().splitlines()
        raise UserError(
            f"{source}: {part} cannot be read ({reason[0] if reason else type(error).__name__}); give a whole one"
        ) from error


def checkpoint_file(place: str, name: str, options: dict[str, Any]) -> Path | None:
    """Return a file of a folder, or of a hub name's cache, where there is one."""
    from transformers.utils import cached_file

    found = cached_file(
        place,
        name,
        local_files_only=options["local_files_only"],
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(found) if found else None
