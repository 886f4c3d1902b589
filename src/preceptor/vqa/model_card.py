"""The model card of a VQA model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preceptor.report.format import count
from preceptor.report.model_card import render_card
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.report import score_tables


def model_card(results: Mapping[str, Any], recipe: VqaRecipe) -> str:
    """Return the card as Markdown with YAML front matter. `results` are those of one stage; any may be missing."""
    stage, method = str(results.get("stage")), recipe.method
    weights = [f"{name} {weight:g}" for name, weight in method.term_weights().items()]
    described = f"{method.name}, teacher {method.teaching.kind}; weights of the loss terms: {', '.join(weights)}"
    return render_card(
        "vqa/templates/card.md.j2",
        results,
        recipe,
        tables=score_tables(results),
        train=(recipe.teacher if stage.startswith("teacher") else recipe.student).train,
        unit="questions",
        pipeline_tag="visual-question-answering",
        tags=["visual-question-answering"],
        method=described if stage == "distilled" else "",
        size=f", {count(results['parameters'])} parameters" if results.get("parameters") else "",
        initial="; ".join(f"{part} {source}" for part, source in (results.get("provenance") or {}).items()),
    )
