"""Expected Dice and votes compare with the whole reference, on the grid of its file."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.types import SegmentationDataset
from preceptor.errors import UserError
from preceptor.segmentation import evaluate
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.dataset import VolumeExamples, VolumeSettings
from preceptor.segmentation.evaluate import dice_by_case, score_cases, votes
from tests.data.volume_files import head, save

SHAPE = (16, 16, 16)
BOTH = (True, True)


@pytest.fixture
def data(tmp_path: Path) -> SegmentationDataset:
    """Two cases whose image is 300 in a cube, which is the lesion. That of the second one has a slab outside the head.

    The head leaves two voxels of background all around. The second case has no core.
    """
    for number in range(2):
        for modality in ("flair", "t1"):
            image, label = head(4 * number + len(modality), SHAPE), np.zeros(SHAPE, np.uint8)
            image[5:10, 5:10, 5:10], label[5:10, 5:10, 5:10] = 300, 1
            if number == 0:
                label[6:8, 6:8, 6:8] = 2
            else:
                label[0:2, :, 3] = 1
            save(tmp_path / f"c{number}" / f"c{number}_{modality}.nii.gz", image)
        save(tmp_path / f"c{number}" / f"c{number}_seg.nii.gz", label)
    return read_volumes(tmp_path, test_fraction=0, validation_fraction=0, regions={"core": [2], "whole": [1, 2]})


@pytest.fixture(autouse=True)
def bright(monkeypatch: pytest.MonkeyPatch) -> None:
    """Predict both regions where the normalised image is bright."""

    def predicted(network: Any, case: Any, *_: Any, only: Any = None, **__: Any) -> dict[Any, torch.Tensor]:
        inside = (case.images[0][case.box] > 1.5).float().expand(2, -1, -1, -1)
        return dict.fromkeys(only or [BOTH], inside)

    monkeypatch.setattr(evaluate, "predict_case", predicted)


def examples(data: SegmentationDataset, **settings: Any) -> VolumeExamples:
    return VolumeExamples(
        data.samples, data, VolumeSettings(**{"patch_size": (8, 8, 8), "intensity": "zscore"} | settings)
    )


def recipe(**method: Any) -> SegmentationRecipe:
    return SegmentationRecipe.model_validate({"name": "x", "data": {"modalities": ["flair", "t1"]}, "method": method})


def test_voxels_outside_the_box_are_missed(data: SegmentationDataset) -> None:
    """125 voxels are found in all cases; the second reference has 32 more."""
    first, second = dice_by_case(None, examples(data), recipe())  # type: ignore[arg-type]
    assert first[BOTH] == pytest.approx([2 * 8 / 133, 1])
    assert second[BOTH] == pytest.approx([0, 250 / 282], abs=1e-9)


def test_votes_leave_out_regions_that_a_case_does_not_contain(data: SegmentationDataset) -> None:
    found = votes(None, examples(data), recipe())  # type: ignore[arg-type]
    assert found.tolist()[0] == pytest.approx([2 * 8 / (125 + 8 + 1), (250 / 251 + 250 / (125 + 157 + 1)) / 2])
    assert torch.equal(found[0], found[1])
    second = replace(data, samples=data.samples[1:])
    assert votes(None, examples(second), recipe())[:, 0].isnan().all()  # type: ignore[arg-type]
    assert second.samples[0].mask is not None
    save(second.samples[0].mask.path, np.zeros(SHAPE, np.uint8))
    with pytest.raises(UserError, match=r"none of the 1 validation cases that vote contains any of the regions core, "):
        votes(None, examples(second), recipe())  # type: ignore[arg-type]


@pytest.mark.parametrize("spacing", [None, (2.0, 2.0, 2.0), (1.5, 1.0, 3.0)])
def test_the_expected_dice_is_that_of_the_written_masks(data: SegmentationDataset, spacing: Any) -> None:
    """`score_cases` scores the files that are written (tests/segmentation/test_score.py)."""
    cases = examples(data, spacing=spacing)
    rows = {
        (row["id"], row["region"]): row["dice"]
        for row in score_cases(None, cases, recipe())["A"]  # type: ignore[arg-type]
    }
    for case, scores in zip(data.samples, dice_by_case(None, cases, recipe()), strict=True):  # type: ignore[arg-type]
        for region, dice in zip(data.regions, scores[BOTH], strict=True):
            assert dice == pytest.approx(rows[case.id, region], abs=1e-12)
    if spacing == (2.0, 2.0, 2.0):
        assert rows["c0", "whole"] < 0.95, "on the coarse grid it would be 1"
