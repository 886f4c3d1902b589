"""A comparison in sentences and in rows for a terminal. Plain text."""

from __future__ import annotations

from collections.abc import Sequence

from preceptor.compare.deltas import Contrast, Delta, Score
from preceptor.compare.groups import Group
from preceptor.compare.run import Comparison
from preceptor.report.words import NONE, SPACE, percent, points

VERDICTS = {"better": "better *", "worse": "worse *", "undecided": "undecided", "not tested": "too few to test"}
HOW_MARKED = "* significant: p below 0.05 in every test that applies, after Holm's correction for their number"
MOST_SENTENCES = 4


def headline(comparison: Comparison) -> list[str]:
    """Return what was found, the overall differences first."""
    if not comparison.contrasts:
        group, score = comparison.groups[0], comparison.score(comparison.groups[0])
        return [
            f"There is one group, {group.name}, and so nothing to compare it with: {percent(score.accuracy)} of "
            f"{score.n} questions, 95{SPACE}% interval {_within(score.low, score.high, percent)}."
        ]
    # What is learnt before who teaches, all data before shares of them.
    ordered = sorted(comparison.contrasts, key=lambda c: (c.group.stage != "distilled", -c.group.share))
    found = [sentence(c) for c in ordered[:MOST_SENTENCES]]
    if more := len(ordered) - len(found):
        marked = sum(c.overall.significant for c in ordered)
        found.append(f"{more} more below; of all {len(ordered)} overall differences {marked} are significant.")
    return found


def sentence(c: Contrast) -> str:
    """Return an overall difference as a sentence, with its interval and what it speaks for."""
    d = c.overall
    said = {
        "better": "more questions are answered correctly",
        "worse": "fewer questions are answered correctly",
        "not tested": "too few answers differ for a test",
        "undecided": "not distinguishable from 0" if d.low <= 0 <= d.high else "not significant among so many tests",
    }[d.verdict]
    return (
        f"{c.title}: {points(d.difference)} points, 95{SPACE}% interval {_within(d.low, d.high, points)} over "
        f"{c.covers}, n = {d.n}: {said}."
    )


def rows_of_groups(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return heads and rows of the table of accuracies."""
    kinds = [(i, c) for i, c in enumerate(comparison.categories) if c.kind in ("open", "closed")]
    heads = [
        "group",
        "seeds",
        "accuracy",
        "95 % interval",
        "over seeds",
        *(f"{c.name} ({len(c.columns)})" for _, c in kinds),
    ]
    rows = []
    for group in comparison.groups:
        scores = comparison.scores[group.name]
        cells = [str(len(group.models)), percent(scores[0].accuracy), interval(scores[0]), over_seeds(scores[0])]
        rows.append([group.name, *cells, *(percent(scores[i].accuracy, unit=False) for i, _ in kinds)])
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
        _within(delta.low, delta.high, points),
        _within(seeds.low, seeds.high, points) if seeds else NONE,
        p_value(delta.p_holm),
        VERDICTS[delta.verdict],
    ]


def p_value(p: float | None) -> str:
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def interval(score: Score) -> str:
    return _within(score.low, score.high, lambda share: percent(share, unit=False))


def over_seeds(score: Score) -> str:
    spread = score.over_seeds
    if spread is None:
        return NONE
    # With two seeds the t interval is wider than the scale itself.
    low, high = max(0.0, spread.low), min(1.0, spread.high)
    return _within(low, high, lambda share: percent(share, unit=False))


def kind(group: Group) -> str:
    """Return the classes of a group in the style sheet: its stage, and which method of it."""
    return group.stage if group.variant == 0 else f"{group.stage} v{(group.variant - 1) % 4 + 1}"


def _within(low: float, high: float, show) -> str:
    return f"{show(low)} to {show(high)}"
