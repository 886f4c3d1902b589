"""Groups of models that differ only in their seed, named by the settings in which they differ from other groups."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.comparison.models import TrainedModel
from preceptor.errors import UserError, nearest
from preceptor.report.contents import ORDER

MOST_SETTINGS = 4
"""If more settings differ, groups are named by their recipes, provided that these have different names."""
NOT_SET = "(none)"


@dataclass(frozen=True)
class Group:
    """Models of one stage and one recipe with different seeds, in the order of the seeds.

    Args:
        name: `method` and, if several shares of the training data are compared, the share.
        method: names stage and recipe.
        stage: of the recipe.
        variant: number of the method among those of the stage.
        share: of the training data.
        differs: settings in which the method differs from the others of its stage.
        models: one per seed.
    """

    name: str
    method: str
    stage: str
    variant: int
    share: float
    differs: dict[str, Any]
    models: tuple[TrainedModel, ...]

    @property
    def seeds(self) -> list[int]:
        return [model.seed for model in self.models]

    @cached_property
    def values(self) -> np.ndarray:
        """(seeds, n) values of the models' unit scores."""
        return np.stack([model.values for model in self.models])


def group_models(models: Sequence[TrainedModel]) -> list[Group]:
    """Return the groups by stage (teacher first, baseline, then the methods), by method as given, by rising share."""
    methods: list[list[TrainedModel]] = []
    for model in models:
        same = (m for m in methods if (m[0].stage, m[0].settings) == (model.stage, model.settings))
        known = next(same, None)
        if known is None:
            methods.append([model])
        else:
            known.append(model)
    several_shares = len({model.share for model in models}) > 1
    groups = []
    for stage in sorted({model.stage for model in models}, key=_rank):
        of_stage = [method for method in methods if method[0].stage == stage]
        apart = _settings_apart(of_stage)
        for variant, (method, title) in enumerate(zip(of_stage, _titles(stage, of_stage, apart), strict=True)):
            for share in sorted({model.share for model in method}):
                members = sorted((m for m in method if m.share == share), key=lambda m: m.seed)
                name = f"{title} at {100 * share:g} %" if several_shares else title
                differs = {key: method[0].settings.get(key) for key in apart}
                groups.append(Group(name, title, stage, variant, share, differs, tuple(members)))
    return groups


def choose_baseline(groups: Sequence[Group], name: str | None) -> Group:
    """Return the group that the others are compared with.

    `name` is the name of a group, of a method or stage if only one group has it, or a run folder. Among several shares
    the largest is chosen. Default: the stage `baseline` if it has one method, else the first group. Raises UserError
    if `name` fits no group, or several methods.
    """
    if name is None:
        baselines = {group.method for group in groups if group.stage == "baseline"}
        if len(baselines) == 1:
            return _largest([group for group in groups if group.stage == "baseline"])
        return _largest(groups[:1])
    exact = [group for group in groups if group.name == name]
    named = exact or [g for g in groups if g.method == name] or [g for g in groups if g.stage == name]
    if not named and (path := Path(name)).exists():
        named = [g for g in groups if any(_within(model, path) for model in g.models)]
    if not named:
        raise UserError(f"--baseline {name!r} is neither a group nor one of the runs{nearest(name, _names(groups))}")
    if len({group.method for group in named}) > 1:
        raise UserError(f"--baseline {name!r} fits several groups: {', '.join(_names(named))}; name one of them")
    return _largest(named)


def baseline_of(group: Group, baseline: Group, groups: Sequence[Group]) -> Group | None:
    """Return the group that `group` is compared with: the baseline's method at the same share of the training data.

    If it was not trained at this share, return the baseline itself. Other shares of the baseline's method are compared
    with it only if there is no other method; otherwise each would weaken the tests of interest.
    """
    if group is baseline:
        return None
    if group.method == baseline.method:
        return baseline if len({g.method for g in groups}) == 1 else None
    same_share = (g for g in groups if g.method == baseline.method and g.share == group.share)
    return next(same_share, baseline)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the keys by their last parts: two if possible, more if they would not stay distinct."""
    short = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-size:]) for size in range(min(2, len(parts)), len(parts) + 1)]
        unique = (end for end in ends if sum(k == end or k.endswith(f".{end}") for k in keys) == 1)
        short[key] = next(unique, key)
    return short


def shown_value(value: Any) -> str:
    """Return a setting as text; for a path only its last part, because paths may contain people's names."""
    if value is None:
        return NOT_SET
    if isinstance(value, str):
        return Path(value).name if value.startswith(("/", "~", ".")) else value
    if isinstance(value, list):
        return f"[{', '.join(shown_value(item) for item in value)}]"
    return json.dumps(value)


def _settings_apart(methods: Sequence[Sequence[TrainedModel]]) -> list[str]:
    keys = dict.fromkeys(key for method in methods for key in method[0].settings)
    return [key for key in keys if any(m[0].settings.get(key) != methods[0][0].settings.get(key) for m in methods)]


def _titles(stage: str, methods: Sequence[Sequence[TrainedModel]], apart: Sequence[str]) -> list[str]:
    if len(methods) == 1:
        return [stage]
    names = [method[0].recipe_name for method in methods]
    if len(apart) > MOST_SETTINGS and len(set(names)) == len(names):
        return [f"{stage} {name}" for name in names]
    short = short_names(apart)
    titles = []
    for method in methods:
        settings = ", ".join(f"{short[key]}={shown_value(method[0].settings.get(key))}" for key in apart)
        titles.append(f"{stage} {settings}")
    if len(set(titles)) < len(titles):  # Paths that differ only above their last part.
        titles = [f"{title} ({number})" for number, title in enumerate(titles, 1)]
    return titles


def _rank(stage: str) -> tuple[int, str]:
    return (ORDER.index(stage) if stage in ORDER else len(ORDER), stage)


def _largest(groups: Sequence[Group]) -> Group:
    return max(groups, key=lambda group: group.share)


def _within(model: TrainedModel, path: Path) -> bool:
    return path.resolve() in (model.folder.resolve(), model.source.resolve())


def _names(groups: Sequence[Group]) -> list[str]:
    return list(dict.fromkeys(group.name for group in groups))
