"""The dialogues of a recipe: read, narrowed to its tasks, thinned to its share and its numbers of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from preceptor.config_vlm import DialogueDataConfig
from preceptor.data.read import FOLDERS
from preceptor.data.read_dialogues import read_dialogues
from preceptor.data.splits import groups_of_share, ordered
from preceptor.errors import UserError
from preceptor.types import Dialogue, DialogueData, Part


def read_recipe_dialogues(config: DialogueDataConfig, scratch: Path) -> DialogueData:
    """Return the dialogues of a recipe, each of one turn: a later turn's question stands after the turns before it.

    Phantoms are made in `scratch`. Raises UserError as the readers do, and where a part is empty.
    """
    data = read_dialogues(config, scratch)
    rows = [row for row in data.dialogues if row.task in config.tasks]
    if config.train_share < 1:
        kept = groups_of_share(rows, config.train_share, config.split_seed)
        rest = [row for row in rows if row.part == "train" and row.group not in kept]
        rows = [row for row in rows if row.part != "train" or row.group in kept]
        data.notes.append(f"trained on {config.train_share:.0%} of the training groups (data.train_share)")
        if config.unlabelled == "rest":
            rows += [replace(row, part="unlabelled", turns=without_answer(row.turns)) for row in rest]
            data.notes.append(f"Beside them {len(rest):,} dialogues without their answers (data.unlabelled).")
    for part, most in (("test", config.test_rows), ("validation", config.validation_rows)):
        rows = _at_most(rows, part, most, config.split_seed)
    data.dialogues = rows
    for part in ("train", "validation", "test"):
        if not data.part(part):
            raise UserError(f"{data.name} has no {part} dialogues of {', '.join(config.tasks)}; see its split, data.tasks")
    return data


def without_answer(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the turns with an empty last answer."""
    return (*turns[:-1], (turns[-1][0], ""))


def _at_most(rows: list[Dialogue], part: Part, most: int | None, seed: int) -> list[Dialogue]:
    """Return the rows with at most so many of each task in `part`, chosen by a hash of their ids."""
    if most is None:
        return rows
    left = {id for task in {row.task for row in rows}
            for id in ordered((r.id for r in rows if r.part == part and r.task == task), f"rows:{seed}")[most:]}  # fmt: skip
    return [row for row in rows if row.part != part or row.id not in left]


def describe_dialogues(data: DialogueData) -> dict[str, Any]:
    """Return what results say of the data: names, fingerprints, numbers by part, task and modality, faults of boxes."""
    parts = ("train", "validation", "test", "unlabelled")
    found: dict[str, Any] = {
        "name": data.name, "split": data.split, "sha256": data.fingerprint(), "test_sha256": data.fingerprint("test"),
        **{part: len(data.part(part)) for part in parts if data.part(part)}, "faults": dict(data.faults),
    }  # fmt: skip
    for name, of in (("tasks", lambda row: row.task), ("modalities", lambda row: row.modality)):
        kinds = sorted({of(row) for row in data.dialogues})
        counts = {part: Counter(of(row) for row in data.part(part)) for part in parts}
        found[name] = {kind: {part: count[kind] for part, count in counts.items() if count[kind]} for kind in kinds}
    return found
