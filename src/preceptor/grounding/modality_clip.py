"""Estimate which of the eight modalities an image has, with a CLIP-like model or from the data set.

Guidance `clip` (see `grounding.guided_rope`) weights its rows by these probabilities. In the paper they come from a
medical CLIP model. Any model with a text tower and an image tower can be used (such as BiomedCLIP, PubMedCLIP, SigLIP).
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
from preceptor.data.limits import MAX_BYTES, MAX_PIXELS
from preceptor.data.types import Dialogue
from preceptor.errors import UserError, nearest
from preceptor.files import write_text
from preceptor.grounding.settings import MODALITIES
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
"""Text that images are compared with, for each modality."""


def by_name(modality: str, images: int = 1) -> Tensor:
    """Return one-hot rows (images, 8) for the name of a modality.

    Raises:
        UserError: the name is not one of `MODALITIES`.
    """
    if modality not in MODALITIES:
        raise UserError(
            f"modality {modality!r} has no row in the guidance table{nearest(modality, MODALITIES)}; rename it in the "
            "data, or use a CLIP model (method.guidance.scorer)"
        )
    return (
        torch.nn.functional.one_hot(torch.tensor(MODALITIES.index(modality)), len(MODALITIES)).float().repeat(images, 1)
    )


def of_dialogue(dialogue: Dialogue) -> Tensor:
    """Return one-hot rows (N, 8) of the modality of a dialogue, for each of its images."""
    return by_name(dialogue.modality, len(dialogue.images))


class ModalityClip:
    """A CLIP-like model that classifies modalities. Create it with `load`.

    The probability of modality m is the softmax over m of ``scale * cos(image, prompt_m)``, with the scale of the model
    (zero-shot classification, Radford et al. 2021). For SigLIP, whose sigmoids do not sum to 1, the same softmax is
    used; its bias cancels.

    `cache_key` is a hash of model and prompts. A file of probabilities is valid for one key only.
    """

    def __init__(self, model: Any, processor: Any, prompts_8D: Tensor, cache_key: str) -> None:
        self.model, self.processor, self.prompts_8D, self.cache_key = model, processor, prompts_8D, cache_key

    @classmethod
    @hide_progress_bars()
    def load(
        cls, source: str | Path, *, prompts: Mapping[str, str] = PROMPTS, allow_downloads: bool = False
    ) -> ModalityClip:
        """Load a model of transformers with `get_text_features` from a folder or hub name.

        Raises:
            UserError: the model does not exist or does not have two towers, or a prompt of a modality is missing.
        """
        if set(prompts) != set(MODALITIES):
            raise UserError(
                f"prompts are given for {', '.join(sorted(prompts))}; give one for each of {', '.join(MODALITIES)}"
            )
        from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

        location = find_pretrained(str(source), allow_downloads=allow_downloads)
        if location is None:
            raise UserError(
                f"{source} is neither a folder with a config.json nor in the local hub cache; give the folder of a "
                "CLIP-like model, or set allow_downloads=true to fetch it from the hub"
            )
        options: dict[str, Any] = {"local_files_only": not allow_downloads, "trust_remote_code": False}
        try:
            model: Any = AutoModel.from_pretrained(location, dtype=torch.float32, use_safetensors=True, **options)
            tokenizer = AutoTokenizer.from_pretrained(location, **options)
            processor = AutoImageProcessor.from_pretrained(location, backend="pil", **options)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"{source}: cannot be loaded as a CLIP-like model ({reason}); give a complete one"
            ) from error
        if not all(hasattr(model, name) for name in ("get_text_features", "get_image_features", "logit_scale")):
            raise UserError(f"{source} is a {type(model).__name__} without two towers; give a CLIP or SigLIP")
        model.eval()
        texts = [prompts[modality] for modality in MODALITIES]
        length = model.config.text_config.max_position_embeddings
        # SigLIP was trained with texts padded to the full length. CLIP reads the state of the end token at any
        # position.
        padding: Any = "max_length" if model.config.model_type.startswith("siglip") else True
        tokens = tokenizer(texts, padding=padding, truncation=True, max_length=length, return_tensors="pt")
        with torch.inference_mode():
            prompts_8D = _unit(model.get_text_features(**tokens))
        digest = hashlib.sha256(json.dumps(texts).encode())
        for name, value in sorted(model.state_dict().items()):
            digest.update(name.encode() + value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
        digest.update(json.dumps(processor.to_dict(), sort_keys=True, default=str).encode())
        return cls(model, processor, prompts_8D, digest.hexdigest())

    @torch.inference_mode()
    def score(self, paths: Sequence[Path], *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS) -> Tensor:
        """Return the probabilities (N, 8) of image files. Raises ImageError if a file cannot be read."""
        images = [load_image(path, max_bytes=max_bytes, max_pixels=max_pixels).convert("RGB") for path in paths]
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        image_ND = _unit(self.model.get_image_features(pixel_values=pixels))
        return (self.model.logit_scale.exp() * image_ND @ self.prompts_8D.T).softmax(dim=-1)


def _unit(features: Any) -> Tensor:
    tensor = features if isinstance(features, Tensor) else features.pooler_output
    return torch.nn.functional.normalize(tensor, dim=-1)


def modality_probabilities(
    paths: Sequence[Path],
    clip: ModalityClip,
    *,
    file: Path | None = None,
    batch_size: int = 32,
    max_bytes: int = MAX_BYTES,
    max_pixels: int = MAX_PIXELS,
) -> Tensor:
    """Return the modality probabilities (N, 8) of image files, at most as large as `data.images.load_image` accepts.

    Probabilities in `file` are reused, new ones are added after every batch. The file is JSON indexed by the SHA-256 of
    the images, without names and paths, so that it can be stored with the data.

    Raises:
        UserError: the file is damaged, or belongs to another model or other prompts.
    """
    known: dict[str, list[float]] = {}
    if file is not None and file.exists():
        try:
            document = json.loads(file.read_text("utf-8"))
            known, cache_key, order = document["probabilities"], document["model"], document["modalities"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} is not a valid file of modality probabilities ({error!r}); delete it to compute it again"
            ) from error
        if cache_key != clip.cache_key or order != list(MODALITIES):
            raise UserError(f"{file} contains probabilities of another CLIP model or other prompts; give another file")
    keys = [content_hash(path) for path in paths]
    missing = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
    todo = list(missing.items())
    for start in range(0, len(todo), batch_size):
        part = todo[start : start + batch_size]
        scores = clip.score([path for _, path in part], max_bytes=max_bytes, max_pixels=max_pixels)
        for (key, _), row in zip(part, scores.tolist(), strict=True):
            known[key] = row
        if file is not None:
            document = {"model": clip.cache_key, "modalities": list(MODALITIES), "probabilities": known}
            write_text(file, json.dumps(document))
    return torch.tensor([known[key] for key in keys]).reshape(len(keys), len(MODALITIES))
