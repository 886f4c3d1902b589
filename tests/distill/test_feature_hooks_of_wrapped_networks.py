"""Feature hooks and projectors of networks that are wrapped, copied or compiled; layer maps with mistakes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from preceptor.distill.feature_hooks import FeatureHooks
from preceptor.distill.projectors import layer_pairs, projector
from preceptor.errors import UserError

X = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 3)  # a name that DDP uses too

    def forward(self, x: Tensor) -> Tensor:
        return x + self.module(x)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))


def test_a_child_called_module_is_not_taken_for_a_wrapper():
    net = nn.Sequential(Residual(), nn.ReLU())
    taps = FeatureHooks(net, ["0", "0.module"])
    assert taps.names == ["0", "0.module"]
    with taps.capture() as features:
        y = net(X)
        assert torch.equal(features["0"].relu(), y)
        assert torch.equal(features["0"], X + features["0.module"])


def test_distributed_data_parallel_does_not_show(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = network()
        wrapped = nn.parallel.DistributedDataParallel(net)
        taps = FeatureHooks(wrapped, ["0", "1"])
        with taps.capture() as features:
            y = wrapped(X)
            assert list(features) == ["0", "1"]
            assert torch.equal(features["1"], y)
    finally:
        dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("tapped_first", [True, False])
def test_compiling_does_not_show(tapped_first: bool):
    torch.compiler.reset()
    net = network()
    taps = FeatureHooks(net, ["0"]) if tapped_first else None
    compiled = torch.compile(net, backend="eager")
    taps = taps or FeatureHooks(compiled, ["0"])
    for scale in (1.0, 2.0):  # the second call runs what the first has compiled
        with taps.capture() as features:
            compiled(scale * X)
            want = nn.functional.linear(scale * X, *net[0].parameters())
            assert torch.allclose(features["0"], want)


def test_a_copy_of_the_network_does_not_fill_the_taps():
    net = network()
    taps = FeatureHooks(net, ["0"])
    teacher = copy.deepcopy(net)
    with taps.capture() as features:
        teacher(X + 1)
        assert features == {}
        net(X)
        assert torch.equal(features["0"], nn.functional.linear(X, *net[0].parameters()))


def test_lists_of_modules_have_no_output_to_tap():
    net = nn.Module()
    net.fusion = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    with pytest.raises(UserError, match=r"'fusion'.*fusion\.[01]"):
        FeatureHooks(net, ["fusion"])
    assert FeatureHooks(net, ["fusion*"]).names == ["fusion.0", "fusion.1"]


def test_an_error_in_the_network_leaves_the_taps_usable():
    net = network()
    taps = FeatureHooks(net, ["0"])
    with pytest.raises(RuntimeError), taps.capture():
        net(torch.zeros(2, 4))
    with taps.capture() as features:
        net(X)
        assert list(features) == ["0"]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("unifrom", "did you mean 'uniform'"),
        ([[0, 1], [0, 1]], "listed twice"),
        ([[0, 1, 2]], "3 numbers"),
        ([[0, 4]], "teacher 0 to 3"),
    ],
)
def test_wrong_layer_maps_say_what_to_mend(how, message: str):
    with pytest.raises(UserError, match=message):
        layer_pairs(2, 4, how)


def test_projectors_leave_the_global_generator_alone():
    torch.manual_seed(0)
    want = torch.rand(3)
    torch.manual_seed(0)
    projector(3, 7, torch.Generator().manual_seed(0))
    assert torch.equal(torch.rand(3), want)


def test_projectors_start_as_scaled_normals_and_learn():
    linear = projector(400, 300, torch.Generator().manual_seed(3))
    # 120,000 draws: the standard error of the deviation is 0.2 %.
    assert linear.weight.std().item() == pytest.approx(400**-0.5, rel=0.02)
    assert linear.bias.abs().sum() == 0
    linear(torch.ones(2, 400)).sum().backward()
    assert all(p.grad is not None and p.requires_grad for p in linear.parameters())
