"""The verbs about results: score, compare and report; and how results are printed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.terminal import log_to_stderr, notes, print_table, say, sentence, table
from preceptor.tasks import module

SCORE_EXAMPLES = """\
preceptor score answers.jsonl --protocol vqa-rad/clean/451 --root VQA_RAD
preceptor score answers.jsonl --protocol mine/test --references file
preceptor score dialogues.jsonl --protocol med-grit/given/birdeval
preceptor score masks/ --protocol brats/all/A --root BRATS"""

COMPARE_EXAMPLES = """\
preceptor compare runs/seed-0 runs/seed-1 runs/seed-2
preceptor compare runs/a runs/b --baseline runs/a --output runs/a-and-b"""

REPORT_EXAMPLES = """\
preceptor report runs/mhkd-demo"""


def score(
    predictions: Annotated[
        Path,
        typer.Argument(metavar="PREDICTIONS", exists=True, help="JSONL file of answers, or folder of NIfTI masks."),
    ],
    protocol: Annotated[str, typer.Option(metavar="ID", help="Protocol, such as vqa-rad/clean/451 or brats/all/A.")],
    root: Annotated[
        Path | None, options.existing("DIR", "Folder of the data set. Default: its folder under PRECEPTOR_DATA.")
    ] = None,
    references: Annotated[
        Literal["data", "file"] | None,
        typer.Option(help="Take the right answers from the data set or from the file itself. Default: data."),
    ] = None,
    normaliser: Annotated[
        Literal["mevf", "lower", "vqa-v2"] | None,
        typer.Option(help="Normalize answers in this way instead of the protocol's."),
    ] = None,
    metric: Annotated[
        Literal["accuracy", "bleu", "soft"] | None, typer.Option(help="Use this metric instead of the protocol's.")
    ] = None,
    box_format: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Format of the boxes in answers, such as qwen2.5-vl. Default: detected."),
    ] = None,
    max_pixels: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="With qwen2.5-vl: limit to which the system resized larger images."),
    ] = None,
    output: Annotated[
        Path | None, options.output_file("Write the score of each prediction to this JSONL file.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Score the predictions of any system under a protocol."""
    chosen: dict[str, Any] = {"root": root, "references": references, "normaliser": normaliser, "metric": metric}
    chosen |= {"box_format": box_format, "max_pixels": max_pixels}
    gc.disable()  # Nothing is freed until the end, and the collector would take a third of the time.
    try:
        scored = api.score(predictions, protocol, **{key: value for key, value in chosen.items() if value is not None})
    finally:
        gc.enable()
    if output is not None:
        from preceptor.files import json_lines, write_text

        write_text(output, json_lines(scored.rows))

    def show(_: dict[str, Any]) -> None:
        table(protocol, scored.heads, scored.lines)
        notes(scored.notes)

    say(scored.results, as_json, show)


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", exists=True, file_okay=False, help="Run folders, stage folders, or folders of several seeds."
        ),
    ],
    baseline: Annotated[
        str | None, typer.Option(metavar="NAME", help="Group or run to compare with. Default: the stage baseline.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(metavar="ID", help="Protocol. Default: the main protocol of the first run.")
    ] = None,
    output: Annotated[Path, options.output_folder("Output folder for the page, JSON, CSV, LaTeX and figures.")] = Path(
        "runs/compare"
    ),
    as_json: options.Json = False,
) -> None:
    """Compare runs on the same test set, with intervals and tests.

    All runs must have the same task. Runs that differ only in their seed form a group.
    """
    document = api.compare(runs, baseline=baseline, protocol=protocol, output=output).to_dict()

    def show(document: dict[str, Any]) -> None:
        show_comparison(document)
        sentence(f"report: {output / 'compare.html'}")

    say(document, as_json, show)


def show_comparison(document: dict[str, Any]) -> None:
    """Print the scores of each group, and the differences from the baseline."""
    from preceptor.comparison.summary import HOW_MARKED, summary

    for one in summary(document):
        print_table(one)
    if document["differences"]:
        sentence(HOW_MARKED)
    notes(document["notes"])


def report(run: options.Run, as_json: options.Json = False) -> None:
    """Write the report page of a run again."""
    log_to_stderr()
    path = api.report(run)
    say({"report": str(path)}, as_json, lambda document: print(document["report"]))


def show_results(results: dict[str, Any]) -> None:
    """Print the scores of each stage of a run, as its task summarizes them."""
    for one in module(results["task"], "report").summary(results):
        print_table(one)
    notes(results["notes"])
