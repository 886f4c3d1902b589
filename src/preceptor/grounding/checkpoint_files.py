"""Load tokenizer, image processor and other files of a Qwen-VL checkpoint, and check them against its configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from PIL import Image

from preceptor.errors import UserError
from preceptor.grounding.dialogue_encoder import MARKS
from preceptor.grounding.new_vlm import CHAT_TEMPLATE
from preceptor.pipeline.model_files import read_settings, reading

MOST_PIXELS = 2**22
"""Largest number of pixels to which a checkpoint may enlarge small images; those of Qwen-VL have less than 2^18."""


def load_tokenizer(source: str | Path, place: str, config: Any, options: dict[str, Any]) -> Any:
    """Load the tokenizer with the chat template of the checkpoint, or a default template if it has none.

    Args:
        source: Checkpoint as the user named it, for messages.
        place: Argument of `from_pretrained`.
        config: Configuration of the model.
        options: Options of `from_pretrained`.

    Raises:
        UserError: the tokenizer does not exist, lacks a token of images or boxes, or has another placeholder id than
            `config`.
    """
    from transformers import AutoTokenizer

    with reading(source, "a tokenizer"):
        tokenizer: Any = AutoTokenizer.from_pretrained(place, **options)
    missing = [token for token in MARKS if tokenizer.convert_tokens_to_ids(token) in (None, tokenizer.unk_token_id)]
    if tokenizer.convert_tokens_to_ids("<|image_pad|>") != config.image_token_id or missing:
        raise UserError(
            f"the tokenizer of {source} lacks {missing[0] if missing else '<|image_pad|>'!r}, or has another id for it "
            "than config.json; copy tokenizer.json and tokenizer_config.json from the checkpoint again"
        )
    # If the processor has a template of its own, the template of the tokenizer may not support images.
    file = checkpoint_file(place, "chat_template.jinja", options)
    json_file = checkpoint_file(place, "chat_template.json", options)
    if file is None and json_file is not None:
        with reading(source, json_file.name):
            tokenizer.chat_template = read_settings(json_file)["chat_template"]
    tokenizer.chat_template = tokenizer.chat_template or CHAT_TEMPLATE
    return tokenizer


def load_image_processor(source: str | Path, place: str, config: Any, options: dict[str, Any]) -> Any:
    """Load the PIL image processor. Raises UserError if it does not exist or does not match `config`."""
    from transformers import AutoImageProcessor

    with reading(source, "an image processor (preprocessor_config.json)"):
        processor: Any = AutoImageProcessor.from_pretrained(place, backend="pil", **options)
    vision = config.vision_config
    expected = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for name, value in expected.items():
        if getattr(processor, name, None) != value:
            raise UserError(
                f"preprocessor_config.json of {source} has {name}={getattr(processor, name, None)}, but its "
                "config.json "
                f"has {value}; copy both files from the checkpoint again"
            )
    with reading(source, "an image processor (preprocessor_config.json)"):
        if not 0 < (smallest := processor.size["shortest_edge"]) <= MOST_PIXELS:
            raise UserError(f"preprocessor_config.json enlarges images to {smallest} pixels")
        values = processor(images=[Image.new("RGB", (64, 64))], return_tensors="pt")["pixel_values"]
        if not bool(values.isfinite().all()):
            raise UserError("preprocessor_config.json turns images into numbers that are not finite")
    return processor


def shrink_images(processor: Any, max_pixels: int) -> None:
    """Limit the size of processed images to `max_pixels`. Raises UserError if that is less than one token."""
    minimum = (processor.patch_size * processor.merge_size) ** 2
    if max_pixels < minimum:
        raise UserError(f"max_pixels={max_pixels} is less than one image token; it must be at least {minimum}")
    shortest = min(processor.size["shortest_edge"], max_pixels)
    processor.size = type(processor.size)(shortest_edge=shortest, longest_edge=max_pixels)


def checkpoint_file(place: str, name: str, options: dict[str, Any]) -> Path | None:
    """Return a file of a folder or of a cached hub model, or None if it does not exist."""
    from transformers.utils import cached_file

    path = cached_file(
        place,
        name,
        local_files_only=options["local_files_only"],
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    return Path(path) if path else None
