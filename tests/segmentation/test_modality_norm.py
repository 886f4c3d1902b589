"""A shared encoder whose instance normalisations have their own scales and shifts for each modality."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from preceptor.config import TrainConfig
from preceptor.errors import UserError
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.subset_decoder import SubsetDecoder
from preceptor.segmentation.subsets import all_subsets
from preceptor.training.setup import make_optimizer
from tests.segmentation.test_lckd import MODALITIES, REGIONS, batch

CHANNELS = (4, 6, 8)
SIZE = (16, 16, 16)


def config(fill: str = "all_levels", **changes) -> MultimodalUNetConfig:
    return MultimodalUNetConfig(MODALITIES, REGIONS, channels=CHANNELS, fill=fill, **changes)


def with_equal_affines(plain: MultimodalUNet) -> MultimodalUNet:
    """Return the network with norms per modality, each with the scales and shifts of the plain network."""
    network = MultimodalUNet(dataclasses.replace(plain.config, norm_per_modality=True), seed=7)
    given = plain.state_dict()
    network.load_state_dict(
        {name: given[name if name in given else name.rpartition(".")[0]] for name in network.state_dict()}
    )
    return network


def randomised(network: MultimodalUNet) -> MultimodalUNet:
    torch.manual_seed(1)
    for name, parameter in network.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, 1.0 if "weight" in name else 0.0, 0.5)
    return network


@pytest.mark.parametrize("fill", ["all_levels", "bottleneck"])
@pytest.mark.parametrize("grad", [True, False])
def test_with_equal_affines_it_is_the_plain_shared_encoder(fill, grad):
    plain = randomised(MultimodalUNet(config(fill), seed=0))
    network, b = with_equal_affines(plain), batch(rows=3)
    visible = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 1], [1, 1, 1, 1]]).bool()
    with torch.set_grad_enabled(grad):
        got, want = network(b["images"], visible), plain(b["images"], visible)
        torch.testing.assert_close(got.logits, want.logits, rtol=1e-4, atol=1e-4)
        for one, other in zip(got.features, want.features, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_number_of_parameters_grows_by_the_affines():
    plain, network = (MultimodalUNet(config(norm_per_modality=own)) for own in (False, True))
    count = [sum(parameter.numel() for parameter in one.parameters()) for one in (plain, network)]
    # Two norms per level, a scale and a shift per channel, three more modalities.
    assert count[1] - count[0] == 3 * 2 * 2 * sum(CHANNELS)


@pytest.mark.parametrize("fill", ["all_levels", "bottleneck"])
def test_all_subsets_at_once_are_those_of_single_passes(fill):
    network = randomised(MultimodalUNet(config(fill, norm_per_modality=True), seed=0)).eval()
    images = batch(rows=2)["images"][1:]
    for available in ([True] * 4, [True, False, True, True]):
        chosen = [s for s in all_subsets(4) if all(there or not used for used, there in zip(s, available, strict=True))]
        present = images[0, torch.tensor(available)]
        with torch.inference_mode():
            decoder = SubsetDecoder(network, available, chosen, SIZE)
            got = torch.cat(list(decoder(present)))
            for subset, logits in zip(chosen, got, strict=True):
                want = network(images, torch.tensor([subset])).logits[0]
                torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)


def test_a_modality_has_its_own_affine():
    network, b = randomised(MultimodalUNet(config(norm_per_modality=True), seed=0)), batch(rows=1)
    same = b["images"][:, :1].expand(-1, 4, -1, -1, -1)
    features = network(same, torch.ones(1, 4, dtype=torch.bool)).features[-1]
    assert (features[0, 0] - features[0, 1]).abs().max() > 0.1
    features[0, 2].square().sum().backward()
    changed = {
        n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0 and "norm" in n
    }
    assert {name.rpartition(".")[2] for name in changed} == {"2"}


def test_scales_and_shifts_do_not_decay():
    task = LckdConfig().build_task(MultimodalUNet(config(norm_per_modality=True)), stage="baseline")
    optimizer, names = make_optimizer(task, TrainConfig(weight_decay=0.3))
    decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
    assert {decay for name, decay in zip(names, decays, strict=True) if "norm" in name} == {0.0}


def test_it_is_saved_and_loaded(tmp_path):
    network, b = randomised(MultimodalUNet(config(norm_per_modality=True), seed=0)).eval(), batch()
    network.save(tmp_path)
    loaded = MultimodalUNet.load(tmp_path).eval()
    assert loaded.config == network.config
    with torch.no_grad():
        torch.testing.assert_close(
            loaded(b["images"], b["available"]).logits, network(b["images"], b["available"]).logits, rtol=0, atol=0
        )


@pytest.mark.parametrize("other", [{"encoder": "separate"}, {"net": "early"}])
def test_it_needs_a_shared_compact_encoder(other):
    with pytest.raises(UserError, match="norm_per_modality=true needs net=compact with encoder=shared"):
        config(norm_per_modality=True, **other)
