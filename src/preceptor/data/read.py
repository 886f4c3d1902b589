"""Data sets by the name that a recipe gives."""

from __future__ import annotations

import os
from pathlib import Path
from typing import cast, get_args

from preceptor.config import DataConfig
from preceptor.data import parquet, vqa_rad
from preceptor.data.splits import note_leaks, subsample
from preceptor.errors import UserError, nearest
from preceptor.types import Part, VqaData

FOLDERS = {"vqa-rad": "vqa_rad", "vqa-med-2019": "vqa_med_2019", "slake": "slake", "path-vqa": "path_vqa"}
"""The folder of each data set under PRECEPTOR_DATA."""

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")

# Which data sets a setting is for, beside what it has to be for the others.
_ONLY_FOR: dict[str, tuple[tuple[str, ...], object]] = {
    "split": (("vqa-rad", "vqa-med-2019", "slake"), None),
    "validation_by": (("vqa-rad",), "image"),
    "language": (("slake",), None),
}


def read_data(config: DataConfig, scratch: Path, needed: tuple[Part, ...] = ("train", "validation", "test")) -> VqaData:
    """Read the data set of a recipe. What has to be written (phantoms, images out of parquet files) goes to `scratch`.

    Raises UserError where a part of `needed` is empty, where the root is missing or is not the data set that its name
    says, for a setting that the data set does not know, and for an entry of `exclude_images_of` that is nothing.
    """
    for setting, (names, default) in _ONLY_FOR.items():
        if config.name not in names and getattr(config, setting) != default:
            raise UserError(
                f"data.{setting}={getattr(config, setting)} is for {' and '.join(names)}, not for "
                f"data.name={config.name}: leave it out"
            )
    data = _read(config, scratch)
    for entry in config.exclude_images_of:
        from preceptor.data.seen import CACHE, leave_out

        limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
        leave_out(data, _images_of(entry, scratch), _public_name(entry), scratch.with_name(CACHE), **limits)
    if config.train_share < 1:
        data.samples = subsample(data.samples, config.train_share, config.split_seed)
        data.notes.append(f"trained on {config.train_share:.0%} of the training groups (data.train_share)")
    for part in needed:
        if not data.part(part):
            raise UserError(f"{data.name} has no {part} questions; see its split column or data.validation_fraction")
    return data


def _read(config: DataConfig, scratch: Path) -> VqaData:
    fraction, seed = config.validation_fraction, config.split_seed
    if config.name == "phantom":
        return _phantom(config, scratch)
    if config.name == "table":
        from preceptor.data.table import read_table

        if config.root is None:
            raise UserError("data.name=table needs data.root=FILE, a CSV or JSONL file with image, question, answer")
        return read_table(Path(config.root), validation_fraction=fraction, seed=seed)
    root = _root(config)
    if config.name == "vqa-med-2019":
        from preceptor.data import vqa_med_2019

        split = _known(config, get_args(vqa_med_2019.Split))
        return vqa_med_2019.read_vqa_med_2019(
            root, split=cast(vqa_med_2019.Split, split or "val"), validation_fraction=fraction, seed=seed
        )
    if config.name == "slake":
        from preceptor.data import slake

        split = _known(config, get_args(slake.Split))
        return slake.read_slake(root, language=config.language or "en", split=cast(slake.Split, split or "clean"))
    if config.name == "path-vqa":
        data = _parquet(config, root, scratch, "official")
        note_leaks(data)
        return data
    split = _known(config, (*get_args(vqa_rad.Split), "hub"))
    if split != "hub" and parquet.holds_parquet(root) and not (root / vqa_rad.TABLE).is_file():
        if split is not None:
            raise UserError(f"{root} holds the hub's parquet files, which know no data.split={split}: set it to hub")
        split = "hub"
    if split == "hub":
        if config.validation_by != "image":
            raise UserError("data.validation_by=question is not for data.split=hub: leave it out")
        data = _parquet(config, root, scratch, "hub")
        vqa_rad.note_hub(data)
        return data
    return vqa_rad.read_vqa_rad(
        root,
        split=cast(vqa_rad.Split, split or "clean"),
        validation_fraction=fraction,
        validation_by=config.validation_by,
        seed=seed,
    )


def _images_of(entry: str, scratch: Path) -> list[Path]:
    """Return the test images of a data set or table, or all images of a folder."""
    name, _, split = entry.replace("_", "-").partition("/")
    path = Path(entry)
    if name in FOLDERS:
        # Of SLAKE the test images of both languages.
        chosen = {"language": "both", "split": "published"} if name == "slake" else {"split": split or None}
        data = _read(DataConfig.model_validate({"name": name, **chosen}), scratch.with_name(f"{scratch.name}-{name}"))
    elif path.suffix in (".csv", ".jsonl"):
        from preceptor.data.table import read_table

        data = read_table(path)
    elif path.is_dir():
        found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
        if not found:
            raise UserError(f"data.exclude_images_of: the folder {path} holds no image files")
        return found
    else:
        raise UserError(f"data.exclude_images_of: {entry!r} is no data set, table or folder{nearest(entry, FOLDERS)}")
    return [sample.image for sample in data.part("test")]


def _public_name(entry: str) -> str:
    return entry if entry.partition("/")[0].replace("_", "-") in FOLDERS else Path(entry).name


def _known(config: DataConfig, splits: tuple[str, ...]) -> str | None:
    if config.split is not None and config.split not in splits:
        raise UserError(f"data.split={config.split!r} of {config.name} is not known{nearest(config.split, splits)}")
    return config.split


def _parquet(config: DataConfig, root: Path, scratch: Path, split: str) -> VqaData:
    return parquet.read_parquet(
        root, name=config.name, split=split, scratch=scratch, validation_fraction=config.validation_fraction,
        seed=config.split_seed, max_bytes=config.max_image_bytes,
    )  # fmt: skip


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


def _root(config: DataConfig) -> Path:
    if config.root is not None:
        return Path(config.root)
    folder = FOLDERS[config.name]
    if shared := os.environ.get("PRECEPTOR_DATA"):
        return Path(shared) / folder
    raise UserError(
        f"data.name={config.name} needs data.root=FOLDER, or PRECEPTOR_DATA set to the folder above {folder}/"
    )
