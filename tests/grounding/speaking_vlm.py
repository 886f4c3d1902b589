"""A tiny Qwen2-VL that says something: with random tied weights a model repeats the last token of its prompt."""

from __future__ import annotations

from pathlib import Path

import torch

from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.new_vlm import new_vlm

CORPUS = ["Question about image? The liver is at <|box_start|>(120,345),(567,890)<|box_end|>."] * 4


def speaking_vlm(folder: Path, seed: int = 0, vocabulary_size: int = 300) -> Path:
    """Write the folder of a model whose output weights are its own, and as large as those of a trained one."""
    made = GroundedVlm.load(
        new_vlm(
            folder.with_name(f"{folder.name}-tied"),
            CORPUS,
            seed=seed,
            vocabulary_size=vocabulary_size,
            max_pixels=56 * 56,
        )
    )
    base = made.base
    for config in (base.config, base.config.get_text_config()):
        config.tie_word_embeddings = False
    weight = base.lm_head.weight
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) * 0.2
    # The bytes and end marks would spoil a text: none of them is said.
    words = torch.tensor(
        [
            token.isascii() and token.isalpha()
            for token in made.encoder.tokenizer.convert_ids_to_tokens(range(len(weight)))
        ]
    )
    drawn[~words] = 0
    base.lm_head.weight = torch.nn.Parameter(drawn)
    made.save(folder)
    return folder
