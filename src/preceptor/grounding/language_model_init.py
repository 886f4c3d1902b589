"""A real small language model as the text tower of a new Qwen-VL model: its weights, its tokenizer, its logits.

The towers of Qwen2-VL and Qwen2.5-VL are Llama's layers with biases in q, k and v, which are 0 for a model that has
none; that of Qwen3-VL is Qwen3's. Multimodal rotary positions are plain ones where all three coordinates are equal, as
they are on text, so that logits on text stay what they were.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.errors import UserError

# Language models with the layers of a family's text tower, by transformers' model_type.
FITTING = {
    "qwen2_vl": ("llama", "mistral", "qwen2"),
    "qwen2_5_vl": ("llama", "mistral", "qwen2"),
    "qwen3_vl": ("qwen3",),
}
_KEPT = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)


def read_language_model(source: str | Path, family: str) -> tuple[Any, Any]:
    """Return (model, tokenizer) in float32 of a Hugging Face folder or a GGUF file.

    `source` may also be ``package:NAME/PATH``, a folder or GGUF file of an installed package. GGUF needs the package
    `gguf`. Raises UserError where it cannot be read, or its layers are not those of `family`'s text tower.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = _place(source)
    gguf: dict[str, Any] = {"gguf_file": place.name} if place.suffix == ".gguf" else {}
    folder = place.parent if gguf else place
    if gguf and importlib.util.find_spec("gguf") is None:
        raise UserError(f"{source} is a GGUF file, which needs the package gguf; pip install 'preceptor[gguf]'")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, **gguf}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        safe = {} if gguf else {"use_safetensors": True}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **safe, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{source}: no language model can be read ({reason}); give a whole folder or GGUF") from error
    kind, fitting = model.config.model_type, FITTING[family]
    if kind not in fitting:
        raise UserError(f"{source} is a {kind} model; the text tower of {family} can start from {' or '.join(fitting)}")
    rope = _rope(model.config)
    if rope.get("rope_type", "default") != "default" or getattr(model.config, "sliding_window", None):
        raise UserError(
            f"{source} has rope {rope.get('rope_type')!r} and sliding window "
            f"{getattr(model.config, 'sliding_window', None)}; only plain positions and full attention can "
            "be carried over"
        )
    return model.eval(), tokenizer


def _place(source: str | Path) -> Path:
    name = str(source)
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        roots = [Path(root) / inner for root in (spec.submodule_search_locations or [])] if spec else []
    else:
        roots = [Path(name)]
    for place in roots:
        if (place / "config.json").is_file() or (place.is_file() and place.suffix == ".gguf"):
            return place
    raise UserError(f"{source} is neither a folder with a config.json nor a GGUF file; give that of a language model")


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def text_settings(config: Any, words: int, family: str) -> dict[str, Any]:
    """Return the text configuration of a tower with a language model's layers and at least `words` words.

    `mrope_section` has Qwen2-VL's proportions 2 : 3 : 3 of time, height and width; of Qwen3-VL, whose coordinates
    alternate, equal parts.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family != "qwen3_vl" and head * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"heads of {head} do not make up the width {config.hidden_size}, as those of {family} do; "
            "choose another language model"
        )
    half = head // 2
    side = half // 3 if family == "qwen3_vl" else 3 * half // 8
    rope = {
        "rope_type": "default",
        "rope_theta": _rope(config).get("rope_theta", 10000.0),
        "mrope_section": [half - 2 * side, side, side],
    }
    found = {name: getattr(config, name) for name in _KEPT} | {"vocab_size": max(words, config.vocab_size)}
    if family == "qwen3_vl":
        found |= {"head_dim": head}
        rope |= {"mrope_interleaved": True}
    return found | {"rope_parameters": rope}


@torch.no_grad()
def copy_text_weights(source: Any, target: Any) -> None:
    """Copy a language model's weights into the text tower of a Qwen-VL model of `text_settings`.

    Biases that the source lacks are 0. Words that it lacks are drawn, from torch's random state, from a normal
    distribution with the mean and the standard deviation of its own, each dimension for itself (after Hewitt 2021).
    Raises UserError where weights are left that the tower has no place for.
    """
    tower = target.model.language_model
    own: dict[str, Tensor] = dict(source.model.state_dict())
    for name, weight in tower.state_dict().items():
        value = own.pop(name, None)
        if name == "embed_tokens.weight" and value is not None:
            _fill_words(weight, value)
        elif value is not None:
            weight.copy_(value)
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            raise UserError(f"the language model has no weight {name!r}; choose another")
    if own:
        raise UserError(f"the tower has no place for the language model's {', '.join(sorted(own)[:3])}; choose another")
    if not target.config.tie_word_embeddings:
        _fill_words(target.lm_head.weight, source.lm_head.weight)


def _fill_words(weight_VD: Tensor, known_WD: Tensor) -> None:
    words = known_WD.shape[0]
    weight_VD[:words] = known_WD
    noise = torch.randn(weight_VD[words:].shape)
    weight_VD[words:] = known_WD.mean(dim=0) + noise * known_WD.std(dim=0)


def extend_tokenizer(tokenizer: Any, special: tuple[str, ...], chat_template: str) -> Any:
    """Return the tokenizer with the special tokens that it lacks, an answer's end as its end, and the template."""
    known = tokenizer.get_vocab()
    tokenizer.add_special_tokens(
        {"extra_special_tokens": [token for token in special if token not in known]},
        replace_extra_special_tokens=False,
    )
    tokenizer.eos_token = "<|im_end|>"
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        tokenizer.pad_token = "<|endoftext|>"
    tokenizer.chat_template = chat_template
    return tokenizer
