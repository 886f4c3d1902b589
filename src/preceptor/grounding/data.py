"""The dialogues of a recipe: read, narrowed to its tasks, thinned to its share and its numbers of rows."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from preceptor.data.splits import cut, groups_of_share, ordered
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.errors import UserError
from preceptor.grounding.config import DialogueDataConfig
from preceptor.vqa.data import FOLDERS, made_phantom, shared_folder

MOST_LISTED = 20
"""Of the places of faulty boxes."""


def read_recipe_dialogues(
    config: DialogueDataConfig, scratch: Path, needed: tuple[Split, ...] = ("train", "validation", "test")
) -> GroundingDataset:
    """Return the dialogues of a recipe. Phantoms are made in `scratch`.

    Raises UserError as the readers do, and where a split of `needed` is empty.
    """
    data = _read(config, scratch)
    rows = [row for row in data.samples if row.task in config.tasks]
    if config.train_share < 1:
        kept = groups_of_share(rows, config.train_share, config.split_seed)
        taken = groups_of_share(rows, config.train_share + config.teacher_share, config.split_seed)  # kept are in it
        train = [row for row in rows if row.split == "train"]
        rest = [row for row in train if row.group not in taken]
        apart = [replace(row, split="teacher") for row in train if row.group in taken - kept]
        rows = [row for row in rows if row.split != "train" or row.group in kept] + apart
        data.notes.append(f"Trained on {config.train_share:.0%} of the training groups (data.train_share).")
        if apart:
            data.notes.append(f"The teacher learnt from {len(apart):,} other dialogues (data.teacher_share).")
        if config.unlabelled == "rest":
            rows += [replace(row, split="unlabelled", turns=without_answer(row.turns)) for row in rest]
            data.notes.append(f"Beside them {len(rest):,} dialogues without their answers (data.unlabelled).")
    rows = _at_most(rows, "test", config.test_rows, config.split_seed)
    rows = _at_most(rows, "validation", config.validation_rows, config.split_seed)
    data.samples = rows
    for split in needed:
        if not data.split(split):
            tasks = ", ".join(config.tasks)
            raise UserError(f"{data.name} has no {split} dialogues of {tasks}; see its split, or data.tasks")
    return data


def _read(config: DialogueDataConfig, scratch: Path) -> GroundingDataset:
    if config.name == "phantom-grounding":
        from preceptor.data.synthetic.grounding import read_phantom_grounding

        folder = Path(config.root) if config.root else scratch
        return read_phantom_grounding(made_phantom(config.phantom, folder, config.phantom_size))
    root = Path(config.root) if config.root else None
    if config.name == "slake-grounding":
        from preceptor.data.grounding.slake import read_slake_grounding

        return read_slake_grounding(
            root or shared_folder(config.name, FOLDERS["slake-grounding"]), language=config.language
        )
    images = Path(config.images) if config.images else None
    if config.name == "med-grit":
        from preceptor.data.grounding.med_grit import read_med_grit_folder

        root = root or shared_folder(config.name, FOLDERS["med-grit"])
        return _parted(read_med_grit_folder(root, images, boxes=config.boxes), config)
    if root is None:
        raise UserError("data.name=sharegpt needs data.root=FILE, the JSON or JSONL of the dialogues")
    from preceptor.data.grounding.sharegpt import read_sharegpt

    return read_sharegpt(
        root,
        images,
        boxes=config.boxes,
        validation_fraction=config.validation_fraction,
        test_fraction=config.test_fraction,
        seed=config.split_seed,
    )


def _parted(data: GroundingDataset, config: DialogueDataConfig) -> GroundingDataset:
    """Return Med-GRIT with the splits that its folder has no file of, cut from the training images."""
    fractions: dict[Split, float] = {"test": config.test_fraction, "validation": config.validation_fraction}
    for split, fraction in fractions.items():
        if not data.split(split):
            data.samples = cut(data.samples, split, fraction, config.split_seed)
            data.notes.append(f"There is no {split}.json: {fraction:.0%} of the training images are its {split} split.")
    return data


def without_answer(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the turns with an empty last answer."""
    return (*turns[:-1], (turns[-1][0], ""))


def _at_most(rows: list[Dialogue], split: Split, most: int | None, seed: int) -> list[Dialogue]:
    """Return the rows with at most so many of each task in `split`, chosen by a hash of their ids."""
    if most is None:
        return rows
    left: set[str] = set()
    for task in {row.task for row in rows}:
        own = [row.id for row in rows if row.split == split and row.task == task]
        left.update(ordered(own, f"rows:{seed}")[most:])
    return [row for row in rows if row.split != split or row.id not in left]


def describe_dialogues(data: GroundingDataset) -> dict[str, Any]:
    """Describe the data for results.json: names, fingerprints, counts by split, task and modality, faulty boxes."""
    splits: tuple[Split, ...] = get_args(Split)
    found: dict[str, Any] = {
        "name": data.name,
        "variant": data.variant,
        "sha256": data.fingerprint(),
        "test_sha256": data.fingerprint("test"),
        **{split: len(data.split(split)) for split in splits if data.split(split)},
        "faults": dict(data.faults),
        "faulty": data.faulty[:MOST_LISTED],
    }
    for name, of in (("tasks", lambda row: row.task), ("modalities", lambda row: row.modality)):
        kinds = sorted({of(row) for row in data.samples})
        counts = {split: Counter(of(row) for row in data.split(split)) for split in splits}
        found[name] = {kind: {split: count[kind] for split, count in counts.items() if count[kind]} for kind in kinds}
    return found
