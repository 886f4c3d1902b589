"""Answer questions about images in memory with a student. This module does not need lmms-eval."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.dataset import pixels, resize


@torch.inference_mode()
def answer_images(bundle: VqaBundle, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Return the most probable answer for each pair of image and question."""
    settings = bundle.preprocessing
    device = next(bundle.model.parameters()).device
    stack = np.stack([resize(image, settings.image_size) for image in images])
    tokens = bundle.tokenizer(
        list(questions), truncation=True, max_length=settings.max_question_tokens, padding=True, return_tensors="pt"
    )
    logits = bundle.model(
        pixels(stack, settings).to(device), tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    ).logits
    return [bundle.vocabulary.answers[label] for label in logits.argmax(-1).tolist()]
