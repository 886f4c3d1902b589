"""The sections of a segmentation's report about missing modalities: what each number of them reaches, what each adds,
and how the cases are spread."""

from __future__ import annotations

from collections.abc import Sequence

from preceptor.report.contents import RunRecord, StageRecord
from preceptor.report.dotplot import Dot, Strip, dot_plot, quartiles, strip_plot
from preceptor.report.figures import Line, line_chart
from preceptor.report.markup import chip, escape
from preceptor.report.training import figure
from preceptor.segmentation.combinations import (
    MEAN,
    Subject,
    Table,
    gain,
    in_order,
    name_of,
    named,
    number,
    parse,
    table_of,
)


def legend(stages: Sequence[StageRecord], kind: str = "stroke") -> str:
    """Return what the lines (`stroke`) or dots (`chip`) of the stages look like."""
    items = "".join(f'<li><i class="{kind} {escape(stage.kind)}"></i>{escape(stage.title)}</li>' for stage in stages)
    return f'<ul class="legend">{items}</ul>' if len(stages) > 1 else ""


def missing(run: RunRecord, subject: Subject) -> str:
    """Return the curves over the number of modalities, and what each modality adds."""
    if subject.protocol is None or len(subject.modalities) < 2:
        return ""
    tables = [(stage, table_of(stage, subject.protocol, subject)) for stage in run.stages]
    tables = [(stage, table) for stage, table in tables if table]
    curves = "".join(_by_number(tables, column) for column in subject.columns)
    if not curves:
        return ""
    stages = [stage for stage, _ in tables]
    row = "charts four" if len(subject.columns) == 4 else "charts"
    spread = "Lines are the mean over the combinations of a size, bars reach from the worst of them to the best."
    found = f'<p class="small">{spread}</p>{legend(stages)}<div class="{row}">{curves}</div>'
    gains = "".join(_gains(tables, subject, column) for column in subject.columns)
    if gains:
        found += (
            "<h3>What each modality adds</h3>"
            '<p class="small">Mean Dice of combinations with the modality less that of the same combinations without '
            "it: what is lost, on average, where it is missing and another is there.</p>"
            f'{legend(stages, "chip")}<div class="{row}">{gains}</div>'
        )
    return found


def _title(column: str) -> str:
    return "Mean of the regions" if column == MEAN else name_of(column)


def _by_number(tables: Sequence[tuple[StageRecord, Table]], column: str) -> str:
    lines = []
    for stage, table in tables:
        sizes: dict[int, list[float]] = {}
        for subset, row in table.items():
            if column in row:
                sizes.setdefault(len(subset), []).append(row[column])
        lines.append(
            Line(
                stage.title,
                stage.kind,
                [(size, sum(found) / len(found)) for size, found in sorted(sizes.items())],
                spreads=[(min(found), max(found)) for _, found in sorted(sizes.items())],
            )
        )
    title = f"Dice of {_title(column)} by number of modalities"
    return figure(_title(column), line_chart(title, lines, x_title="modalities present", percent=True, counts=True))


def _gains(tables: Sequence[tuple[StageRecord, Table]], subject: Subject, column: str) -> str:
    rows = []
    for modality in subject.modalities:
        added = [(stage, gain(table, modality, column)) for stage, table in tables]
        dots = [Dot(stage.kind, stage.title, value) for stage, value in added if value is not None]
        rows.append((name_of(modality), dots))
    title = f"What each modality adds to the Dice of {_title(column)}"
    return figure(_title(column), dot_plot(title, rows, x_title="points of Dice"))


def distribution(run: RunRecord, subject: Subject) -> str:
    """Return how the cases' Dice is spread by combination, a chart per region, the last stage against `alone`."""
    protocol = subject.protocol
    stage = next((stage for stage in reversed(run.stages) if protocol and stage.rows.get(protocol)), None)
    if stage is None or protocol is None:
        return ""
    found = _by_row(stage, protocol, subject)
    alone = run.stage("baseline") if stage.kind == "distilled" else None
    others = _by_row(alone, protocol, subject) if alone else {}
    charts = ""
    for region in subject.regions:
        strips = []
        for subset in in_order((subset for subset, held in found if held == region), subject.modalities):
            on = tuple(modality in subset for modality in subject.modalities)
            other = others.get((subset, region))
            strips.append(Strip(named(subset), on, found[subset, region], quartiles(other)[2] if other else None))
        title = f"Dice of {name_of(region)} over cases by combination, {stage.title}"
        charts += figure(
            name_of(region), strip_plot(title, strips, kind=stage.kind, other="baseline", x_title="Dice, %")
        )
    if not charts:
        return ""
    cases = len({row.get("id") for row in stage.rows[protocol]})
    about = (
        f"{chip(stage.kind, stage.title)}, {cases} cases: boxes hold the middle half of the cases, the line in them is "
        "the median, thin lines reach from the worst case to the best."
    )
    if any(others):
        about += f" Rings are the medians of {chip('baseline', alone.title if alone else '')}."
    dots = f"Dots: {escape(', '.join(name_of(modality) for modality in subject.modalities))}, filled where present."
    return f'<p class="small">{about} {dots}</p><div class="charts spreads">{charts}</div>'


def _by_row(stage: StageRecord, protocol: str, subject: Subject) -> dict[tuple[tuple[str, ...], str], list[float]]:
    """Return the Dice of the cases by combination and region."""
    found: dict[tuple[tuple[str, ...], str], list[float]] = {}
    for row in stage.rows.get(protocol, []):
        subset, value = parse(str(row.get("subset")), subject.modalities), number(row.get("dice"))
        if subset and value is not None and row.get("region") in subject.regions:
            found.setdefault((subset, row["region"]), []).append(value)
    return found
