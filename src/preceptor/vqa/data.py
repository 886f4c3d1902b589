"""Data sets by the name that a recipe gives."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast, get_args

from preceptor.config import PhantomConfig
from preceptor.data.splits import note_leaks, subsample
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa import parquet, vqa_rad
from preceptor.errors import UserError, nearest
from preceptor.recipe import apply_override, validate
from preceptor.vqa.config import DataConfig, VqaRecipe

FOLDERS = {
    "vqa-rad": "vqa_rad",
    "vqa-med-2019": "vqa_med_2019",
    "slake": "slake",
    "path-vqa": "path_vqa",
    "slake-grounding": "slake",
    "med-grit": "med_grit",
}
"""The folder of each data set under PRECEPTOR_DATA."""

IMAGE_ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".dcm", ".dicom")

# Which data sets a setting is for, beside what it has to be for the others.
_ONLY_FOR: dict[str, tuple[tuple[str, ...], object]] = {
    "variant": (("vqa-rad", "vqa-med-2019", "slake"), None),
    "validation_by": (("vqa-rad",), "image"),
    "language": (("slake",), None),
}


def load_data_config(name: str, root: Path | None, overrides: Iterable[str] = (), section: str = "data") -> DataConfig:
    """Return data settings without a recipe: a data set's name, its root, and ``data.key=value`` overrides.

    `section` is the first word of the overrides. Raises UserError for a value that does not fit and for keys of other
    sections.
    """
    raw: dict[str, Any] = {"task": "vqa", "name": name}
    raw["data"] = {"name": name, "root": None if root is None else str(root)}
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise UserError(f"override {override!r} must look like {section}.key=value")
        apply_override(raw, f"data.{override.removeprefix(f'{section}.')}")
    return validate(raw, f"data set {name}", VqaRecipe).data


def read_data(
    config: DataConfig, scratch: Path, needed: tuple[Split, ...] = ("train", "validation", "test")
) -> Dataset[Sample]:
    """Read the data set of a recipe. What has to be written (phantoms, images out of parquet files) goes to `scratch`.

    Raises UserError where a split of `needed` is empty, where the root is missing or is not the data set that its name
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
        from preceptor.data.provenance import CACHE, leave_out

        limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
        leave_out(data, _images_of(entry, scratch), _public_name(entry), scratch.with_name(CACHE), **limits)
    keep_rest = "rest" in config.unlabelled
    if config.train_share < 1:
        data.samples = subsample(data.samples, config.train_share, config.split_seed, keep_rest=keep_rest)
        data.notes.append(f"trained on {config.train_share:.0%} of the training groups (data.train_share)")
    elif keep_rest:
        raise UserError("data.unlabelled=[rest] is what data.train_share leaves out, and that is 1: set it below 1")
    add_unlabelled(data, config, scratch)
    for split in needed:
        if not data.split(split):
            raise UserError(f"{data.name} has no {split} questions; see its split column or data.validation_fraction")
    return data


def _read(config: DataConfig, scratch: Path) -> Dataset[Sample]:
    fraction, seed = config.validation_fraction, config.split_seed
    if config.name == "phantom":
        return _phantom(config, scratch)
    if config.name == "table":
        from preceptor.data.vqa.table import read_table

        if config.root is None:
            raise UserError("data.name=table needs data.root=FILE, a CSV or JSONL file with image, question, answer")
        return read_table(Path(config.root), validation_fraction=fraction, seed=seed)
    root = _root(config)
    if config.name == "vqa-med-2019":
        from preceptor.data.vqa import vqa_med_2019

        variant = _known(config, get_args(vqa_med_2019.Variant))
        return vqa_med_2019.read_vqa_med_2019(
            root, variant=cast(vqa_med_2019.Variant, variant or "val"), validation_fraction=fraction, seed=seed
        )
    if config.name == "slake":
        from preceptor.data.vqa import slake

        variant = _known(config, get_args(slake.Variant))
        return slake.read_slake(root, language=config.language or "en", variant=cast(slake.Variant, variant or "clean"))
    if config.name == "path-vqa":
        data = _parquet(config, root, scratch, "official")
        note_leaks(data)
        return data
    variant = _known(config, (*get_args(vqa_rad.Variant), "hub"))
    if variant != "hub" and parquet.holds_parquet(root) and not (root / vqa_rad.TABLE).is_file():
        if variant is not None:
            raise UserError(
                f"{root} holds the hub's parquet files, which know no data.variant={variant}: set it to hub"
            )
        variant = "hub"
    if variant == "hub":
        if config.validation_by != "image":
            raise UserError("data.validation_by=question is not for data.variant=hub: leave it out")
        data = _parquet(config, root, scratch, "hub")
        vqa_rad.note_hub(data)
        return data
    return vqa_rad.read_vqa_rad(
        root,
        variant=cast(vqa_rad.Variant, variant or "clean"),
        validation_fraction=fraction,
        validation_by=config.validation_by,
        seed=seed,
    )


def add_unlabelled(data: Dataset[Sample], config: DataConfig, scratch: Path) -> None:
    """Add the rows of `config.unlabelled` that are not of this data set, less images of its held-out splits."""
    from preceptor.data.provenance import CACHE, hash_images, match_images

    limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
    cache = scratch.with_name(CACHE)
    left_out = 0
    for entry in (entry for entry in config.unlabelled if entry != "rest"):
        name = _public_name(entry)
        rows = _questions_of(entry, scratch)
        held_out = [sample.image for sample in data.samples if sample.split in ("validation", "test")]
        theirs = dict(hash_images(held_out, cache, **limits).values())
        known = match_images(hash_images([sample.image for sample in rows], cache, **limits), theirs)
        left_out += len(known)
        data.samples += [
            replace(s, id=f"{name}:{s.id}", group=f"{name}:{s.group}", split="unlabelled", answers=(), tags={})
            for s in rows
            if s.image not in known
        ]
    if added := data.split("unlabelled"):
        data.notes.append(
            f"Beside the labelled rows a distilled student saw {len({s.image for s in added}):,} images "
            f"({sum(bool(s.question) for s in added):,} questions) without labels (data.unlabelled)"
            + (f"; {left_out} that are validation or test images too were left out." if left_out else ".")
        )


def _questions_of(entry: str, scratch: Path) -> list[Sample]:
    """Return the training rows of a data set, all rows of a table, or a row without a question for each image file."""
    name = entry.replace("_", "-").partition("/")[0]
    path = Path(entry)
    if name in FOLDERS:
        chosen = {"name": name, "language": "en"} if name == "slake" else {"name": name}
        other = _read(DataConfig.model_validate(chosen), scratch.with_name(f"{scratch.name}-{name}"))
        return other.split("train")
    if path.suffix in (".csv", ".jsonl"):
        from preceptor.data.vqa.table import read_table

        return read_table(path, answered=False).samples
    files = _image_files(path, "data.unlabelled", entry, "`rest`, a data set")
    names = [file.relative_to(path).as_posix() for file in files]
    return [Sample(n, file, "", (), "open", n, "unlabelled") for n, file in zip(names, files, strict=True)]


def _image_files(path: Path, key: str, entry: str, kinds: str) -> list[Path]:
    if not path.is_dir():
        raise UserError(f"{key}: {entry!r} is not {kinds}, a table or a folder of images{nearest(entry, FOLDERS)}")
    found = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_ENDINGS)
    if not found:
        raise UserError(f"{key}: the folder {path} holds no image files")
    return found


def _images_of(entry: str, scratch: Path) -> list[Path]:
    """Return the test images of a data set or table, or all images of a folder."""
    name, _, variant = entry.replace("_", "-").partition("/")
    path = Path(entry)
    if name in FOLDERS:
        # Of SLAKE the test images of both languages.
        chosen = {"language": "both", "variant": "published"} if name == "slake" else {"variant": variant or None}
        data = _read(DataConfig.model_validate({"name": name, **chosen}), scratch.with_name(f"{scratch.name}-{name}"))
    elif path.suffix in (".csv", ".jsonl"):
        from preceptor.data.vqa.table import read_table

        data = read_table(path)
    else:
        return _image_files(path, "data.exclude_images_of", entry, "a data set")
    return [sample.image for sample in data.split("test")]


def _public_name(entry: str) -> str:
    return entry if entry.partition("/")[0].replace("_", "-") in FOLDERS else Path(entry).name


def _known(config: DataConfig, splits: tuple[str, ...]) -> str | None:
    if config.variant is not None and config.variant not in splits:
        raise UserError(
            f"data.variant={config.variant!r} of {config.name} is not known{nearest(config.variant, splits)}"
        )
    return config.variant


def _parquet(config: DataConfig, root: Path, scratch: Path, variant: str) -> Dataset[Sample]:
    return parquet.read_parquet(
        root,
        name=config.name,
        variant=variant,
        scratch=scratch,
        validation_fraction=config.validation_fraction,
        seed=config.split_seed,
        max_bytes=config.max_image_bytes,
    )


def _phantom(config: DataConfig, scratch: Path) -> Dataset[Sample]:
    from preceptor.data.vqa.table import read_table

    table = made_phantom(config.phantom, Path(config.root) if config.root else scratch, config.image_size)
    data = read_table(table, name="phantom")
    data.notes.append("Generated images: the numbers show that the method works, and nothing about medicine.")
    return data


def made_phantom(config: PhantomConfig, folder: Path, image_size: int) -> Path:
    """Return the table of generated images and questions in a folder, made there if it is not yet."""
    from preceptor.data.synthetic.questions_table import write_phantom

    return write_phantom(
        folder,
        cases=config.cases,
        questions_per_image=config.questions_per_image,
        images_per_case=config.images_per_case,
        seed=config.seed,
        image_size=image_size,
    )


def _root(config: DataConfig) -> Path:
    return Path(config.root) if config.root is not None else shared_folder(config.name, FOLDERS[config.name])


def shared_folder(name: str, folder: str) -> Path:
    """Return where a data set's folder lies under PRECEPTOR_DATA. Raises UserError where that is not set."""
    if shared := os.environ.get("PRECEPTOR_DATA"):
        return Path(shared) / folder
    raise UserError(
        f"{name} needs its folder, as data.root=FOLDER in a recipe or --root FOLDER, or PRECEPTOR_DATA set to the "
        f"folder above {folder}/"
    )
