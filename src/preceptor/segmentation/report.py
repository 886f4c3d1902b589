"""The report of a segmentation run: one HTML page, and the tables that the terminal shows too.

It reads only the run folder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.files import write_text
from preceptor.report.contents import (
    RunRecord,
    StageRecord,
    first_value,
    get_nested,
    protocols_of,
    read_run,
    stage_kind,
    stage_title,
    stages_of,
)
from preceptor.report.format import (
    NONE,
    SPACE,
    bounds,
    difference_sentence,
    enumerate_words,
    finite,
    percent,
)
from preceptor.report.page import Bar, Bars, Charts, Details, Fragment, Heading, Page, Section, Text
from preceptor.report.pictures import data_uri, read_figures
from preceptor.report.plots import Box, Dot, Line, box_plot, interval_plot, line_chart
from preceptor.report.sections import cost_table, heading, record_section, skipped_note, training_section
from preceptor.report.tables import Table
from preceptor.segmentation import metrics
from preceptor.segmentation.heat_table import Column, heat_table
from preceptor.segmentation.subset_scores import (
    POST,
    Scores,
    Subject,
    column_mean,
    gain,
    scores_of,
    subject_of,
    validation_scores,
)
from preceptor.segmentation.subsets import (
    LONG,
    MEAN,
    Subset,
    all_subsets,
    name_of,
    parse_subset,
    sort_subsets,
    subset_title,
)

SUBJECTS = {"distilled": "The distilled network", "baseline": "The baseline", "teacher": "The teacher"}
TEACHERS = {
    "single": "The modality that is best over all regions teaches (the last column).",
    "multi": "The winners of all regions teach, each of them everywhere.",
    "per_task": "The winner of a region teaches inside that region.",
}
LEAK = "Leaking split: these scores are too high. Patients of test cases occur in training."
COLORS = 6


def write_report(run: Path) -> Path:
    """Write RUN/report.html from the files of the run folder and return its path.

    Raises UserError if `run` is not a run folder.
    """
    path = run / "report.html"
    # The distance is null if there is none.
    fields = {name: kind for name, kind in metrics.ROW_FIELDS.items() if name != "hd95"}
    write_text(path, render(read_run(run, fields=fields)))
    return path


def render(run: RunRecord) -> str:
    """Return the HTML page."""
    subject = subject_of(run.document)
    title, facts = heading(run, "Segmentation", "cases")
    sections = [
        Section("finding", "Result", _finding(run, subject)),
        Section("combinations", "Every combination of modalities", _combinations(run, subject)),
        Section("missing", "Missing modalities", _missing(run, subject)),
        Section("elections", "Elections", _elections(run, subject)),
        Section("importance", "Importance of the modalities", _importance(run, subject)),
        Section("cases", "Worst cases", _cases(run, subject)),
        Section("spread", "Over cases", _distribution(run, subject)),
        training_section(run, score="Dice", unit="Cases"),
        record_section(run, "cases"),
    ]
    notes = [*run.notes, *skipped_note(run, "cases")]
    style = "segmentation/templates/report.css"
    return Page(title, facts, sections, notes, LEAK if run.leaking else "", style).render()


# --- tables -----------------------------------------------------------------------------------------------------------


def summary(results: Mapping[str, Any]) -> list[Table]:
    """Return the scores under each protocol, and the size and speed of the models."""
    return [*score_tables(results), cost_table(results, metrics.UNIT)]


def score_tables(results: Mapping[str, Any]) -> list[Table]:
    """Return a table of the models for each protocol, and one of every combination for the main protocol."""
    subject = subject_of(results)
    tables = [_models(results, protocol, subject) for protocol in protocols_of(results)]
    return [*tables, _all_combinations(results, subject)]


def _models(results: Mapping[str, Any], protocol: str, subject: Subject) -> Table:
    """Return a row per stage: the mean by region, and with one and with all modalities."""
    last, several = subject.columns[-1] if subject.columns else MEAN, len(subject.modalities) > 1
    rows, keys = [], []
    for name, stage in stages_of(results).items():
        scores = scores_of(stage, protocol, subject)
        given = get_nested(stage, "protocols", protocol) or {}
        if not scores:
            continue
        values = [finite(get_nested(given, "regions", region)) for region in subject.regions]
        if len(subject.regions) > 1:
            values.append(finite(given.get("dice")))
        if several:
            single = [subset for subset in scores if len(subset) == 1]
            values += [column_mean(scores, last, single), column_mean(scores, last, [subject.modalities])]
        rows.append([stage_title(name), *map(percent, values)])
        keys.append(stage_kind(name))
    columns = ["Model", *map(name_of, subject.columns)]
    columns += ["One modality", "All modalities"] if several else []
    title = f"{_caption(results, protocol)}: mean Dice over combinations, in{SPACE}%"
    if explained := [f"{name_of(region)} {LONG[region]}" for region in subject.regions if region in LONG]:
        title += f" ({', '.join(explained)})"
    sentence = difference_sentence(get_nested(results, "comparison", protocol, "distilled - baseline"))
    notes = [f"Distilled minus baseline, mean Dice. {sentence}"] if sentence else []
    return Table(f"{title}.", columns, rows, notes, keys)


def _all_combinations(results: Mapping[str, Any], subject: Subject) -> Table:
    stages = stages_of(results)
    tables = {name: scores_of(stage, subject.protocol, subject) for name, stage in stages.items()}
    subsets = sort_subsets((subset for table in tables.values() for subset in table), subject.modalities)
    # The titles of three stages do not fit 80 columns.
    short = {name: stage_title(name)[0] if len(stages) > 2 else stage_title(name) for name in stages}
    legend = ", ".join(f"{letter} {stage_title(name)}" for name, letter in short.items()) if len(stages) > 2 else ""
    columns = [
        f"{name_of(region)}\n{short[name]}" if len(stages) > 1 else name_of(region)
        for region in subject.regions
        for name in stages
    ]
    rows = [
        [
            subset_title(subset),
            *(percent(tables[name].get(subset, {}).get(region)) for region in subject.regions for name in stages),
        ]
        for subset in subsets
    ]
    title = f"{_caption(results, subject.protocol or '')}: Dice by combination, in{SPACE}%"
    return Table(f"{title}{f' ({legend})' if legend else ''}.", ["Modalities", *columns], rows)


def _caption(results: Mapping[str, Any], protocol: str) -> str:
    n = finite(first_value(results, "protocols", protocol, "n"))
    return f"{protocol} (n{SPACE}={SPACE}{n:g})" if n else protocol


# --- result -----------------------------------------------------------------------------------------------------------


def headline(run: RunRecord, subject: Subject) -> list[str]:
    """Return the main result in sentences, the most important first."""
    stage = run.focus
    scores = scores_of(stage.results, subject.protocol, subject)
    overall = finite(stage.score(subject.protocol, "dice"))
    if overall is None:
        return ["This run has no scores yet."]
    possible = len(all_subsets(len(subject.modalities)))
    over = ""
    if len(subject.modalities) > 1:
        number = f"all {possible}" if len(scores) in (0, possible) else f"{len(scores)} of the {possible}"
        over = f" over {number} combinations of {enumerate_words([name_of(m) for m in subject.modalities])}"
    cases = finite(stage.score(subject.protocol, "n"))
    on = f" on {cases:g} test case{'' if cases == 1 else 's'}" if cases else ""
    regions = enumerate_words([name_of(region) for region in subject.regions])
    means = f", the mean of {regions}" if len(subject.regions) > 1 else f" for {regions}" if regions else ""
    who = SUBJECTS.get(stage.kind, "The network")
    found = [f"{who} reaches a mean Dice of {percent(overall, unit=True)}{over}{on}{means}."]
    baseline = run.stage("baseline")
    before = finite(baseline.score(subject.protocol, "dice")) if baseline and stage.kind == "distilled" else None
    if before is not None:
        found.append(f"The baseline, the same network without distillation, reaches {percent(before, unit=True)}.")
        entry = get_nested(run.results, "comparison", subject.protocol or "", "distilled - baseline")
        found.append(difference_sentence(entry))
    return [sentence for sentence in [*found, _one_modality(scores, subject)] if sentence]


def _one_modality(scores: Scores, subject: Subject) -> str:
    """Describe the scores of single modalities and of all together."""
    column = subject.columns[-1] if subject.columns else MEAN
    single = {subset: row[column] for subset, row in scores.items() if len(subset) == 1 and column in row}
    if not single or len(subject.modalities) < 2:
        return ""
    low, high = min(single, key=lambda s: single[s]), max(single, key=lambda s: single[s])
    average = sum(single.values()) / len(single)
    worst, best = subset_title(low), subset_title(high)
    span = f"from {percent(single[low])} ({worst}) to {percent(single[high], unit=True)} ({best})"
    together = get_nested(scores.get(tuple(subject.modalities)), column)
    every = "both" if len(subject.modalities) == 2 else f"all {len(subject.modalities)}"
    whole = f"; {every} together give {percent(together, unit=True)}" if together is not None else ""
    spread = f", {span}" if len(single) > 1 else ""
    return f"One modality alone gives {percent(average, unit=True)} on average{spread}{whole}."


def _finding(run: RunRecord, subject: Subject) -> list[Any]:
    first, *others = headline(run, subject)
    blocks: list[Any] = [Text(first, "headline"), Text(" ".join(others))]
    if subject.protocol is None:
        return blocks
    bars = [
        Bar(stage.title, stage.kind, finite(stage.score(subject.protocol, "dice")))
        for stage in sorted(run.stages, key=lambda stage: stage.kind == "teacher")
    ]
    over = "combinations and regions" if len(subject.regions) > 1 else "combinations"
    return [
        *blocks,
        Bars(bars, f"Mean Dice over {over}. Protocol {subject.protocol}."),
        _differences(run, subject),
        replace(_models(run.document, subject.protocol, subject), notes=()),  # the first paragraph holds them
        cost_table(run.document, metrics.UNIT),
    ]


def _differences(run: RunRecord, subject: Subject) -> Charts:
    """Draw the paired differences of distilled and baseline network that have an interval, by region."""
    entry = get_nested(run.results, "comparison", subject.protocol or "", "distilled - baseline")
    found = [(name_of(region), get_nested(entry, "regions", region)) for region in subject.regions]
    if len(subject.regions) > 1:
        found.append((name_of(MEAN), entry))
    rows = []
    for name, values in found:
        value, (low, high) = finite(get_nested(values, "difference")), bounds(values)
        if value is not None and low is not None:
            rows.append((name, [Dot("", "distilled", value, low, high)]))
    how = get_nested(entry, "interval")
    title = f"Distilled minus baseline{f' ({how})' if isinstance(how, str) else ''}"
    return Charts([(title, interval_plot(title, rows, x_title="points of Dice"))])


# --- every combination ------------------------------------------------------------------------------------------------


def _combinations(run: RunRecord, subject: Subject) -> list[Any]:
    """Return the combination table of the main protocol; HD95, post-processing and other protocols unfold below."""
    if subject.protocol is None:
        return []
    about = "Rows are the modalities that the network was given: filled dots are present."
    if sentence := tally(run, subject):
        about += f" Small numbers are the difference to the baseline; cells with a corner are for the worse. {sentence}"
    folded = [("HD95, in mm", _heat(run, subject, subject.protocol, "hd95"))]
    for protocol in run.protocols:
        if protocol == subject.protocol:
            continue
        title = "After post-processing" if protocol == f"{subject.protocol}{POST}" else protocol
        folded += [(f"{title}: Dice", _heat(run, subject, protocol, "dice"))]
        folded += [(f"{title}: HD95, in mm", _heat(run, subject, protocol, "hd95"))]
    validation = [Column(stage.kind, stage.title, validation_scores(stage.results, subject)) for stage in run.stages]
    folded.append(("On validation cases: Dice", heat_table(f"Dice in{SPACE}%, validation cases.", subject, validation)))
    main = _heat(run, subject, subject.protocol, "dice")
    return [Text(about if main else "", "small"), main, *(Details(title, [heat]) for title, heat in folded)]


def tally(run: RunRecord, subject: Subject) -> str:
    """Count the combinations in which the distilled network scores higher, from the printed numbers."""
    baseline = run.stage("baseline")
    if baseline is None or run.focus.kind != "distilled" or not subject.columns:
        return ""
    column = subject.columns[-1]
    student, reference = (scores_of(stage.results, subject.protocol, subject) for stage in (run.focus, baseline))
    gains = [
        round(100 * (row[column] - reference[subset][column]), 1)
        for subset, row in student.items()
        if column in row and column in reference.get(subset, {})
    ]
    if not gains:
        return ""
    better, worse = sum(gain > 0 for gain in gains), sum(gain < 0 for gain in gains)
    equal = len(gains) - better - worse
    what = " (mean of the regions)" if len(subject.regions) > 1 else ""
    return (
        f"The distilled network scores higher than the baseline in {better} of {len(gains)} combinations{what}, lower "
        f"in {worse}{f', equally in {equal}' if equal else ''}. This count is not a test."
    )


def _heat(run: RunRecord, subject: Subject, protocol: str, score: str) -> Fragment | None:
    columns = [
        Column(stage.kind, stage.title, scores_of(stage.results, protocol, subject, score)) for stage in run.stages
    ]
    described = run.first("describes", protocol)
    what = f"Dice in{SPACE}%" if score == "dice" else f"HD95 in{SPACE}mm, less is better"
    title = f"{what}, {_caption(run.document, protocol)}{f': {described}' if described else ''}"
    return heat_table(title, subject, columns, "%" if score == "dice" else "mm")


# --- missing modalities -----------------------------------------------------------------------------------------------


def _missing(run: RunRecord, subject: Subject) -> list[Any]:
    """Return the curves over the number of modalities, and the gain from each modality."""
    if len(subject.modalities) < 2:
        return []
    tables = [(stage, scores_of(stage.results, subject.protocol, subject)) for stage in run.stages]
    tables = [(stage, table) for stage, table in tables if table]
    legend = [(stage.kind, stage.title) for stage, _ in tables]
    curves = [(_title(column), _by_number(tables, column)) for column in subject.columns]
    gains = [(_title(column), _gains(tables, subject, column)) for column in subject.columns]
    if not any(svg for _, svg in curves):
        return []
    about = "Lines are the mean over the combinations of a size; bars reach from the worst of them to the best."
    found: list[Any] = [Text(about, "small"), Charts(curves, legend)]
    if any(svg for _, svg in gains):
        about = (
            "Mean Dice of the combinations with the modality minus that of the same combinations without it: the "
            "average loss if this modality is missing and another is present."
        )
        found += [Heading("Gain from each modality"), Text(about, "small"), Charts(gains, legend)]
    return found


def _title(column: str) -> str:
    return "Mean of the regions" if column == MEAN else name_of(column)


def _by_number(tables: Sequence[tuple[StageRecord, Scores]], column: str) -> str:
    lines = []
    for stage, table in tables:
        sizes: dict[int, list[float]] = {}
        for subset, row in table.items():
            if column in row:
                sizes.setdefault(len(subset), []).append(row[column])
        found = sorted(sizes.items())
        means = [(float(size), sum(values) / len(values)) for size, values in found]
        lines.append(Line(stage.title, stage.kind, means, spreads=[(min(values), max(values)) for _, values in found]))
    title = f"Dice of {_title(column)} by number of modalities"
    return line_chart(title, lines, x_title="modalities present", as_percent=True, integers=True)


def _gains(tables: Sequence[tuple[StageRecord, Scores]], subject: Subject, column: str) -> str:
    rows = []
    for modality in subject.modalities:
        added = [(stage, gain(table, modality, column)) for stage, table in tables]
        dots = [Dot(stage.title, stage.kind, value) for stage, value in added if value is not None]
        rows.append((name_of(modality), dots))
    return interval_plot(f"Gain in Dice of {_title(column)} from each modality", rows, x_title="points of Dice")


def _distribution(run: RunRecord, subject: Subject) -> list[Any]:
    """Return the distribution of the cases' Dice by combination, a chart per region, with the baseline's medians."""
    protocol = subject.protocol or ""
    stage = next((stage for stage in reversed(run.stages) if stage.rows.get(protocol)), None)
    if stage is None:
        return []
    values = _by_row(stage, protocol, subject)
    baseline = run.stage("baseline") if stage.kind == "distilled" else None
    others = _by_row(baseline, protocol, subject) if baseline else {}
    charts = []
    for region in subject.regions:
        boxes = []
        for subset in sort_subsets((subset for subset, of in values if of == region), subject.modalities):
            present = [modality in subset for modality in subject.modalities]
            other = others.get((subset, region))
            median = float(np.median(other)) if other else None
            boxes.append(Box(subset_title(subset), stage.kind, present, values[subset, region], median))
        title = f"Dice of {name_of(region)} over cases by combination, {stage.title}"
        charts.append((name_of(region), box_plot(title, boxes, x_title=f"Dice,{SPACE}%")))
    cases = len({row.get("id") for row in stage.rows[protocol]})
    about = (
        f"{stage.title}, {cases} cases: boxes hold the middle half of the cases, the line in them is the median, thin "
        "lines reach from the worst case to the best."
    )
    if others:
        about += " Rings are the medians of the baseline."
    about += f" Dots: {', '.join(name_of(modality) for modality in subject.modalities)}, filled if present."
    return [Text(about, "small"), Charts(charts)] if values else []


def _by_row(stage: StageRecord, protocol: str, subject: Subject) -> dict[tuple[Subset, str], list[float]]:
    """Return the Dice of the cases by combination and region."""
    found: dict[tuple[Subset, str], list[float]] = {}
    for row in stage.rows.get(protocol, []):
        subset, value = parse_subset(str(row.get("subset")), subject.modalities), finite(row.get("dice"))
        if subset and value is not None and row.get("region") in subject.regions:
            found.setdefault((subset, row["region"]), []).append(value)
    return found


# --- elections --------------------------------------------------------------------------------------------------------


def _elections(run: RunRecord, subject: Subject) -> list[Any]:
    """Return the elections of each stage that held any: a chart per region, and the winners over the steps."""
    elections = {stage.title: votes for stage in run.stages if (votes := _votes(stage))}
    if not elections:
        return []
    legend = [(_color(place), name_of(modality)) for place, modality in enumerate(subject.modalities)]
    about = "Soft Dice of each modality alone on validation cases; the ring marks the winner of an election."
    how = TEACHERS.get(str(get_nested(run.recipe, "method", "teachers")), "")
    blocks: list[Any] = [Text(f"{about} {how}".strip(), "small")]
    for title, votes in elections.items():
        if len(elections) > 1:
            blocks.append(Heading(title))
        charts = [(name_of(region), _election_chart(votes, region, subject)) for region in subject.regions]
        blocks += [Charts(charts, legend), _winners(votes, subject)]
    return blocks


def _votes(stage: StageRecord) -> list[Mapping[str, Any]]:
    votes = get_nested(stage.results, "elections")
    known = [vote for vote in votes if finite(get_nested(vote, "step")) is not None] if isinstance(votes, list) else []
    return sorted(known, key=lambda vote: vote["step"])


def _color(place: int) -> str:
    return f"m{place % COLORS}"


def _election_chart(votes: Sequence[Mapping[str, Any]], region: str, subject: Subject) -> str:
    lines = []
    for place, modality in enumerate(subject.modalities):
        scores = [(vote["step"], finite(get_nested(vote, "soft_dice", region, modality))) for vote in votes]
        won = [vote["step"] for vote in votes if get_nested(vote, "elected", region) == modality]
        known = [(step, score) for step, score in scores if score is not None]
        lines.append(Line(name_of(modality), _color(place), known, won))
    title = f"Soft Dice of {name_of(region)} from each modality alone, by step"
    return line_chart(title, lines, x_title="step", as_percent=True)


def _winners(votes: Sequence[Mapping[str, Any]], subject: Subject) -> Table:
    """Return the teachers, one row for consecutive elections with the same winners."""
    periods: list[tuple[tuple[Any, ...], list[float]]] = []
    for vote in votes:
        won = *(get_nested(vote, "elected", region) for region in subject.regions), get_nested(vote, "overall")
        if not periods or periods[-1][0] != won:
            periods.append((won, []))
        periods[-1][1].append(vote["step"])
    rows = []
    for won, steps in periods:
        *by_region, overall = [NONE if winner is None else name_of(str(winner)) for winner in won]
        span = f"{steps[0]:g}" if len(steps) == 1 else f"{steps[0]:g} to {steps[-1]:g}"
        teachers = enumerate_words([name_of(m) for m in subject.modalities if m in won[:-1]])
        rows.append([span, str(len(steps)), *by_region, teachers or NONE, overall])
    columns = ["Step", "Elections", *map(name_of, subject.regions), "Teachers", "Best over all"]
    return Table("Winners of the elections", columns, rows)


def _importance(run: RunRecord, subject: Subject) -> list[Any]:
    """Return the importance of each modality over the steps, for the stages that learned it (MetaKD)."""
    charts, legend = [], [(_color(place), name_of(modality)) for place, modality in enumerate(subject.modalities)]
    for stage in run.stages:
        history = get_nested(stage.results, "importance")
        lines = []
        for place, modality in enumerate(subject.modalities):
            values = [
                (step, value)
                for entry in (history if isinstance(history, list) else [])
                if (step := finite(get_nested(entry, "step"))) is not None
                and (value := finite(get_nested(entry, modality))) is not None
            ]
            lines.append(Line(name_of(modality), _color(place), values))
        title = f"Importance of each modality in \u201c{stage.title}\u201d, by step"
        if chart := line_chart(title, lines, x_title="step", as_percent=True):
            charts.append((stage.title, chart))
    about = "Learned on training cases that were held out of the training of the network; the sum over modalities is 1."
    return [Text(about, "small"), Charts(charts, legend)] if charts else []


# --- cases ------------------------------------------------------------------------------------------------------------


def _cases(run: RunRecord, subject: Subject) -> list[Any]:
    """Return the stored pictures of the worst cases."""
    keys = {region: f"r{place % COLORS}" for place, region in enumerate(subject.regions)}
    cases = []
    for case in read_figures(run.focus.folder).get("cases", []):
        views = []
        for entry in case["combinations"]:
            subset = parse_subset(entry["subset"], subject.modalities) or ()
            scores = [
                f"{name_of(region)}{SPACE}{percent(value)}"
                for region in subject.regions
                if (value := finite(entry["dice"].get(region))) is not None
            ]
            planes = [
                {
                    "name": plane["plane"],
                    "picture": data_uri(run.focus.folder, plane["picture"]),
                    "width": plane["width"],
                    "height": plane["height"],
                    "outlines": [{**one, "key": keys.get(one["region"], "r0")} for one in plane["outlines"]],
                }
                for plane in entry["planes"]
            ]
            title = "All modalities" if len(subset) == len(subject.modalities) else subset_title(subset)
            views.append(
                {"title": title, "scores": " · ".join(scores), "image": name_of(entry["image"]), "planes": planes}
            )
        cases.append({"id": case["id"], "dice": percent(finite(case.get("dice")), unit=True), "views": views})
    about = (
        f"The worst cases of \u201c{run.focus.title}\u201d by mean Dice over all combinations, from all modalities "
        "down to fewer. Tinted areas are the reference, each voxel in the colour of its smallest region; solid lines "
        "are the prediction. Planes go through the centre of the reference. Radiological convention: the "
        "patient\u2019s right (R) is on the left of axial and coronal planes; sagittal planes show the face on the "
        "left (A). The image is one that the network was given, black and white at its 1st and 99.5th percentile."
    )
    legend = [(keys[region], name_of(region)) for region in subject.regions]
    data = {"legend": legend, "cases": cases}
    return [Text(about, "small"), Fragment("segmentation/templates/cases.html.j2", data)] if cases else []
