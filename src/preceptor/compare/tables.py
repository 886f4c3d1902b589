"""A comparison as CSV and as LaTeX, made from the content of compare.json."""

from __future__ import annotations

import csv
import io
from typing import Any

_LATEX = {
    "\\": r"\textbackslash{}",
    "{": r"\{",
    "}": r"\}",
    "$": r"\$",
    "&": r"\&",
    "#": r"\#",
    "%": r"\%",
    "_": r"\_",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "\u2212": "$-$",
}


def as_csv(document: dict[str, Any]) -> str:
    """Return one line per score of a group and per difference, on all units and by category."""
    columns = ["row", "group", "baseline", "metric", "kind", "category", "n", "seeds", "mean", "low", "high", "p_holm"]
    file = io.StringIO()
    writer = csv.DictWriter(file, [*columns, "verdict"], extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for group in document["groups"]:
        for score in group["scores"]:
            writer.writerow(score | {"row": "score", "group": group["name"], "seeds": len(group["seeds"])})
    for difference in document["differences"]:
        names = {key: difference[key] for key in ("group", "baseline")}
        for delta in (difference, *difference["categories"]):
            writer.writerow(delta | names | {"row": "difference", "mean": delta["difference"]})
    return file.getvalue()


def as_latex(document: dict[str, Any]) -> str:
    """Return a table for the package booktabs: the score of each group and its difference from the baseline."""
    metrics = document["metrics"]
    differences = {(d["group"], d["metric"]): d for d in document["differences"]}
    heads = [head for metric in metrics for head in (escape_latex(metric), "difference")]
    lines = [
        f"% {' '.join(document['protocol'].split())}, n = {document['n']} {document['unit']}s, 95 % intervals",
        r"\begin{tabular}{lr" + "ll" * len(metrics) + "}",
        r"\toprule",
        " & ".join(["group", "seeds", *heads]) + r" \\",
        r"\midrule",
    ]
    for group in document["groups"]:
        cells = [escape_latex(group["name"]), str(len(group["seeds"]))]
        for metric in metrics:
            score = next(s for s in group["scores"] if s["metric"] == metric and s["kind"] == "all")
            cells.append(_cell(score["mean"], score["low"], score["high"]))
            delta = differences.get((group["name"], metric))
            mark = r"\,*" if delta and delta["significant"] else ""
            cells.append(_cell(delta["difference"], delta["low"], delta["high"], sign="+") + mark if delta else "--")
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def escape_latex(text: str) -> str:
    """Return text without a character that LaTeX would interpret."""
    return "".join(_LATEX.get(character, character) for character in text)


def _cell(mean: float, low: float | None, high: float | None, sign: str = "") -> str:
    """Return a score or difference in percent, with its interval in brackets."""

    def text(value: float) -> str:
        return f"{round(100 * value, 1) + 0.0:{sign}.1f}".replace("-", "$-$")

    return text(mean) if low is None or high is None else f"{text(mean)} [{text(low)}, {text(high)}]"
