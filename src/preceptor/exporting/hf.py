"""A model as a Hugging Face folder, which transformers loads with the same weights."""

from __future__ import annotations

import shutil
import tempfile
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from preceptor import tasks
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.hub import hide_progress_bars
from preceptor.pipeline.model_files import check_loaded

CARD = "README.md"
# The class of transformers that loads a model, and where the network of torch is in the class of Preceptor.
_CLASSES = {
    "vqa": ("AutoModel", "bundle.model"),
    "segmentation": ("AutoModel", "network"),
    "grounding": ("AutoModelForImageTextToText", "vlm.base"),
}
_QUESTIONS = 8


def write_hf(model: Path, folder: Path) -> dict[str, Any]:
    """Write a model and its card to `folder`, load it with transformers, and return what was compared.

    Only what belongs to the model is written. Of a grounded model with guided positions, the result and the card say
    how much its answers change in programs that do not guide them.

    Raises:
        UserError: the model cannot be read, or a weight that transformers loads differs.
    """
    task = tasks.task_of_model(model)
    name, network = _CLASSES[task]
    loaded = tasks.module(task, "predict").MODEL.load(model)
    loaded.save_pretrained(folder)
    if (model / CARD).is_file():
        shutil.copyfile(model / CARD, folder / CARD)
    document: dict[str, Any] = {"class": name, "tensors": _compare(attrgetter(network)(loaded), folder, name)}
    if task == "grounding":
        document["guidance"] = loaded.vlm.guidance.settings()
        if loaded.vlm.guidance.kind != "none":
            document["unguided"] = found = unguided(loaded.vlm)
            document["statement"] = statement(document["guidance"], found)
            card = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else ""
            write_text(folder / CARD, f"{card}\n## Guided positions\n\n{document['statement']}\n")
    return document


@hide_progress_bars()
def _compare(network: torch.nn.Module, folder: Path, name: str) -> int:
    """Return the number of tensors of a network. Raises UserError unless transformers loads equal ones."""
    import transformers

    found, info = getattr(transformers, name).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, dtype="auto", output_loading_info=True
    )
    check_loaded(folder, info)
    expected, others = network.state_dict(), found.state_dict()
    for key in sorted(expected.keys() | others.keys()):
        one, other = expected.get(key), others.get(key)
        if one is None or other is None or one.dtype != other.dtype or not torch.equal(one.cpu(), other):
            raise UserError(
                f"the tensor {key} differs when transformers loads the exported folder, so nothing was written; use "
                "the model folder with preceptor.load, and report this"
            )
    return len(expected)


def unguided(vlm: Any) -> dict[str, Any]:
    """Return how much the answers of a grounded model change if its positions are not guided.

    The model answers generated images of noise with and without its guidance.

    Returns:
        `questions`, their number; `largest_difference`, of a probability of the first token; and `changed`, the number
        of greedy answers that differ.
    """
    from preceptor.grounding.guided_rope import Guidance, attach
    from preceptor.grounding.model import GroundedVlm
    from preceptor.grounding.predict import as_dialogue
    from preceptor.grounding.settings import MODALITIES

    plain = GroundedVlm(vlm.model, vlm.encoder, Guidance("none")).eval()
    rng = np.random.default_rng(0)
    difference, changed = 0.0, 0
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        for number in range(_QUESTIONS):
            path = Path(scratch) / f"{number}.png"
            Image.fromarray(rng.integers(0, 256, (112, 84 + 28 * number, 3), dtype=np.uint8)).save(path)
            dialogue = as_dialogue([path], "Where is the lesion?", MODALITIES[number % len(MODALITIES)])
            probabilities = []
            for one in (vlm, plain):
                batch = one.encoder.collate([one.encoder.encode(dialogue, prompt=True)], "left")
                batch = {key: value.to(one.lm_head_weight.device) for key, value in batch.items() if key != "labels"}
                with attach(one.base, one.guidance, batch.pop("modalities", None)):
                    probabilities.append(one.base(**batch).logits[0, -1].float().softmax(-1))
            difference = max(difference, float((probabilities[0] - probabilities[1]).abs().max()))
            guided, other = (one.generate([dialogue], max_new_tokens=32)[0][0] for one in (vlm, plain))
            changed += guided.tokens != other.tokens
    return {"questions": _QUESTIONS, "largest_difference": difference, "changed": changed}


def statement(guidance: dict[str, Any], found: dict[str, Any]) -> str:
    """Return the sentences that say what guided positions mean for other programs."""
    return (
        f"This model was trained with guided positions (guidance: {guidance['kind']}), which Preceptor applies and "
        "plain transformers, vLLM and llama.cpp do not. Without them, "
        f"{found['changed']} of {found['questions']} answers to generated images change, and a probability of the "
        f"first token by up to {found['largest_difference']:.1e}. For these programs, train with "
        "method.guidance.kind=none."
    )
