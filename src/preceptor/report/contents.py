"""The files of a run folder, read for its report. Any of them may be missing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import yaml

from preceptor.errors import UserError
from preceptor.training.metrics_file import read_metrics

ORDER = ("teacher", "baseline", "guided", "distilled", "clinkd")
TITLES = {"teacher": "Teacher", "baseline": "Baseline", "distilled": "Distilled"}


@dataclass(frozen=True)
class StageRecord:
    """One trained model: its results.json, the lines of metrics.jsonl, and the prediction `rows` by protocol id."""

    name: str
    folder: Path
    results: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    titles: Mapping[str, str] = field(default_factory=lambda: TITLES)

    @property
    def kind(self) -> str:
        """``teacher`` for every member of an ensemble of teachers, else the name. It is the colour of the stage."""
        return stage_kind(self.name)

    @property
    def title(self) -> str:
        return stage_title(self.name, self.titles)

    def score(self, protocol: str | None, key: str) -> Any:
        return get_nested(self.results, "protocols", protocol or "", key)


@dataclass(frozen=True)
class RunRecord:
    """A run: its stages in the order teacher, baseline, distilled, the results over all of them, and its recipe."""

    folder: Path
    stages: list[StageRecord]
    results: dict[str, Any]
    recipe: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return str(self.recipe.get("name") or self.folder.resolve().name)

    @property
    def focus(self) -> StageRecord:
        """The model that the run is about: the last stage."""
        return self.stages[-1]

    @cached_property
    def document(self) -> dict[str, Any]:
        """The results of the run with those of every stage filled in."""
        return {**self.results, "stages": {stage.name: stage.results for stage in self.stages}}

    @property
    def protocols(self) -> list[str]:
        """Protocol ids, the main one first."""
        return protocols_of(self.document)

    @property
    def protocol(self) -> str | None:
        """The id of the main protocol."""
        return next(iter(self.protocols), None)

    def first(self, *keys: str) -> Any:
        """Return a value of the focus, or of the last other stage that has it."""
        return first_value(self.document, *keys)

    def stage(self, name: str) -> StageRecord | None:
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def notes(self) -> list[str]:
        found: list[str] = list(get_nested(self.results, "notes") or [])
        for stage in self.stages:
            found += get_nested(stage.results, "notes") or []
        return list(dict.fromkeys(found))

    @property
    def leaking(self) -> bool:
        """Whether test rows share images, patients or question frames with training rows."""
        described = (get_nested(stage.results, "describes") or {} for stage in self.stages)
        told = any("leaks" in str(sentence) for sentences in described for sentence in sentences.values())
        return told or bool(self.first("data", "leaking"))


def read_run(
    folder: Path, titles: Mapping[str, str] = TITLES, fields: Mapping[str, type] = MappingProxyType({})
) -> RunRecord:
    """Read a run folder of one stage or of several.

    Args:
        folder: folder of the run.
        titles: titles of the stages.
        fields: what every row of predictions must have, see `read_prediction_rows`.

    Raises:
        UserError: there is no results.json, or a file is damaged.
    """
    root = _results(folder / "results.json")
    listed = get_nested(root, "stages") or {}
    names = set(listed) | {path.parent.name for path in folder.glob("*/results.json")}
    if not root and not names:
        raise UserError(f"{folder} is not a run folder: it has no results.json; give the output folder of a training")
    if names:
        ordered = sorted(names, key=_rank)
        stages = [_stage(name, folder / name, get_nested(listed, name) or {}, titles, fields) for name in ordered]
    else:
        stages = [_stage(get_nested(root, "stage") or "model", folder, root, titles, fields)]
    return RunRecord(folder, stages, root, _recipe(folder / "recipe.yaml"))


def get_nested(tree: Any, *keys: str) -> Any:
    """Return ``tree[key][key]...``, or None if a key is missing."""
    for key in keys:
        if not isinstance(tree, Mapping):
            return None
        tree = tree.get(key)
    return tree


def stages_of(results: Mapping[str, Any]) -> dict[str, Any]:
    """Return the results of each stage by name, of a run of several stages or of one."""
    return get_nested(results, "stages") or {str(results.get("stage") or "model"): results}


def protocols_of(results: Mapping[str, Any]) -> list[str]:
    """Return the protocol ids of a run's results, those of the last stage first."""
    stages = list(stages_of(results).values())
    return list(dict.fromkeys(id for stage in reversed(stages) for id in get_nested(stage, "protocols") or {}))


def first_value(results: Mapping[str, Any], *keys: str) -> Any:
    """Return a value of the last stage, or of the last other stage that has it."""
    values = (get_nested(stage, *keys) for stage in reversed(list(stages_of(results).values())))
    return next((value for value in values if value), None)


def stage_kind(name: str) -> str:
    """Return ``teacher`` for every member of an ensemble of teachers, else the name."""
    return "teacher" if name.startswith("teacher-") else name


def stage_title(name: str, titles: Mapping[str, str] = TITLES) -> str:
    """Return the title of a stage: ``Baseline``, ``Teacher 2``."""
    kind = stage_kind(name)
    title = titles.get(kind, name)
    return title if kind == name else f"{title} {name.removeprefix('teacher-')}"


def _rank(name: str) -> tuple[int, int, str]:
    kind, _, number = name.partition("-")
    return ORDER.index(kind) if kind in ORDER else -1, int(number) if number.isdecimal() else 1, name


def _stage(
    name: str, folder: Path, listed: dict[str, Any], titles: Mapping[str, str], fields: Mapping[str, type]
) -> StageRecord:
    results = _results(folder / "results.json") or listed
    metrics = folder / "metrics.jsonl"
    rows = {}
    for protocol in get_nested(results, "protocols") or {}:
        path = folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
        if path.is_file():
            rows[protocol] = read_prediction_rows(path, fields)
    return StageRecord(name, folder, results, read_metrics(metrics) if metrics.is_file() else [], rows, titles)


def _results(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text("utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error}); evaluate the run again, or delete the file") from error
    return check_results(found, path) if isinstance(found, dict) else {}


_SECTIONS = frozenset(
    [
        "baselines",
        "comparison",
        "data",
        "describes",
        "hd95",
        "image_reliance",
        "interval",
        "machine",
        "mean",
        "modalities",
        "protocols",
        "provenance",
        "pseudo_labels",
        "question_types",
        "reflection",
        "regions",
        "selection",
        "speed",
        "stages",
        "subsets",
        "tasks",
        "training",
        "validation",
        "validation_subsets",
        "versions",
    ]
)
"""Keys of results whose values are mappings."""
_NUMBERS = frozenset(
    [
        "accuracy",
        "bleu",
        "bleu_1",
        "bleu_2",
        "bleu_3",
        "bleu_4",
        "ceiling",
        "closed",
        "f1",
        "high",
        "low",
        "macro",
        "n",
        "n_closed",
        "n_open",
        "open",
        "score",
    ]
)
"""Keys of scores whose values are numbers."""


def check_results(results: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return the results. Raises UserError unless their sections are mappings, scores numbers and notes sentences."""
    stages = results.get("stages") or {}
    if not isinstance(stages, dict):
        raise UserError(f"{path} is damaged (stages is not a mapping of names to results); evaluate the run again")
    for one in (results, *stages.values()):
        notes = get_nested(one, "notes") or []
        if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
            raise UserError(f"{path} is damaged (notes is not a list of texts); evaluate the run again")
        for key in _SECTIONS & one.keys() - {"modalities", "regions"} if isinstance(one, Mapping) else ():
            if not isinstance(one[key], Mapping | None):
                raise UserError(f"{path} is damaged ({key} is {one[key]!r:.40}, not a mapping); evaluate the run again")
        for protocol, scores in (get_nested(one, "protocols") or {}).items():
            _check_scores(scores, str(protocol), path)
    return results


def _check_scores(scores: Any, place: str, path: Path) -> None:
    """Raise UserError unless all scores in nested mappings are numbers or missing."""
    if not isinstance(scores, Mapping):
        raise UserError(f"{path} is damaged ({place} is {scores!r:.40}, not a mapping); evaluate the run again")
    for key, value in scores.items():
        where = f"{place}.{key}"
        if (key in _SECTIONS and value is not None) or (isinstance(value, Mapping) and key not in _NUMBERS):
            _check_scores(value, where, path)
        elif key == "notes" and isinstance(value, list):
            continue
        elif not isinstance(value, str if key == "metric" else int | float | None) or isinstance(value, bool):
            raise UserError(f"{path} is damaged ({where} is {value!r:.40}, not a number); evaluate the run again")


def read_prediction_rows(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Return the rows of a file of predictions.

    Args:
        path: JSON Lines.
        fields: type of the fields that every row must have; a float may be an integer.

    Raises:
        UserError: a line is not an object with these fields. JSON has no NaN and no infinity.
    """
    again = "evaluate the run again"
    rows = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text in UTF-8; {again}") from error
    for number, line in enumerate(lines, 1):
        try:
            row = parse_strictly(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is damaged ({error}); {again}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is damaged (it is not a mapping of keys to values); {again}")
        for name, kind in fields.items():
            value = row.get(name)
            if not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
                raise UserError(f"{path}, line {number}: {name} is {value!r:.80}, not {kind.__name__}; {again}")
        rows.append(row)
    return rows


def parse_strictly(text: str) -> Any:
    """Return parsed JSON. Unlike `json.loads`, refuse NaN and infinities, which JSON does not have."""

    def refuse(constant: str) -> None:
        raise ValueError(f"it contains {constant}")

    return json.loads(text, parse_constant=refuse)


def _recipe(path: Path) -> dict[str, Any]:
    try:
        found = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    except (yaml.YAMLError, UnicodeDecodeError):
        return {}
    return found if isinstance(found, dict) else {}
