"""The verb that exports a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.terminal import log_to_stderr, say, sentence

EXAMPLES = """\
preceptor export runs/rad --output rad-onnx
preceptor export runs/rad --output rad-onnx --int8 --table questions.csv
preceptor export runs/lckd-demo --output lckd-onnx
preceptor export runs/clinkd-demo --output clinkd-hf --to hf
preceptor export runs/lckd-demo --output lckd-bundle --to monai
preceptor export runs/lckd-demo --output lckd.zip --to zip"""


def export(
    run: options.Model,
    output: Annotated[
        Path,
        typer.Option(metavar="PATH", help="Folder, for zip a file; it must not exist.", callback=options.expand_home),
    ],
    to: Annotated[str, typer.Option(metavar="FORMAT", help="Format: onnx, hf, monai or zip.")] = "onnx",
    int8: Annotated[
        bool, typer.Option("--int8", help="For onnx, also write a file whose weights have 8 bits, and compare both.")
    ] = False,
    table: Annotated[
        Path | None,
        options.existing(
            "FILE",
            "CSV or JSONL table: for onnx, of questions with answers, to compare accuracies; for hf and guided "
            "positions, of questions, to count the answers that change without them.",
            folder=False,
        ),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Write a model in a format of other programs, or as one file.

    onnx runs without torch: the preprocessing is part of the export, and a runner comes with it. hf is a Hugging Face
    folder, and monai a bundle of MONAI for segmentation. zip is the model in one file, which predict, serve, export and
    preceptor.load read.
    """
    log_to_stderr()
    settings = api.export(run, output, to=to, int8=int8, table=table)
    say({"file" if to == "zip" else "folder": str(output), **settings}, as_json, show_export)


def show_export(document: dict[str, Any]) -> None:
    """Print how an exported model was checked."""
    if document.get("format") == "zip":
        size = document["bytes"] / 1e6
        return sentence(f"{document['file']}: {document['files']} files, {size:.1f} MB, SHA-256 {document['sha256']}")
    if document.get("format") == "monai":
        return sentence(f"{document['folder']}: a bundle for {document['metadata']['task']}")
    if document.get("format") == "hf":
        sentence(
            f"{document['folder']}: {document['class']} loads all {document['tensors']} tensors, equal to the model"
        )
        return sentence(document["statement"]) if "statement" in document else None
    check = document["check"]
    sentence(
        f"{document['folder']}: the probabilities differ from those of torch by at most "
        f"{check['largest_difference']:.1e} on {check['inputs']} inputs"
    )
    if int8 := document.get("int8"):
        sizes, times = int8["bytes"], int8["milliseconds"]
        sentence(
            f"int8: {sizes['int8'] / 1e6:.2f} instead of {sizes['float32'] / 1e6:.2f} MB, {times['int8']:.1f} instead "
            f"of {times['float32']:.1f} ms, probabilities differ by at most {int8['largest_difference']:.1e}"
        )
    if accuracy := document.get("accuracy"):
        shares = ", ".join(f"{name} {accuracy[name]:.3f}" for name in ("torch", "float32", "int8") if name in accuracy)
        sentence(f"accuracy on {accuracy['questions']} questions: {shares}")
