"""Which of the eight modalities an image is: by a CLIP-like model, or by the data set's own word.

Guidance of kind `clip` (models/guided_rope.py) weighs its rows by these probabilities. In the published figure they
come from a medical CLIP; any model with a text and an image tower serves (BiomedCLIP-like, PubMedCLIP, SigLIP).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.data.images import content_hash, load_image
from preceptor.data.types import Dialogue
from preceptor.errors import UserError, nearest
from preceptor.files import write_text
from preceptor.grounding.guided_rope import MODALITIES
from preceptor.hub import find_pretrained, hide_progress_bars

PROMPTS: dict[str, str] = {
    "ct": "a CT scan",
    "mr": "an MRI scan",
    "x": "an X-ray image",
    "pet": "a PET scan",
    "endoscopy": "an endoscopy image",
    "dermoscopy": "a dermoscopy image of skin",
    "fundus": "a fundus photograph of the retina",
    "ultrasound": "an ultrasound image",
}
"""What an image of each modality is compared with."""


def by_name(modality: str, images: int = 1) -> Tensor:
    """Return (images, 8): 1 for the modality of a name, 0 for the others.

    Raises UserError where the name is none of `MODALITIES`.
    """
    if modality not in MODALITIES:
        raise UserError(
            f"modality {modality!r} has no row in the guidance table{nearest(modality, MODALITIES)}; name it so in the "
            "data, or let a CLIP model say (method.guidance.scorer)"
        )
    return (
        torch.nn.functional.one_hot(torch.tensor(MODALITIES.index(modality)), len(MODALITIES)).float().repeat(images, 1)
    )


def of_dialogue(dialogue: Dialogue) -> Tensor:
    """Return (N, 8): the dialogue's own word for each of its images."""
    return by_name(dialogue.modality, len(dialogue.images))


class ModalityClip:
    """A CLIP-like model as a judge of modalities; `load` one.

    The probability of modality m is softmax over m of ``scale * cos(image, prompt_m)`` (Radford et al. 2021, zero-shot
    classification), `scale` being the model's own; of SigLIP, whose sigmoids do not sum to 1, the same softmax, its
    bias falling out.

    `identity` tells models and prompts apart, so that a file of probabilities of another one is not taken for its own.
    """

    def __init__(self, model: Any, processor: Any, prompts_8D: Tensor, identity: str) -> None:
        self.model, self.processor, self.prompts_8D, self.identity = model, processor, prompts_8D, identity

    @classmethod
    @hide_progress_bars()
    def load(
        cls, source: str | Path, *, prompts: Mapping[str, str] = PROMPTS, allow_downloads: bool = False
    ) -> ModalityClip:
        """Return the judge of a folder or hub name, a transformers model with `get_text_features`.

        Raises UserError where it is not there, has no two towers, or the prompts are not of the eight modalities.
        """
        if set(prompts) != set(MODALITIES):
            raise UserError(
                f"prompts are given for {', '.join(sorted(prompts))}; give one for each of {', '.join(MODALITIES)}"
            )
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        place = find_pretrained(str(source), allow_downloads=allow_downloads)
        if place is None:
            raise UserError(
                f"{source} is neither a folder with a config.json nor in the local hub cache; give the folder of a "
                "CLIP-like model, or set allow_downloads=true to fetch it from the hub"
            )
        options: dict[str, Any] = {"local_files_only": not allow_downloads, "trust_remote_code": False}
        try:
            model: Any = AutoModel.from_pretrained(place, dtype=torch.float32, use_safetensors=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(place, **options)
            processor = AutoImageProcessor.from_pretrained(place, backend="pil", **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"{source}: no CLIP-like model can be read ({reason}); give a whole one") from error
        if not all(hasattr(model, name) for name in ("get_text_features", "get_image_features", "logit_scale")):
            raise UserError(f"{source} is a {type(model).__name__} without two towers; give a CLIP or SigLIP")
        model.eval()
        texts = [prompts[modality] for modality in MODALITIES]
        length = model.config.text_config.max_position_embeddings
        # SigLIP was trained on texts padded to their full length; CLIP reads the state of the end mark, wherever it is.
        padding: Any = "max_length" if model.config.model_type.startswith("siglip") else True
        words = tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            prompts_8D = _unit(model.get_text_features(**words))
        digest = hashlib.sha256(json.dumps(texts).encode())
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
        return cls(model, processor, prompts_8D, digest.hexdigest())

    @torch.inference_mode()
    def score(self, paths: Sequence[Path]) -> Tensor:
        """Return (N, 8) probabilities of image files, in the order of `MODALITIES`; raise as `load_image`."""
        images = [load_image(path).convert("RGB") for path in paths]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        found_ND = _unit(self.model.get_image_features(pixel_values=pixels))
        return (self.model.logit_scale.exp() * found_ND @ self.prompts_8D.T).softmax(dim=-1)


def _unit(features: Any) -> Tensor:
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor, dim=-1)


def modality_probabilities(
    paths: Sequence[Path], clip: ModalityClip, *, file: Path | None = None, batch_size: int = 32
) -> Tensor:
    """Return (N, 8) probabilities of image files; those in `file` are read from it, the others computed and added.

    The file is JSON, by the SHA-256 of an image's bytes, so that it can be computed once and lie with the data; neither
    names nor paths of images are in it. Every batch is written as it is done.

    Raises UserError where the file is damaged or of another model or other prompts.
    """
    known: dict[str, list[float]] = {}
    if file is not None and file.exists():
        try:
            document = json.loads(file.read_text("utf-8"))
            known, identity, order = document["probabilities"], document["model"], document["modalities"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{file} holds no modality probabilities ({error!r}); delete it to have it anew") from error
        if identity != clip.identity or order != list(MODALITIES):
            raise UserError(f"{file} holds probabilities of another CLIP model or other prompts; name another file")
    keys = [content_hash(path) for path in paths]
    missing = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
    todo = list(missing.items())
    for start in range(0, len(todo), batch_size):
        part = todo[start : start + batch_size]
        for (key, _), row in zip(part, clip.score([path for _, path in part]).tolist(), strict=True):
            known[key] = row
        if file is not None:
            document = {"model": clip.identity, "modalities": list(MODALITIES), "probabilities": known}
            write_text(file, json.dumps(document))
    return torch.tensor([known[key] for key in keys]).reshape(len(keys), len(MODALITIES))
