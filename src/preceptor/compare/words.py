"""A comparison in sentences and in rows for a terminal. Plain text."""

from __future__ import annotations

from collections.abc import Sequence

from preceptor.compare.deltas import Contrast, Delta, Score
from preceptor.compare.groups import Group
from preceptor.compare.run import Comparison
from preceptor.report.words import NONE, SPACE, percent, points
from preceptor.statistics import MINIMUM_UNITS

VERDICTS = {
    "better": "better *",
    "worse": "worse *",
    "better for this seed": "better, one seed *",
    "worse for this seed": "worse, one seed *",
    "undecided": "undecided",
    "too few differ": "too few differ",
    "too few units": "too few units",
}
HOW_MARKED = "* significant: p below 0.05 in every test that applies, after Holm's correction for their number"
MOST_SENTENCES = 4


def headline(comparison: Comparison) -> list[str]:
    """Return the overall differences as sentences, those of distilled students first."""
    if not comparison.contrasts:
        group, score = comparison.groups[0], comparison.score(comparison.groups[0])
        return [
            f"There is only one group, {group.name}, and nothing to compare it with: {comparison.metrics[0]} "
            f"{percent(score.mean)} on {score.n} {comparison.unit}s, 95{SPACE}% interval {interval(score)}."
        ]
    ordered = sorted(comparison.contrasts, key=lambda c: (c.group.stage != "distilled", -c.group.share))
    sentences = [sentence(c) for c in ordered[:MOST_SENTENCES]]
    if more := len(ordered) - len(sentences):
        marked = sum(c.overall.significant for c in ordered)
        sentences.append(f"{more} more below; {marked} of all {len(ordered)} overall differences are significant.")
    return sentences


def sentence(c: Contrast) -> str:
    """Return an overall difference as a sentence, with its interval and what the interval covers."""
    d = c.overall
    if d.low is None or d.high is None:
        return (
            f"{c.title}: {points(d.difference)} points on {d.n} {c.unit}s, fewer than the {MINIMUM_UNITS} that an "
            "interval and a verdict need."
        )
    conclusion = {
        "better": "higher scores",
        "worse": "lower scores",
        "better for this seed": "higher scores of this model; one seed does not show that the method helps",
        "worse for this seed": "lower scores of this model; one seed does not show that the method hurts",
        "too few differ": f"too few {c.unit}s differ for a test",
        "undecided": "not distinguishable from 0" if d.low <= 0 <= d.high else "not significant among so many tests",
    }[d.verdict]
    return (
        f"{c.title}: {points(d.difference)} points, 95{SPACE}% interval {_within(d.low, d.high, points)} over "
        f"{c.covers}, n = {d.n}: {conclusion}."
    )


def rows_of_groups(comparison: Comparison, metric: str | None = None) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table of scores under a metric, the main one by default."""
    metric = metric or comparison.metrics[0]
    shown = [
        (i, c)
        for i, c in enumerate(comparison.categories)
        if c.metric == metric and c.kind in ("answer_types", "regions")
    ]
    heads = ["group", "seeds", metric, "95 % interval", "over seeds", *(f"{c.name} ({c.n})" for _, c in shown)]
    rows = []
    for group in comparison.groups:
        score, scores = comparison.score(group, metric), comparison.scores[group.name]
        cells = [str(len(group.models)), percent(score.mean), interval(score), over_seeds(score)]
        rows.append([group.name, *cells, *(percent(scores[i].mean, unit=False) for i, _ in shown)])
    return heads, rows


def rows_of_deltas(deltas: Sequence[tuple[str, Delta]]) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of a table of differences, each with a title."""
    heads = ["difference", "n", "points", "95 % interval", "over seeds", "p (Holm)", ""]
    return heads, [[title, *delta_cells(delta)] for title, delta in deltas]


def delta_cells(delta: Delta) -> list[str]:
    seeds = delta.over_seeds
    return [
        str(delta.n),
        points(delta.difference),
        NONE if delta.low is None or delta.high is None else _within(delta.low, delta.high, points),
        _within(seeds.low, seeds.high, points) if seeds else NONE,
        p_value(delta.p_holm),
        VERDICTS[delta.verdict],
    ]


def p_value(p: float | None) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval(score: Score) -> str:
    if score.low is None or score.high is None:
        return NONE
    return _within(score.low, score.high, lambda share: percent(share, unit=False))


def over_seeds(score: Score) -> str:
    spread = score.over_seeds
    if spread is None:
        return NONE
    # With two seeds the t interval can be wider than the scale.
    low, high = max(0.0, spread.low), min(1.0, spread.high)
    return _within(low, high, lambda share: percent(share, unit=False))


def kind(group: Group) -> str:
    """Return the classes of a group in the style sheet: its stage, and the number of its method."""
    return group.stage if group.variant == 0 else f"{group.stage} v{(group.variant - 1) % 4 + 1}"


def _within(low: float, high: float, show) -> str:
    return f"{show(low)} to {show(high)}"
