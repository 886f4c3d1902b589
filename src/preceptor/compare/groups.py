"""Models that differ only in their seed are one group, named by what sets it apart."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.compare.models import TrainedModel
from preceptor.errors import UserError, nearest
from preceptor.report.contents import ORDER

MOST_SETTINGS = 4  # in a name; where more differ, recipes with names of their own are told apart by these
NOT_SET = "(none)"


@dataclass(frozen=True)
class Group:
    """Models of one stage and one recipe over seeds, in the order of the seeds.

    `method` names stage and recipe, `name` also the share of the training data where several are compared; `variant`
    numbers the methods of one stage. `differs` are the settings that set the method apart from others of its stage.
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
    def hits(self) -> np.ndarray:
        """(seeds, n) 1.0 where an answer is correct; columns in the order of the questions' ids."""
        return np.stack([model.hits for model in self.models])


def group_models(models: Sequence[TrainedModel]) -> list[Group]:
    """Return the groups: stages in the order teacher, baseline, distilled, methods as given, shares rising."""
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


def choose_baseline(groups: Sequence[Group], asked: str | None) -> Group:
    """Return the group that the others are compared with.

    `asked` is a group's name, the name of a method or stage where one group answers to it, or a run folder; of several
    shares the largest is meant. Without it: the student alone, if there is one method of it, else the first run's.
    Raises UserError for what names no group, or several methods.
    """
    if asked is None:
        alone = {group.method for group in groups if group.stage == "baseline"}
        if len(alone) == 1:
            return _largest([group for group in groups if group.stage == "baseline"])
        return _largest(groups[:1])
    exact = [group for group in groups if group.name == asked]
    named = exact or [g for g in groups if g.method == asked] or [g for g in groups if g.stage == asked]
    if not named and (path := Path(asked)).exists():
        named = [g for g in groups if any(_within(model, path) for model in g.models)]
    if not named:
        raise UserError(f"--baseline {asked!r} is neither a group nor one of the runs{nearest(asked, _names(groups))}")
    if len({group.method for group in named}) > 1:
        raise UserError(f"--baseline {asked!r} fits several groups: {', '.join(_names(named))}; name one of them")
    return _largest(named)


def baseline_of(group: Group, baseline: Group, groups: Sequence[Group]) -> Group | None:
    """Return what `group` is compared with: the baseline's method at the same share of the training data.

    Where it has not been trained at this share, the baseline itself. Other shares of the baseline's own method are
    compared with it only if there is no other method; otherwise each would weaken the tests that were asked for.
    """
    if group is baseline:
        return None
    if group.method == baseline.method:
        return baseline if len({g.method for g in groups}) == 1 else None
    same_share = (g for g in groups if g.method == baseline.method and g.share == group.share)
    return next(same_share, baseline)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """Return the keys without what leads to them, as far as they stay apart: at most two parts where possible."""
    found = {}
    for key in keys:
        parts = key.split(".")
        ends = [".".join(parts[-size:]) for size in range(min(2, len(parts)), len(parts) + 1)]
        unique = (end for end in ends if sum(k == end or k.endswith(f".{end}") for k in keys) == 1)
        found[key] = next(unique, key)
    return found


def shown_value(value: Any) -> str:
    """Return a setting as text; of a path only the last part, since paths may name people."""
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
    if len(set(titles)) < len(titles):  # paths that differ only above their last part
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
