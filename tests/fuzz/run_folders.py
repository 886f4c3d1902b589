"""Run folders with damaged results, recipes and predictions, for `compare` and `report`."""

from __future__ import annotations

import atexit
import functools
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from preceptor import api
from preceptor.comparison.run import compare_runs
from tests.comparison.made import hits, write_run
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely
from tests.fuzz.outcome import attempt, command, require
from tests.fuzz.target import Target

STAGES = ("baseline", "distilled")
FILES = (
    "results.json",
    *(f"{stage}/{name}" for stage in STAGES for name in ("results.json", "recipe.yaml", "predictions/toy-test.jsonl")),
)
ACCURACY = {"baseline": 0.5, "distilled": 0.75}


@functools.cache
def template() -> Path:
    """Return a finished run of two stages with the files that comparisons read."""
    run = Path(tempfile.mkdtemp(prefix="preceptor-fuzz-")) / "run"
    atexit.register(shutil.rmtree, run.parent, ignore_errors=True)
    write_run(run, {stage: hits(20, accuracy) for stage, accuracy in ACCURACY.items()})
    shutil.copy(run / "distilled" / "recipe.yaml", run / "recipe.yaml")
    return run


@dataclass(frozen=True)
class RunInput:
    """The file of a run to damage, an odd value in it, damage to its bytes, and what reads the run."""

    file: str
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    deleted: bool
    verb: str


RUNS = st.builds(
    RunInput,
    st.sampled_from([*FILES, "recipe.yaml"]),
    st.one_of(st.none(), st.tuples(st.integers(0, 40), json_values()), st.tuples(st.integers(0, 40), json_values())),
    DAMAGE,
    rarely(12),
    st.integers(0, 19).map(lambda number: "command" if number == 19 else "report" if number > 13 else "compare"),
)


def damage(path: Path, replaced: tuple[int, Any] | None, mutations: tuple[Mutation, ...]) -> None:
    """Replace a value of a JSON file or of JSON lines, and damage the bytes."""
    if replaced is not None and path.suffix == ".json":
        content = replace_nested(json.loads(path.read_text()), *replaced)
        path.write_text(json.dumps(content), errors="surrogatepass")
    elif replaced is not None and path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        content = replace_nested(rows, replaced[0] + 1, replaced[1])
        path.write_text("".join(json.dumps(row) + "\n" for row in content), errors="surrogatepass")
    path.write_bytes(mutate(path.read_bytes(), mutations))


def check(case: RunInput, folder: Path) -> bool:
    """Compare a damaged run; an accepted run has the scores of its predictions."""
    run = folder / "run"
    shutil.copytree(template(), run)
    path = run / case.file
    damage(path, case.replaced, case.mutations)
    if case.deleted:
        path.unlink()
    if case.verb == "report":
        return attempt(lambda: api.report(run / "distilled")).accepted
    if case.verb == "command":
        return command("compare", run, "--output", folder / "out", "--json").accepted
    outcome = attempt(lambda: compare_runs([run], resamples=100))
    if not outcome.accepted:
        return False
    comparison = outcome.value
    for group in comparison.groups:
        accuracy = ACCURACY.get(group.stage)
        if accuracy is not None and case.file != f"{group.stage}/predictions/toy-test.jsonl":
            found = comparison.score(group).mean
            require(abs(found - accuracy) < 1e-9, "another accuracy", (group.stage, found))
    return True


TARGET = Target(RUNS, check, 60)


# --- several runs ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunsInput:
    """Several runs (seed, accuracy of the student, rows), and damage to a file of one of them."""

    runs: tuple[tuple[int, float, int], ...]
    damaged: int
    file: str
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    settings: bool
    by_command: bool


SEVERAL = st.builds(
    RunsInput,
    runs=st.lists(
        st.tuples(st.integers(0, 3), st.sampled_from([0.25, 0.5, 0.75, 1.0]), mostly(st.just(20), st.just(21), 16)),
        min_size=1,
        max_size=4,
    ).map(tuple),
    damaged=st.integers(0, 3),
    file=st.sampled_from(FILES),
    replaced=mostly(st.none(), st.tuples(st.integers(0, 40), json_values()), 2),
    mutations=DAMAGE,
    settings=rarely(4),
    by_command=rarely(12),
)


def check_several(case: RunsInput, folder: Path) -> bool:
    """Compare several runs; an accepted comparison has the mean accuracy of the students, over all seeds."""
    runs = []
    for number, (seed, accuracy, rows) in enumerate(case.runs):
        stages = {"baseline": hits(rows, 0.5, seed), "distilled": hits(rows, accuracy, seed)}
        other = {"student": {"train": {"epochs": 3 + number}}} if case.settings else {}
        runs.append(write_run(folder / f"run{number}", stages, seed=seed, settings=other))
    damaged = case.replaced is not None or bool(case.mutations)
    damage(runs[case.damaged % len(runs)] / case.file, case.replaced, case.mutations)
    if case.by_command:
        return command("compare", *runs, "--output", folder / "out", "--json").accepted
    outcome = attempt(lambda: compare_runs(runs, resamples=100))
    if not outcome.accepted:
        return False
    if damaged:
        return True
    require(len({rows for _, _, rows in case.runs}) == 1, "runs with other questions were compared", case.runs)
    comparison = outcome.value
    groups = [group for group in comparison.groups if group.stage == "distilled"]
    if case.settings:
        accuracies = sorted(accuracy for _, accuracy, _ in case.runs)
        found = sorted(comparison.score(group).mean for group in groups)
        require(found == pytest.approx(accuracies, abs=0.03), "other accuracies", (found, accuracies))
    else:
        require(len({seed for seed, _, _ in case.runs}) == len(case.runs), "one seed was counted twice", case.runs)
        require(len(groups) == 1, "runs that differ in the seed are not one group", len(groups))
        mean = sum(round(rows * accuracy) / rows for _, accuracy, rows in case.runs) / len(case.runs)
        require(abs(comparison.score(groups[0]).mean - mean) < 1e-9, "another mean", comparison.score(groups[0]))
    return True


SEVERAL_TARGET = Target(SEVERAL, check_several, 25)
