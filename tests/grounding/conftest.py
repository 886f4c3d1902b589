"""Tiny random models of the Qwen-VL families and of one with DINOv2's eyes, one folder each for all tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from preceptor.grounding.new_vlm import new_vlm

CORPUS = [
    "Where is the liver?",
    "The liver is at <|box_start|>(120,345),(567,890)<|box_end|>",
    "What modality is shown? A CT of the abdomen.",
    "Is the heart enlarged? No.",
] * 4


def dinov2_folder(folder: Path, seed: int = 0) -> Path:
    """Write a tiny random DINOv2 as transformers saves one, whose blocks, positions and norms all matter."""
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=24, num_attention_heads=3, num_hidden_layers=2, image_size=70, hidden_dropout_prob=0.1
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        model = Dinov2Model(config)
        for weight in model.parameters():
            weight.add_(torch.randn_like(weight) * 0.2)
    model.save_pretrained(folder)
    BitImageProcessorPil(image_mean=[0.5, 0.4, 0.3], image_std=[0.3, 0.2, 0.25]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vlm_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a model of one of `guided_rope.FAMILIES`."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            root = tmp_path_factory.mktemp("vlm")
            vision = dinov2_folder(root / "dinov2") if family == "qwen2_vl_dinov2" else None
            made[family] = new_vlm(
                root / family,
                CORPUS,
                "qwen2_vl" if vision else family,  # type: ignore[arg-type]
                max_pixels=112 * 112,
                vision=vision,
            )
        return made[family]

    return make
