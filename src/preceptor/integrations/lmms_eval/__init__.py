"""Integration into lmms-eval: Preceptor's students as models, and Preceptor's protocols as tasks for any model."""

from __future__ import annotations

from typing import Any


def manifests() -> list[Any]:
    """Return the manifests for the entry point `lmms_eval.models`: the model `preceptor`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    place = "preceptor.integrations.lmms_eval.model.PreceptorStudent"
    return [ModelManifest(model_id="preceptor", simple_class_path=place)]
