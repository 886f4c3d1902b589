from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from preceptor.errors import UserError
from preceptor.segmentation.layers import InstanceNorm, Join, StandardisedConv, initialise
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig, fill_with_mean
from preceptor.segmentation.reference_unet import Aspp

MODALITIES, REGIONS = ("flair", "t1", "t1ce", "t2"), ("et", "wt", "tc")
MIXED = torch.tensor([[1, 1, 1, 1], [0, 1, 0, 1], [1, 0, 0, 0], [1, 1, 0, 1]]).bool()
SMALL = {"channels": (4, 6, 8)}
KINDS = [(e, f) for e in ("shared", "separate") for f in ("all_levels", "bottleneck")]


@pytest.fixture(autouse=True)
def _same_draws():
    torch.manual_seed(0)


def net(seed: int = 0, **options) -> MultimodalUNet:
    """Weights with shifts: at the start all of them are 0, and so are the features of a zero image."""
    model = MultimodalUNet(MultimodalUNetConfig(MODALITIES, REGIONS, **options), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "bias" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator)
    return model


def images(count: int, size: tuple[int, ...], seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 4, *size, generator=torch.Generator().manual_seed(seed))


def naive(model: MultimodalUNet, x_NDHW: torch.Tensor, available: list[bool]) -> torch.Tensor:
    """One sample: every modality encoded, missing ones as zeros, then filled in by the book."""
    size = tuple(x_NDHW.shape[1:])
    features = [
        model.encode(x[None, None] if there else torch.zeros(1, 1, *size), m)
        for m, (x, there) in enumerate(zip(x_NDHW, available, strict=True))
    ]
    joined = []
    for level, join in enumerate(model.decoder.joins):
        maps = [f[level][0] for f in features]
        mean = sum(x for x, there in zip(maps, available, strict=True) if there) / sum(available)
        if level == len(model.decoder.joins) - 1 or model.config.fill == "all_levels":
            maps = [x if there else mean for x, there in zip(maps, available, strict=True)]
        weight = join.weight
        if join.standardise:
            weight = torch.stack([(row - row.mean()) / (row.var() + 1e-12).sqrt() for row in weight])
        x = torch.cat(maps)[None]
        if join.kind == "pointwise":
            joined.append(F.conv3d(x, weight[..., None, None, None]))
        else:
            joined.append(F.conv_transpose3d(x, weight, stride=2))
    return model.decoder.finish(joined, size)


@pytest.mark.parametrize(("encoder", "fill"), KINDS)
def test_a_mixed_batch_equals_sample_by_sample(encoder: str, fill: str):
    model, x = net(encoder=encoder, fill=fill, **SMALL), images(4, (8, 12, 16))
    got = model(x, MIXED).logits
    want = torch.cat([naive(model, one, row.tolist()) for one, row in zip(x, MIXED, strict=True)])
    assert got.shape == (4, 3, 8, 12, 16)
    assert torch.allclose(got, want, atol=1e-5)
    signs = torch.randn(got.shape, generator=torch.Generator().manual_seed(5))
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((got * signs).sum(), parameters),
        torch.autograd.grad((want * signs).sum(), parameters),
        strict=True,
    ):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()) + 1e-5)
    with torch.no_grad():
        assert torch.allclose(model(x, MIXED).logits, want, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("encoder", "fill"), [("shared", "all_levels"), ("separate", "bottleneck")])
def test_the_reference_network_too(encoder: str, fill: str):
    model, x = net(net="reference", encoder=encoder, fill=fill), images(2, (32, 64, 64))
    rows = MIXED[1:3]
    with torch.no_grad():
        got = model(x, rows).logits
        want = torch.cat([naive(model, one, row.tolist()) for one, row in zip(x, rows, strict=True)])
    assert got.shape == (2, 3, 32, 64, 64)
    assert torch.allclose(got, want, atol=1e-4 * float(want.abs().max()))


@given(rows=st.lists(st.integers(1, 15), min_size=1, max_size=3), seed=st.integers(0, 99))
@settings(max_examples=12)
def test_what_stands_in_an_absent_channel_is_never_read(rows: list[int], seed: int):
    model, x = net(**SMALL), images(len(rows), (8, 8, 8), seed)
    available = torch.tensor([[bool(row >> m & 1) for m in range(4)] for row in rows])
    garbage = torch.where(available[..., None, None, None], x, torch.tensor(float("nan")))
    a, b = model(x, available), model(garbage, available)
    assert torch.equal(a.logits, b.logits)
    assert all(torch.equal(p, q) for p, q in zip(a.features, b.features, strict=True))
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    assert torch.allclose(model(x[order], available[order]).logits, a.logits[order], atol=1e-5)
    for feature in a.features:
        assert (feature[~available] == 0).all()
        assert (feature[available] != 0).any()


def test_features_are_the_encoders_before_filling():
    model, x = net(encoder="separate", **SMALL), images(4, (8, 8, 8))
    out = model(x, MIXED)
    assert [tuple(f.shape) for f in out.features] == [(4, 4, 4, 8, 8, 8), (4, 4, 6, 4, 4, 4), (4, 4, 8, 2, 2, 2)]
    for b, m in MIXED.nonzero().tolist():
        for got, want in zip(out.features, model.encode(x[b : b + 1, m : m + 1], m), strict=True):
            assert torch.allclose(got[b, m], want[0], atol=1e-5)


def test_only_what_is_there_is_encoded():
    model, x, rows = net(**SMALL), images(4, (8, 8, 8)), []
    model.encoders[0].register_forward_hook(lambda module, inputs, output: rows.append(len(inputs[0])))
    model(x, MIXED)
    assert rows == [int(MIXED.sum())]


def test_the_published_size():
    with torch.device("meta"):
        model = MultimodalUNet(MultimodalUNetConfig(MODALITIES, REGIONS, net="reference"))

    def millions(module) -> str:
        return f"{sum(p.numel() for p in module.parameters()) / 1e6:.2f}"

    assert millions(model) == "43.66"
    assert millions(model.encoders) == "35.13"
    assert millions(model.encoders[0].aspp) == "5.77"
    assert millions(model.decoder) == "8.53"
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        features = model.encode_available(
            torch.empty(1, 4, 80, 160, 160, device="meta"), torch.ones(1, 4, dtype=torch.bool)
        )
        joined = [join(x) for join, x in zip(model.decoder.joins, features, strict=True)]
        assert model.decoder.finish(joined, (80, 160, 160)).shape == (1, 3, 80, 160, 160)
    assert round(counter.get_total_flops() / 1e9) == 754
    shapes = [(64, 80, 80, 80), (256, 40, 40, 40), (512, 20, 20, 20), (1024, 10, 10, 10), (256, 5, 5, 5)]
    assert [tuple(f.shape[2:]) for f in features] == shapes


def test_the_zero_image_without_its_stem():
    encoder = net(net="reference").encoders[0]
    with torch.no_grad():
        want = encoder(torch.zeros(1, 1, 32, 32, 64))[:-1]
        got = encoder.zero_skips((32, 32, 64))
        both = encoder(torch.randn(2, 1, 32, 32, 64), with_zero=True)
    assert [len(maps) for maps in both] == [3, 3, 3, 3, 2]
    for a, b, c in zip(got, want, both[:-1], strict=True):
        assert torch.allclose(a, b, atol=1e-3)
        assert torch.allclose(c[2:], a, atol=1e-4)


def test_the_global_branch_changes_nothing():
    """It is a constant for each channel, which the normalisation after the merging convolution takes away."""
    aspp = Aspp(4)
    initialise(aspp)
    x, signs = torch.randn(2, 2, 4, 3, 3, 3)
    before = aspp(x)
    (before * signs).sum().backward()
    assert aspp.whole.conv.weight.grad.abs().max() == 0
    assert aspp.whole.norm.bias.grad.abs().max() < 1e-5
    assert aspp.branches[0].norm.bias.grad.abs().max() > 1e-2
    torch.nn.init.normal_(aspp.whole.norm.bias)
    assert torch.allclose(aspp(x), before, atol=1e-5)


def test_standardised_weights():
    conv = StandardisedConv(3, 5, 3)
    torch.nn.init.normal_(conv.weight, 3.0, 2.0)
    x = torch.randn(1, 3, 6, 6, 6)
    rows = conv.weight.detach().flatten(1)
    rows = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True)
    assert torch.allclose(conv(x), F.conv3d(x, rows.view_as(conv.weight), padding=1), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_ways_of_normalising_agree(dtype: torch.dtype):
    norm = InstanceNorm(6)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = (3 + 2 * torch.randn(2, 6, 8, 8, 8)).to(dtype)
    want = norm(x)
    with torch.no_grad():
        # A bfloat16 has eight bits: one unit in the last place is 2^-7.
        close = {"atol": 1e-5} if dtype == torch.float32 else {"atol": 0.01, "rtol": 2**-6}
        assert torch.allclose(norm(x).float(), want.float(), **close)


@pytest.mark.parametrize("kind", ["pointwise", "up"])
@pytest.mark.parametrize("standardise", [False, True])
def test_a_join_is_the_sum_of_its_parts(kind: str, standardise: bool):
    join = Join(3, 4, 5, kind=kind, standardise=standardise)
    torch.nn.init.normal_(join.weight)
    x = torch.randn(1, 3, 4, 2, 3, 4)
    want = join(x)[0]
    own = join.mixed(x[0], torch.eye(3)[:, None])
    assert own.shape == (3, 1, *want.shape)
    assert torch.allclose(own.sum(0)[0], want, atol=1e-5)
    alike = join(x[:, :1].expand(-1, 3, -1, -1, -1, -1) * torch.tensor([1, 0.5, -2]).view(3, 1, 1, 1, 1))[0]
    mixes = torch.tensor([[1, 0.5, -2], [0, 0, 0]])
    assert torch.allclose(
        join.mixed(x[0, :1], mixes[None])[0], torch.stack([alike, torch.zeros_like(alike)]), atol=1e-5
    )


def test_fill_with_mean_by_hand():
    x = torch.tensor([[1.0, 0.0, 5.0]]).view(1, 3, 1, 1, 1, 1)
    assert fill_with_mean(x, torch.tensor([[True, False, True]])).flatten().tolist() == [1, 3, 5]


def test_bfloat16_autocast_trains():
    for options in (SMALL, {"fill": "bottleneck", "encoder": "separate", **SMALL}):
        model = net(**options)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = model(images(4, (8, 8, 8)), MIXED)
        out.logits.float().square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("options", [SMALL, {"net": "reference", "fill": "bottleneck"}])
def test_saved_and_loaded(tmp_path: Path, options: dict):
    model = net(**options).eval()
    model.save(tmp_path)
    again = MultimodalUNet.load(tmp_path)
    assert again.config == model.config
    state = again.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad and not p.is_meta for p in again.parameters())


def test_the_seed_alone_decides():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    a = net(seed=3, **SMALL).state_dict()
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(2)
    assert all(torch.equal(v, a[k]) for k, v in net(seed=3, **SMALL).state_dict().items())
    assert not torch.equal(net(seed=4, **SMALL).state_dict()["decoder.head.weight"], a["decoder.head.weight"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"nett": "compact"}, "did you mean 'net'"),
        ({"net": "big"}, "known: compact, early, reference"),
        ({"encoder": "share"}, "did you mean 'shared'"),
        ({"channels": [8, 16]}, "3 to 5 numbers"),
        ({"channels": [8, 16, 10**9]}, "1 to 4096"),
        ({"channels": 8}, "must be a list"),
        ({"net": "reference", "channels": [8, 16, 32]}, "remove it"),
        ({"modalities": ["t1", "t1"]}, "distinct names"),
        ({"regions": []}, "non-empty list"),
    ],
)
def test_a_wrong_configuration(change: dict, words: str):
    values = {**MultimodalUNetConfig(MODALITIES, REGIONS).to_dict(), **change}
    with pytest.raises(UserError, match=words):
        MultimodalUNetConfig.from_dict(values)


def test_wrong_inputs():
    model = net(**SMALL)
    everything = torch.ones(1, 4, dtype=torch.bool)
    with pytest.raises(UserError, match=r"multiples of 4x4x4; use 12x12x8"):
        model(images(1, (9, 12, 8)), everything)
    with pytest.raises(UserError, match="single voxel at the bottleneck"):
        model(images(1, (4, 4, 4)), everything)
    assert model.fitting((3, 4, 1)) == (4, 4, 8)
    with pytest.raises(UserError, match="row 1 of the batch has no modality"):
        model(images(2, (8, 8, 8)), torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0]]).bool())


def test_a_broken_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"config.json does not exist"):
        MultimodalUNet.load(tmp_path)
    model = net(**SMALL)
    model.save(tmp_path)
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    state = load_file(weights)
    weights.write_bytes(weights.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"weights cannot be read"):
        MultimodalUNet.load(tmp_path)
    state.pop("decoder.head.weight")
    save_file(state, weights)
    with pytest.raises(UserError, match=r"decoder\.head\.weight"):
        MultimodalUNet.load(tmp_path)
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match="does not describe a preceptor-multimodal-unet"):
        MultimodalUNet.load(tmp_path)
