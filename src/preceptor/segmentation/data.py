"""Read the cases of a segmentation recipe."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from preceptor.data.identity import note_leaks
from preceptor.data.readers import SEGMENTATION, read_named
from preceptor.data.segmentation.check import cheap_findings
from preceptor.data.splits import groups_of_share
from preceptor.data.types import Case, SegmentationDataset, Split
from preceptor.errors import UserError
from preceptor.segmentation.config import SegmentationRecipe, VolumeDataConfig
from preceptor.segmentation.dataset import VolumeExamples, VolumeSettings


def read_cases(config: VolumeDataConfig, scratch: Path, needed: tuple[Split, ...] = ("train", "validation", "test")):
    """Read the cases of a recipe as a SegmentationDataset.

    Args:
        config: Data settings of the recipe.
        scratch: Folder for the synthetic data set, unless `config.root` is set.
        needed: Splits that must not be empty.

    Raises:
        UserError: the root is missing or contains no cases, or a needed split is empty.
    """
    data = read_named(SEGMENTATION, config, scratch)
    _reduce_labels(data, config)
    note_leaks(data)  # of what is used
    data.findings += cheap_findings(data)
    for split in needed:
        if not data.split(split) and config.split:
            raise UserError(
                f"{data.root} has no {split} case of data.split={config.split}; give the folder of its cases as "
                "data.root, or set data.split=null, which cuts splits by patient"
            )
        if not data.split(split):
            raise UserError(
                f"{data.name} has no {split} case; check data.split_file, data.fold, data.validation_fraction and "
                "data.test_fraction"
            )
    return data


def _reduce_labels(data: SegmentationDataset, config: VolumeDataConfig) -> None:
    """Keep the masks of `config.train_share` of the training cases. The other cases are dropped, or unlabelled."""
    labelled_groups = groups_of_share(data.samples, config.train_share, config.split_seed)
    if config.train_share < 1:
        data.notes.append(f"Trained on {config.train_share:.0%} of the training cases (data.train_share).")
    cases: list[Case] = []
    for case in data.samples:
        if case.split != "train" or case.group in labelled_groups:
            cases.append(case)
        elif config.unlabelled == "rest":
            cases.append(replace(case, split="unlabelled", mask=None))
    data.samples = cases
    if config.unlabelled == "rest":
        number = len(data.split("unlabelled"))
        if not number:
            raise UserError(
                "data.unlabelled=rest needs cases without masks, but all cases have masks and data.train_share is 1; "
                "set it below 1"
            )
        data.notes.append(f"In addition, {number} cases without masks were used (data.unlabelled).")


def settings(config: VolumeDataConfig, *, augmented: bool) -> VolumeSettings:
    """Return the preprocessing of the recipe."""
    return VolumeSettings(
        patch_size=config.patch_size,
        spacing=config.spacing,
        intensity=config.intensity,
        augment=config.augment if augmented else "none",
        foreground_probability=config.foreground_probability,
        max_voxels=config.max_voxels,
        broken=config.broken,
    )


def examples(
    recipe: SegmentationRecipe, data: SegmentationDataset, split: Split, seed: int, *, unlabelled: bool = False
) -> VolumeExamples:
    """Return the examples of a split, followed by the unlabelled cases if requested. Training is augmented."""
    cases = data.split(split) + (data.split("unlabelled") if unlabelled else [])
    return VolumeExamples(cases, data, settings(recipe.data, augmented=split == "train"), seed=seed)
