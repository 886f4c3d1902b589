from __future__ import annotations

import itertools

import pytest
import torch

from preceptor.errors import UserError
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig, fill_with_mean
from preceptor.segmentation.sliding_window import predict_subsets
from preceptor.segmentation.subset_decoder import SubsetDecoder
from preceptor.segmentation.subsets import all_subsets, subset_name, within

MODALITIES, REGIONS = ("flair", "t1", "t1ce", "t2"), ("et", "wt", "tc")
ALL = (True,) * 4


def test_the_published_order():
    names = [subset_name(s, ("F", "T1", "T1c", "T2")) for s in all_subsets(4)]
    rows = "F, T1, T1c, T2, F+T1, F+T1c, F+T2, T1+T1c, T1+T2, T1c+T2, F+T1+T1c, F+T1+T2, F+T1c+T2, T1+T1c+T2"
    assert ", ".join(names) == f"{rows}, F+T1+T1c+T2"
    assert all_subsets(1) == [(True,)]
    for n in (2, 3, 5):
        assert set(all_subsets(n)) == set(itertools.product((False, True), repeat=n)) - {(False,) * n}
        assert len(all_subsets(n)) == 2**n - 1
    assert within(all_subsets(3), (True, False, True)) == [
        (True, False, False),
        (False, False, True),
        (True, False, True),
    ]


def net(**options) -> MultimodalUNet:
    model = MultimodalUNet(MultimodalUNetConfig(MODALITIES, REGIONS, **options), seed=0)
    generator = torch.Generator().manual_seed(0)
    for key, parameter in model.named_parameters():
        if "bias" in key:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def volume(*size: int) -> torch.Tensor:
    return torch.randn(4, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def naive(model, images, subset, window, overlap, mode, blend):
    """MONAI's windows over the network, what is missing set to zero."""
    from monai.inferers import sliding_window_inference

    flags = torch.tensor([subset])

    def predict(x):
        # As the published code does: all channels are encoded, zeros too; then what is missing is filled in.
        features = model.encode_available(x, torch.ones_like(flags))
        there = flags[:, :, None, None, None, None]
        skips = features[:-1] if model.config.fill == "bottleneck" else [f * there for f in features[:-1]]
        if model.config.fill == "all_levels":
            skips = [fill_with_mean(f, flags) for f in skips]
        filled = [*skips, fill_with_mean(features[-1] * there, flags)]
        joined = [join(f) for join, f in zip(model.decoder.joins, filled, strict=True)]
        logits = model.decoder.finish(joined, window)
        return logits.sigmoid() if blend == "probabilities" else logits

    x = torch.where(flags[0, :, None, None, None], images, torch.zeros(()))[None]
    out = sliding_window_inference(x, window, 1, predict, overlap=overlap, mode=mode)[0]
    return out if blend == "probabilities" else out.sigmoid()


CASES = [
    ("shared", "all_levels", "constant", "probabilities", (13, 16, 21), (8, 12, 16), 0.5),
    ("separate", "all_levels", "gaussian", "logits", (13, 10, 16), (8, 12, 16), 1 / 3),
    ("shared", "bottleneck", "gaussian", "probabilities", (8, 12, 20), (8, 12, 16), 0.25),
    ("separate", "bottleneck", "constant", "logits", (9, 12, 16), (8, 12, 16), 0.0),
]


@pytest.mark.parametrize(("encoder", "fill", "mode", "blend", "size", "window", "overlap"), CASES)
def test_all_subsets_equal_the_naive_loop(encoder, fill, mode, blend, size, window, overlap):
    model, images = net(encoder=encoder, fill=fill, channels=(4, 6, 8)), volume(*size)
    got = predict_subsets(model, images, ALL, window, overlap, mode=mode, blend=blend)
    assert list(got) == all_subsets(4)
    for subset, probabilities in got.items():
        want = naive(model, images, subset, window, overlap, mode, blend)
        assert probabilities.shape == (3, *size)
        assert torch.allclose(probabilities, want, rtol=0, atol=1e-5), subset


@pytest.mark.slow
@pytest.mark.parametrize("fill", ["all_levels", "bottleneck"])
def test_the_compact_network_equals_the_naive_loop(fill):
    """At its size: few channels and many are joined in different ways."""
    size = (32, 32, 32)
    model, images = net(fill=fill), volume(*size)
    got = predict_subsets(model, images, ALL, size)
    for subset in all_subsets(4):
        want = naive(model, images, subset, size, 0.5, "constant", "probabilities")
        assert torch.allclose(got[subset], want, rtol=0, atol=1e-5), subset
        with torch.no_grad():
            assert torch.allclose(
                got[subset], model(images[None], torch.tensor([subset])).logits[0].sigmoid(), atol=1e-5
            )


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "fill"), [("shared", "bottleneck"), ("separate", "all_levels")])
def test_the_reference_network_equals_the_naive_loop(encoder, fill):
    """In float64: with random weights its fifty layers enlarge float32's rounding to 2e-5, whoever computes them."""
    size = (16, 32, 64)
    model, images = net(net="reference", encoder=encoder, fill=fill).double(), volume(*size).double()
    some = all_subsets(4)[1::4]
    got = predict_subsets(model, images, ALL, size, subsets=some)
    for subset in some:
        want = naive(model, images, subset, size, 0.5, "constant", "probabilities")
        assert torch.allclose(got[subset].double(), want, rtol=0, atol=1e-6), subset


@pytest.mark.parametrize("fill", ["all_levels", "bottleneck"])
@pytest.mark.parametrize("encoder", ["shared", "separate"])
def test_a_case_that_lacks_modalities(encoder, fill):
    model, images = net(encoder=encoder, fill=fill, channels=(4, 6, 8)), volume(8, 12, 16)
    have = (True, False, True, False)
    nothing = torch.where(torch.tensor(have)[:, None, None, None], images, torch.tensor(float("nan")))
    got = predict_subsets(model, nothing, have, (8, 12, 16))
    assert list(got) == [(True, False, False, False), (False, False, True, False), have]
    for subset, probabilities in got.items():
        want = naive(model, images, subset, (8, 12, 16), 0.5, "constant", "probabilities")
        assert torch.allclose(probabilities, want, rtol=0, atol=1e-5)
    singles = [s for s in all_subsets(4) if sum(s) == 1]
    assert predict_subsets(model, nothing, have, (8, 12, 16), subsets=[ALL]) == {}
    few = predict_subsets(model, nothing, have, (8, 12, 16), subsets=[*singles, ALL])
    assert list(few) == singles[::2]
    assert all(torch.allclose(few[s], got[s], rtol=0, atol=1e-5) for s in few)
    full = predict_subsets(model, images, ALL, (8, 12, 16), subsets=[ALL])[ALL]
    assert torch.allclose(full, naive(model, images, ALL, (8, 12, 16), 0.5, "constant", "probabilities"), atol=1e-5)


def test_one_encoder_pass_per_modality_and_window():
    model, seen = net(fill="bottleneck", channels=(4, 6, 8)), []
    model.encoders[0].register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    predict_subsets(model, volume(8, 8, 16), ALL, (8, 8, 8), overlap=0)
    assert seen == [4, 4]


def test_one_modality_only():
    model = MultimodalUNet(MultimodalUNetConfig(("ct",), ("lesion",), channels=(4, 6, 8)), seed=0)
    x = volume(8, 8, 8)[:1]
    with torch.no_grad():
        want = model(x[None], torch.tensor([[True]])).logits[0].sigmoid()
        assert torch.allclose(next(SubsetDecoder(model, [True], [(True,)], (8, 8, 8))(x))[0].sigmoid(), want, atol=1e-5)
    assert torch.allclose(predict_subsets(model, x, (True,), (8, 8, 8))[(True,)], want, atol=1e-5)


def test_bfloat16_is_close():
    model, images = net(channels=(4, 6, 8)), volume(8, 8, 16)
    want = predict_subsets(model, images, ALL, (8, 8, 8))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = predict_subsets(model, images, ALL, (8, 8, 8))
    for subset in want:
        assert got[subset].dtype == torch.float32
        assert (got[subset] - want[subset]).abs().mean() < 0.02


def test_wrong_windows():
    model, images = net(channels=(4, 6, 8)), volume(8, 8, 8)
    with pytest.raises(UserError, match=r"a window of 6x8x8 .* use 8x8x8"):
        predict_subsets(model, images, ALL, (6, 8, 8))
    with pytest.raises(UserError, match="overlap=1"):
        predict_subsets(model, images, ALL, (8, 8, 8), 1.0)
    with pytest.raises(UserError, match="no modality"):
        predict_subsets(model, images, (False,) * 4, (8, 8, 8))
