"""Modality probabilities against the models' own logits; the file they are kept in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.guided_rope import MODALITIES, Guidance
from preceptor.grounding.modality_clip import PROMPTS, ModalityClip, by_name, modality_probabilities, of_dialogue


def clip_folder(folder: Path, kind: str, seed: int = 0) -> Path:
    """Write a tiny random CLIP or SigLIP in the ordinary layout: weights, tokenizer, image processor."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import AutoConfig, AutoModel, PreTrainedTokenizerFast

    words = sorted({word for prompt in PROMPTS.values() for word in prompt.replace("-", " - ").split()})
    numbers = {word: i for i, word in enumerate(["<pad>", "<start>", "<unk>", *words, "<end>"])}
    inner = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", 1), ("<end>", numbers["<end>"])]
    inner.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(folder)
    part = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(numbers),
        "max_position_embeddings": 12,
        "eos_token_id": numbers["<end>"],
        "bos_token_id": 1,
        "pad_token_id": 0,
        "projection_size": 32,
    }
    config = AutoConfig.for_model(
        kind, text_config=part | text, vision_config=part | {"image_size": 32, "patch_size": 8}, projection_dim=24
    )
    torch.manual_seed(seed)
    model: Any = AutoModel.from_config(config)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
        model.logit_scale.fill_(2.0)
    model.save_pretrained(folder)
    processor = {
        "image_processor_type": "CLIPImageProcessor" if kind == "clip" else "SiglipImageProcessor",
        "resample": 3,
        "size": {"height": 32, "width": 32},
        "do_resize": True,
        "do_center_crop": False,
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
        "do_convert_rgb": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: clip_folder(tmp_path_factory.mktemp(kind), kind) for kind in ("clip", "siglip")}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    paths = [folder / f"patient-{number}.png" for number in range(5)]
    for path in paths:
        pixels = rng.integers(0, 256, (40, 50), dtype=np.uint8)
        Image.fromarray(pixels if path.stem[-1] in "02" else np.stack([pixels] * 3, -1)).save(path)
    return paths


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_probabilities_are_the_softmax_of_the_models_own_logits(kind: str, folders: dict, images: list[Path]):
    from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

    clip = ModalityClip.load(folders[kind])
    got = modality_probabilities(images, clip, batch_size=2)
    assert got.shape == (5, 8)
    model, tokenizer = AutoModel.from_pretrained(folders[kind]).eval(), AutoTokenizer.from_pretrained(folders[kind])
    processor = AutoImageProcessor.from_pretrained(folders[kind])
    rows = []
    for path in images:
        for modality in MODALITIES:  # one at a time: no padding but SigLIP's own
            padding: Any = {"padding": "max_length", "max_length": 12} if kind == "siglip" else {}
            words = tokenizer([PROMPTS[modality]], return_tensors="pt", **padding)
            pixels = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
            with torch.no_grad():
                rows.append(model(**words, pixel_values=pixels).logits_per_image.item())
    want = torch.tensor(rows).reshape(5, 8).softmax(-1)
    assert torch.allclose(got, want, atol=1e-5)
    assert want.std(dim=0).max() > 1e-3  # images differ, or nothing was tested
    assert Guidance("clip", learnable=True).intervals(5, got).shape == (5, 3)


def test_what_is_in_the_file_is_not_computed_again(folders: dict, images: list[Path], tmp_path: Path, monkeypatch: Any):
    clip, file = ModalityClip.load(folders["clip"]), tmp_path / "modalities.json"
    asked: list[list[Path]] = []
    score = clip.score
    monkeypatch.setattr(clip, "score", lambda paths, **_: asked.append(list(paths)) or score(paths))
    first = modality_probabilities(images[:3], clip, file=file)
    twin = tmp_path / "other-name.png"
    shutil.copyfile(images[1], twin)
    second = modality_probabilities([images[4], twin, images[0], images[4]], clip, file=file)
    assert asked == [images[:3], [images[4]]]
    assert torch.equal(second[1:3], first[[1, 0]])
    assert torch.equal(second[0], second[3])
    assert torch.allclose(second[:1], score([images[4]]), atol=1e-6)
    text = file.read_text()
    assert "patient" not in text
    assert len(json.loads(text)["probabilities"]) == 4
    shutil.copyfile(images[2], twin)  # the same name, another image
    assert torch.equal(modality_probabilities([twin], clip, file=file), first[2:3])


def test_an_interrupted_run_keeps_what_it_has(folders: dict, images: list[Path], tmp_path: Path, monkeypatch: Any):
    clip, file = ModalityClip.load(folders["clip"]), tmp_path / "modalities.json"
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"broken.png"):
        modality_probabilities([*images, broken], clip, file=file, batch_size=2)
    assert len(json.loads(file.read_text())["probabilities"]) == 4


@pytest.mark.parametrize("change", ["weights", "prompts"])
def test_a_file_of_another_judge_is_refused(change: str, folders: dict, images: list[Path], tmp_path: Path):
    file = tmp_path / "modalities.json"
    modality_probabilities(images[:1], ModalityClip.load(folders["clip"]), file=file)
    if change == "weights":
        other = ModalityClip.load(clip_folder(tmp_path / "other", "clip", seed=1))
    else:
        other = ModalityClip.load(folders["clip"], prompts=PROMPTS | {"ct": "a photograph of a cat scan"})
    with pytest.raises(UserError, match="another CLIP model or other prompts"):
        modality_probabilities(images[:1], other, file=file)
    assert modality_probabilities(images[:1], ModalityClip.load(folders["clip"]), file=file).shape == (1, 8)


def test_a_damaged_file_is_named(folders: dict, images: list[Path], tmp_path: Path):
    file = tmp_path / "modalities.json"
    for text in ("{", "[]", '{"model": "x"}'):
        file.write_text(text)
        with pytest.raises(UserError, match=r"modalities.json is not a valid file of modality probabilities"):
            modality_probabilities(images, ModalityClip.load(folders["clip"]), file=file)


def test_a_name_is_a_certainty():
    assert by_name("pet", 2).tolist() == [[0, 0, 0, 1, 0, 0, 0, 0]] * 2
    dialogue = Dialogue("a", (Path("1.png"), Path("2.png")), (("q", "a"),), "vg", "fundus", "g", "train")
    assert of_dialogue(dialogue).tolist() == [[0, 0, 0, 0, 0, 0, 1, 0]] * 2
    with pytest.raises(UserError, match="modality 'endoscopi' has no row in the guidance table; did you mean 'endosc"):
        by_name("endoscopi")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: ModalityClip.load(f["clip"] / "nowhere"), "neither a folder with a config.json nor in the"),
        (lambda f: ModalityClip.load(f["clip"], prompts={"ct": "a CT"}), "prompts are given for ct; give one for each"),
    ],
)
def test_mistakes_are_named(call: Callable, message: str, folders: dict):
    with pytest.raises(UserError, match=message):
        call(folders)


def test_a_model_without_two_towers_is_named(vlm_folder: Callable):
    with pytest.raises(UserError, match="without two towers; give a CLIP or SigLIP"):
        ModalityClip.load(vlm_folder("qwen2_vl"))


def test_a_folder_without_its_image_processor_is_named(folders: dict, tmp_path: Path):
    shutil.copytree(folders["clip"], tmp_path / "split")
    (tmp_path / "split" / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="cannot be loaded as a CLIP-like model"):
        ModalityClip.load(tmp_path / "split")
