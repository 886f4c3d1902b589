"""Data sets by the name that a recipe gives."""

from __future__ import annotations

import os
from pathlib import Path

from preceptor.config import DataConfig
from preceptor.data.splits import subsample
from preceptor.errors import UserError
from preceptor.types import Part, VqaData


def read_data(config: DataConfig, scratch: Path, needed: tuple[Part, ...] = ("train", "validation", "test")) -> VqaData:
    """Read the data set of a recipe. Phantoms without a root are written to `scratch`.

    Raises UserError where a part of `needed` is empty.

    Raises UserError where the root is missing or is not the data set that its name says.
    """
    if config.split is not None and config.name != "vqa-rad":
        raise UserError(
            f"data.split={config.split!r} is for vqa-rad; data.name={config.name} names its parts in its table"
        )
    if config.validation_by != "image" and config.name != "vqa-rad":
        raise UserError(
            f"data.validation_by={config.validation_by} is for vqa-rad; data.name={config.name} cuts validation by "
            "image: leave it out"
        )
    if config.name == "phantom":
        data = _phantom(config, scratch)
    elif config.name == "table":
        from preceptor.data.table import read_table

        if config.root is None:
            raise UserError("data.name=table needs data.root=FILE, a CSV or JSONL file with image, question, answer")
        data = read_table(Path(config.root), validation_fraction=config.validation_fraction, seed=config.split_seed)
    else:
        from preceptor.data.vqa_rad import read_vqa_rad

        data = read_vqa_rad(
            _root(config, "vqa_rad"),
            split=config.split or "clean",  # type: ignore[arg-type]
            validation_fraction=config.validation_fraction,
            validation_by=config.validation_by,
            seed=config.split_seed,
        )
    if config.train_share < 1:
        data.samples = subsample(data.samples, config.train_share, config.split_seed)
        data.notes.append(f"trained on {config.train_share:.0%} of the training groups (data.train_share)")
    for part in needed:
        if not data.part(part):
            raise UserError(f"{data.name} has no {part} questions; see its split column or data.validation_fraction")
    return data


def _phantom(config: DataConfig, scratch: Path) -> VqaData:
    from preceptor.data.phantom import write_phantom
    from preceptor.data.table import read_table

    p = config.phantom
    table = write_phantom(
        Path(config.root) if config.root else scratch,
        cases=p.cases, questions_per_image=p.questions_per_image, images_per_case=p.images_per_case, seed=p.seed,
        image_size=config.image_size,
    )  # fmt: skip
    data = read_table(table, name="phantom")
    data.notes.append("Generated images: the numbers show that the method works, and nothing about medicine.")
    return data


def _root(config: DataConfig, folder: str) -> Path:
    if config.root is not None:
        return Path(config.root)
    if shared := os.environ.get("PRECEPTOR_DATA"):
        return Path(shared) / folder
    raise UserError(
        f"data.name={config.name} needs data.root=FOLDER, or PRECEPTOR_DATA set to the folder above {folder}/"
    )
