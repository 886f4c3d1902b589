"""Export a VQA model to ONNX: raw pixels and token ids in, probabilities of the answers out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from preceptor.data.images import load_image
from preceptor.data.types import Prediction, Sample
from preceptor.data.vqa.table import read_table
from preceptor.errors import UserError
from preceptor.exporting.image_graph import preprocessing_graph
from preceptor.exporting.onnx_files import INT8_MODEL, MODEL, Inputs, Session, check_outputs, quantise, trace
from preceptor.files import write_text
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import DataConfig
from preceptor.vqa.dataset import pixels, resize
from preceptor.vqa.evaluate import accuracy
from preceptor.vqa.model import VqaTransformer

if TYPE_CHECKING:
    import tokenizers

QUESTIONS = (
    "Is there a fracture?",
    "what is shown in the left lower lobe of the lung, and is it larger than on the other side of the image?" * 4,
    "T2-weighted MRI: \u00d8 3,5 mm \u2013 n\u00e4her?  \u2460 \u4e2d",
)
SIZES = ((2, 3), (5, 300), (300, 5), (97, 131), (640, 480), (333, 333))
"""Height and width of the images of the check. None has a single colour: group normalisation amplifies its rounding
errors, so that two ways to compute one network may differ."""


class _Probabilities(nn.Module):
    def __init__(self, model: VqaTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.model(pixels, input_ids, attention_mask).logits.softmax(-1)


def write_onnx(model: Path, folder: Path, *, int8: bool, table: Path | None = None) -> dict[str, Any]:
    """Write the ONNX files of a model folder to `folder`; return the content of `model.json`.

    With a `table` of questions with answers, the files are also compared with torch on it, and `accuracy` is reported.

    Raises:
        UserError: the model cannot be exported, or its ONNX file differs from torch.
    """
    bundle = VqaBundle.load(model)
    samples = read_table(table).samples if table is not None else []
    tokenizer = export_tokenizer(bundle)
    write_text(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_graph(bundle, folder / MODEL)
    checked = [*_generated_inputs(tokenizer), *(_inputs(tokenizer, sample) for sample in samples)]
    expected = [probabilities(bundle, one) for one in checked]
    settings = {
        "answers": bundle.vocabulary.answers,
        "normaliser": bundle.vocabulary.normaliser,
        "image_size": bundle.preprocessing.image_size,
        "max_question_tokens": bundle.preprocessing.max_question_tokens,
        "check": check_outputs(folder / MODEL, checked, expected),
    }
    files = {"float32": MODEL}
    if int8:
        settings["int8"] = quantise(folder, checked, expected)
        files["int8"] = INT8_MODEL
    if samples:
        found = checked[-len(samples) :]
        torch_accuracy = _accuracy(bundle, samples, expected[-len(samples) :])
        of_files = {
            name: _accuracy(bundle, samples, list(map(Session(folder / file), found))) for name, file in files.items()
        }
        settings["accuracy"] = {"questions": len(samples), "torch": torch_accuracy} | of_files
    return settings


def write_graph(bundle: VqaBundle, path: Path) -> None:
    """Write the network with the preprocessing of images in front of it."""
    import onnx
    from onnx import compose

    side, length = bundle.preprocessing.image_size, bundle.preprocessing.max_question_tokens
    # Two tensors: the exporter would take one that is given twice for a single input.
    ids, mask = (torch.ones(1, length, dtype=torch.int64) for _ in range(2))
    names = ("pixels", "input_ids", "attention_mask")
    network = trace(_Probabilities(bundle.model), (torch.zeros(1, 3, side, side), ids, mask), names, "probabilities")
    opset = next(entry.version for entry in network.opset_import if entry.domain == "")
    front = compose.add_prefix(
        preprocessing_graph(bundle.preprocessing, opset, network.ir_version),
        "image.",
        rename_inputs=False,
        rename_outputs=False,
    )
    merged = compose.merge_models(front, network, io_map=[("pixels", "pixels")])
    del merged.opset_import[:]  # it names the operators of ONNX twice, and a domain that is not used any more
    merged.opset_import.append(onnx.helper.make_opsetid("", opset))
    onnx.checker.check_model(merged, full_check=True)
    onnx.save(merged, path)


def export_tokenizer(bundle: VqaBundle) -> tokenizers.Tokenizer:
    """Return the tokenizer, which truncates and pads to the length that the graph reads.

    Raises:
        UserError: the tokenizer is not one of the `tokenizers` library, or does not give the same ids.
    """
    import tokenizers

    source, length = bundle.tokenizer, bundle.preprocessing.max_question_tokens
    backend = getattr(source, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"the tokenizer {type(source).__name__} has no tokenizer.json, which the export needs; convert it to a "
            "fast tokenizer of transformers"
        )
    tokenizer = tokenizers.Tokenizer.from_str(backend.to_str())
    tokenizer.enable_truncation(length, direction=source.truncation_side)
    # `VqaExamples.collate` pads at the end.
    tokenizer.enable_padding(length=length, pad_id=source.pad_token_id or 0, pad_token=source.pad_token or "[PAD]")
    for question in QUESTIONS:
        ids = source([question], truncation=True, max_length=length)["input_ids"][0]
        encoded = tokenizer.encode(question)
        if encoded.ids[: sum(encoded.attention_mask)] != ids:
            raise UserError(
                f"tokenizer.json of {type(source).__name__} gives other tokens than the tokenizer itself for "
                f"{question[:30]!r}; export a model with a standard tokenizer"
            )
    return tokenizer


def probabilities(bundle: VqaBundle, inputs: Inputs) -> np.ndarray:
    """Return the probabilities (1, C) that torch computes from raw inputs."""
    image = resize(Image.fromarray(inputs["image"]), bundle.preprocessing.image_size).copy()  # torch wants to write
    length = int(inputs["attention_mask"].sum())  # without padding, as for a single question
    ids, mask = (torch.from_numpy(inputs[name][:, :length]) for name in ("input_ids", "attention_mask"))
    with torch.inference_mode():
        return bundle.model(pixels(image[None], bundle.preprocessing), ids, mask).logits.softmax(-1).numpy()


def _generated_inputs(tokenizer: tokenizers.Tokenizer) -> Iterator[Inputs]:
    """Yield questions about images of noise in blocks, which stay different when they are resized."""
    rng = np.random.default_rng(0)
    for number, (height, width) in enumerate(SIZES):
        blocks = Image.fromarray(rng.integers(0, 256, (9, 7, 3)).astype(np.uint8))
        image = np.asarray(blocks.resize((width, height), Image.Resampling.NEAREST))
        yield _tokens(tokenizer, QUESTIONS[number % len(QUESTIONS)]) | {"image": image}


def _inputs(tokenizer: tokenizers.Tokenizer, sample: Sample) -> Inputs:
    image = np.asarray(load_image(sample.image).convert("RGB"))
    return _tokens(tokenizer, sample.question) | {"image": image}


def _tokens(tokenizer: tokenizers.Tokenizer, question: str) -> dict[str, np.ndarray]:
    encoded = tokenizer.encode(question)
    return {"input_ids": np.array([encoded.ids]), "attention_mask": np.array([encoded.attention_mask])}


def _accuracy(bundle: VqaBundle, samples: list[Sample], found: Sequence[np.ndarray]) -> float:
    """Return the share of rows whose most probable answer is accepted."""
    answers = bundle.vocabulary.answers
    predictions = [
        Prediction(sample.id, answers[int(scores.argmax())], float(scores.max()))
        for sample, scores in zip(samples, found, strict=True)
    ]
    return accuracy(bundle.examples(samples, DataConfig()), predictions, bundle.vocabulary.normaliser)
