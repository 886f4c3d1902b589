"""What a run folder holds, read for its report. Anything may be missing: an older run, or one that was cut short."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.training.trackers import read_metrics

ORDER = ("teacher", "baseline", "guided", "distilled", "clinkd")
TITLES = {"teacher": "Teacher", "baseline": "Student, undistilled", "distilled": "Student, distilled"}


@dataclass(frozen=True)
class StageRecord:
    """One trained model of a run: `results` of its results.json, `metrics` lines, scored `rows` by protocol id."""

    name: str
    folder: Path
    results: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)

    @property
    def kind(self) -> str:
        """`teacher` for every member of an ensemble of teachers, else the name."""
        return "teacher" if self.name.startswith("teacher-") else self.name

    @property
    def title(self) -> str:
        title = self.titles.get(self.kind, self.name)
        return title if self.kind == self.name else f"{title} {self.name.removeprefix('teacher-')}"

    def score(self, protocol: str, key: str = "accuracy") -> float | None:
        return get_nested(self.results, "protocols", protocol, key)

    @property
    def parameters(self) -> int | None:
        return get_nested(self.results, "parameters")


@dataclass(frozen=True)
class RunRecord:
    """A run: its stages in the order teacher(s), undistilled, distilled, and the results over all of them."""

    folder: Path
    stages: list[StageRecord]
    results: dict[str, Any]

    @property
    def focus(self) -> StageRecord:
        """The model that the run is about: the last in the order."""
        return self.stages[-1]

    def stage(self, name: str) -> StageRecord | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def protocols(self) -> list[str]:
        """Protocol ids, the main one first."""
        found: dict[str, None] = {}
        for stage in reversed(self.stages):
            found |= dict.fromkeys(get_nested(stage.results, "protocols") or {})
        return list(found)

    def first(self, *keys: str) -> Any:
        """Return a value of the focus, or of the last other stage that has it."""
        values = (get_nested(stage.results, *keys) for stage in reversed(self.stages))
        return next((value for value in values if value), None)

    @property
    def notes(self) -> list[str]:
        found: dict[str, None] = dict.fromkeys(get_nested(self.results, "notes") or [])
        for stage in self.stages:
            found |= dict.fromkeys(get_nested(stage.results, "notes") or [])
        return list(found)


def read_run(folder: Path, titles: Mapping[str, str] = TITLES) -> RunRecord:
    """Read a run folder of one stage or of several; `titles` are what its stages are called.

    Raises UserError where there is no results.json at all, or one that is not JSON.
    """
    root = _results(folder / "results.json")
    listed = get_nested(root, "stages") or {}
    names = set(listed) | {path.parent.name for path in folder.glob("*/results.json")}
    if not root and not names:
        raise UserError(f"{folder} is no run folder: it holds no results.json; give the output folder of a training")
    if names:
        stages = [
            _stage(name, folder / name, get_nested(listed, name) or {}, titles) for name in sorted(names, key=_rank)
        ]
    else:
        stages = [_stage(get_nested(root, "stage") or "student", folder, root, titles)]
    return RunRecord(folder, stages, root)


def get_nested(tree: Any, *keys: str) -> Any:
    """Return ``tree[key][key]...``, or None where something on the way is missing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def _rank(name: str) -> tuple[int, int, str]:
    kind, _, number = name.partition("-")
    known = ORDER.index(kind) if kind in ORDER else -1
    return known, int(number) if number.isdecimal() else 1, name


def _stage(name: str, folder: Path, listed: dict[str, Any], titles: Mapping[str, str]) -> StageRecord:
    results = _results(folder / "results.json") or listed
    metrics = folder / "metrics.jsonl"
    rows = {}
    for protocol in get_nested(results, "protocols") or {}:
        path = folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
        if path.is_file():
            rows[protocol] = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return StageRecord(name, folder, results, read_metrics(metrics) if metrics.is_file() else [], rows, titles)


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); evaluate the run again, or delete the file") from error
    return found if isinstance(found, dict) else {}
