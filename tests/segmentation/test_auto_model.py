"""Segmentation folders in transformers' Auto classes, against the loader of Preceptor."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel

import preceptor  # noqa: F401 - registers the classes
from preceptor import extension
from preceptor.errors import UserError
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig

SMALL = MultimodalUNetConfig(("flair", "t1"), ("et", "wt"), channels=(4, 4, 8))
CONFIGS = [
    SMALL,
    MultimodalUNetConfig(("ct",), ("lesion",), channels=(4, 4, 8), encoder="separate"),
    MultimodalUNetConfig(("flair", "t1"), ("et",), channels=(4, 4, 4, 8), encoder="separate", fill="bottleneck"),
    MultimodalUNetConfig(("flair", "t1"), ("et",), net="early", channels=(4, 4, 8)),
    pytest.param(MultimodalUNetConfig(("flair", "t1"), ("et",), net="reference"), marks=pytest.mark.slow),
]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_outputs_equal_those_of_the_network_bit_for_bit(tmp_path: Path, config: MultimodalUNetConfig) -> None:
    MultimodalUNet(config, seed=0).save(tmp_path / "model")
    network = MultimodalUNet.load(tmp_path / "model").eval()
    images = torch.randn(3, len(config.modalities), *network.fitting((16, 16, 16)))
    available = torch.tensor([[True, True], [True, False], [False, True]])
    available = available[:, : len(config.modalities)] | (len(config.modalities) == 1)
    model = AutoModel.from_pretrained(tmp_path / "model")
    model.save_pretrained(tmp_path / "again")
    expected = network.state_dict()
    for one in (model, AutoModel.from_pretrained(tmp_path / "again")):
        assert list(one.state_dict()) == list(expected)
        assert all(torch.equal(tensor, expected[name]) for name, tensor in one.state_dict().items())
        with torch.no_grad():
            assert torch.equal(one(images, available).logits, network(images, available).logits)


@pytest.mark.parametrize("config", CONFIGS)
def test_the_configuration_has_the_fields_of_the_network(tmp_path: Path, config: MultimodalUNetConfig) -> None:
    MultimodalUNet(config, seed=0).save(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert loaded.network_config() == config
    for name, value in asdict(config).items():
        assert getattr(loaded, name) == (list(value) if isinstance(value, tuple) else value)


def test_gradients_reach_every_weight(tmp_path: Path) -> None:
    MultimodalUNet(SMALL, seed=0).save(tmp_path)
    model = AutoModel.from_pretrained(tmp_path).train()
    model(torch.randn(1, 2, 16, 16, 16), torch.tensor([[True, False]])).logits.square().sum().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_missing_weights_are_initialised(tmp_path: Path) -> None:
    """As transformers does for each of its models, with a warning; they are never left uninitialised."""
    MultimodalUNet(SMALL, seed=0).save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    torch.manual_seed(0)
    kept = {name: weights[name] for name in list(weights)[::2]}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    for name, tensor in AutoModel.from_pretrained(tmp_path).state_dict().items():
        assert tensor.shape == weights[name].shape
        if name in kept or tensor.dim() == 1:  # the norms and biases of a new network are ones and zeros
            assert torch.equal(tensor, weights[name])
        else:
            assert 0.5 < tensor.std() / weights[name].std() < 2


def test_a_network_of_the_user_is_refused(tmp_path: Path, monkeypatch) -> None:
    MultimodalUNet(SMALL, seed=0).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"compact"', '"my_nets:Volumes"'))
    for trusted in (set(), {"my_nets:Volumes"}):
        monkeypatch.setattr(extension, "_trusted", trusted)
        with pytest.raises(UserError, match=r"my_nets:Volumes is a class of your own.*preceptor\.load"):
            AutoModel.from_pretrained(tmp_path)


def test_an_invalid_configuration_is_refused(tmp_path: Path) -> None:
    MultimodalUNet(SMALL, seed=0).save(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"compact"', '"compcat"'))
    with pytest.raises(UserError, match="did you mean 'compact'"):
        AutoModel.from_pretrained(tmp_path)
