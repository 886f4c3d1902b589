"""The page of a comparison, made from the content of compare.json."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from preceptor.comparison.summary import HOW_MARKED, color, delta_table, headline, score_of, scores_table
from preceptor.report.format import NONE, SPACE, count, interval, p_value, percent, points
from preceptor.report.page import Bar, Bars, Charts, Facts, Heading, Page, Section, Text
from preceptor.report.plots import Dot, Line, interval_plot, line_chart
from preceptor.report.tables import Table

CAPTION = f"95{SPACE}% intervals; filled: significant"
LEAK = "Leaking split: these scores are too high. Answers of test questions occur in training."


def render(document: Mapping[str, Any]) -> str:
    """Return the HTML page."""
    data = document["data"]
    title = " / ".join(str(data[key]) for key in ("name", "variant") if data.get(key))
    described = f": {document['describes']}" if document["describes"] else ""
    models = sum(len(group["runs"]) for group in document["groups"])
    counts = f"{document['n']} {document['unit']}s · {models} models in {len(document['groups'])} groups"
    sections = [
        Section("finding", "Result", _finding(document)),
        Section("differences", "Differences", _differences(document)),
        Section("categories", "By category", _categories(document)),
        Section("curves", "Learning curves", _curves(document)),
        Section("runs", "Runs", _runs(document)),
        Section("reading", "How to read this", _reading(document)),
    ]
    facts = [f"{document['protocol']}{described}", counts]
    leak = LEAK if document["leaks"] else ""
    return Page(f"Comparison of runs on {title}", facts, sections, document["notes"], leak).render()


def _finding(document: Mapping[str, Any]) -> list[Any]:
    first, *others = headline(document)
    metric, unit = document["metrics"][0], document["unit"]
    bars = []
    for group in document["groups"]:
        score = score_of(group, metric)
        bars.append(Bar(group["name"], color(group), score["mean"], score["low"], score["high"]))
    caption = f"Mean {metric} over the test set and the seeds."
    if any(bar.low is not None for bar in bars):
        caption += (
            f" Whiskers are 95{SPACE}% intervals over {unit}s and, with several seeds, seeds. Overlapping whiskers do "
            "not mean that there is no difference: the models are scored on the same "
            f"{unit}s, so the differences below are more precise."
        )
    tables = [scores_table(document, metric) for metric in document["metrics"]]
    return [Text(first, "headline"), *map(Text, others), Bars(bars, caption), *tables]


def _differences(document: Mapping[str, Any]) -> list[Any]:
    differences = document["differences"]
    colors = {group["name"]: color(group) for group in document["groups"]}
    named = [(d["title"], d, colors[d["group"]]) for d in differences]
    names = [d["title"] if len(document["metrics"]) == 1 else f"{d['title']}, {d['metric']}" for d in differences]
    covers = list(dict.fromkeys(d["covers"] for d in differences))
    title = f"All {document['unit']}s, in percentage points; interval over {', or '.join(covers)}"
    table = replace(delta_table(title, differences, names), keys=[key for *_, key in named], notes=[HOW_MARKED])
    return [Charts([(CAPTION, _forest("Differences", named))]), table] if differences else []


def _categories(document: Mapping[str, Any]) -> list[Any]:
    colors = {group["name"]: color(group) for group in document["groups"]}
    blocks: list[Any] = []
    for d in document["differences"]:
        if d["categories"]:
            named = [(f"{part['category']} (n = {part['n']})", part, colors[d["group"]]) for part in d["categories"]]
            heading = d["title"] if len(document["metrics"]) == 1 else f"{d['title']}, {d['metric']}"
            chart = Charts([(CAPTION, _forest(heading, named))])
            blocks += [Heading(heading), chart, delta_table("In percentage points", d["categories"])]
    about = (
        f"The same difference on parts of the {document['unit']}s. The p-values are adjusted for all rows of this "
        "section."
    )
    return [Text(about, "small"), *blocks] if blocks else []


def _forest(title: str, rows: Sequence[tuple[str, Mapping[str, Any], str]]) -> str:
    dots = [
        (name, [Dot("", key, d["difference"], d["low"], d["high"], d["significant"])])
        for name, d, key in rows
        if d["low"] is not None
    ]
    return interval_plot(title, dots, x_title="percentage points")


def _curves(document: Mapping[str, Any]) -> list[Any]:
    charts, rows, keys = [], [], []
    for metric in document["metrics"]:
        lines = []
        for curve in document["curves"]:
            if curve["metric"] != metric:
                continue
            dots = [(100 * point["train_share"], point["mean"]) for point in curve["points"]]
            spreads = [(p["mean"], p["mean"]) if p["low"] is None else (p["low"], p["high"]) for p in curve["points"]]
            lines.append(Line(curve["method"], color(curve), dots, spreads=spreads))
            for p in curve["points"]:
                train = NONE if p["train"] is None else str(p["train"])
                cells = [f"{100 * p['train_share']:g}{SPACE}%", train, str(p["seeds"]), percent(p["mean"])]
                rows.append([curve["method"], metric, *cells, interval(p["low"], p["high"]), str(p["n"])])
                keys.append(color(curve))
        title = f"{metric} by share of the training data"
        charts.append((title, line_chart(title, lines, x_title="share of training data, %", as_percent=True)))
    legend = list(dict.fromkeys((color(curve), curve["method"]) for curve in document["curves"]))
    columns = ["Method", "Metric", "Share", "Training samples", "Seeds", "Mean", f"95{SPACE}% interval", "n"]
    title = f"In{SPACE}%, with 95{SPACE}% intervals over {document['unit']}s and seeds"
    return [Charts(charts, legend), Table(title, columns, rows, keys=keys)]


def _runs(document: Mapping[str, Any]) -> list[Any]:
    metric = document["metrics"][0]
    pairs = {
        (d["group"], pair["seed"]): (pair, d["baseline"])
        for d in document["differences"]
        if d["metric"] == metric
        for pair in d["per_seed"]
    }
    rows, keys = [], []
    for group in document["groups"]:
        for run in group["runs"]:
            pair, baseline = pairs.get((group["name"], run["seed"]), (None, ""))
            difference = f"{points(pair['difference'])} ({baseline})" if pair else NONE
            p = p_value(pair["p_mcnemar"]) if pair else NONE
            rows.append(
                [
                    group["name"],
                    run["run"],
                    str(run["seed"]),
                    percent(run["mean"]),
                    difference,
                    p,
                    count(group["parameters"]),
                ]
            )
            keys.append(color(group))
    columns = ["Group", "Run", "Seed", metric, "Minus baseline, same seed", "McNemar's p", "Parameters"]
    facts = {
        f"Settings of {group['name']}": ", ".join(f"{key}={value}" for key, value in group["settings"].items())
        for group in document["groups"]
        if group["settings"]
    }
    if fingerprint := document["data"].get("test_sha256"):
        facts["Test samples (SHA-256)"] = fingerprint
    title = "Every model; p of single pairs is not adjusted and enters no verdict"
    return [Table(title, columns, rows, keys=keys), Facts(facts)]


def _reading(document: Mapping[str, Any]) -> list[Any]:
    sentences = (
        f"Every difference is of scores on the same {document['unit']}s, in percentage points, group minus baseline.",
        "The interval covers new units and, with several seeds, new seeds: it includes the interval of the paired "
        "bootstrap and, with several seeds or with units in groups, that of the analysis of variance. Units that share "
        "an image or a patient are a group: they are drawn together and count once. \u201cOver seeds\u201d is "
        "Student's t interval of the seeds' differences. It takes the test units as given and does not enter the "
        "verdict.",
        "A difference is marked if all tests agree after Holm's correction; for two single models these are the "
        "bootstrap, McNemar's exact test, which exchanges the models in whole groups, and with units in groups the "
        "analysis of variance. The overall differences are one family of tests, those by category another.",
        "\u201cUndecided\u201d does not mean equal: the interval shows how large a difference is still possible.",
        f"Below {document['minimum_units']} units or groups there is no interval, test or verdict. With one seed a "
        "verdict is about the two trained models, not about the method.",
    )
    return [Text(sentence) for sentence in sentences]
