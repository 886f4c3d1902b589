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

from hypothesis import strategies as st

from preceptor import api
from preceptor.comparison.run import compare_runs
from tests.comparison.made import hits, write_run
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mutate, rarely
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
    st.integers(0, 19).map(lambda number: {19: "command", 18: "report"}.get(number, "compare")),
)


def check(case: RunInput, folder: Path) -> bool:
    """Compare a damaged run; an accepted run has the scores of its predictions."""
    run = folder / "run"
    shutil.copytree(template(), run)
    path = run / case.file
    if case.replaced is not None and path.suffix == ".json":
        content = replace_nested(json.loads(path.read_text()), *case.replaced)
        path.write_text(json.dumps(content), errors="surrogatepass")
    elif case.replaced is not None and path.suffix == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().split("\n") if line]
        content = replace_nested(rows, case.replaced[0] + 1, case.replaced[1])
        path.write_text("".join(json.dumps(row) + "\n" for row in content), errors="surrogatepass")
    path.write_bytes(mutate(path.read_bytes(), case.mutations))
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


TARGET = Target(RUNS, check, 150)
