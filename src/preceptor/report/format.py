"""Numbers as text. Shares in [0, 1] are shown in percent, differences of shares in percentage points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

NONE = "\u2013"
SPACE = "\u00a0"
VERDICTS = {
    "better": "distillation helped",
    "worse": "distillation hurt",
    "better for this seed": "better for this seed; one seed does not show that distillation helps",
    "worse for this seed": "worse for this seed; one seed does not show that distillation hurts",
    "undecided": "not distinguishable from 0",
    "too few differ": "too few differ for a test",
}
"""Verdicts of a comparison as the end of a sentence."""


def percent(share: float | None, *, unit: bool = False) -> str:
    """Format a share in [0, 1]: ``61.2``, or ``61.2 %`` with `unit`."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.1f}" + (f"{SPACE}%" if unit else "")


def points(difference: float | None) -> str:
    """Format a difference of shares in percentage points, with its sign: ``+1.4``."""
    return NONE if difference is None else signed(100 * difference)


def signed(value: float) -> str:
    """Format a number with one decimal and its sign."""
    if not math.isfinite(value):
        return NONE
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\u2212")


def interval(low: float | None, high: float | None, show: Callable[[float], str] = percent) -> str:
    """Format an interval: ``58.0 to 64.3``."""
    return NONE if low is None or high is None else f"{show(low)} to {show(high)}"


def count(number: float | None) -> str:
    """Format a large number with its unit: ``4.7 M``, ``431 k``."""
    if number is None:
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.0f}{SPACE}{unit}" if scaled >= 100 else f"{scaled:.1f}{SPACE}{unit}"
    return f"{number:g}"


def milliseconds(value: float | None) -> str:
    """Format a latency: ``1,204``, ``12.3``."""
    if value is None:
        return NONE
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}"


def duration(seconds: float | None) -> str:
    """Format a duration: ``2 h 5 min``, ``1 min 33 s``."""
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{SPACE}h {minutes}{SPACE}min"
    return f"{minutes}{SPACE}min {rest}{SPACE}s" if minutes else f"{rest}{SPACE}s"


def p_value(p: float | None) -> str:
    """Format a p-value: ``< 0.001``, ``0.012``."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def enumerate_words(words: Sequence[str]) -> str:
    """Join words: ``a, b and c``."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def bounds(entry: Mapping[str, Any] | None) -> tuple[float | None, float | None]:
    """Return the interval of a score or difference in results.json, (None, None) if it has none.

    An interval of fewer than `statistics.MINIMUM_UNITS` units or groups, as earlier versions wrote it, does not count.
    """
    from preceptor.statistics import MINIMUM_UNITS  # imports numpy, which few commands need

    low, high = (finite((entry or {}).get(key)) for key in ("low", "high"))
    units = [finite((entry or {}).get(key)) for key in ("n", "groups")]
    if low is None or high is None or any(number is not None and number < MINIMUM_UNITS for number in units):
        return None, None
    return low, high


def difference_sentence(entry: Mapping[str, Any] | None) -> str:
    """Describe a paired difference of distilled and baseline model from `results["comparison"]`.

    Returns an empty string without a difference.
    """
    from preceptor.statistics import MINIMUM_UNITS, excludes_zero

    difference, (low, high) = finite((entry or {}).get("difference")), bounds(entry)
    if entry is None or difference is None:
        return ""
    text, how = f"The difference is {points(difference)} points", str(entry.get("interval") or "95 %")
    if low is None or high is None:
        if how.startswith("no interval"):
            return f"{text}; {how}."
        few = finite(entry.get("n")) is not None
        return f"{text}; no interval, fewer than {MINIMUM_UNITS} units." if few else f"{text}."
    verdict = str(entry.get("verdict"))
    if not excludes_zero(low, high):
        verdict = "undecided"
    said = VERDICTS.get(verdict, "")
    return f"{text}, {interval(low, high, points)} ({how}){f': {said}' if said else ''}."


def finite(value: Any) -> float | None:
    """Return a finite number of a JSON document, or None."""
    known = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return float(value) if known else None
