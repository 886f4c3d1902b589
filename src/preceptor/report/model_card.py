"""The model card: README.md of a model folder, in the format of the Hugging Face hub.

It holds nothing that changes if the same recipe runs again: no time, no speed, no path, no machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from preceptor.config import BaseRecipe, TrainConfig
from preceptor.recipe import is_for
from preceptor.report.contents import get_nested
from preceptor.report.page import render_markdown
from preceptor.report.tables import Table


def render_card(
    template: str,
    results: Mapping[str, Any],
    recipe: BaseRecipe,
    *,
    tables: Sequence[Table],
    train: TrainConfig,
    unit: str,
    pipeline_tag: str,
    tags: Sequence[str],
    library: str = "preceptor",
    method: str = "",
    **context: Any,
) -> str:
    """Render the card of one stage as Markdown with YAML front matter.

    Args:
        template: the task's template, which extends ``report/templates/card.md.j2``.
        results: the results of the stage. Any part may be missing.
        recipe: the recipe of the run.
        tables: scores, without measured times.
        train: training settings of the stage.
        unit: the samples of the data set, such as ``questions``.
        pipeline_tag, tags, library: front matter of the hub.
        method: settings of the distillation, if the stage was distilled.
        context: further values for the template.
    """
    stage = str(results.get("stage") or "model")
    data = results.get("data") or {}
    own = is_for(recipe.name, recipe.data.name)
    title = f"{recipe.name if own else data.get('name', 'own data')}: {stage}"
    front: dict[str, Any] = {"license": "other", "library_name": library, "pipeline_tag": pipeline_tag}
    front["tags"] = ["preceptor", "medical", *tags]
    if method:
        front["tags"] += ["knowledge-distillation", method.split(",")[0]]
    front |= _model_index(title, results, pipeline_tag)
    sizes = ", ".join(f"{data[split]} {split}" for split in ("train", "validation", "test") if split in data)
    return render_markdown(
        template,
        front=Markup(yaml.safe_dump(front, sort_keys=False, allow_unicode=True)),
        title=title,
        stage="teacher" if stage.startswith("teacher") else stage,
        results=results,
        data={"name": "unknown", "variant": "", "sha256": "unknown", **data, "sizes": sizes} if data else None,
        notes=results.get("notes") or [],
        tables=[table for table in tables if table],
        facts=[*([] if own else [f"settings of recipe {recipe.name}, other data"]), *_training(results, train, method)],
        unit=unit,
        **context,
    )


def _model_index(title: str, results: Mapping[str, Any], task: str) -> dict[str, Any]:
    name, variant = get_nested(results, "data", "name"), get_nested(results, "data", "variant")
    metrics = []
    for protocol, scores in (results.get("protocols") or {}).items():
        metric = get_nested(scores, "metric") or "accuracy"
        value = get_nested(scores, metric) if get_nested(scores, metric) is not None else get_nested(scores, "accuracy")
        if value is not None:
            metrics.append({"type": metric, "name": f"{metric}, {protocol}", "value": round(value, 4)})
    if not name or not metrics:
        return {}
    dataset = {"type": name, "name": name, "split": "test", **({"config": variant} if variant else {})}
    return {
        "model-index": [{"name": title, "results": [{"task": {"type": task}, "dataset": dataset, "metrics": metrics}]}]
    }


def _training(results: Mapping[str, Any], train: TrainConfig, method: str) -> list[str]:
    facts = [
        f"at most {train.epochs:g} epochs in batches of {train.batch_size}, {train.optimizer}, learning rate "
        f"{train.learning_rate:g} ({train.schedule}), weight decay {train.weight_decay:g}"
    ]
    training = results.get("training") or {}
    if "steps" in training:
        facts.append(f"{training['steps']} steps; the weights are those of step {training.get('kept_step')}")
    if results.get("seed") is not None:
        facts.append(f"seed {results['seed']}")
    facts += [method] if method else []
    if skipped := training.get("skipped"):
        facts.append(f"{len(skipped)} training samples left out because their files are broken")
    if versions := results.get("versions"):
        facts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return facts
