"""What a segmentation run found, in sentences. Sentences are plain text, not HTML."""

from __future__ import annotations

from preceptor.data.types import SegmentationDataset
from preceptor.report.contents import RunRecord, StageRecord, get_nested
from preceptor.report.words import difference, percent, points
from preceptor.segmentation.combinations import (
    MEAN,
    Subject,
    Table,
    column_mean,
    every,
    listed,
    name_of,
    named,
    number,
    table_of,
)

TITLES = {"teacher": "Teacher", "baseline": "Undistilled", "distilled": "Distilled"}
SUBJECTS = {"distilled": "The distilled network", "baseline": "The network, not distilled,", "teacher": "The teacher"}


def headline(run: RunRecord, subject: Subject) -> list[str]:
    """Return what was found, the most important first."""
    stage, protocol = run.focus, subject.protocol
    table = table_of(stage, protocol, subject) if protocol else {}
    overall = overall_dice(stage, subject)
    if protocol is None or overall is None:
        return ["This run has no scores yet."]
    who = SUBJECTS.get(stage.kind, "The network")
    of = f" of {listed([name_of(modality) for modality in subject.modalities])}" if subject.modalities else ""
    count, possible = len(table), len(every(subject.modalities))
    over = f"all {possible}" if count in (0, possible) else f"{count} of the {possible}"
    cases = number(get_nested(stage.results, "protocols", protocol, "n"))
    on = f" on {cases:g} test cases" if cases else ""
    regions = listed([name_of(region) for region in subject.regions])
    means = f", the mean of {regions}" if len(subject.regions) > 1 else f" for {regions}" if regions else ""
    if len(subject.modalities) > 1:
        found = [f"{who} reaches a mean Dice of {percent(overall)} over {over} combinations{of}{on}{means}."]
    else:
        found = [f"{who} reaches a mean Dice of {percent(overall)}{on}{means}."]
    alone = run.stage("baseline")
    before = overall_dice(alone, subject) if alone and stage.kind == "distilled" else None
    if before is not None:
        found.append(f"The same network without distillation reaches {percent(before)}.")
        entry = get_nested(run.results, "comparison", protocol, "distilled - baseline")
        known = all(number(get_nested(entry, key)) is not None for key in ("difference", "low", "high"))
        sentence = difference(entry, "cases") if known else f"The difference is {points(overall - before)} points."
        found.append(sentence)
    found += _one_modality(table, subject)
    return found


def overall_dice(stage: StageRecord, subject: Subject) -> float | None:
    """Return the mean Dice of the main protocol, as the results say, or over combinations and regions."""
    if subject.protocol is None:
        return None
    given = number(get_nested(stage.results, "protocols", subject.protocol, "dice"))
    table = table_of(stage, subject.protocol, subject)
    return given if given is not None else column_mean(table, subject.columns[-1]) if subject.columns else None


def _one_modality(table: Table, subject: Subject) -> list[str]:
    """Return what single modalities give, and what all of them do."""
    column = subject.columns[-1] if subject.columns else MEAN
    single = {subset: row[column] for subset, row in table.items() if len(subset) == 1 and column in row}
    if not single or len(subject.modalities) < 2:
        return []
    low, high = min(single, key=lambda s: single[s]), max(single, key=lambda s: single[s])
    average = sum(single.values()) / len(single)
    span = f", from {percent(single[low], unit=False)} ({named(low)}) to {percent(single[high])} ({named(high)})"
    together = get_nested(table.get(tuple(subject.modalities)), column)
    count = len(subject.modalities)
    every_one = "both" if count == 2 else f"all {count}"
    whole = f"; {every_one} together give {percent(together)}" if together is not None else ""
    return [f"One modality alone gives {percent(average)} on average{span if len(single) > 1 else ''}{whole}."]


def tally(run: RunRecord, subject: Subject) -> str:
    """Return in how many combinations the distilled network is better, by what the table prints; "" without both."""
    alone = run.stage("baseline")
    if alone is None or run.focus.kind != "distilled" or subject.protocol is None or not subject.columns:
        return ""
    column = subject.columns[-1]
    mine, theirs = (table_of(stage, subject.protocol, subject) for stage in (run.focus, alone))
    gains = [
        round(100 * (row[column] - theirs[s][column]), 1)
        for s, row in mine.items()
        if column in row and column in theirs.get(s, {})
    ]
    if not gains:
        return ""
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    same = len(gains) - better - worse
    even = f", equal in {same}" if same else ""
    what = " (mean of the regions)" if len(subject.regions) > 1 else ""
    return (
        f"Distilled is better than undistilled in {better} of {len(gains)} combinations{what}, worse in {worse}{even}."
    )


def warnings(run: RunRecord, data: SegmentationDataset | None) -> list[str]:
    """Return what a reader must know before believing a number of this run."""
    found = []
    if data is not None and (recorded := run.first("data", "sha256")) and recorded != data.fingerprint():
        found.append("The data set has changed since this run: its fingerprint is no longer the one below.")
    skipped = sum(len(get_nested(stage.results, "training", "skipped") or []) for stage in run.stages)
    if skipped:
        found.append(f"{skipped} training cases were left out, their files being broken; their ids are listed below.")
    return found


LEAKING = ("Leaking split: these scores flatter.", "Patients of test cases occur in training.")
