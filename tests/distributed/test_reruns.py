"""A run that is started again in two processes: what is finished stays, and what is missing is made once."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from preceptor.files import lock
from preceptor.teachers.array_store import ArrayStoreWriter
from preceptor.teachers.label_store import LabelStore, read_labels
from tests.distributed.pair import run_pair, run_scenario
from tests.fault.test_kill import weights
from tests.fault.tiny import CLINKD, RECIPE, write_recipe

pytestmark = pytest.mark.slow
VQA = [
    "stages=[teacher,distilled]",
    "teacher.train.epochs=2",
    "student.train.epochs=2",
    "method.teaching.kind=cached",
    "data.augment.views=2",
]
GROUNDING = ["student.train.epochs=4", "method.reflection.rounds=1"]


class Pair:
    """Runs a recipe in two processes and expects both to succeed."""

    def __init__(self, folder: Path, text: str, settings: list[str]) -> None:
        recipe = str(write_recipe(folder, text))
        self.folder = folder
        self.arguments = ["train", recipe, f"output={folder / 'run'}", f"data.root={folder / 'data'}", *settings]

    def __call__(self) -> None:
        codes, log = run_pair(self.arguments, self.folder)
        assert codes == [0, 0], log[-4000:]


def kill_in_finish(rank: int) -> None:
    """Kill the writer of a cache when all but the last step is done; only the first process writes one."""
    ArrayStoreWriter.finish = lambda _: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment,method-assign]


def kill_after_append(rank: int) -> None:
    """Kill the writer of labels after the first ones."""
    append = LabelStore.append

    def cut(self: LabelStore, labels) -> None:
        append(self, labels)
        os.kill(os.getpid(), signal.SIGKILL)

    LabelStore.append = cut  # type: ignore[method-assign]


def steps(stage: Path) -> tuple[int, bytes]:
    """Return something that differs after any step of a training."""
    file = stage / "metrics.jsonl"
    return file.stat().st_mtime_ns, file.read_bytes()


def scenario_vqa(folder: Path) -> None:
    start = Pair(folder, RECIPE, VQA)
    run = folder / "run"
    start()
    want, teacher, student = weights(run), steps(run / "teacher"), steps(run / "distilled")
    assert len(want) >= 2

    start()  # nothing is left to do
    assert (weights(run), steps(run / "teacher"), steps(run / "distilled")) == (want, teacher, student)

    # A killed run: the teacher is finished, the student and the cache are not.
    cache = run / "teacher-cache"
    built = cache.stat().st_mtime_ns
    shutil.rmtree(run / "distilled")
    start()  # the cache is there
    assert cache.stat().st_mtime_ns == built
    assert (weights(run), steps(run / "teacher")) == (want, teacher)
    assert steps(run / "distilled") != student
    shutil.rmtree(run / "distilled")
    shutil.rmtree(cache)
    codes, log = run_pair(start.arguments, folder, kill_in_finish)
    assert codes == [-signal.SIGKILL, 2], log[-3000:]
    assert "another process of this run has stopped" in log
    assert not cache.exists()
    start()
    assert (weights(run), steps(run / "teacher")) == (want, teacher)

    with lock(run / ".lock"):  # only the first process asks for it
        codes, log = run_pair(start.arguments, folder)
    assert codes == [2, 2], log[-3000:]
    assert log.count("is in use by") == 2


def scenario_seeds(folder: Path) -> None:
    start = Pair(folder, RECIPE, ["teacher.train.epochs=1", "--seeds", "2"])
    run = folder / "run"
    start()
    want = weights(run)
    assert len({*want.values()}) == 2
    before = [steps(folder) for folder in sorted(run.glob("seed-*"))]
    assert len(before) == 2
    shutil.rmtree(run / "compare")
    start()
    assert weights(run) == want
    assert [steps(folder) for folder in sorted(run.glob("seed-*"))] == before
    assert (run / "compare" / "compare.html").exists()


def scenario_grounding(folder: Path) -> None:
    start = Pair(folder, CLINKD, GROUNDING)
    run = folder / "run"
    start()
    want, teacher = weights(run), steps(run / "teacher")
    start()
    assert (weights(run), steps(run / "teacher")) == (want, teacher)

    # The first process is killed while it answers, then while it caches.
    shutil.rmtree(run / "clinkd")
    labels = read_labels(run / "pseudo-labels")
    for folder_of_teacher, kill in (("pseudo-labels", kill_after_append), ("teacher-cache", kill_in_finish)):
        shutil.rmtree(run / folder_of_teacher)
        codes, log = run_pair(start.arguments, folder, kill)
        assert codes == [-signal.SIGKILL, 2], log[-3000:]
        assert "another process of this run has stopped" in log
        if kill is kill_after_append:
            assert 0 < len(read_labels(run / "pseudo-labels")) < len(labels)
    start()
    assert (weights(run), steps(run / "teacher")) == (want, teacher)
    assert len(read_labels(run / "pseudo-labels")) == len(labels)


@pytest.mark.parametrize("scenario", [scenario_vqa, scenario_seeds, scenario_grounding])
def test_a_run_that_is_started_again(tmp_path, scenario):
    run_scenario(__name__, scenario.__name__, tmp_path)
