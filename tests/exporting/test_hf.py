"""A Hugging Face folder holds what belongs to the model, and transformers loads it with equal weights and answers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForImageTextToText, AutoTokenizer

import preceptor
from preceptor.exporting import hf
from preceptor.grounding.guided_rope import Guidance, attach
from preceptor.grounding.model import GroundedVlm, LoraSettings
from preceptor.grounding.predict import as_dialogue
from tests.command_line import call
from tests.grounding.speaking_vlm import speaking_vlm


def equal(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A model that says something, saved with guided positions."""
    folder = tmp_path_factory.mktemp("vlm")
    vlm = GroundedVlm.load(speaking_vlm(folder / "plain"), guidance=Guidance("fixed", gap=8.0))
    vlm.save(folder / "guided")
    return folder / "guided"


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    return path


def test_a_vqa_model_answers_equally(vqa, tmp_path):
    code, out, err = call("export", vqa.model, "--output", tmp_path / "hf", "--to", "hf")
    assert (code, err) == (0, "")
    original, exported = preceptor.load(vqa.model), preceptor.load(tmp_path / "hf")
    assert f"AutoModel loads all {len(original.bundle.model.state_dict())} tensors" in out
    assert equal(AutoModel.from_pretrained(tmp_path / "hf"), original.bundle.model)
    image = next(vqa.model.parent.glob("images/*.png"))
    one, other = (model.answer(image, "Where is the disc?") for model in (original, exported))
    assert one.alternatives == other.alternatives


def test_a_segmentation_model_computes_equal_logits(segmentation, tmp_path):
    preceptor.export(segmentation.model, tmp_path / "hf", to="hf")
    images, available = torch.randn(1, 3, 16, 24, 16), torch.tensor([[True, False, True]])
    original = preceptor.load(segmentation.model)
    found = AutoModel.from_pretrained(tmp_path / "hf").eval()
    with torch.inference_mode():
        assert torch.equal(found(images, available).logits, original.network(images, available).logits)
    assert preceptor.load(tmp_path / "hf").config == original.config


def test_a_grounding_model_is_equal_and_says_what_plain_programs_miss(guided, image, tmp_path):
    code, out, _ = call("export", guided, "--output", tmp_path / "hf", "--to", "hf")
    assert code == 0
    assert "guided positions (guidance: fixed), which Preceptor applies and plain transformers, vLLM" in out
    assert "train with method.guidance.kind=none" in out
    assert "## Guided positions" in (tmp_path / "hf" / "README.md").read_text()
    original, exported = preceptor.load(guided), preceptor.load(tmp_path / "hf")
    assert equal(AutoModelForImageTextToText.from_pretrained(tmp_path / "hf", dtype="auto"), original.vlm.base)
    assert original.ask(image, "Where?") == exported.ask(image, "Where?")


def test_the_keys_of_transformers_4_are_added_and_change_nothing(guided, tmp_path):
    """transformers 4.57.6 computed equal logits from such folders; without the keys, it takes its own defaults."""
    preceptor.export(guided, tmp_path / "hf", to="hf")
    text = json.loads((tmp_path / "hf" / "config.json").read_text())["text_config"]
    config = AutoConfig.from_pretrained(guided)
    rope = config.text_config.rope_parameters
    assert text["rope_theta"] == rope["rope_theta"] == 10_000
    assert text["rope_scaling"] == {"rope_type": "default", "mrope_section": rope["mrope_section"]}
    assert text["tie_word_embeddings"] is config.tie_word_embeddings
    tokenizer = json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())
    assert "<|image_pad|>" in tokenizer["additional_special_tokens"]
    assert not isinstance(tokenizer.get("extra_special_tokens"), list)
    assert AutoConfig.from_pretrained(tmp_path / "hf").text_config.rope_parameters == rope
    one, other = (AutoTokenizer.from_pretrained(folder) for folder in (guided, tmp_path / "hf"))
    assert one.all_special_tokens == other.all_special_tokens
    question = "<|im_start|>Is there a fracture?<|image_pad|>"
    assert one(question).input_ids == other(question).input_ids


def test_without_its_guidance_the_model_is_what_transformers_computes(guided, image):
    vlm = preceptor.load(guided).vlm
    no_guidance = GroundedVlm(vlm.model, vlm.encoder, Guidance("none")).eval()
    assert hf.unguided(no_guidance) == {"questions": 8, "largest_difference": 0.0, "changed": 0}
    assert hf.unguided(vlm)["largest_difference"] > 1e-6
    row = vlm.encoder.encode(as_dialogue([image], "Where?"), prompt=True)
    batch = {name: value for name, value in vlm.encoder.collate([row], "left").items() if name != "labels"}
    plain = AutoModelForImageTextToText.from_pretrained(guided, dtype="auto").eval()
    with torch.inference_mode():
        expected = plain(**batch).logits
        with attach(vlm.base, Guidance("none")):
            assert torch.equal(vlm.base(**batch).logits, expected)
        with attach(vlm.base, vlm.guidance):
            assert not torch.equal(vlm.base(**batch).logits, expected)


def test_answers_that_change_are_counted_on_the_questions_of_a_table(guided, image, tmp_path):
    questions = [f"What is shown, {number}?" for number in range(10)]
    table = tmp_path / "questions.csv"
    table.write_text("image,question\n" + "".join(f'{image.name},"{question}"\n' for question in questions))
    code, out, _ = call("export", guided, "--output", tmp_path / "hf", "--to", "hf", "--table", table, "--json")
    document = json.loads(out)
    plain = GroundedVlm.load(guided, guidance=Guidance("none"))
    models = preceptor.load(guided).vlm, plain.eval()
    answers = [
        [vlm.generate([as_dialogue([image], question)], max_new_tokens=32)[0][0].tokens for question in questions]
        for vlm in models
    ]
    changed = sum(one != two for one, two in zip(*answers, strict=True))
    assert changed > 0, "otherwise nothing is tested"
    assert (code, document["unguided"]["questions"], document["unguided"]["changed"]) == (0, 10, changed)
    assert f"Without them, {changed} of 10 answers to the given questions change" in document["statement"]
    assert document["statement"] in (tmp_path / "hf" / "README.md").read_text()


@pytest.mark.parametrize(
    ("guidance", "sentence"),
    [
        (Guidance("none"), "this model has no guided positions"),
        (Guidance("clip", table=np.ones((8, 3)).tolist()), "this model needs the modality of each image"),
    ],
)
def test_a_table_that_cannot_show_what_guidance_changes(guidance, sentence, image, tmp_path):
    GroundedVlm.load(speaking_vlm(tmp_path / "plain"), guidance=guidance).save(tmp_path / "model")
    table = tmp_path / "questions.csv"
    table.write_text(f"image,question\n{image.name},Where?\n")
    with pytest.raises(preceptor.UserError, match=sentence):
        preceptor.export(tmp_path / "model", tmp_path / "hf", to="hf", table=table)
    assert not (tmp_path / "hf").exists()


def test_without_guidance_nothing_is_said(tmp_path):
    model = speaking_vlm(tmp_path / "plain")
    code, out, _ = call("export", model, "--output", tmp_path / "hf", "--to", "hf", "--json")
    document = json.loads(out)
    assert (code, document["guidance"]) == (0, {"kind": "none"})
    assert "statement" not in document
    assert not (tmp_path / "hf" / "README.md").exists()


def test_adapters_are_merged(tmp_path):
    pytest.importorskip("peft")
    vlm = GroundedVlm.load(speaking_vlm(tmp_path / "plain"), training="lora", lora=LoraSettings(rank=2))
    for name, weight in vlm.model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    vlm.save(tmp_path / "adapted")
    preceptor.export(tmp_path / "adapted", tmp_path / "hf", to="hf")
    names = AutoModelForImageTextToText.from_pretrained(tmp_path / "hf").state_dict()
    assert not [name for name in names if "lora" in name]
    assert not list((tmp_path / "hf").glob("adapter*"))


def test_only_what_belongs_to_the_model_is_written(vqa, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(vqa.model, model)
    (model / "README.md").write_text("a card")
    for stray in ("optimizer.pt", "log.txt", "notes.json"):
        (model / stray).write_text("{}")
    preceptor.export(model, tmp_path / "hf", to="hf")
    names = {path.name for path in (tmp_path / "hf").iterdir()}
    assert names == {path.name for path in vqa.model.iterdir()} | {"README.md"}
    assert (tmp_path / "hf" / "README.md").read_text() == "a card"


def test_a_weight_that_differs_is_refused_and_nothing_is_left(vqa, tmp_path, monkeypatch):
    load = AutoModel.from_pretrained

    def altered(*arguments, **options):
        found = load(*arguments, **options)
        next(found[0].parameters()).data.view(-1)[0] += 1e-6
        return found

    monkeypatch.setattr(AutoModel, "from_pretrained", altered)
    with pytest.raises(preceptor.UserError, match=r"the tensor \S+ differs when transformers loads"):
        preceptor.export(vqa.model, tmp_path / "hf", to="hf")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        (["--int8"], "--int8 belongs to the format onnx; leave it out for hf"),
        (
            ["--table", "table.csv"],
            "--table belongs to VQA models with --to onnx and to grounding models with --to hf; leave it out for a vqa "
            "model with --to hf",
        ),
    ],
)
def test_options_of_onnx(vqa, tmp_path, monkeypatch, option, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "table.csv").touch()
    code, out, err = call("export", vqa.model, "--output", tmp_path / "hf", "--to", "hf", *option)
    assert (code, out) == (2, "")
    assert err == f"error: {sentence}\n"
