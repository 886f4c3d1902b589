"""The sections that the reports of all tasks share: training and record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from preceptor.recipe import is_for
from preceptor.report.contents import TITLES, RunRecord, first_value, get_nested, stage_kind, stage_title, stages_of
from preceptor.report.format import NONE, SPACE, count, duration, finite, milliseconds
from preceptor.report.page import Charts, Code, Details, Facts, Section
from preceptor.report.plots import Line, line_chart
from preceptor.report.tables import Table

BOOKKEEPING = {"step", "epoch", "lr", "grad_norm", "loss", "samples/s"}
HIDDEN = "(local path, not shown)"
PATH_KEYS = {"output", "root", "images", "cache", "runs", "init", "split_file", "teaching_run", "store"}


def heading(run: RunRecord, task: str, unit: str) -> tuple[str, list[str]]:
    """Return the title of a report, which names the data that were used, and facts: the recipe and counts of `unit`.

    A shipped recipe that was given other data is only where the settings come from.
    """
    sizes = run.first("data") or {}
    data = " / ".join(str(sizes[key]) for key in ("name", "variant") if sizes.get(key))
    counts = [
        f"{sizes[split]:,} {split} {unit}".replace(",", SPACE)
        for split in ("train", "validation", "test")
        if isinstance(sizes.get(split), int)
    ]
    own = is_for(run.name, str(get_nested(run.recipe, "data", "name")))
    recipe = f"Recipe {run.name}" if own else f"Settings of recipe {run.name}, other data"
    return f"{task}: {data}" if data else task, [" · ".join([recipe, *counts])]


def cost_table(results: Mapping[str, Any], unit: str, titles: Mapping[str, str] = TITLES) -> Table:
    """Return the number of parameters and the speed of every model; `unit` is what is timed, such as ``question``."""
    rows, keys = [], []
    for name, stage in stages_of(results).items():
        rate = finite(get_nested(stage, "speed", "units_per_second"))
        cells = [count(stage.get("parameters")), milliseconds(finite(stage.get("latency_ms")))]
        rows.append([stage_title(name, titles), *cells, NONE if rate is None else f"{rate:,.1f}"])
        keys.append(stage_kind(name))
    batch, how = first_value(results, "speed", "batch_size"), first_value(results, "latency")
    processor = first_value(results, "machine", "gpu") or first_value(results, "machine", "processor")
    where = f", on {processor}" if processor else ""
    per_second = f"{unit.capitalize()}s/s{f', batch of {batch}' if batch else ''}"
    notes = [f"Milliseconds: {how}{where}."] if how else []
    return Table("Size and speed", ["Model", "Parameters", f"ms per {unit}", per_second], rows, notes, keys)


def training_section(run: RunRecord, *, score: str, unit: str) -> Section:
    """Return curves of validation and loss terms, and a table of what training took.

    `score` names the validation score, `unit` the samples that may be left out.
    """
    validation = [
        Line(
            stage.title,
            stage.kind,
            [(line["step"], line["validation/score"]) for line in stage.metrics if "validation/score" in line],
            [get_nested(stage.results, "training", "kept_step")],
        )
        for stage in run.stages
    ]
    title = f"Validation {score}"
    charts = [
        (f"{title} (ring: selected step)", line_chart(f"{title} by step", validation, x_title="step", as_percent=True))
    ]
    terms = {key for stage in run.stages for line in stage.metrics for key in line}
    for term in sorted(terms, key=lambda term: (term not in ("label", "output"), term)):
        if term in BOOKKEEPING or term.startswith("validation/"):
            continue
        lines = [
            Line(stage.title, stage.kind, [(line["step"], line[term]) for line in stage.metrics if term in line])
            for stage in run.stages
        ]
        charts.append((f"Loss term: {term}", line_chart(f"Loss term {term} by step", lines, x_title="step")))
    kinds = {stage.kind: stage.title for stage in reversed(run.stages)}
    return Section("training", "Training", [Charts(charts, list(kinds.items())), _effort(run, unit)])


def _effort(run: RunRecord, unit: str) -> Table:
    rows, keys = [], []
    for stage in run.stages:
        training = get_nested(stage.results, "training")
        if not training:
            continue
        begun = get_nested(stage.results, "provenance") or {}
        cells = [training.get("steps"), training.get("kept_step"), duration(training.get("seconds"))]
        cells += [training.get("samples_per_second"), get_nested(stage.results, "seed")]
        cells += [len(training.get("skipped") or []), "; ".join(f"{part}: {source}" for part, source in begun.items())]
        rows.append([stage.title, *(NONE if cell in (None, "") else str(cell) for cell in cells)])
        keys.append(stage.kind)
    columns = ["Model", "Steps", "Selected step", "Time", "Samples/s", "Seed", f"{unit} left out", "Initial weights"]
    if all(row[-1] == NONE for row in rows):
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return Table("Training of each model", columns, rows, keys=keys)


def record_section(run: RunRecord, unit: str) -> Section:
    """Return the facts of a run (fingerprints of the data, seeds, machine, versions) and its recipe without paths."""
    facts: dict[str, Any] = {}
    for key, name in (("sha256", f"Data (SHA-256 of the {unit})"), ("test_sha256", f"Test {unit} (SHA-256)")):
        if fingerprint := run.first("data", key):
            facts[name] = fingerprint
    seeds = {stage.title: get_nested(stage.results, "seed") for stage in run.stages}
    if known := [f"{title} {seed}" for title, seed in seeds.items() if seed is not None]:
        facts["Seeds"] = ", ".join(known)
    if machine := run.first("machine"):
        facts["Machine"] = ", ".join(f"{key} {value}" for key, value in machine.items())
    seconds = [get_nested(stage.results, "training", "seconds") for stage in run.stages]
    if any(value is not None for value in seconds):
        facts["Training time, all models"] = duration(sum(value or 0 for value in seconds))
    if versions := get_nested(run.results, "versions") or run.first("versions"):
        facts["Versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    for stage in run.stages:
        if skipped := get_nested(stage.results, "training", "skipped"):
            facts[f"{unit.capitalize()} left out, {stage.title}"] = ", ".join(map(str, skipped))
    settings = {key: value for key, value in run.recipe.items() if key != "description"}
    recipe = yaml.safe_dump(without_paths(settings), sort_keys=False, allow_unicode=True) if settings else ""
    return Section("record", "Record", [Facts(facts), *([Details("Recipe", [Code(recipe)])] if recipe else [])])


def skipped_note(run: RunRecord, unit: str) -> list[str]:
    """Return a sentence about samples that were left out of training, if there are any."""
    skipped = sum(len(get_nested(stage.results, "training", "skipped") or []) for stage in run.stages)
    if not skipped:
        return []
    return [f"{skipped} training {unit} were left out because their files are broken. Their ids are listed below."]


def without_paths(value: Any, key: str = "") -> Any:
    """Return a recipe without local paths: a page is passed on, and paths may name people."""
    if isinstance(value, Mapping):
        return {name: without_paths(inner, key if key in PATH_KEYS else name) for name, inner in value.items()}
    if isinstance(value, list):
        return [without_paths(inner, key) for inner in value]
    if isinstance(value, str) and (
        key in PATH_KEYS or value.startswith((".", "/", "~", "\\")) or value[1:3] in (":\\", ":/")
    ):
        return HIDDEN
    return value
