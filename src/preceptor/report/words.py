"""What a run found, in sentences, and numbers as a reader wants them. Sentences are plain text, not HTML."""

from __future__ import annotations

import math
from typing import Any

from preceptor.data.types import Dataset, Sample
from preceptor.report.contents import RunRecord, StageRecord, get_nested
from preceptor.statistics import Interval, wilson

NONE = "\u2013"
SPACE = "\u00a0"
SUBJECTS = {"distilled": "The distilled student", "baseline": "The student", "teacher": "The teacher"}
BASELINES = {
    "majority": "Most frequent answer",
    "question_only": "Question without the image",
    "look_up": "Most similar training question",
    "look_up_same_image": "Most similar training question on the same image",
}
LEAKING = ("Leaking split: these scores flatter.", "Answers of test questions occur in training.")


def percent(share: float | None, *, unit: bool = True) -> str:
    """Return a share in [0, 1] as ``61.2 %``."""
    if share is None or not math.isfinite(share):
        return NONE
    return f"{100 * share:.1f}" + (f"{SPACE}%" if unit else "")


def points(difference: float | None) -> str:
    """Return a difference of shares in percentage points, with its sign: ``+1.4``."""
    if difference is None or not math.isfinite(difference):
        return NONE
    text = f"{100 * difference:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\u2212")


def count(number: float | None) -> str:
    """Return a large number with its unit: ``4.7 M``, ``431 k``."""
    if number is None:
        return NONE
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            scaled = number / size
            return f"{scaled:.0f}{SPACE}{unit}" if scaled >= 100 else f"{scaled:.1f}{SPACE}{unit}"
    return f"{number:g}"


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}{SPACE}h {minutes}{SPACE}min"
    return f"{minutes}{SPACE}min {rest}{SPACE}s" if minutes else f"{rest}{SPACE}s"


def interval(stage: StageRecord, protocol: str) -> Interval | None:
    """Return a stage's accuracy with its 95 % interval over questions (Wilson); None where the metric is another."""
    if get_nested(stage.results, "protocols", protocol, "metric") not in (None, "accuracy"):
        return None
    accuracy, n = stage.score(protocol), stage.score(protocol, "n")
    return wilson(round(accuracy * n), int(n)) if accuracy is not None and n else None


def headline(run: RunRecord) -> list[str]:
    """Return what was found, in sentences, the most important first."""
    protocol = next(iter(run.protocols), None)
    focus = run.focus
    accuracy = focus.score(protocol) if protocol else None
    if protocol is None or accuracy is None:
        return ["This run has no scores yet."]
    n = focus.score(protocol, "n")
    subject = SUBJECTS.get(focus.kind, "The model")
    size = f" ({', '.join(_size(run))})" if _size(run) else ""
    of = f" of {n:g} questions" if n else " of the questions"
    spread = interval(focus, protocol)
    within = f" (95{SPACE}% interval {percent(spread.low, unit=False)} to {percent(spread.high)})" if spread else ""
    found = [f"{subject}{size} answers {percent(accuracy)}{of} correctly{within}."]
    found += _versus_alone(run, protocol)
    kept = get_nested(run.results, "comparison", protocol, "distilled / teacher")
    teacher = run.stage("teacher")
    if kept is not None and teacher:
        found.append(f"{subject} keeps {percent(kept)} of the teacher's {percent(teacher.score(protocol))}.")
    return found


def _size(run: RunRecord) -> list[str]:
    found, teacher = [], run.stage("teacher")
    if run.focus.parameters:
        found.append(f"{count(run.focus.parameters)} parameters".replace(f"{SPACE}M", f"{SPACE}million"))
        if teacher and teacher.parameters and run.focus.kind != "teacher":
            found.append(f"{run.focus.parameters / teacher.parameters:.0%} of the teacher's".replace("%", f"{SPACE}%"))
    return found


def _versus_alone(run: RunRecord, protocol: str) -> list[str]:
    alone = run.stage("baseline")
    if alone is None or run.focus.kind != "distilled" or alone.score(protocol) is None:
        return []
    found = [f"The same student without distillation answers {percent(alone.score(protocol))}."]
    if sentence := difference(get_nested(run.results, "comparison", protocol, "distilled - baseline")):
        found.append(sentence)
    return found


def difference(entry: dict[str, Any] | None, over: str = "questions") -> str:
    """Return the paired difference of distilled and undistilled student as a sentence, with what follows from it.

    `over` is what the interval is over.
    """
    low, high = get_nested(entry, "low"), get_nested(entry, "high")
    if entry is None or low is None or high is None:
        return ""
    if low > 0:
        verdict = "distillation helped"
    elif high < 0:
        verdict = "distillation hurt"
    else:
        verdict = "not distinguishable from 0"
    spread = f"95{SPACE}% interval {points(low)} to {points(high)} over {over}, this seed alone"
    return f"The difference is {points(entry.get('difference'))} points, {spread}: {verdict}."


def warnings(run: RunRecord, data: Dataset[Sample] | None) -> list[str]:
    """Return what a reader must know before believing a number of this run."""
    found = []
    if data is not None and (recorded := run.first("data", "sha256")) and recorded != data.fingerprint():
        found.append("The data set has changed since this run: its fingerprint is no longer the one below.")
    protocol = next(iter(run.protocols), None)
    if protocol:
        accuracy = run.focus.score(protocol)
        blind = {
            name: get_nested(scores, "accuracy") for name, scores in (run.first("baselines", protocol) or {}).items()
        }
        known = {name: value for name, value in blind.items() if value is not None}
        best = max(known, key=lambda name: known[name], default=None)
        if best is not None and accuracy is not None and known[best] >= accuracy:
            found.append(
                f"Without seeing the image, the baseline \u201c{BASELINES.get(best, best).lower()}\u201d answers "
                f"{percent(known[best])}, no less than the model's {percent(accuracy)}."
            )
    skipped = sum(len(get_nested(stage.results, "training", "skipped") or []) for stage in run.stages)
    if skipped:
        found.append(f"{skipped} training rows were left out, their images being broken; their ids are listed below.")
    return found


def leaks(run: RunRecord, data: Dataset | None) -> bool:
    """Return whether test rows share frames, images or patients with training rows."""
    if data is not None and data.leaking:
        return True
    described = (get_nested(stage.results, "describes") or {} for stage in run.stages)
    return any("leaks" in str(sentence) for sentences in described for sentence in sentences.values())
