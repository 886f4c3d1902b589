"""Answer questions about images in memory with a student. This module does not need lmms-eval."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.dataset import pixels, resize, tokenize


@torch.inference_mode()
def answer_images(bundle: VqaBundle, images: Sequence[Image.Image], questions: Sequence[str]) -> list[str]:
    """Return the most probable answer for each pair of image and question.

    A warning is logged if a question is longer than the model reads.
    """
    settings = bundle.preprocessing
    device = next(bundle.model.parameters()).device
    stack = np.stack([resize(image, settings.image_size) for image in images])
    length = settings.max_question_tokens
    tokens = bundle.tokenizer(list(questions), truncation=True, max_length=length, padding=True, return_tensors="pt")
    if any(tokenize(bundle.tokenizer, questions, length)[1]):
        logging.getLogger("preceptor").warning("A question has more than %d tokens and is truncated", length)
    logits = bundle.model(
        pixels(stack, settings).to(device), tokens["input_ids"].to(device), tokens["attention_mask"].to(device)
    ).logits
    return [bundle.vocabulary.answers[label] for label in logits.argmax(-1).tolist()]
