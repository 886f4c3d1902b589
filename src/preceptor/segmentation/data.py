"""Read the cases of a segmentation recipe."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from pathlib import Path

from preceptor.data.groups import note_leaks
from preceptor.data.readers import SEGMENTATION, read_named
from preceptor.data.segmentation.check import cheap_findings
from preceptor.data.segmentation.table import require_file_name
from preceptor.data.splits import cut, empty_split, groups_of_share
from preceptor.data.types import Case, SegmentationDataset, Split
from preceptor.data.volumes import content_hash
from preceptor.errors import UserError
from preceptor.segmentation.config import SegmentationRecipe, VolumeDataConfig
from preceptor.segmentation.dataset import VolumeExamples, VolumeSettings
from preceptor.task import Batch


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
                f"{empty_split(data, split, 'cases')}; check data.split_file, data.fold, data.validation_fraction and "
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
        require_file_name(case.id, f"{data.name}: case")  # the masks of the worst cases are named after them
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
    recipe: SegmentationRecipe,
    data: SegmentationDataset,
    split: Split,
    seed: int,
    *,
    unlabelled: bool = False,
    without: Collection[Case] = (),
) -> VolumeExamples:
    """Return the examples of a split, followed by the unlabelled cases if requested. Training is augmented.

    The cases `without` are left out.
    """
    cases = data.split(split) + (data.split("unlabelled") if unlabelled else [])
    left_out = {case.id for case in without}
    cases = [case for case in cases if case.id not in left_out]
    return VolumeExamples(cases, data, settings(recipe.data, augmented=split == "train"), seed=seed)


def hold_out(data: SegmentationDataset, share: float, seed: int) -> list[Case]:
    """Return about `share` of the training cases with masks, by patient, which a stage does not train on.

    Raises:
        UserError: no training case would be left, or a held-out case shares its patient or an image with a case that
            the network is trained on or that selects the model.
    """
    held_out = [case for case in cut(data.split("train"), "teacher", share, seed) if case.split == "teacher"]
    groups = {case.group for case in held_out}
    others = [case for case in data.split("train") + data.split("unlabelled") if case.group not in groups]
    if not any(case.split == "train" for case in others) or not held_out:
        raise UserError(
            f"method.importance.held_out={share} holds out {len(held_out)} of {len(data.split('train'))} training "
            "cases, but both parts need a patient; use more cases"
        )
    # A patient can be in two splits only if the splits are given.
    rest = [case for case in data.split("unlabelled") if case.group in groups]
    for what, cases in (("validation", data.split("validation")), ("training", others + rest)):
        known, hashes = {case.group for case in cases}, {digest for case in cases for digest in _hashes(case)}
        shared = [case.id for case in held_out if case.group in known or hashes.intersection(_hashes(case))]
        if shared:
            raise UserError(
                f"method.importance.held_out holds out the cases {', '.join(shared[:5])}, whose patients or images are "
                f"also among the {what} cases; give a split by patient, or another data.split_seed"
            )
    return [replace(case, split="train") for case in held_out]


def _hashes(case: Case) -> set[str]:
    """Return the content hashes of the images of a case. A file that cannot be read has none."""
    return {content_hash(path) for path in {file.path for file in case.images.values()} if path.exists()}


def held_out_batches(
    recipe: SegmentationRecipe, data: SegmentationDataset, cases: Sequence[Case], seed: int
) -> Callable[[int], Batch]:
    """Return a function that returns batch number n of random patches of held-out cases, without augmentation.

    It goes through the cases in order, again and again, each time with other patches.
    """
    examples = VolumeExamples(cases, data, settings(recipe.data, augmented=False), seed=seed)
    size = min(recipe.train.batch_size, len(examples))

    def batch(number: int) -> Batch:
        places = range(number * size, (number + 1) * size)
        return examples.collate([examples[place % len(examples), place // len(examples)] for place in places])

    return batch
