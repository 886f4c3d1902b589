from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.hub import find_pretrained
from preceptor.vqa.bundle import VqaBundle, build_bundle, image_processor, make_tokenizer
from preceptor.vqa.config import ConvVisionConfig, ModelConfig
from preceptor.vqa.dataset import Preprocessing, pixels, resize
from preceptor.vqa.vision import ConvVision

QUESTIONS = ["is there a lesion in the left lung?", "which plane is this?", "what organ is shown?"] * 4
SMALL = {
    "vision": {"conv": {"channels": [8, 12], "blocks": [1, 1], "token_stages": [1]}},
    "text": {"scratch": {"embedding": 8, "width": 16, "layers": 1, "heads": 2}},
    "width": 16,
    "layers": 2,
    "heads": 2,
    "dropout": 0.1,
}


@pytest.fixture(scope="module")
def bundle() -> VqaBundle:
    vocabulary = AnswerVocabulary(["yes", "no", "axial"])
    return build_bundle(
        ModelConfig.model_validate(SMALL),
        make_tokenizer(QUESTIONS),
        Preprocessing(32, max_question_tokens=12),
        vocabulary,
        seed=3,
    )


def inputs(bundle: VqaBundle, texts: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    tokens = bundle.tokenizer(texts, padding=True, truncation=True, max_length=12, return_tensors="pt")
    images = torch.randn(len(texts), 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return {"pixels": images, "input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}


def test_padding_has_no_influence(bundle: VqaBundle):
    bundle.model.eval()
    both = inputs(bundle, ["which plane is this?", "is there a lesion in the left lung?"])
    length = int(both["attention_mask"][0].sum())
    assert length < both["input_ids"].shape[1]
    alone = {"pixels": both["pixels"][:1], **{k: both[k][:1, :length] for k in ("input_ids", "attention_mask")}}
    noisy = {k: v.clone() for k, v in both.items()}
    noisy["input_ids"][0, length:] = 7
    want = bundle.model(**both).logits[0]
    assert torch.allclose(bundle.model(**alone).logits[0], want, atol=1e-5)
    assert torch.allclose(bundle.model(**noisy).logits[0], want, atol=1e-5)
    assert not torch.allclose(bundle.model(**both).logits[1], want, atol=1e-3)


def test_image_and_question_both_matter(bundle: VqaBundle):
    bundle.model.eval()
    base = inputs(bundle, ["which plane is this?"])
    other = inputs(bundle, ["which plane is this?"], seed=1)
    asked = inputs(bundle, ["what organ is shown?"])
    logits = bundle.model(**base).logits
    assert (bundle.model(**other).logits - logits).abs().max() > 1e-5
    assert (bundle.model(**asked).logits - logits).abs().max() > 1e-5


def test_attention_maps_are_probabilities_without_padding(bundle: VqaBundle):
    seen = []
    handle = bundle.model.fusion[0].attention.probabilities.register_forward_hook(lambda m, i, o: seen.append(o))
    both = inputs(bundle, ["which plane is this?", "is there a lesion in the left lung?"])
    mask = bundle.model.eval()(**both).mask
    handle.remove()
    assert torch.allclose(seen[0].sum(-1), torch.ones(seen[0].shape[:3]), atol=1e-5)
    assert seen[0][0, :, :, ~mask[0]].max() == 0


@pytest.mark.parametrize("size", [32, 40, 63, 112])
def test_token_count_matches_the_forward_pass(size: int):
    net = ConvVision({"channels": [8, 8, 12], "blocks": [1, 2, 1], "token_stages": [1, 2]})
    assert net(torch.zeros(2, 3, size, size)).shape == (2, net.tokens(size), 12)


@pytest.mark.parametrize("stages", [1, 2, 3, 4, 5])
def test_no_convolution_halves_a_single_cell(stages: int):
    config = {"channels": [16] * stages, "blocks": [1] * stages, "token_stages": [0]}
    net = ConvVision(config)
    sides: list[int] = []
    for module in net.modules():
        if isinstance(module, torch.nn.Conv2d) and module.stride == (2, 2):
            module.register_forward_pre_hook(lambda _, inputs: sides.append(inputs[0].shape[-1]))
    smallest = ConvVisionConfig(**config).smallest_image
    net(torch.zeros(2, 3, smallest, smallest))
    assert min(sides, default=2) >= 2
    sides.clear()
    if stages > 1:
        net(torch.zeros(2, 3, smallest - 1, smallest - 1))
        assert min(sides) == 1


def test_save_and_load_give_the_same_answers(bundle: VqaBundle, tmp_path):
    bundle.save(tmp_path / "model")
    loaded = VqaBundle.load(tmp_path)
    x = inputs(bundle, QUESTIONS[:3])
    assert torch.equal(loaded.model.eval()(**x).logits, bundle.model.eval()(**x).logits)
    assert loaded.vocabulary == bundle.vocabulary
    assert loaded.preprocessing == bundle.preprocessing
    assert loaded.tokenizer(QUESTIONS)["input_ids"] == bundle.tokenizer(QUESTIONS)["input_ids"]
    assert loaded.provenance == bundle.provenance


def test_a_folder_without_a_model_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match="contains no trained model"):
        VqaBundle.load(tmp_path)


def test_same_seed_same_weights_whatever_was_drawn_before(bundle: VqaBundle):
    torch.randn(5)
    again = build_bundle(
        ModelConfig.model_validate(SMALL), bundle.tokenizer, bundle.preprocessing, bundle.vocabulary, seed=3
    )
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, bundle.model.state_dict()[name]), name


def test_pixels_equal_the_transformers_image_processor():
    from transformers import AutoImageProcessor

    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (70, 50, 3), dtype=np.uint8))
    preprocessing = Preprocessing(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    ours = pixels(resize(image, 32)[None].copy(), preprocessing)[0]
    settings = image_processor(preprocessing)
    kind = settings.pop("image_processor_type")
    import transformers

    theirs = getattr(transformers, kind + "Pil", None) or getattr(transformers, kind)
    want = theirs(**settings)(image, return_tensors="pt")["pixel_values"][0]
    assert torch.allclose(ours, want, atol=1e-5)
    assert AutoImageProcessor is not None


def test_pretrained_parts_are_found_and_named(tmp_path, bundle: VqaBundle):
    from transformers import BertConfig, BertModel, ViTConfig, ViTModel

    text, vision = tmp_path / "tiny-bert", tmp_path / "tiny-vit"
    torch.manual_seed(1)
    BertModel(
        BertConfig(
            vocab_size=len(bundle.tokenizer),
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
        )
    ).save_pretrained(text)
    bundle.tokenizer.save_pretrained(text)
    ViTModel(
        ViTConfig(
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            image_size=32,
            patch_size=8,
        )
    ).save_pretrained(vision)
    (vision / "preprocessor_config.json").write_text(json.dumps(image_processor(Preprocessing(32))))
    config = ModelConfig.model_validate(
        {
            **SMALL,
            "text": {"pretrained": ["package:no_such_package/x", str(text)]},
            "vision": {"pretrained": str(vision), "depths": [1, -1]},
        }
    )
    # Another side than the 32 pixels it was pretrained with.
    built = build_bundle(config, bundle.tokenizer, Preprocessing(48, max_question_tokens=12), bundle.vocabulary, seed=0)
    assert built.provenance == {"text": "pretrained: tiny-bert, 2 layers", "vision": "pretrained: tiny-vit"}
    theirs = BertModel.from_pretrained(text).state_dict()
    own = built.model.text.state_dict()
    assert torch.equal(own["encoder.layer.1.output.dense.weight"], theirs["encoder.layer.1.output.dense.weight"])
    assert "text.encoder.layer.1.output.dense.weight" in built.pretrained
    assert any(name.startswith("vision.model.") for name in built.pretrained)
    assert not any(name.startswith(("fusion", "head", "vision.lift")) for name in built.pretrained)
    x = inputs(bundle, QUESTIONS[:2]) | {"pixels": torch.randn(2, 3, 48, 48)}
    built.model.eval()
    want = built.model(**x).logits
    built.save(tmp_path / "model")
    assert torch.equal(VqaBundle.load(tmp_path).model(**x).logits, want)


def test_names_that_are_not_there(tmp_path):
    for name in ("package:no_such_package/model", str(tmp_path), "someone/a-model-that-is-not-cached", "./nowhere"):
        assert find_pretrained(name, allow_downloads=False) is None


def test_missing_vision_model_says_how_to_get_it(bundle: VqaBundle):
    config = ModelConfig.model_validate({**SMALL, "vision": {"pretrained": "someone/a-model-that-is-not-cached"}})
    with pytest.raises(UserError, match="allow_downloads=true"):
        build_bundle(config, bundle.tokenizer, bundle.preprocessing, bundle.vocabulary, seed=0)


def test_init_takes_what_fits(bundle: VqaBundle, tmp_path):
    bundle.save(tmp_path / "model")
    config = ModelConfig.model_validate({**SMALL, "init": str(tmp_path)})
    other = AnswerVocabulary(["coronal", "axial", "no", "yes"])
    built = build_bundle(config, bundle.tokenizer, bundle.preprocessing, other, seed=9)
    assert torch.equal(built.model.cls, bundle.model.cls)
    assert torch.equal(built.model.head.weight[1:], bundle.model.head.weight.flip(0))
    assert torch.equal(built.model.head.bias[1:], bundle.model.head.bias.flip(0))
    assert "3 of 4 answers of an earlier run" in built.provenance["init"]
    everything = {name for name, _ in built.model.named_parameters()}
    assert everything - built.pretrained == {"head.weight", "head.bias"}, "one of the four rows is new"
    assert built.provenance["text"] == built.provenance["vision"] == "of an earlier run (from scratch)"


def test_the_weights_of_init_are_pretrained_if_they_are_copied(bundle: VqaBundle, tmp_path):
    bundle.save(tmp_path / "model")
    everything = {name for name, _ in bundle.model.named_parameters()}
    parts = (bundle.tokenizer, bundle.preprocessing)

    def built(answers: list[str], **settings) -> VqaBundle:
        config = ModelConfig.model_validate({**SMALL, **settings})
        return build_bundle(config, *parts, AnswerVocabulary(answers), seed=9)

    assert built(["yes", "no", "axial"]).pretrained == frozenset()
    of_init = built(["no", "axial"], init=str(tmp_path))
    assert of_init.pretrained == everything, "all rows of the answer layer are copied, too"
    deeper = built(["yes", "no", "axial"], init=str(tmp_path), layers=3)
    assert any(name.startswith("fusion.2") for name, _ in deeper.model.named_parameters())
    assert deeper.pretrained == everything, "the third layer is new"
    wider = built(["yes", "no", "axial"], init=str(tmp_path), width=32)
    assert not any(name.startswith(("head.weight", "fusion.0.feedforward", "cls")) for name in wider.pretrained)
    assert wider.provenance["text"] == "of an earlier run (from scratch)"
    conv = {"conv": {"channels": [8, 16], "blocks": [1, 1], "token_stages": [1]}}
    assert built(["yes"], init=str(tmp_path), vision=conv).provenance["vision"] == "from scratch"


def test_init_takes_no_embeddings_of_other_tokens(bundle: VqaBundle, tmp_path):
    bundle.save(tmp_path / "model")
    config = ModelConfig.model_validate({**SMALL, "init": str(tmp_path)})
    other = make_tokenizer([question.replace("lung", "kidney") for question in QUESTIONS])
    assert len(other) == len(bundle.tokenizer)
    embeddings = bundle.model.text.get_input_embeddings().weight
    for tokenizer in (bundle.tokenizer, other):
        built = build_bundle(config, tokenizer, bundle.preprocessing, bundle.vocabulary, seed=9)
        same = tokenizer is bundle.tokenizer
        assert torch.equal(built.model.text.get_input_embeddings().weight, embeddings) == same
        assert torch.equal(built.model.cls, bundle.model.cls)


def test_of_several_vision_models_the_first_that_is_there(bundle: VqaBundle):
    config = ModelConfig.model_validate({**SMALL, "vision": {"pretrained": ["package:none", "someone/no-such-model"]}})
    built = build_bundle(config, bundle.tokenizer, bundle.preprocessing, bundle.vocabulary, seed=0)
    assert built.provenance["vision"] == "from scratch (package:none, someone/no-such-model not found)"


def test_a_trained_tokenizer_is_the_same_every_time_and_spells_unknown_words():
    questions = [f"is the {a} {b} seen?" for a in ("left", "right", "upper") for b in ("lung", "kidney", "lobe")]
    one, two = make_tokenizer(questions), make_tokenizer(questions[::-1])
    assert one.get_vocab() == two.get_vocab()
    assert one.tokenize("Is the LEFT lobule seen?")[:4] == ["is", "the", "left", "l"]
    assert "[UNK]" not in one.tokenize("is the lobule seen?")
    assert one("is the lung seen?")["input_ids"][0] == one.cls_token_id
