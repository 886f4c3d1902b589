"""A network on cases: every subset of what each case has, by region."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from preceptor.data.types import SegmentationDataset
from preceptor.data.volumes import load_label, on_source_grid, save_mask, to_labels, to_regions
from preceptor.errors import UserError
from preceptor.scores import number_groups
from preceptor.segmentation.config import EvaluationConfig, SegmentationRecipe
from preceptor.segmentation.dataset import VolumeExamples, WholeCase
from preceptor.segmentation.election import Election, mean_scores
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.losses import soft_dice
from preceptor.segmentation.method import SegmentationMethod
from preceptor.segmentation.metrics import dice, post_process, score_masks, unreadable_rows
from preceptor.segmentation.model import MultimodalUNet
from preceptor.segmentation.region_masks import threshold_regions
from preceptor.segmentation.settings import ElectionConfig
from preceptor.segmentation.sliding_window import predict_subsets
from preceptor.segmentation.subsets import SubsetFlags, all_subsets, subset_name

THRESHOLD = 0.5


def predict_case(
    network: MultimodalUNet,
    case: WholeCase,
    config: EvaluationConfig,
    window: tuple[int, int, int],
    *,
    overlap: float | None = None,
    only: list[SubsetFlags] | None = None,
    blend: Literal["probabilities", "logits"] = "probabilities",
) -> dict[SubsetFlags, Tensor]:
    """Return the probabilities (R, d, h, w) inside the case's box from every subset of its modalities, or from `only`.

    Outside the box there is no foreground, and no network is asked.
    """
    device = next(network.parameters()).device
    images = case.images[(slice(None), *case.box)].to(device)
    with torch.inference_mode():
        return predict_subsets(
            network,
            images,
            case.available.tolist(),
            window,
            overlap=config.overlap if overlap is None else overlap,
            mode=config.mode,
            subsets=only,
            blend=blend,
        )


def alone(count: int) -> list[SubsetFlags]:
    """Return the subsets of one modality each."""
    return [tuple(i == m for i in range(count)) for m in range(count)]


def votes(network: MultimodalUNet, cases: VolumeExamples, recipe: SegmentationRecipe) -> Tensor:
    """Return the soft Dice (N, R) of every single modality, averaged over the cases that have it and have the region.

    NaN if there is no such case. The soft Dice is that of the whole volume on the grid of the network.

    `method.election.cases` of the cases vote, by name; before them, those with a modality or a region that the others
    lack. Cases that cannot be read have no vote. Raises UserError if none can be read, or none contains a region.
    """
    count, regions = len(cases.modalities), len(cases.regions)
    election = recipe.method.election if isinstance(recipe.method, LckdConfig) else ElectionConfig()
    found = {}
    for index, case in islice(voters(cases), election.cases or None):
        assert case.masks is not None
        only = [single for single in alone(count) if bool(case.available[single.index(True)])]
        predictions = predict_case(
            network,
            case,
            recipe.evaluation,
            recipe.data.patch_size,
            overlap=recipe.evaluation.validation_overlap,
            only=only,
            blend=election.blend,
        )
        scores = torch.full((count, regions), torch.nan, dtype=torch.float64)
        for single, probabilities in predictions.items():
            scores[single.index(True)] = _soft_dice_of_whole(probabilities, case)
        found[index] = scores
    if not found:
        raise UserError(
            f"none of the {len(cases)} validation cases can be read, so none can vote in the election of teachers: "
            f"{', '.join([*cases.unreadable][:3])}; repair their files, or choose other validation cases"
        )
    means = mean_scores([found[index] for index in sorted(found)])
    if bool(means.isnan().all()):
        raise UserError(
            f"none of the {len(found)} validation cases that vote contains any of the regions "
            f"{', '.join(cases.regions)}, so no teacher can be elected; choose other validation cases, or set "
            "method.cross_modal.weight=0"
        )
    return means


def _soft_dice_of_whole(probabilities: Tensor, case: WholeCase) -> Tensor:
    """Return the soft Dice (R,) of probabilities (R, d, h, w) inside the box of a case, which are 0 outside.

    NaN for a region that the case does not contain: it tells nothing about the modality.
    """
    assert case.masks is not None
    target = case.masks[(slice(None), *case.box)]
    total, known = (masks.flatten(1).sum(dim=1) for masks in (case.masks, target))
    scores = soft_dice(probabilities[None], target[None].to(probabilities.device, torch.float32))[0].double().cpu()
    divisor = probabilities.float().flatten(1).sum(dim=1).double().cpu() + known + 1
    return torch.where(total > 0, scores * (divisor / (divisor + total - known)), torch.nan)


def voters(cases: VolumeExamples) -> Iterator[tuple[int, WholeCase]]:
    """Yield the cases that can be read, each with its index, first those that have what no case before has.

    This is a modality of the images in a region of the label map. Thus every modality has a vote in every region of a
    few cases. If all cases have the same modalities and regions, their order does not change.
    """
    left, seen = list(range(len(cases))), set[tuple[str, str]]()

    def content(index: int) -> set[tuple[str, str]]:
        regions = ("", *cases.regions_of(index))  # a case without any region still has its modalities
        return {(modality, region) for modality in cases.cases[index].images for region in regions}

    while left:
        index = max(left, key=lambda index: len(content(index) - seen))
        left.remove(index)
        if (case := cases.readable(index)) is not None:
            seen |= content(index)
            yield index, case


def doubts_of_votes(scores: Tensor, data: SegmentationDataset, method: SegmentationMethod) -> list[str]:
    """Return sentences on votes (N, R) that are missing, and on an election by which nothing is distilled."""
    modalities, regions = tuple(data.modalities), tuple(data.regions)
    missing = scores.isnan()
    absent = [name for name, row in zip(modalities, missing, strict=True) if bool(row.all())]
    empty = [name for name, column in zip(regions, missing.T, strict=True) if bool(column.all())]
    pairs = [
        f"{modality} and {region}"
        for modality, row in zip(modalities, missing.tolist(), strict=True)
        for region, lacks in zip(regions, row, strict=True)
        if lacks and modality not in absent and region not in empty
    ]
    doubts = []
    if absent:
        doubts.append(f"No validation case that votes has {', '.join(absent)}, so no election can make it a teacher.")
    if empty:
        doubts.append(f"No validation case that votes contains {', '.join(empty)}, so no election finds its teacher.")
    if pairs:
        doubts.append(
            f"No validation case that votes has {', or '.join(pairs)}, so no election can make this modality the "
            "teacher of this region."
        )
    if isinstance(method, LckdConfig) and method.cross_modal.students == "others" and len(modalities) > 1:
        election = Election(modalities, regions)
        election.vote(0, scores)
        if method.teachers == "multi" and len(election.teachers("multi")) == len(modalities):
            doubts.append(
                "In an election every modality became a teacher, so that none learned from another until the next one "
                "(method.cross_modal.students=others); set it to all, or method.teachers to single or per_task."
            )
    return doubts


def dice_by_case(
    network: MultimodalUNet, cases: VolumeExamples, recipe: SegmentationRecipe
) -> list[dict[SubsetFlags, np.ndarray]]:
    """Return the Dice (R,) of each case from every subset of its modalities, the smallest subsets first.

    The masks are those of the label map that would be written, on the grid of the source file, and the reference is the
    whole label map. A case that cannot be read and is skipped scores 0.
    """
    found = []
    for index in range(len(cases)):
        case = cases.readable(index)
        if case is None:
            found.append({subset: np.zeros(len(cases.regions)) for subset in cases.subsets_of(index)})
            continue
        target = reference_masks(cases, index, case)
        is_resampled = case.loaded.shape != case.loaded.geometry.canonical_shape
        # Without a change of the grid, the box is enough: outside of it, nothing is predicted.
        inside = target if is_resampled else target[(slice(None), *case.box)]
        outside = [int(np.count_nonzero(a) - np.count_nonzero(b)) for a, b in zip(target, inside, strict=True)]
        scores = {}
        predictions = predict_case(
            network, case, recipe.evaluation, recipe.data.patch_size, overlap=recipe.evaluation.validation_overlap
        )
        for subset, probabilities in predictions.items():
            label = label_map(probabilities.float().cpu().numpy(), cases.regions)
            if is_resampled:
                label = on_source_grid(_in_whole(label, case), case.loaded)
            masks = to_regions(label, cases.regions)
            scores[subset] = np.array([dice(m, t, o) for m, t, o in zip(masks, inside, outside, strict=True)])
        found.append(scores)
    return found


def _in_whole(inside: np.ndarray, case: WholeCase) -> np.ndarray:
    """Return (..., D, H, W) of a whole case with the values (..., d, h, w) in its box, and 0 elsewhere."""
    whole = np.zeros((*inside.shape[:-3], *case.images.shape[1:]), inside.dtype)
    whole[(..., *case.box)] = inside
    return whole


def mean_by_subset(
    scores: Sequence[Mapping[SubsetFlags, np.ndarray]], cases: VolumeExamples
) -> dict[str, dict[str, float]]:
    """Return the mean Dice over cases by subset and region. A subset that no case has is left out."""
    rows = {
        subset_name(subset, cases.modalities): [case[subset] for case in scores if subset in case]
        for subset in all_subsets(len(cases.modalities))
    }
    return {name: _by_region(values, cases) for name, values in rows.items() if values}


def mean_from_all(scores: Sequence[Mapping[SubsetFlags, np.ndarray]], cases: VolumeExamples) -> dict[str, float]:
    """Return the mean Dice over cases by region, of each case from all the modalities that it has."""
    return _by_region([case[max(case, key=sum)] for case in scores if case], cases)


def _by_region(values: Sequence[np.ndarray], cases: VolumeExamples) -> dict[str, float]:
    return dict(zip(cases.regions, np.mean(values, axis=0).tolist(), strict=True))


def mean_of(scores: dict[str, dict[str, float]]) -> float:
    """Return the mean over subsets and regions."""
    return float(np.mean([value for by_region in scores.values() for value in by_region.values()]))


def score_cases(
    network: MultimodalUNet, cases: VolumeExamples, recipe: SegmentationRecipe
) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every case (`metrics.score_masks`), as predicted (`A`) and post-processed (`A-post`).

    A row scores the label map that would be written, on the grid of the source file. A case that cannot be read and is
    skipped has the rows of `metrics.unreadable_rows`.
    """
    rows: dict[str, list[dict[str, Any]]] = {"A": [], "A-post": []}
    groups, regions = number_groups(cases.cases), list(cases.regions)
    for index in range(len(cases)):
        case = cases.readable(index)
        if case is None:
            id = cases.cases[index].id
            for subset in cases.subsets_of(index):
                name = subset_name(subset, cases.modalities)
                for found in rows.values():
                    found += unreadable_rows(id, name, regions, group=groups[id])
            continue
        target = reference_masks(cases, index, case)
        spacing = case.loaded.geometry.spacing
        for subset, probabilities in whole_probabilities(network, case, recipe):
            name = subset_name(subset, cases.modalities)
            plain = label_map(probabilities, cases.regions)
            post = label_map(probabilities, cases.regions, recipe.evaluation)
            for key, label in (("A", plain), ("A-post", post)):
                if key == "A-post" and np.array_equal(plain, post):  # HD95 is expensive
                    rows[key] += [dict(row) for row in rows["A"][-len(regions) :]]
                    continue
                masks = to_regions(on_source_grid(label, case.loaded), cases.regions)
                rows[key] += score_masks(case.id, name, masks, target, regions, spacing, group=groups[case.id])
    return rows


def reference_masks(cases: VolumeExamples, index: int, case: WholeCase) -> np.ndarray:
    """Return the masks (R, D, H, W) bool of the reference label map on the grid of its file."""
    assert case.masks is not None
    if case.loaded.shape == case.loaded.geometry.canonical_shape:
        return case.masks.numpy()
    mask = cases.cases[index].mask
    assert mask is not None
    label, _ = load_label(mask, cases.regions, max_voxels=cases.settings.max_voxels)
    return to_regions(label, cases.regions)


def whole_probabilities(
    network: MultimodalUNet, case: WholeCase, recipe: SegmentationRecipe, only: list[SubsetFlags] | None = None
) -> Iterator[tuple[SubsetFlags, np.ndarray]]:
    """Yield (subset, probabilities (R, D, H, W) float32) of a whole case; 0 outside the box of its images."""
    predictions = predict_case(network, case, recipe.evaluation, recipe.data.patch_size, only=only)
    for subset, probabilities in predictions.items():
        yield subset, _in_whole(probabilities.float().cpu().numpy(), case)


def label_map(
    probabilities: np.ndarray, regions: Mapping[str, Sequence[int]], post: EvaluationConfig | None = None
) -> np.ndarray:
    """Return the label map (D, H, W) uint8 of region probabilities (R, D, H, W).

    Probabilities are cut at `THRESHOLD`; of regions that share no label, the most probable one is kept
    (`threshold_regions`). The label map is post-processed by the settings `post` (`metrics.post_process`), if given.
    Scores, volumes and files are all made from this label map, in which the regions are nested or exclude each other.
    """
    label = to_labels(threshold_regions(probabilities, regions, THRESHOLD), regions)
    if post is None:
        return label
    return post_process(
        label,
        regions,
        share=post.minimum_component,
        voxels=post.minimum_component_voxels,
        lowest_slices=post.lowest_slices,
        et_minimum=post.et_minimum,
    )


def write_worst(
    folder: Path, network: MultimodalUNet, cases: VolumeExamples, recipe: SegmentationRecipe, rows: list[dict[str, Any]]
) -> None:
    """Write the label maps of the worst cases for four subsets: all modalities, then ever fewer, the worst ones.

    Cases that cannot be read have none.
    """
    by_case: dict[str, list[float]] = {}
    for row in rows:
        by_case.setdefault(row["id"], []).append(row["dice"])
    worst = sorted(by_case, key=lambda name: (float(np.mean(by_case[name])), name))
    places = {case.id: number for number, case in enumerate(cases.cases)}
    readable = (case for name in worst if (case := cases.readable(places[name])) is not None)
    for case in islice(readable, recipe.report.cases):
        chosen = _four(rows, case.id, case, cases.modalities)
        for subset, probabilities in whole_probabilities(network, case, recipe, only=chosen):
            label = label_map(probabilities, cases.regions)
            save_mask(folder / f"{case.id}__{subset_name(subset, cases.modalities)}.nii.gz", label, case.loaded)


def _four(rows: list[dict[str, Any]], name: str, case: WholeCase, modalities: tuple[str, ...]) -> list[SubsetFlags]:
    """Return all available modalities, and then, one modality less each time, the worst subset of the one before."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        if row["id"] == name:
            scores.setdefault(row["subset"], []).append(row["dice"])
    chosen: list[SubsetFlags] = [tuple(bool(a) for a in case.available)]
    while sum(chosen[-1]) > 1 and len(chosen) < 4:
        smaller = [
            tuple(kept and m != gone for m, kept in enumerate(chosen[-1]))
            for gone, there in enumerate(chosen[-1])
            if there
        ]
        chosen.append(min(smaller, key=lambda s: float(np.mean(scores[subset_name(s, modalities)]))))
    return chosen
