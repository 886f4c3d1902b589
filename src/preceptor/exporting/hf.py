"""A model as a Hugging Face folder, which transformers loads with the same weights."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from preceptor import tasks
from preceptor.errors import UserError
from preceptor.files import to_json, write_text
from preceptor.hub import hide_progress_bars
from preceptor.pipeline.model_files import check_loaded, read_settings

CARD = "README.md"
# The class of transformers that loads a model, and where the network of torch is in the class of Preceptor.
_CLASSES = {
    "vqa": ("AutoModel", "bundle.model"),
    "segmentation": ("AutoModel", "network"),
    "grounding": ("AutoModelForImageTextToText", "vlm.base"),
}
_QUESTIONS = 8
_TOKENS = 32
"""Most tokens of a compared answer."""


def write_hf(model: Path, folder: Path, table: Path | None = None) -> dict[str, Any]:
    """Write a model and its card to `folder`, load it with transformers, and return what was compared.

    Only what belongs to the model is written. Of a grounded model with guided positions, the result and the card say
    what programs make of it that do not guide them, on the questions of a `table` if there is one.

    Raises:
        UserError: the model cannot be read, a weight that transformers loads differs, or the table cannot be used.
    """
    task = tasks.task_of_model(model)
    name, network = _CLASSES[task]
    loaded = tasks.module(task, "predict").MODEL.load(model)
    dialogues = [] if table is None else _questions(loaded, table)
    loaded.save_pretrained(folder)
    if task == "grounding":
        _add_earlier_keys(folder, loaded.vlm.base.config)
    if (model / CARD).is_file():
        shutil.copyfile(model / CARD, folder / CARD)
    document: dict[str, Any] = {"class": name, "tensors": _compare(attrgetter(network)(loaded), folder, name)}
    if task == "grounding":
        document["guidance"] = loaded.vlm.guidance.settings()
        if loaded.vlm.guidance.kind != "none":
            document["unguided"] = found = unguided(loaded.vlm, dialogues)
            document["statement"] = statement(document["guidance"], found, own=bool(dialogues))
            card = (folder / CARD).read_text("utf-8") if (folder / CARD).is_file() else ""
            write_text(folder / CARD, f"{card}\n## Guided positions\n\n{document['statement']}\n")
    return document


def _add_earlier_keys(folder: Path, config: Any) -> None:
    """Add the keys that transformers 4 reads to a folder that transformers 5 wrote.

    Without them, transformers 4 takes the default RoPE and a new `lm_head`, and cannot read the tokenizer.
    """
    settings, tokenizer = (read_settings(folder / name) for name in ("config.json", "tokenizer_config.json"))
    rope = dict(config.text_config.rope_parameters)
    settings["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    settings["text_config"]["tie_word_embeddings"] = config.tie_word_embeddings
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
    write_text(folder / "config.json", to_json(settings, indent=2) + "\n")
    write_text(folder / "tokenizer_config.json", to_json(tokenizer, indent=2) + "\n")


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


def _questions(loaded: Any, table: Path) -> list[Any]:
    """Return the questions of a table as dialogues. Raises UserError if they cannot show what guidance changes."""
    kind = loaded.vlm.guidance.kind
    if kind in ("none", "clip"):
        reason = (
            "has no guided positions" if kind == "none" else "needs the modality of each image, which a table lacks"
        )
        raise UserError(f"--table counts answers that change without guided positions, and this model {reason}")
    return list(loaded.items(table=table))


def unguided(vlm: Any, dialogues: Sequence[Any] = ()) -> dict[str, Any]:
    """Return how much the answers of a grounded model change if its positions are not guided.

    Without `dialogues`, the model is asked about images of noise, on which a trained model may answer the same
    whatever its positions are.

    Returns:
        `questions`, their number; `largest_difference`, of a probability of the first token in up to eight of them; and
        `changed`, the number of greedy answers that differ.
    """
    from preceptor.grounding.guided_rope import Guidance, attach
    from preceptor.grounding.model import GroundedVlm

    plain = GroundedVlm(vlm.model, vlm.encoder, Guidance("none")).eval()
    difference = 0.0
    with tempfile.TemporaryDirectory() as scratch, torch.inference_mode():
        asked = list(dialogues) or _about_noise(Path(scratch))
        for dialogue in asked[:_QUESTIONS]:
            probabilities = []
            for one in (vlm, plain):
                batch = one.encoder.collate([one.encoder.encode(dialogue, prompt=True)], "left")
                batch = {key: value.to(one.lm_head_weight.device) for key, value in batch.items() if key != "labels"}
                with attach(one.base, one.guidance, batch.pop("modalities", None)):
                    probabilities.append(one.base(**batch).logits[0, -1].float().softmax(-1))
            difference = max(difference, float((probabilities[0] - probabilities[1]).abs().max()))
        guided, other = (
            [answers[0].tokens for answers in one.generate(asked, max_new_tokens=_TOKENS)] for one in (vlm, plain)
        )
    changed = sum(one != two for one, two in zip(guided, other, strict=True))
    return {"questions": len(asked), "largest_difference": difference, "changed": changed}


def _about_noise(folder: Path) -> list[Any]:
    """Return questions about images of noise, which are written to a folder."""
    from preceptor.grounding.predict import as_dialogue
    from preceptor.grounding.settings import MODALITIES

    rng, dialogues = np.random.default_rng(0), []
    for number in range(_QUESTIONS):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (112, 84 + 28 * number, 3), dtype=np.uint8)).save(path)
        dialogues.append(as_dialogue([path], "Where is the lesion?", MODALITIES[number % len(MODALITIES)]))
    return dialogues


def statement(guidance: dict[str, Any], found: dict[str, Any], *, own: bool) -> str:
    """Return the sentences that say what guided positions mean for other programs. `own`: the user gave questions."""
    size = f"{found['largest_difference']:.1e}"
    shown = (
        f"Without them, {found['changed']} of {found['questions']} answers to the given questions change, and a "
        f"probability of the first token by up to {size}."
        if own
        else f"On images of noise, a probability of the first token changes by up to {size}. Give questions of your "
        "own (--table) to count the answers that change."
    )
    return (
        f"This model was trained with guided positions (guidance: {guidance['kind']}), which Preceptor applies and "
        "plain transformers, vLLM and llama.cpp do not: they compute another model, for which the scores of the card "
        f"do not hold. {shown} For these programs, train with method.guidance.kind=none."
    )
