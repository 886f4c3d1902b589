"""Damaged checkpoints of an interrupted training: it resumes to the weights of an uninterrupted one, or is refused."""

from __future__ import annotations

import atexit
import functools
import hashlib
import json
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from preceptor.training.loop import fit
from tests.fuzz.dialogues import replace_nested
from tests.fuzz.mutate import DAMAGE, Mutation, json_values, mostly, mutate, rarely
from tests.fuzz.outcome import attempt, require
from tests.fuzz.target import Target
from tests.training.test_loop import Rows, Toy, config, job_of

SETTINGS = {"epochs": 2, "ema_decay": 0.9, "checkpoint_every": 0.5, "keep_checkpoints": 5, "select": "last"}
STEPS = 4


@functools.cache
def templates() -> Path:
    """Return a folder with the checkpoints of an interrupted training, and the weights of an uninterrupted one."""
    folder = Path(tempfile.mkdtemp(prefix="preceptor-fuzz-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    fit(Toy(), job_of(folder / "whole", Rows()), config(**SETTINGS))
    shutil.copytree(folder / "whole", folder / "part")
    shutil.rmtree(folder / "part" / "model")
    for step in (1, STEPS):
        shutil.rmtree(folder / "part" / "checkpoints" / f"step-{step}")
    return folder


@dataclass(frozen=True)
class CheckpointInput:
    """Damage to one file of a checkpoint (checkpoint, file): an odd value, bytes, or a tensor that is left out.

    With `sealed`, the checksums are written again, as if the damage had been there before.
    """

    place: tuple[int, int]
    replaced: tuple[int, Any] | None
    mutations: tuple[Mutation, ...]
    dropped: int | None
    deleted: bool
    sealed: bool
    temporary: bool


INPUTS = st.builds(
    CheckpointInput,
    place=st.tuples(st.integers(0, 1), st.integers(0, 3)),
    replaced=mostly(st.none(), st.tuples(st.integers(1, 40), json_values()), 3),
    mutations=DAMAGE,
    dropped=mostly(st.none(), st.integers(0, 20), 4),
    deleted=rarely(8),
    sealed=mostly(st.just(False), st.just(True), 3),
    temporary=rarely(6),
)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def check(case: CheckpointInput, folder: Path) -> bool:
    """Resume a training from damaged checkpoints. An accepted training ends with the right weights.

    Only a checkpoint whose checksums were written after the damage may lead to others.
    """
    run = folder / "part"
    shutil.copytree(templates() / "part", run)
    places = sorted((run / "checkpoints").iterdir())
    place = places[case.place[0] % len(places)]
    files = sorted(place.iterdir())
    path = files[case.place[1] % len(files)]
    if case.replaced is not None and path.suffix == ".json" and not case.sealed:
        content = replace_nested(json.loads(path.read_text()), *case.replaced)
        path.write_text(json.dumps(content), errors="surrogatepass")
    if case.dropped is not None and path.suffix == ".safetensors":
        tensors = load_file(path)
        if tensors:
            del tensors[sorted(tensors)[case.dropped % len(tensors)]]
            save_file(tensors, path)
    path.write_bytes(mutate(path.read_bytes(), case.mutations))
    if case.deleted:
        path.unlink()
    if case.temporary:
        shutil.copytree(place, place.parent / ".tmp-step-3")
    if case.sealed:
        seal(place)
    outcome = attempt(lambda: fit(Toy(), job_of(run, Rows()), config(**SETTINGS)), place=folder.name)
    if not outcome.accepted:
        require(case.sealed, "damage that a checksum shows ends a training", outcome.sentence)
        return False
    require(not (run / "checkpoints" / ".tmp-step-3").exists(), "a temporary folder is left")
    found, right = (load_file(root / "model" / "model.safetensors") for root in (run, templates() / "whole"))
    if not case.sealed:
        require(outcome.value.step == STEPS, "another number of steps", outcome.value.step)
        same = found.keys() == right.keys() and all(np.array_equal(found[name], right[name]) for name in right)
        require(same, "a resumed training has other weights")
    require(all(np.isfinite(array).all() for array in found.values()), "weights that are not finite")
    return True


def seal(place: Path) -> None:
    """Write the checksums of a checkpoint for its files as they are."""
    path = place / "state.json"
    try:
        state = json.loads(path.read_text())
        state.pop("own_sha256", None)
        state["sha256"] = {name: digest(place / name) for name in state["sha256"]}
        text = json.dumps(state, sort_keys=True)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return
    state["own_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(state))


TARGET = Target(INPUTS, check, 30)
