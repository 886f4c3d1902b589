"""Checkpoints of the training state: atomic, checksummed, without pickles.

``checkpoints/step-N/`` holds `task.safetensors` (student and task state), `optimizer.safetensors` and `state.json`
(step, best score, checksums of the other files and of itself). A folder is written under a temporary name, flushed
and renamed, so a kill at any moment leaves either the whole of it or none of it; the newest folder whose checksums
agree is loaded.
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

from preceptor.files import recover, replace_folder, sha256

STATE, FORMAT = "state.json", 1


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Iterable[str]) -> dict[str, Tensor]:
    """Return the optimiser's state as ``name/key`` tensors; `names` are the parameters' names in the groups' order."""
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
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def save(root: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], keep: int) -> Path:
    """Write ``root/step-N`` from `tensors` (a safetensors file per name) and the JSON `state`; keep the last `keep`."""
    root.mkdir(parents=True, exist_ok=True)
    folder, temporary = root / f"step-{step}", root / f".tmp-step-{step}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    sums = {}
    for name, group in tensors.items():
        path = temporary / f"{name}.safetensors"
        # Tied tensors share storage, which safetensors refuses: each name gets its own copy.
        save_file({key: value.detach().cpu().contiguous().clone() for key, value in group.items()}, path)
        sums[path.name] = sha256(path)
    body = {"format": FORMAT, "step": step, "sha256": sums, **state}
    (temporary / STATE).write_text(json.dumps({**body, "own_sha256": _digest(body)}, indent=1), "utf-8")
    replace_folder(temporary, folder)
    for number, old in folders(root)[:-keep]:
        if number != step:
            shutil.rmtree(old, ignore_errors=True)
    return folder


def _digest(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def folders(root: Path) -> list[tuple[int, Path]]:
    """Return (step, folder) of every complete-looking checkpoint, oldest first."""
    found = []
    for path in root.glob("step-*"):
        number = path.name.removeprefix("step-")
        if number.isdigit() and path.is_dir():
            found.append((int(number), path))
    return sorted(found)


def problem(folder: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None."""
    try:
        state = json.loads((folder / STATE).read_text("utf-8"))
        if state.get("format") != FORMAT:
            return f"its format is {state.get('format')!r}, this version reads {FORMAT}"
        own = state.pop("own_sha256", None)
        if own is not None and own != _digest(state):
            return f"{STATE} does not match its checksum"
        for name, wanted in state["sha256"].items():
            if sha256(folder / name) != wanted:
                return f"{name} does not match its checksum"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"
    return None


def newest(root: Path, warn) -> Path | None:
    """Return the newest valid checkpoint; `warn(message)` is told of each that is passed over."""
    for _, folder in reversed(folders(root)):
        reason = problem(folder)
        if reason is None:
            return folder
        warn(f"checkpoint {folder.name} is passed over: {reason}")
    return None


def load(folder: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Return (tensors by file name, state) of a checkpoint."""
    state = json.loads((folder / STATE).read_text("utf-8"))
    return {name.removesuffix(".safetensors"): load_file(folder / name) for name in state["sha256"]}, state


def clear_temporaries(root: Path) -> None:
    """Remove what a killed save left."""
    for path in root.glob(".tmp-step-*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in root.glob(".step-*.old"):
        recover(root / path.name[1:].removesuffix(".old"))
