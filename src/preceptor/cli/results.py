"""The verbs about results: score, compare and report; and how results are printed."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.terminal import log_to_stderr, notes, percent, say, sentence, table

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

SIGNIFICANT = "* significant: p below 0.05 in every applicable test, after Holm's correction for multiple tests"


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
    output: Annotated[
        Path | None, options.output_file("Write the score of each prediction to this JSONL file.")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Score the predictions of any system under a protocol."""
    chosen = {"root": root, "references": references, "normaliser": normaliser, "metric": metric}
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
        typer.Argument(metavar="RUN", exists=True, file_okay=False, help="Run folders or stage folders."),
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
    from preceptor.compare.run import as_dict

    document = as_dict(api.compare(runs, baseline=baseline, protocol=protocol, output=output))

    def show(document: dict[str, Any]) -> None:
        show_comparison(document)
        sentence(f"report: {output / 'compare.html'}")

    say(document, as_json, show)


def show_comparison(document: dict[str, Any]) -> None:
    """Print the scores of each group, and the differences from the baseline."""
    for metric in document["metrics"]:
        shown = [s for s in document["groups"][0]["scores"] if s["metric"] == metric]
        kinds = [s for s in shown if s["kind"] in ("answer_types", "regions")]
        columns = ["group", "seeds", f"{metric}, %", "95 % interval", "over seeds"]
        columns += [f"{s['category']} ({s['n']})" for s in kinds]
        rows = []
        for group in document["groups"]:
            scores = {(s["metric"], s["kind"], s["category"]): s for s in group["scores"]}
            overall = next(s for s in group["scores"] if s["metric"] == metric and s["kind"] == "all")
            cells = [percent(overall["mean"]), _interval(overall), _interval(overall["over_seeds"])]
            cells += [percent(scores[metric, s["kind"], s["category"]]["mean"]) for s in kinds]
            rows.append([group["name"], str(len(group["seeds"])), *cells])
        n = next(s["n"] for s in shown if s["kind"] == "all")
        table(f"{document['protocol']} (n = {n})", columns, rows)
    columns = ["difference", "n", "points", "95 % interval", "over seeds", "p (Holm)", "verdict"]
    for difference in document["differences"]:
        rows = [_difference(delta) for delta in (difference, *difference["categories"])]
        table(f"{difference['title']}, over {difference['covers']}", columns, rows)
    if document["differences"]:
        sentence(SIGNIFICANT)
    notes(document["notes"])


def _difference(delta: dict[str, Any]) -> list[str]:
    p = delta["p_holm"]
    return [
        delta["category"],
        str(delta["n"]),
        f"{100 * delta['difference']:+.1f}",
        _interval(delta, "+.1f"),
        _interval(delta["over_seeds"], "+.1f"),
        "-" if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}",
        delta["verdict"] + (" *" if delta["significant"] else ""),
    ]


def _interval(bounds: dict[str, Any] | None, form: str = ".1f") -> str:
    if bounds is None or bounds["low"] is None or bounds["high"] is None:
        return "-"
    return f"{100 * bounds['low']:{form}} to {100 * bounds['high']:{form}}"


def report(run: options.Run, as_json: options.Json = False) -> None:
    """Write the report page of a run again."""
    log_to_stderr()
    path = api.report(run)
    say({"report": str(path)}, as_json, lambda document: print(document["report"]))


def show_results(results: dict[str, Any]) -> None:
    """Print the scores of each stage of a run, as its task summarizes them."""
    from preceptor.cli.old_tables import show

    show(results)
