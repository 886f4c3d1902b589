from __future__ import annotations

from pathlib import Path

import pytest
import torch

import preceptor
from preceptor.api import run_recipe
from preceptor.errors import UserError
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.sliding_window import predict_subsets
from preceptor.segmentation.subsets import all_subsets
from tests.segmentation.conftest import recipe

MODALITIES, REGIONS, CHANNELS = ("flair", "t1", "t1ce", "t2"), ("et", "tc", "wt"), (4, 6, 8)


def network(seed: int = 0) -> MultimodalUNet:
    return MultimodalUNet(MultimodalUNetConfig(MODALITIES, REGIONS, net="early", channels=CHANNELS), seed=seed).eval()


def volume(*size: int) -> torch.Tensor:
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(1))


def test_every_subset_of_a_volume_is_segmented_in_windows():
    model, images = network(), volume(20, 16, 24)
    found = predict_subsets(model, images, (True,) * 4, (16, 16, 16), 0.5)
    assert list(found) == all_subsets(4)
    one = predict_subsets(model, images, (True,) * 4, (16, 16, 16), 0.5, [(False, True, False, True)])
    torch.testing.assert_close(one[False, True, False, True], found[False, True, False, True])
    assert found[True, True, True, True].shape == (3, 20, 16, 24)


def test_what_a_missing_channel_holds_is_not_read_and_that_it_is_missing_matters():
    model, images = network(), volume(16, 16, 16)[None]
    available = torch.tensor([[True, False, True, True]])
    poisoned = images.clone()
    poisoned[:, 1] = torch.nan
    with torch.no_grad():
        want = model(images, available).logits
        torch.testing.assert_close(model(poisoned, available).logits, want)
        zero = images.clone()
        zero[:, 1] = 0
        inner = (..., slice(4, 12), slice(4, 12), slice(4, 12))  # the padding at the border shows every constant
        there = model(zero, torch.ones(1, 4, dtype=torch.bool)).logits
    assert (there - want)[inner].abs().mean() > 1e-3


def test_weights_depend_on_the_seed_alone_and_are_saved(tmp_path):
    model, images = network(3), volume(16, 16, 16)[None]
    torch.rand(5)
    again, everything = network(3), torch.ones(1, 4, dtype=torch.bool)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    model.save(tmp_path)
    loaded = MultimodalUNet.load(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(images, everything).logits, model(images, everything).logits)


def test_sizes_are_checked_before_the_first_step():
    model = network()
    assert model.stride == (4, 4, 4)
    model.check_size((8, 4, 4))
    with pytest.raises(UserError, match="use 16x16x20"):
        model.check_size((16, 16, 18))
    with pytest.raises(UserError, match="single voxel"):
        model.check_size((4, 4, 4))


@pytest.mark.slow
def test_early_fusion_trains_evaluates_and_segments_any_subset(tmp_path: Path):
    results = run_recipe(recipe(tmp_path, "model.net=early", "stages=[baseline]"))
    scores = results["protocols"]["phantom/made/A"]
    assert len(scores["subsets"]) > 1
    again = preceptor.evaluate(tmp_path / "run")
    assert again["protocols"]["phantom/made/A"]["dice"] == pytest.approx(scores["dice"])
    case = min((tmp_path / "run" / "data").rglob("*flair.nii.gz"))
    result = preceptor.load(tmp_path / "run").segment({"flair": case})
    assert result.missing == ("t1", "t1ce", "t2")
    assert result.mask.shape == result.probabilities.shape[1:]


def test_its_features_cannot_be_compared(tmp_path):
    with pytest.raises(UserError, match="compares features, and the network early returns none"):
        run_recipe(recipe(tmp_path, "model.net=early", "stages=[distilled]"))
