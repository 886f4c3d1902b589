"""`model.init`: a network starts from the weights of an earlier one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from preceptor.api import run_recipe
from preceptor.data.provenance import read_provenance
from preceptor.errors import UserError
from preceptor.segmentation.initial_weights import copied_parameters, copy_weights
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


@pytest.mark.parametrize("net", NETS)
def test_the_layer_of_a_new_region_is_not_pretrained(net: str) -> None:
    earlier = network(("et", "tc", "wt"), seed=1, **NETS[net])
    names = {name for name, _ in earlier.named_parameters()}
    for regions in (("et", "tc", "wt"), ("wt", "et")):
        assert copied_parameters(network(regions, **NETS[net]), earlier) == names
    own = network(("wt", "lesion"), seed=2, **NETS[net])
    copy_weights(own, earlier, "")
    new = {name for name, weight in own.named_parameters() if weight.shape != earlier.get_parameter(name).shape}
    assert new
    assert copied_parameters(own, earlier) == names - new
    for name in names - new:
        assert torch.equal(own.get_parameter(name), earlier.get_parameter(name))


def train_on(folder: Path, trained: Path, *settings: str) -> dict[str, torch.Tensor]:
    """Return the weights of the last step of a short run on the cases of the finished one."""
    short = ["train.epochs=1", "train.select=last", "train.ema_decay=0", f"data.root={trained / 'run' / 'data'}"]
    run_recipe(recipe(folder, *short, "stages=[baseline]", f"output={folder / 'run'}", *settings))
    return load_file(folder / "run" / "model" / "model.safetensors")


@pytest.mark.slow
def test_pretrained_weights_train_with_their_own_rate(trained: Path, tmp_path: Path) -> None:
    init = f"model.init={trained / 'run'}"
    start = load_file(trained / "run" / "distilled" / "model" / "model.safetensors")

    def moved(name: str, *settings: str) -> float:
        (tmp_path / name).mkdir()
        found = train_on(tmp_path / name, trained, init, *settings)
        return sum(float((found[key] - weight).abs().sum()) for key, weight in start.items())

    by_default, slower = moved("default"), moved("slower", "train.pretrained_lr_scale=0.01")
    assert moved("whole", "train.pretrained_lr_scale=1") == by_default
    assert moved("lower", "train.learning_rate=2.0e-5") == pytest.approx(slower, rel=1e-3), "0.01 times 2.0e-3"
    assert 0 < slower < by_default / 20
    with pytest.raises(UserError, match=r"train\.pretrained_lr_scale=0 freezes all weights .* set it above 0"):
        moved("frozen", "train.pretrained_lr_scale=0")


@pytest.mark.slow
def test_frozen_weights_leave_the_layer_of_new_regions(trained: Path, tmp_path: Path) -> None:
    regions = "data.regions={tc: [1, 4], oedema: [2]}"
    settings = ["data.name=brats", f"data.split_file={trained / 'run' / 'data' / 'splits.json'}", regions]
    found = train_on(tmp_path, trained, *settings, f"model.init={trained / 'run'}", "train.pretrained_lr_scale=0")
    start = load_file(trained / "run" / "distilled" / "model" / "model.safetensors")
    changed = {name for name, weight in start.items() if not torch.equal(found[name], weight)}
    assert changed == {name for name, weight in start.items() if found[name].shape != weight.shape}


@pytest.mark.slow
def test_a_student_that_starts_from_its_teacher_has_pretrained_weights(trained: Path, tmp_path: Path) -> None:
    method = "{name: kd, initialise_from_teacher: true, teaching_run: " + f"{trained / 'run'}" + "}"
    settings = ["stages=[distilled]", f"method={method}"]
    for name, scale, rate in (("a", 0.01, 2.0e-3), ("b", 1.0, 2.0e-5)):
        (tmp_path / name).mkdir()
        both = [f"train.pretrained_lr_scale={scale}", f"train.learning_rate={rate}"]
        train_on(tmp_path / name, trained, *settings, *both)
    one, other = (load_file(tmp_path / name / "run" / "model" / "model.safetensors") for name in "ab")
    for key, weight in one.items():
        torch.testing.assert_close(weight, other[key], rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="freezes all weights"):
        train_on(tmp_path, trained, *settings, "train.pretrained_lr_scale=0")


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
