"""A comparison in sentences and tables, made from the content of compare.json: for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.report.format import NONE, SPACE, interval, p_value, percent, points
from preceptor.report.tables import Table
from preceptor.statistics import excludes_zero

VERDICTS = {
    "better": "better *",
    "worse": "worse *",
    "better for this seed": "better, one seed *",
    "worse for this seed": "worse, one seed *",
}
HOW_MARKED = "* significant: p below 0.05 in every test that applies, after Holm's correction for their number."
MOST_SENTENCES = 4
BREAKDOWNS = ("answer_types", "regions")
"""Kinds of categories that the table of scores shows as columns."""


def summary(document: Mapping[str, Any]) -> list[Table]:
    """Return a table of scores for each metric, and one for each difference with its categories."""
    tables = [scores_table(document, metric) for metric in document["metrics"]]
    for difference in document["differences"]:
        title = f"{difference['title']}, in percentage points, interval over {difference['covers']}"
        tables.append(delta_table(title, [difference, *difference["categories"]]))
    return tables


def headline(document: Mapping[str, Any]) -> list[str]:
    """Return the overall differences as sentences, those of distilled students first."""
    groups = {group["name"]: group for group in document["groups"]}
    if not document["differences"]:
        name, metric = next(iter(groups)), document["metrics"][0]
        score = score_of(groups[name], metric)
        within = f"95{SPACE}% interval {interval(score['low'], score['high'])}"
        within = "too few for an interval" if score["low"] is None else within
        return [
            f"There is only one group, {name}, and nothing to compare it with: {metric} {percent(score['mean'])} on "
            f"{_counted(score, document['unit'])}, {within}."
        ]
    ordered = sorted(
        document["differences"],
        key=lambda d: (groups[d["group"]]["stage"] != "distilled", -groups[d["group"]]["train_share"]),
    )
    sentences = [_sentence(difference, document) for difference in ordered[:MOST_SENTENCES]]
    if more := len(ordered) - len(sentences):
        marked = sum(difference["significant"] for difference in ordered)
        sentences.append(f"{more} more below; {marked} of all {len(ordered)} overall differences are significant.")
    return sentences


def _sentence(d: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    """Describe an overall difference, with its interval and what the interval covers."""
    unit = document["unit"]
    if d["low"] is None:
        return (
            f"{d['title']}: {points(d['difference'])} points on {_counted(d, unit)}, fewer than the "
            f"{document['minimum_units']} that an interval and a verdict need."
        )
    inside = not excludes_zero(d["low"], d["high"])
    conclusion = {
        "better": "higher scores",
        "worse": "lower scores",
        "better for this seed": "higher scores of this model; one seed does not show that the method helps",
        "worse for this seed": "lower scores of this model; one seed does not show that the method hurts",
        "too few differ": f"too few {unit}s differ for a test",
        "undecided": "not distinguishable from 0" if inside else "not significant among so many tests",
    }.get(d["verdict"], d["verdict"])
    return (
        f"{d['title']}: {points(d['difference'])} points, 95{SPACE}% interval {interval(d['low'], d['high'], points)} "
        f"over {d['covers']}, n = {d['n']}: {conclusion}."
    )


def _counted(d: Mapping[str, Any], unit: str) -> str:
    """Return the number of units and, if some share an image or a patient, of their groups."""
    units = f"{d['n']} {unit}{'' if d['n'] == 1 else 's'}"
    return units if d["groups"] == d["n"] else f"{units} in {d['groups']} group{'' if d['groups'] == 1 else 's'}"


def scores_table(document: Mapping[str, Any], metric: str) -> Table:
    """Return the scores of the groups under a metric."""
    first = document["groups"][0]["scores"]
    shown = [score for score in first if score["metric"] == metric and score["kind"] in BREAKDOWNS]
    rows = []
    for group in document["groups"]:
        score = score_of(group, metric)
        by_name = {(s["kind"], s["category"]): s for s in group["scores"] if s["metric"] == metric}
        seeds = score["over_seeds"]
        # With two seeds the t interval can be wider than the scale.
        over_seeds = interval(max(0.0, seeds["low"]), min(1.0, seeds["high"])) if seeds else NONE
        cells = [str(len(group["seeds"])), percent(score["mean"]), interval(score["low"], score["high"]), over_seeds]
        cells += [percent(by_name[s["kind"], s["category"]]["mean"]) for s in shown]
        rows.append([group["name"], *cells])
    columns = ["Group", "Seeds", metric, f"95{SPACE}% interval", "Over seeds"]
    columns += [f"{score['category']} ({score['n']})" for score in shown]
    whole = score_of(document["groups"][0], metric)
    of = f", in {whole['groups']} groups" if whole["groups"] < whole["n"] else ""
    title = f"{document['protocol']} (n = {whole['n']}{of}): {metric} in{SPACE}%"
    return Table(title, columns, rows, keys=[color(group) for group in document["groups"]])


def delta_table(title: str, deltas: Sequence[Mapping[str, Any]], names: Sequence[str] | None = None) -> Table:
    """Return a table of differences; each row is named by its category unless `names` are given.

    If units share an image or a patient, a column has the number of their groups.
    """
    clustered = any(d["groups"] < d["n"] for d in deltas)
    rows = []
    for number, d in enumerate(deltas):
        seeds = d["over_seeds"]
        rows.append(
            [
                names[number] if names else d["category"],
                str(d["n"]),
                *([str(d["groups"])] if clustered else []),
                points(d["difference"]),
                interval(d["low"], d["high"], points),
                interval(seeds["low"], seeds["high"], points) if seeds else NONE,
                p_value(d["p_holm"]),
                VERDICTS.get(d["verdict"], d["verdict"]),
            ]
        )
    heads = ["", "n", *(["Groups"] if clustered else [])]
    return Table(title, [*heads, "Points", f"95{SPACE}% interval", "Over seeds", "p (Holm)", "Verdict"], rows)


def score_of(group: Mapping[str, Any], metric: str) -> Mapping[str, Any]:
    """Return a group's score on all units."""
    return next(score for score in group["scores"] if score["metric"] == metric and score["kind"] == "all")


def color(group: Mapping[str, Any]) -> str:
    """Return the colour of a group or curve: that of its stage, or of its number among the methods of the stage."""
    return group["stage"] if group["variant"] == 0 else f"v{(group['variant'] - 1) % 4 + 1}"
