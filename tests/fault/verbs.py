"""Every verb on tiny inputs, run in a fork of the test process after a fault was put in."""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from preceptor.grounding.teachers import CACHE, STORE
from preceptor.teachers.label_store import LabelStore, read_labels, read_store
from tests.command_line import call
from tests.fault.tiny import CLINKD, LCKD, RECIPE, wait
from tests.grounding.asked_data import image
from tests.grounding.speaking_vlm import speaking_vlm

SHORT = ("teacher.train.epochs=1",)
CACHED = """
name: cached
task: grounding
stages: [distilled]
teacher: &model {model: {source: FOLDER/vlm, max_pixels: 3136}}
student: *model
data: {name: sharegpt, root: FOLDER/dialogues.jsonl, images: FOLDER/pictures}
method:
  name: clinkd
  teaching_run: FOLDER/vlm
  guidance: {kind: none}
  reflection: {rounds: 0}
  selection: {candidates: 1}
  pseudo_labels: {share: 0.5, logits: cached, top_k: 8, max_new_tokens: 6}
answers: {batch_size: 4}
"""
VERBS = (
    "train",
    "train on parquet",
    "cache",
    "cache of grounding",
    "doctor",
    "doctor on parquet",
    "report",
    "report of segmentation",
    "evaluate",
    "predict",
    "predict masks",
    "predict boxes",
    "score",
    "compare",
    "audit",
    "new-vlm",
    "teach",
)
Prepare = Callable[[], object]


def nothing() -> None:
    """Put in no fault."""


def forked_call(arguments: list[object], prepare: Prepare = nothing) -> tuple[int, str]:
    """Return (exit code, standard error) of the command line in a fork, after `prepare`. A signal is negative."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
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


def limit(kind: int, number: int) -> Prepare:
    return lambda: resource.setrlimit(kind, (number, number))


def limit_of_open_files(more: int) -> Prepare:
    """Allow `more` files to be opened."""

    def prepare() -> None:
        free = os.dup(0)
        os.close(free)
        number = free + more
        resource.setrlimit(resource.RLIMIT_NOFILE, (number, number))

    return prepare


def limit_of_memory(more: int) -> Prepare:
    """Allow `more` bytes of address space than this process uses."""

    def prepare() -> None:
        number = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE + more
        resource.setrlimit(resource.RLIMIT_AS, (number, number))

    return prepare


def killed_by_size(number: int) -> Prepare:
    """End the process in the middle of the write that makes a file larger than `number` bytes: no code of it runs."""

    def prepare() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (number, number))

    return prepare


class Signal:
    """Sends a signal to the forked process just before its `number`-th change of a file or folder below `folder`."""

    def __init__(self, folder: Path, number: int = 0, what: int = signal.SIGKILL) -> None:
        self.folder, self.number, self.what = str(folder), number, what
        self._count = mmap.mmap(-1, 8)

    @property
    def count(self) -> int:
        """The number of changes so far."""
        return struct.unpack("q", self._count[:])[0]

    def __call__(self) -> None:
        pid = os.getpid()

        def hook(event: str, values: tuple[Any, ...]) -> None:
            if event == "open":
                # By safetensors and SQLite, files are opened without an event.
                if not values[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                    return
            elif event not in ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.truncate", "shutil.rmtree"):
                return
            if str(values[0]).startswith(self.folder) and os.getpid() == pid:
                self._count[:] = struct.pack("q", self.count + 1)
                if self.count == self.number:
                    os.kill(pid, self.what)

        sys.addaudithook(hook)


@dataclass(frozen=True)
class Inputs:
    """Folders that are read, and what is copied to where a verb writes."""

    folder: Path

    def place(self, output: Path) -> None:
        """Copy what a verb writes into next to `output`."""
        output.parent.mkdir(exist_ok=True)
        for name in ("run", "masks", "parquet", "cached"):
            shutil.copytree(self.folder / name, output.parent / name)

    def arguments(self, verb: str, output: Path) -> list[object]:
        """Return the command line. It writes only below the parent of `output`."""
        folder, place = self.folder, output.parent
        predictions = next((folder / "run" / "predictions").glob("*.jsonl"))
        of_parquet = [folder / "tiny.yaml", "data.name=path-vqa", f"data.root={place / 'parquet'}", f"output={output}"]
        cached = ["method.teaching.kind=cached", f"method.teaching.runs=[{folder / 'run'}]", "data.augment.views=1"]
        data = f"data.root={folder / 'data'}"
        teach = ["--teacher", folder / "vlm", "--max-tokens", 6, "--min-usable", 0, "--max-pixels", 3136]
        return {
            "train": ["train", folder / "tiny.yaml", f"output={output}", data, *SHORT],
            "train on parquet": ["train", *of_parquet, *SHORT],
            "cache": ["cache", folder / "tiny.yaml", "stages=[distilled]", *cached, data, f"output={output}"],
            "cache of grounding": ["cache", folder / "cached.yaml", f"output={place / 'cached'}"],
            "doctor": ["doctor", folder / "tiny.yaml", f"data.root={output}"],
            "doctor on parquet": ["doctor", *of_parquet],
            "report": ["report", place / "run"],
            "report of segmentation": ["report", place / "masks"],
            "evaluate": ["evaluate", folder / "run", "--output", output],
            "predict": ["predict", folder / "run", "--table", folder / "table.csv", "--output", output],
            "predict masks": ["predict", folder / "masks", "--case", folder / "volumes", "--output", output],
            "predict boxes": [
                *("predict", folder / "boxes", "--image", folder / "pictures", "--question", "where?"),
                *("--output", output),
            ],
            "score": [
                *("score", predictions, "--protocol", predictions.stem.replace("-", "/"), "--references", "file"),
                *("--output", output),
            ],
            "compare": ["compare", folder / "run", folder / "run2", "--output", output],
            "audit": ["audit", folder / "table.csv", "--output", output, "--allow"],
            "new-vlm": ["new-vlm", output, "--corpus", folder / "corpus.txt"],
            "teach": ["teach", folder / "dialogues.jsonl", "--root", folder / "pictures", *teach, "--output", output],
        }[verb]


def make_inputs(folder: Path) -> Inputs:
    """Train the tiny models and write the tiny data."""
    for name, recipe, data, settings in (
        ("run", RECIPE, "data", SHORT),
        ("masks", LCKD, "volumes", ("stages=[baseline]", "train.epochs=1")),
        ("boxes", CLINKD, "slices", ("stages=[teacher]", *SHORT)),
    ):
        file = folder / f"{name}.yaml"
        file.write_text(recipe)
        code, _, err = call("train", file, f"output={folder / name}", f"data.root={folder / data}", *settings)
        assert code == 0, err
    (folder / "run.yaml").rename(folder / "tiny.yaml")
    shutil.copytree(folder / "run", folder / "run2")
    (folder / "corpus.txt").write_text("is it red? yes no left right\n" * 50)
    speaking_vlm(folder / "vlm")
    pictures = [image(folder / "pictures", number) for number in range(7)]
    parts = ["train"] * 5 + ["validation", "test"]
    turns = [{"from": "human", "value": "Question?"}, {"from": "gpt", "value": "the liver"}]
    dialogues = [
        {"id": f"{n}", "image": picture.name, "task": "mia", "split": part, "conversations": turns}
        for n, (picture, part) in enumerate(zip(pictures, parts, strict=True))
    ]
    (folder / "dialogues.jsonl").write_text("".join(json.dumps(row) + "\n" for row in dialogues))
    rows = ["image,question,answer,split"]
    (folder / "parquet").mkdir()
    for part, count in (("train", 12), ("validation", 4), ("test", 4)):
        used = [picture for picture, its in zip(pictures, parts, strict=True) if its == part]
        chosen = [used[n % len(used)] for n in range(count)]
        answers = [("no", "yes")[n % 2] for n in range(count)]
        rows += [f"pictures/{p.name},what is {a}?,{a},{part}" for p, a in zip(chosen, answers, strict=True)]
        images = [{"bytes": picture.read_bytes()} for picture in chosen]
        table = {"image": images, "question": ["is it red?"] * count, "answer": answers}
        parquet.write_table(pyarrow.table(table), folder / "parquet" / f"{part}-00000-of-00001.parquet")
    (folder / "table.csv").write_text("\n".join(rows))
    (folder / "cached.yaml").write_text(CACHED.replace("FOLDER", str(folder)))
    _make_labels(folder)
    return Inputs(folder)


def _make_labels(folder: Path) -> None:
    """Write pseudo-labels without a cache of their logits. The made model never ends an answer, so they say it did."""
    code, _, err = call("cache", folder / "cached.yaml", f"output={folder / 'cached'}")
    assert (code, "5 cut off" in err) == (2, True), err
    store = folder / "cached" / STORE
    labels = [replace(label, ended=True, reasons=()) for label in read_labels(store)]
    key, names = read_store(store)
    shutil.rmtree(store)
    with LabelStore.open(store, key, names) as opened:
        opened.append(labels)
    assert not (folder / "cached" / CACHE).exists()


def hidden(folder: Path) -> list[Path]:
    """Return the files and folders that users should not see: temporary ones, and locks."""
    return [path for path in folder.rglob("*") if any(part.startswith(".") for part in path.relative_to(folder).parts)]


_TIMED = ("log.txt", "results.json", "state.json", ".html", "README.md", "audit.json", "metrics.jsonl")
"""Files that contain times or measured speeds."""


def contents(folder: Path) -> dict[str, str]:
    """Return a fingerprint of every file, of those with times in them only the name."""
    return {
        str(path.relative_to(folder)): ""
        if path.name.endswith(_TIMED)
        else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }
