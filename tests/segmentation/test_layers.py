from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import conv3d

from preceptor.segmentation.layers import Conv, StandardisedConv, standardised
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.sliding_window import predict_subsets
from preceptor.segmentation.subsets import all_subsets


@pytest.mark.parametrize("kind", [Conv, StandardisedConv])
@pytest.mark.parametrize(("channels", "side"), [(1, 8), (4, 8), (16, 32), (16, 40)])  # 16 x 40 x 40 is not slow alone
@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("maps", [1, 2])
def test_results_and_gradients_are_those_of_torch_in_double_precision(kind, channels, side, stride, dilation, maps):
    """Alone or in a batch, whatever the memory format in which the layer computes."""
    torch.manual_seed(0)
    layer = kind(channels, 3, 3, stride, dilation)
    nn.init.normal_(layer.weight, std=0.1)
    x = torch.randn(maps, channels, side, side, side, requires_grad=True)
    weight = layer.weight.detach().double().requires_grad_()
    wide = x.detach().double().requires_grad_()
    used = standardised(weight) if kind is StandardisedConv else weight
    want = conv3d(wide, used, None, stride, dilation, dilation)
    got = layer(x)
    assert got.shape == want.shape
    assert got.is_contiguous()
    scale = float(want.detach().abs().max())
    assert float((got - want).detach().abs().max()) < 1e-5 * scale
    got.square().mean().backward()
    want.square().mean().backward()
    for found, expected in ((x.grad, wide.grad), (layer.weight.grad, weight.grad)):
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_only_a_single_small_float32_map_is_doubled():
    layer = Conv(4, 4, 3)
    counts = []
    plain = nn.Conv3d._conv_forward
    nn.Conv3d._conv_forward = lambda self, x, w, b: counts.append(len(x)) or plain(self, x, w, b)
    try:
        for shape in [(1, 4, 8, 8, 8), (2, 4, 8, 8, 8), (1, 4, 80, 80, 2)]:
            layer(torch.randn(shape))
        layer.double()(torch.randn(1, 4, 8, 8, 8, dtype=torch.float64))
        layer.float()
        with torch.autocast("cpu", torch.bfloat16):
            layer(torch.randn(1, 4, 8, 8, 8))
    finally:
        nn.Conv3d._conv_forward = plain
    assert counts == [2, 2, 1, 1, 1]


def test_only_training_in_float32_with_few_channels_changes_the_memory_format():
    formats = []
    plain = nn.Conv3d._conv_forward

    def spy(self, x, w, b):
        formats.append(x.is_contiguous(memory_format=torch.channels_last_3d) and not x.is_contiguous())
        return plain(self, x, w, b)

    nn.Conv3d._conv_forward = spy
    try:
        few, many, x = Conv(4, 4, 3), Conv(65, 4, 3), torch.randn(2, 4, 8, 8, 8)
        few(x)
        many(torch.randn(2, 65, 8, 8, 8))
        with torch.no_grad():
            few(x)
        with torch.autocast("cpu", torch.bfloat16):
            few(x)
        few.double()(x.double())
    finally:
        nn.Conv3d._conv_forward = plain
    assert formats == [True, False, False, False, False]


@pytest.mark.parametrize("encoder", ["separate", "shared"])
def test_a_network_gives_the_same_with_and_without_doubling(encoder, monkeypatch):
    model = MultimodalUNet(MultimodalUNetConfig(("a", "b"), ("x",), encoder=encoder, channels=(4, 8, 16)), seed=0)
    size = (16, 16, 32)
    images = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))

    def run():
        model.zero_grad()
        found = predict_subsets(model, images, (True, True), size, subsets=all_subsets(2))
        logits = model(images[None], torch.tensor([[True, False]])).logits
        logits.sigmoid().mean().backward()
        weight = next(p for p in model.parameters() if p.dim() == 5)
        return [*found.values(), logits.detach().sigmoid(), weight.grad.clone()]

    fast = run()
    monkeypatch.setattr(Conv, "_conv_forward", nn.Conv3d._conv_forward)
    for got, want in zip(fast, run(), strict=True):
        assert float((got - want).abs().max()) < 1e-5
