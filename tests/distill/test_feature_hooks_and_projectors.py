from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from preceptor.distill.feature_hooks import FeatureHooks, plain_path
from preceptor.distill.projectors import layer_pairs, projector
from preceptor.errors import UserError


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 3)

    def forward(self, x):
        return self.inner(x), "not a tensor"


def network(layers: int = 12) -> nn.Module:
    return nn.Sequential(*[nn.Linear(3, 3) for _ in range(layers)])


def test_patterns_in_natural_order_and_values():
    net = network()
    taps = FeatureHooks(net, ["1*", "2"])
    assert taps.names == ["1", "2", "10", "11"]
    x = torch.randn(2, 3)
    with taps.capture() as features:
        y = net(x)
        assert torch.equal(features["11"], y)
    assert not taps._features


def test_values_are_the_modules_outputs_and_carry_gradients():
    net = network(3)
    taps = FeatureHooks(net, ["1"])
    x = torch.randn(2, 3)
    with taps.capture() as features:
        net(x)
        loss = features["1"].square().sum() + features["1"].abs().sum()  # two terms on one layer
        tapped = features["1"]
    assert torch.equal(tapped, net[1](net[0](x)))
    loss.backward()
    assert net[0].weight.grad is not None
    assert net[2].weight.grad is None


def test_nothing_is_kept_outside_and_close_removes_the_hooks():
    net = network(2)
    taps = FeatureHooks(net, ["*"])
    net(torch.randn(1, 3))
    assert taps._features == {}
    taps.close()
    with taps.capture() as features:
        net(torch.randn(1, 3))
        assert features == {}


def test_unmatched_pattern_lists_near_names():
    with pytest.raises(UserError, match=r"'fusoin\.1'.*inner"):
        FeatureHooks(Pair(), ["fusoin.1"])
    many = nn.ModuleDict({"fusion": network(20), "text": network(20)})
    with pytest.raises(UserError, match=r"near: fusion, fusion\.0, fusion\.1"):
        FeatureHooks(many, ["fusion.33"])


def test_tuple_output_gives_its_first_tensor():
    net = nn.Sequential(Pair())
    taps = FeatureHooks(net, ["0"])
    with taps.capture() as features:
        net(torch.ones(1, 3))
        assert features["0"].shape == (1, 3)


def test_a_module_run_twice_is_refused():
    shared = nn.Linear(3, 3)
    net = nn.Sequential(shared, nn.ReLU(), shared)
    taps = FeatureHooks(net, ["0"])
    with pytest.raises(RuntimeError, match="twice"), taps.capture():
        net(torch.randn(1, 3))


def test_wrappers_do_not_show():
    assert plain_path("module.fusion.0") == "fusion.0"
    assert plain_path("_orig_mod.module.fusion.0.norm") == "fusion.0.norm"
    assert plain_path("submodule.fusion") == "submodule.fusion"

    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

        def forward(self, x):
            return self.module(x)

    net = Wrapper(network(2))
    taps = FeatureHooks(net, ["1"])
    with taps.capture() as features:
        assert torch.equal(net(torch.ones(1, 3)), features["1"])


@pytest.mark.parametrize(
    ("s", "t", "how", "want"),
    [
        (2, 4, "uniform", [(0, 1), (1, 3)]),
        (4, 12, "uniform", [(0, 2), (1, 5), (2, 8), (3, 11)]),  # TinyBERT: every third
        (6, 12, "uniform", [(0, 1), (1, 3), (2, 5), (3, 7), (4, 9), (5, 11)]),  # Patient KD skip
        (1, 1, "uniform", [(0, 0)]),
        (3, 2, "uniform", [(0, 0), (1, 0), (2, 1)]),
        (2, 3, "uniform", [(0, 1), (1, 2)]),  # 1.5 is rounded up
        (3, 5, "uniform", [(0, 1), (1, 2), (2, 4)]),  # 1.67 and 3.33 are rounded
        (2, 4, "last", [(0, 2), (1, 3)]),
        (4, 2, "last", [(2, 0), (3, 1)]),
        (2, 4, [[0, 3], [0, 1]], [(0, 3), (0, 1)]),
    ],
)
def test_layer_pairs(s, t, how, want):
    assert layer_pairs(s, t, how) == want


@given(st.integers(1, 24), st.integers(1, 24), st.sampled_from(["uniform", "last"]))
def test_layer_pairs_stay_inside_and_in_order(s, t, how):
    pairs = layer_pairs(s, t, how)
    assert all(0 <= a < s and 0 <= b < t for a, b in pairs)
    assert pairs == sorted(pairs)
    assert pairs[-1] == (s - 1, t - 1)


@pytest.mark.parametrize("pairs", [[[0, 4]], [[2, 0]], [[-1, 0]], []])
def test_wrong_pairs(pairs):
    with pytest.raises(UserError):
        layer_pairs(2, 4, pairs)


def test_projectors_depend_on_their_seed_alone():
    def draw(seed: int) -> torch.nn.Linear:
        return projector(3, 7, torch.Generator().manual_seed(seed))

    torch.manual_seed(5)
    one = draw(1)
    torch.manual_seed(6)
    two = draw(1)
    x = torch.randn(2, 5, 3)
    assert one(x).shape == (2, 5, 7)
    assert torch.equal(one(x), two(x))
    assert not torch.equal(one(x), draw(2)(x))


def test_projectors_keep_the_scale_of_features():
    linear = projector(400, 25, torch.Generator().manual_seed(0))
    x = torch.randn(200, 400, generator=torch.Generator().manual_seed(1))
    assert linear(x).std().item() == pytest.approx(1, rel=0.05)
    assert not linear.bias.any()


def test_the_outputs_of_a_deep_copy_are_not_captured():
    net = network(2)
    taps = FeatureHooks(net, ["1"])
    average = copy.deepcopy(net)
    with taps.capture() as features:
        average(torch.ones(1, 3))
        assert features == {}
