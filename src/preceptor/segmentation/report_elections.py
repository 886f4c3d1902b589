"""The section of a report that shows LCKD's elections: who segments best alone, and who therefore teaches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from preceptor.report.contents import RunRecord, StageRecord, get_nested
from preceptor.report.figures import Line, line_chart
from preceptor.report.markup import escape, row, table
from preceptor.report.training import figure
from preceptor.report.words import NONE
from preceptor.segmentation.combinations import Subject, listed, name_of, number
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.lckd import LckdConfig

COLOURS = 6
TEACHING = {
    "single": "The modality that is best over all regions teaches (the last column).",
    "multi": "The winners of all regions teach, each of them everywhere.",
    "per_task": "The winner of a region teaches where that region lies.",
}


def elections(run: RunRecord, subject: Subject, recipe: SegmentationRecipe | None) -> str:
    """Return the votes of every stage that held any: a chart per region, and the winners from step to step."""
    found = ""
    holding = [stage for stage in run.stages if _votes(stage)]
    for stage in holding:
        if len(holding) > 1:
            found += f"<h3>{escape(stage.title)}</h3>"
        found += _charts(_votes(stage), subject) + _winners(_votes(stage), subject)
    if not found:
        return ""
    about = "Soft Dice of each modality alone on validation cases; the ring marks who won the vote."
    if recipe is not None and isinstance(recipe.method, LckdConfig):
        about += f" {TEACHING[recipe.method.teachers]}"
    items = "".join(
        f'<li><i class="stroke {_kind(place)}"></i>{escape(name_of(modality))}</li>'
        for place, modality in enumerate(subject.modalities)
    )
    return f'<p class="small">{about}</p><ul class="legend">{items}</ul>{found}'


def _votes(stage: StageRecord) -> list[Mapping[str, Any]]:
    votes = get_nested(stage.results, "elections")
    held = [vote for vote in votes if number(get_nested(vote, "step")) is not None] if isinstance(votes, list) else []
    return sorted(held, key=lambda vote: vote["step"])


def _kind(place: int) -> str:
    return f"m{place % COLOURS}"


def _charts(votes: Sequence[Mapping[str, Any]], subject: Subject) -> str:
    charts = ""
    for region in subject.regions:
        lines = []
        for place, modality in enumerate(subject.modalities):
            scores = [(vote["step"], number(get_nested(vote, "soft_dice", region, modality))) for vote in votes]
            won = tuple(vote["step"] for vote in votes if get_nested(vote, "elected", region) == modality)
            known = [(step, score) for step, score in scores if score is not None]
            lines.append(Line(name_of(modality), _kind(place), known, rings=won))
        title = f"Soft Dice of {name_of(region)} from each modality alone, by step"
        charts += figure(name_of(region), line_chart(title, lines, x_title="step", percent=True, named=True))
    return f'<div class="charts">{charts}</div>' if charts else ""


def _winners(votes: Sequence[Mapping[str, Any]], subject: Subject) -> str:
    """Return who teaches, one row per stretch of votes with the same winners."""
    stretches: list[tuple[tuple[Any, ...], list[Any]]] = []
    for vote in votes:
        won = tuple(get_nested(vote, "elected", region) for region in subject.regions), get_nested(vote, "overall")
        if not stretches or stretches[-1][0] != won:
            stretches.append((won, []))
        stretches[-1][1].append(vote["step"])
    rows = []
    for (by_region, overall), steps in stretches:
        span = f"{steps[0]:g}" if len(steps) == 1 else f"{steps[0]:g} to {steps[-1]:g}"
        teachers = [m for m in subject.modalities if m in by_region]
        cells = [str(len(steps)), *(_name(winner) for winner in by_region)]
        rows.append(row(span, [*cells, listed([name_of(m) for m in teachers]) or NONE, _name(overall)]))
    heads = ["Step", "Votes", *(name_of(region) for region in subject.regions), "Teachers", "Best over all"]
    return table("Winners of the votes", heads, rows)


def _name(winner: Any) -> str:
    return NONE if winner is None else name_of(str(winner))
