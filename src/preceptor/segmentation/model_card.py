"""The model card of a segmentation network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from preceptor.report.format import count
from preceptor.report.model_card import render_card
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.report import score_tables


def model_card(results: Mapping[str, Any], recipe: SegmentationRecipe) -> str:
    """Return the card as Markdown with YAML front matter. `results` are those of one stage; any may be missing."""
    modalities = results.get("modalities") or []
    method = recipe.method
    who = [f"{key} {getattr(method, key)}" for key in ("teachers", "teacher") if hasattr(method, key)]
    described = ", ".join([method.name, *who])
    return render_card(
        "segmentation/templates/card.md.j2",
        results,
        recipe,
        tables=score_tables(results),
        train=recipe.train,
        unit="cases",
        pipeline_tag="image-segmentation",
        tags=["image-segmentation", "missing-modalities"],
        method=described if results.get("stage") == "distilled" else "",
        regions=", ".join(results.get("regions") or []),
        modalities=", ".join(modalities),
        first_modality=next(iter(modalities), "flair"),
        size=f", {count(results['parameters'])} parameters" if results.get("parameters") else "",
    )
