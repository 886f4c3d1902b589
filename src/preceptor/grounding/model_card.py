"""The model card of a grounded vision-language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.report import score_tables
from preceptor.report.format import count
from preceptor.report.model_card import render_card


def model_card(results: Mapping[str, Any], recipe: GroundingRecipe) -> str:
    """Return the card as Markdown with YAML front matter. `results` are those of one stage; any may be missing."""
    stage = results.get("stage")
    return render_card(
        "grounding/templates/card.md.j2",
        results,
        recipe,
        tables=score_tables(results),
        train=(recipe.teacher if stage == "teacher" else recipe.student).train,
        unit="dialogues",
        library="transformers",
        pipeline_tag="image-text-to-text",
        tags=["visual-grounding", "visual-question-answering"],
        method=recipe.method.name if stage in ("distilled", "clinkd") else "",
        size=f", {count(results['parameters'])} parameters" if results.get("parameters") else "",
    )
