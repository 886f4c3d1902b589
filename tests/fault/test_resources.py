"""Limits of the machine and of paths, really injected in a forked process: one sentence, exit code 2, nothing left."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.command_line import call
from tests.fault.tiny import CLINKD, LCKD, RECIPE, wait, write_recipe


def forked_call(arguments: list[object], prepare: Callable[[], None] = lambda: None) -> tuple[int, str]:
    """Return (exit code, output) of the command line in a fork, after `prepare`. The output goes through a pipe."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        code, err = 70, ""
        try:
            prepare()
            code, _, err = call(*arguments)
        except BaseException as error:
            err = f"Traceback of {error!r}"
        finally:
            os.write(writing, err.encode()[-60_000:])
            os._exit(code)
    os.close(writing)
    with os.fdopen(reading, "rb") as file:
        text = file.read().decode()
    return wait(pid), text


def limit(kind: int, number: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(kind, (number, number))


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("resources")
    recipe = str(write_recipe(folder, RECIPE))
    code, _, err = call("train", recipe, f"output={folder / 'run'}", f"data.root={folder / 'data'}", *SHORT)
    assert code == 0, err
    shutil.copytree(folder / "run", folder / "run2")
    (folder / "corpus.txt").write_text("is it red? yes no left right\n" * 50)
    image = next((folder / "data" / "images").iterdir()).relative_to(folder)
    rows = [f"{image},what is {i}?,yes,{s}" for i, s in enumerate(["train"] * 12 + ["validation"] * 4 + ["test"] * 4)]
    (folder / "table.csv").write_text("\n".join(["image,question,answer,split", *rows]))
    return folder / "run"


SHORT = ("teacher.train.epochs=1",)
VERBS = ("train", "evaluate", "predict", "score", "compare", "audit", "new-vlm")


def arguments(verb: str, run: Path, output: Path) -> list[object]:
    folder, predictions = run.parent, next((run / "predictions").glob("*.jsonl"))
    protocol = predictions.stem.replace("-", "/")
    return {
        "train": ["train", folder / "tiny.yaml", f"output={output}", f"data.root={folder / 'data'}", *SHORT],
        "evaluate": ["evaluate", run, "--output", output],
        "predict": ["predict", run, "--table", folder / "table.csv", "--output", output],
        "score": ["score", predictions, "--protocol", protocol, "--references", "file", "--output", output],
        "compare": ["compare", run, folder / "run2", "--output", output],
        "audit": ["audit", folder / "table.csv", "--output", output],
        "new-vlm": ["new-vlm", output, "--corpus", folder / "corpus.txt"],
    }[verb]


def under_a_file(folder: Path) -> Path:
    (folder / "file").write_text("x")
    return folder / "file" / "out"


def in_a_loop(folder: Path) -> Path:
    (folder / "loop").symlink_to("loop")
    return folder / "loop" / "out"


PLACES: dict[str, Callable[[Path], Path]] = {
    "under a file": under_a_file,
    "in a loop of links": in_a_loop,
    "too long": lambda folder: folder / ("x" * 300),
    "not writable even for root": lambda folder: Path("/proc/out"),
}


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_place_that_cannot_be_written_is_one_sentence(run, tmp_path, verb):
    for name, place in PLACES.items():
        code, err = forked_call(arguments(verb, run, place(tmp_path)))
        assert code == 2, (name, err)
        assert "Traceback" not in err, name
        assert err.strip().splitlines()[-1].lower().startswith("error: "), (name, err)
        assert not list(tmp_path.rglob(".*")), name


@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_a_limit_of_file_sizes_is_one_sentence_and_leaves_no_temporary_file(run, tmp_path, verb):
    for size in (0, 300, 20_000):
        code, err = forked_call(arguments(verb, run, tmp_path / "out"), limit(resource.RLIMIT_FSIZE, size))
        assert "Traceback" not in err, err
        assert not list(tmp_path.rglob(".*"))
        if size < 20_000:
            assert code == 2, err
            assert "larger than its file system" in err
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").unlink(missing_ok=True)


def test_a_checkpoint_that_does_not_fit_keeps_the_former_one(run, tmp_path):
    """The limit is above the size of the first checkpoint's files, so a grown log or table cannot hit it first."""
    command = arguments("train", run, tmp_path / "out")
    code, err = forked_call(command, limit(resource.RLIMIT_FSIZE, 50_000))
    assert (code, "larger than" in err) == (2, True), err
    assert not list(tmp_path.rglob(".*"))
    code, err = forked_call(command)
    assert code == 0, err
    weights = [folder / "model" / "model.safetensors" for folder in (run, tmp_path / "out")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_too_many_open_files_is_one_sentence(run, tmp_path):
    code, err = forked_call(arguments("train", run, tmp_path / "out"), limit(resource.RLIMIT_NOFILE, 8))
    assert code == 2
    assert "too many files are open" in err
    assert "Traceback" not in err


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_files_have_the_permissions_of_the_umask(run, tmp_path, mask):
    code, err = forked_call(arguments("train", run, tmp_path / "out"), lambda: os.umask(mask) and None)
    assert code == 0, err
    modes = {path: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in modes)
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o666 & ~mask} == {}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [LCKD, CLINKD], ids=["lckd", "clinkd"])
def test_files_of_every_task_have_the_permissions_of_the_umask(tmp_path, recipe):
    path = write_recipe(tmp_path, recipe)
    out = tmp_path / "out"
    code, err = forked_call(["train", str(path), f"output={out}"], lambda: os.umask(0o002) and None)
    assert code == 0, err
    modes = {path: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert any(path.suffix == ".safetensors" for path in modes)
    assert {path: oct(mode) for path, mode in modes.items() if mode != 0o664} == {}
