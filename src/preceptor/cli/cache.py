"""The verb cache."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.errors import CHECK_FAILED
from preceptor.cli.terminal import log_to_stderr, say, sentence, table
from preceptor.report.format import NONE, percent

CACHE_EXAMPLES = """\
preceptor cache mhkd-vqa-rad data.root=VQA_RAD
preceptor cache runs/mhkd-vqa-rad --verify 0.05"""


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
