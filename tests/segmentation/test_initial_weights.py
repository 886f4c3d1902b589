"""`model.init`: a network starts from the weights of an earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.api import run_recipe
from preceptor.data.provenance import read_provenance
from preceptor.errors import UserError
from preceptor.segmentation.initial_weights import copy_weights
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from tests.command_line import call
from tests.segmentation.conftest import recipe
from tests.segmentation.test_lckd import MODALITIES, REGIONS, batch

NETS = {
    "compact": {"channels": (4, 4, 8)},
    "separate": {"channels": (4, 4, 8), "encoder": "separate"},
    "norms": {"channels": (4, 4, 8), "norm_per_modality": True},
    "early": {"channels": (4, 4, 8), "net": "early"},
}


def network(regions=REGIONS, seed: int = 0, **settings) -> MultimodalUNet:
    return MultimodalUNet(MultimodalUNetConfig(MODALITIES, tuple(regions), **settings), seed=seed).eval()


def logits(model: MultimodalUNet) -> torch.Tensor:
    b = batch()
    with torch.no_grad():
        return model(b["images"], b["available"]).logits


@pytest.mark.parametrize("net", NETS)
def test_regions_of_both_are_copied_by_name(net: str) -> None:
    earlier, own = network(("et", "tc", "wt"), seed=1, **NETS[net]), network(("wt", "lesion"), seed=2, **NETS[net])
    unchanged = logits(earlier)
    assert copy_weights(own, earlier, "model.init=x") == ["wt"]
    torch.testing.assert_close(logits(own)[:, 0], unchanged[:, 2])
    # The row of a new region keeps its own weights on the copied features: a copy of everything else.
    other = network(("lesion",), seed=2, **NETS[net])
    assert copy_weights(other, earlier, "") == []
    assert not torch.allclose(logits(other)[:, 0], logits(own)[:, 0])
    assert torch.equal(logits(earlier), unchanged)
    same = network(("et", "tc", "wt"), seed=3, **NETS[net])
    assert copy_weights(same, earlier, "") == ["et", "tc", "wt"]
    torch.testing.assert_close(logits(same), unchanged)
    with torch.no_grad():
        next(same.parameters()).add_(1)
    assert torch.equal(logits(earlier), unchanged), "copied, not shared"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"channels": (4, 8, 8)}, r"channels=\[4, 4, 8\], and the recipe has channels=\[4, 8, 8\]"),
        ({"channels": (4, 4, 8), "encoder": "separate"}, "encoder=shared, and the recipe has encoder=separate"),
        ({"channels": (4, 4, 8), "net": "early"}, "net=compact, and the recipe has net=early"),
    ],
)
def test_another_network_is_refused(settings, message: str) -> None:
    with pytest.raises(UserError, match=f"model.init=x has another network, with {message}"):
        copy_weights(network(**settings), network(channels=(4, 4, 8)), "model.init=x")


def test_other_modalities_are_refused() -> None:
    own = MultimodalUNet(MultimodalUNetConfig(("flair",), REGIONS, channels=(4, 4, 8)), seed=0)
    with pytest.raises(UserError, match=r"modalities=\['flair', .* and the recipe has modalities=\['flair'\]"):
        copy_weights(own, network(channels=(4, 4, 8)), "model.init=x")


@pytest.mark.slow
def test_a_run_starts_from_an_earlier_one(trained: Path, tmp_path: Path) -> None:
    """With a rate of almost 0 the weights stay: those of the stage that the earlier run ends with."""
    earlier = trained / "run"
    short = ["train.epochs=1", "train.learning_rate=1e-12", f"data.root={earlier / 'data'}", "stages=[baseline]"]
    results = run_recipe(recipe(tmp_path, *short, f"model.init={earlier}"))
    assert any("Initial weights: those of an earlier run" in note for note in results["notes"])
    found, want = (load_file(run / "model" / "model.safetensors") for run in (tmp_path / "run", earlier / "distilled"))
    for name, weight in want.items():
        torch.testing.assert_close(found[name], weight, rtol=0, atol=1e-7)

    assert read_provenance(tmp_path / "run" / "model") == read_provenance(earlier / "distilled" / "model")
    with pytest.raises(UserError, match="another network, with channels"):
        run_recipe(
            recipe(tmp_path, *short, "model.channels=[4,8,8]", f"model.init={earlier}", f"output={tmp_path / 'c'}")
        )


def test_a_missing_run_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for name, key in (("lckd-demo", "model.init"), ("mhkd-demo", "student.model.init")):
        code, _, err = call("train", name, f"{key}={tmp_path / 'no'}", f"output={tmp_path / 'run'}")
        assert (code, f"{key}={tmp_path / 'no'} does not exist" in err) == (2, True), err
