"""Read the dialogues of a recipe, filtered by task and reduced to its training share and row limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from preceptor.data.grounding.check import fault_findings
from preceptor.data.grounding.med_grit import is_inferred, task_of_turn
from preceptor.data.grounding.sharegpt import HELD_OUT, UNANSWERED
from preceptor.data.groups import folder_findings, note_leaks, ungrouped_images
from preceptor.data.locations import FOLDERS
from preceptor.data.readers import GROUNDING, read_named, require_applies
from preceptor.data.splits import FIX_SPLITS, empty_split, groups_of_share, ordered
from preceptor.data.types import Dialogue, GroundingDataset, Split
from preceptor.errors import UserError
from preceptor.grounding.config import DialogueDataConfig

# Data sets that a setting applies to, and its value for all other data sets.
_ONLY_FOR = {
    "language": (("slake-grounding",), "en"),
    "images": (("med-grit", "sharegpt"), None),
    "box_format": (("sharegpt",), "auto"),
    "box_max_pixels": (("sharegpt",), None),
}
MOST_LISTED = 20
"""Number of faulty boxes whose places are listed in the results."""


def read_recipe_dialogues(
    config: DialogueDataConfig,
    scratch: Path,
    needed: tuple[Split, ...] = ("train", "validation", "test"),
    *,
    unanswered: bool = False,
) -> GroundingDataset:
    """Read the dialogues of a recipe.

    Args:
        config: Data settings of the recipe.
        scratch: Folder for the synthetic data set.
        needed: Splits that must not be empty.
        unanswered: Whether a file may contain dialogues with unanswered questions. They are in the split `unlabelled`,
            except those about images or patients of the validation and test splits, which are left out.

    Raises:
        UserError: a needed split is empty, a question has no answer, a setting does not apply to the data set, or a
            reader refuses the data.
    """
    require_applies(config, _ONLY_FOR)
    data = read_named(GROUNDING, config, scratch)
    data.findings += fault_findings(data, config.boxes)
    if ":" in config.name:
        data.findings += folder_findings(ungrouped_images(data.samples))
    _leave_out_held_out(data, unanswered)
    # The task of an unanswered question is not known, unless the file names it.
    rows = [
        row for row in data.samples if _has_task(row, config.tasks) or (UNANSWERED in row.tags and is_inferred(row))
    ]
    if config.train_share < 1:
        student_groups = groups_of_share(rows, config.train_share, config.split_seed)
        # Shares are nested: the groups of the student are among these.
        used_groups = groups_of_share(rows, config.train_share + config.teacher_share, config.split_seed)
        train = [row for row in rows if row.split == "train"]
        unused = [row for row in train if row.group not in used_groups]
        teacher_only = [replace(row, split="teacher") for row in train if row.group in used_groups - student_groups]
        rows = [row for row in rows if row.split != "train" or row.group in student_groups] + teacher_only
        data.notes.append(f"Trained on {config.train_share:.0%} of the training groups (data.train_share).")
        if teacher_only:
            data.notes.append(f"The teacher was trained on {len(teacher_only):,} other dialogues (data.teacher_share).")
        if config.unlabelled == "rest":
            rows += [replace(row, split="unlabelled", turns=without_answer(row.turns)) for row in unused]
            data.notes.append(f"In addition, {len(unused):,} dialogues were used without answers (data.unlabelled).")
    rows = _limit_rows(rows, "test", config.test_rows, config.split_seed)
    data.samples = _limit_rows(rows, "validation", config.validation_rows, config.split_seed)
    note_leaks(data, published=config.name in FOLDERS)  # of what is used
    for split in needed:
        if not data.split(split):
            tasks = ", ".join(config.tasks)
            what = f"dialogues of the tasks {tasks}"
            raise UserError(f"{empty_split(data, split, what)}; {FIX_SPLITS}, or widen data.tasks")
    return data


def _leave_out_held_out(data: GroundingDataset, unanswered: bool) -> None:
    """Leave out unanswered dialogues about held-out images or patients, and note the number of all unanswered ones.

    Raises:
        UserError: there are unanswered dialogues and `unanswered` is false.
    """
    rows = [row for row in data.samples if UNANSWERED in row.tags]
    if not rows:
        return
    if not unanswered:
        raise UserError(
            f"{rows[0].tags[UNANSWERED]}: a question has no answer; write it, remove the record, or learn the answer "
            "of a teacher in a stage distilled or clinkd with method.pseudo_labels.share above 0"
        )
    held_out = [row for row in rows if HELD_OUT in row.tags]
    data.samples = [row for row in data.samples if HELD_OUT not in row.tags]
    data.notes.append(
        f"{len(rows) - len(held_out):,} dialogues have unanswered questions (split unlabelled): only the pseudo-labels "
        "of a teacher answer them."
    )
    if held_out:
        data.notes.append(
            f"{len(held_out):,} other dialogues with unanswered questions are about images or patients of the "
            "validation or test split, and were left out."
        )


def without_answer(turns: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """Return the turns with an empty last answer."""
    return (*turns[:-1], (turns[-1][0], ""))


def _has_task(dialogue: Dialogue, tasks: Collection[str]) -> bool:
    """Return whether a dialogue has a question of one of the tasks."""
    return any(task_of_turn(dialogue, number) in tasks for number in range(len(dialogue.turns)))


def _limit_rows(rows: list[Dialogue], split: Split, limit: int | None, seed: int) -> list[Dialogue]:
    """Return the rows with at most `limit` rows per task in `split`, chosen by a hash of their ids."""
    if limit is None:
        return rows
    dropped: set[str] = set()
    for task in {row.task for row in rows}:
        ids = [row.id for row in rows if row.split == split and row.task == task]
        dropped.update(ordered(ids, f"rows:{seed}")[limit:])
    return [row for row in rows if row.split != split or row.id not in dropped]


def describe_dialogues(data: GroundingDataset) -> dict[str, Any]:
    """Return the description of the data in results.json: names, fingerprints, counts per split, faulty boxes."""
    splits: tuple[Split, ...] = get_args(Split)
    description: dict[str, Any] = {
        "name": data.name,
        "variant": data.variant,
        "sha256": data.fingerprint(),
        "test_sha256": data.fingerprint("test"),
        "leaking": data.leaking,
        **{split: len(data.split(split)) for split in splits if data.split(split)},
        "faults": dict(data.faults),
        "faulty": data.faulty[:MOST_LISTED],
    }
    for name, key in (("tasks", lambda row: row.task), ("modalities", lambda row: row.modality)):
        counts = {split: Counter(key(row) for row in data.split(split)) for split in splits}
        description[name] = {
            value: {split: count[value] for split, count in counts.items() if count[value]}
            for value in sorted({key(row) for row in data.samples})
        }
    return description
