"""Checkpoints of the training state: atomic, with checksums, and without pickle.

``checkpoints/step-N/`` contains `task.safetensors` (student and task state), `optimizer.safetensors` and `state.json`
(step, best score, checksums of the other files and of itself). A folder is written under a temporary name, flushed and
renamed, so that an interruption never leaves a partial checkpoint. The newest folder with valid checksums is loaded.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from preceptor.files import new_folder, recover, sha256

STATE, FORMAT = "state.json", 1


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the optimiser state as ``name/key`` tensors. `names` are the parameters in the order of the groups."""
    state = optimizer.state_dict()["state"]
    tensors: dict[str, Tensor] = {}
    for index, name in enumerate(names):
        for key, value in state.get(index, {}).items():
            if value is not None:
                tensors[f"{name}/{key}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def load_optimizer(optimizer: torch.optim.Optimizer, names: Iterable[str], tensors: dict[str, Tensor]) -> None:
    state: dict[int, dict[str, Tensor]] = {}
    index_of = {name: index for index, name in enumerate(names)}
    for path, value in tensors.items():
        name, _, key = path.rpartition("/")
        state.setdefault(index_of[name], {})[key] = value
    if len({frozenset(values) for values in state.values()}) > 1:
        raise ValueError("the state of the optimiser is incomplete")
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write ``root/step-N`` with a safetensors file per group of `tensors` and the JSON `state`.

    Only the last `keep` checkpoints are kept.
    """
    folder, sums = root / f"step-{step}", {}
    with new_folder(folder, root / f".tmp-step-{step}") as temporary:
        for name, group in tensors.items():
            path = temporary / f"{name}.safetensors"
            # Safetensors refuses tied tensors, which share storage, so that each name gets a copy.
            save_file({key: value.detach().cpu().contiguous().clone() for key, value in group.items()}, path)
            sums[path.name] = sha256(path)
        body = {"format": FORMAT, "step": step, "sha256": sums, **state}
        (temporary / STATE).write_text(json.dumps({**body, "own_sha256": _digest(body)}, indent=1), "utf-8")
    for number, old in folders(root)[:-keep]:
        if number != step:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def folders(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every checkpoint, the oldest first."""
    checkpoints = []
    for path in root.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            checkpoints.append((int(number), path))
    return sorted(checkpoints)


def problem(folder: Path) -> str | None:
    """Return the reason why a checkpoint is unusable, or None if it is valid."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        if state.get("format") != FORMAT:
            return f"its format is {state.get('format')!r}, this version reads {FORMAT}"
        expected = state.pop("own_sha256", None)
        if expected is not None and expected != _digest(state):
            return f"{STATE} does not match its checksum"
        for name, checksum in state["sha256"].items():
            if sha256(folder / name) != checksum:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def newest(root: Path, warn) -> Path | None:
    """Return the newest valid checkpoint. `warn(message)` is called for every invalid one."""
    for _, folder in reversed(folders(root)):
        reason = problem(folder)
        if reason is None:
            return folder
        warn(f"skipping checkpoint {folder.name}: {reason}")
    return None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return (tensors by file name, state) of a checkpoint."""
    state = json.loads((folder / STATE).read_text("utf-8"))
    return {name.removesuffix(".safetensors"): load_file(folder / name) for name in state["sha256"]}, state


def clear_temporaries(root: Path) -> None:
    """Remove the temporary folders of interrupted saves."""
    for path in root.glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".step-*.old"):
        recover(root / path.name[1:].removesuffix(".old"))
