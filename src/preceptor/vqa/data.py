"""Read the data set of a VQA recipe."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from preceptor.data.findings import Finding
from preceptor.data.groups import folder_findings, note_leaks, renew_leaks, ungrouped_images
from preceptor.data.image_folder import find_images
from preceptor.data.locations import FOLDERS
from preceptor.data.provenance import CACHE, hash_images, leave_out, match_images, note_undecoded
from preceptor.data.readers import VQA, read_named, require_applies
from preceptor.data.splits import FIX_SPLITS, empty_split, subsample
from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa.check import check_data
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError, nearest
from preceptor.recipe import apply_override, validate
from preceptor.vqa.config import DataConfig, VqaRecipe

# Data sets that a setting applies to, and its value for all other data sets.
_ONLY_FOR = {
    "variant": (("vqa-rad", "vqa-med-2019", "slake"), None),
    "validation_by": (("vqa-rad",), "image"),
    "language": (("slake",), None),
}


def load_data_config(name: str, root: Path | None, overrides: Iterable[str] = (), section: str = "data") -> DataConfig:
    """Return data settings without a recipe, from the name of a data set, its root and ``data.key=value`` overrides.

    `section` is the first part of the keys of the overrides.

    Raises:
        UserError: a value is invalid, or an override does not start with `section`.
    """
    raw: dict[str, Any] = {"task": "vqa", "name": name}
    raw["data"] = {"name": name, "root": None if root is None else str(root)}
    for override in overrides:
        if not override.startswith(f"{section}."):
            raise UserError(f"override {override!r} must have the form {section}.key=value")
        apply_override(raw, f"data.{override.removeprefix(f'{section}.')}")
    return validate(raw, f"data set {name}", VqaRecipe).data


def read_data(
    config: DataConfig, scratch: Path, needed: tuple[Split, ...] = ("train", "validation", "test")
) -> Dataset[Sample]:
    """Read the data set of a recipe.

    Args:
        config: Data settings of the recipe.
        scratch: Folder for generated files: the synthetic data set, and images extracted from parquet files.
        needed: Splits that must not be empty.

    Raises:
        UserError: a needed split is empty, the root is missing or contains another data set, a setting does not apply
            to the data set, or an entry of `exclude_images_of` does not exist.
    """
    require_applies(config, _ONLY_FOR)
    data = read_named(VQA, config, scratch)
    if ":" in config.name:
        note_leaks(data)
        data.findings += folder_findings(ungrouped_images(data.samples))
    limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
    for entry in config.exclude_images_of:
        excluded = _images_of(entry, scratch, data.findings)
        leave_out(data, excluded, _public_name(entry), scratch.with_name(CACHE), **limits)
    keep_rest = "rest" in config.unlabelled
    if config.train_share < 1:
        data.samples = subsample(data.samples, config.train_share, config.split_seed, keep_rest=keep_rest)
        data.notes.append(f"Trained on {config.train_share:.0%} of the training groups (data.train_share).")
    elif keep_rest:
        raise UserError("data.unlabelled=[rest] needs samples that data.train_share=1 leaves out; set it below 1")
    renew_leaks(data)  # of what is used
    add_unlabelled(data, config, scratch)
    for split in needed:
        if not data.split(split):
            raise UserError(f"{empty_split(data, split, 'questions')}; {FIX_SPLITS}")
    data.findings += check_data(data, config.normaliser, config.minimum_answer_count)
    return data


def add_unlabelled(data: Dataset[Sample], config: DataConfig, scratch: Path) -> None:
    """Add the samples of the other data sets in `config.unlabelled`, without images of the held-out splits."""
    limits = {"max_bytes": config.max_image_bytes, "max_pixels": config.max_image_pixels}
    cache = scratch.with_name(CACHE)
    excluded = 0
    for entry in (entry for entry in config.unlabelled if entry != "rest"):
        name = _public_name(entry)
        samples = _unlabelled_samples(entry, scratch, data.findings)
        held_out = [sample.image for sample in data.samples if sample.split in ("validation", "test")]
        held_out_hashes = hash_images(held_out, cache, **limits)
        hashes = hash_images([sample.image for sample in samples], cache, **limits)
        matches = match_images(hashes, dict(held_out_hashes.values()))
        images = {*held_out, *(sample.image for sample in samples)}
        note_undecoded(data, name, images, {*held_out_hashes, *hashes})
        excluded += len(matches)
        data.samples += [
            replace(s, id=f"{name}:{s.id}", group=f"{name}:{s.group}", split="unlabelled", answers=(), tags={})
            for s in samples
            if s.image not in matches
        ]
    if added := data.split("unlabelled"):
        data.notes.append(
            f"In addition to the labelled samples, distilled students were trained on "
            f"{len({s.image for s in added}):,} images ({sum(bool(s.question) for s in added):,} questions) without "
            "labels (data.unlabelled)"
            + (f"; {excluded} images that are also validation or test images were left out." if excluded else ".")
        )


def _unlabelled_samples(entry: str, scratch: Path, findings: list[Finding]) -> list[Sample]:
    """Return the training samples of a data set, all samples of a table, or one sample per image of a folder."""
    name = entry.replace("_", "-").partition("/")[0]
    path = Path(entry)
    if name in FOLDERS:
        settings = {"name": name, "language": "en"} if name == "slake" else {"name": name}
        data = read_named(VQA, DataConfig.model_validate(settings), scratch.with_name(f"{scratch.name}-{name}"))
        return data.split("train")
    if path.suffix in (".csv", ".jsonl"):
        return read_table(path, answered=False).samples
    files = _folder_images(path, "data.unlabelled", entry, "`rest`, a data set", findings)
    names = [file.relative_to(path).as_posix() for file in files]
    return [Sample(n, file, "", (), "open", n, "unlabelled") for n, file in zip(names, files, strict=True)]


def _folder_images(path: Path, key: str, entry: str, alternatives: str, findings: list[Finding]) -> list[Path]:
    if not path.is_dir():
        hint = nearest(entry, FOLDERS)
        raise UserError(f"{key}: {entry!r} is not {alternatives}, a table or a folder of images{hint}")
    try:
        files, found = find_images(path)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None
    findings += found
    return files


def _images_of(entry: str, scratch: Path, findings: list[Finding]) -> list[Path]:
    """Return the test images of a data set or table, or all images of a folder."""
    name, _, variant = entry.replace("_", "-").partition("/")
    path = Path(entry)
    if name in FOLDERS:
        # The test images of both languages of SLAKE.
        settings = {"language": "both", "variant": "published"} if name == "slake" else {"variant": variant or None}
        data = read_named(
            VQA, DataConfig.model_validate({"name": name, **settings}), scratch.with_name(f"{scratch.name}-{name}")
        )
    elif path.suffix in (".csv", ".jsonl"):
        data = read_table(path)
    else:
        return _folder_images(path, "data.exclude_images_of", entry, "a data set", findings)
    return [sample.image for sample in data.split("test")]


def _public_name(entry: str) -> str:
    return entry if entry.partition("/")[0].replace("_", "-") in FOLDERS else Path(entry).name
