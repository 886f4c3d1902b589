"""The memory estimate against real tensors, and against the published sizes of checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.guided_rope import FAMILIES
from preceptor.grounding.memory_model import memory_estimate, parameter_counts
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.trained_weights import LoraSettings


def qwen2_vl(size: str) -> Any:
    """The published shapes of Qwen2-VL-2B and 7B."""
    from transformers import AutoConfig

    text = {
        "2B": {
            "hidden_size": 1536,
            "intermediate_size": 8960,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
        },
        "7B": {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
        },
    }[size]
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}  # type: ignore[assignment]
    vision = {"depth": 32, "embed_dim": 1280, "hidden_size": text["hidden_size"], "num_heads": 16, "patch_size": 14}
    return AutoConfig.for_model("qwen2_vl", text_config=text, vision_config=vision, tie_word_embeddings=size == "2B")


@pytest.mark.parametrize(("size", "published"), [("2B", 2.21e9), ("7B", 8.29e9)])
def test_published_checkpoints_have_their_published_size(size: str, published: float):
    counts = parameter_counts(qwen2_vl(size))
    assert counts.total == counts.trained == pytest.approx(published, rel=3e-3)
    assert counts.head == {"2B": 151936 * 1536, "7B": 152064 * 3584}[size]
    frozen = parameter_counts(qwen2_vl(size), "frozen_vision")
    assert counts.total - frozen.trained == pytest.approx(0.67e9, rel=0.02)  # the vision tower


def test_a_whole_estimate_by_hand():
    """Qwen2-VL-2B in bfloat16 with AdamW, 2,048 tokens, checkpointing; a 7B teacher."""
    found = memory_estimate(qwen2_vl("2B"), tokens=2048, checkpointing=True, teacher=qwen2_vl("7B"))
    count = parameter_counts(qwen2_vl("2B")).total
    assert found["weights"] == found["gradients"] == 2 * count
    assert found["optimizer"] == 4 * count
    assert found["teacher"] == pytest.approx(2 * 8.29e9, rel=3e-3)
    assert found["logits"] == (5 * 128 * 4 + 8 * 128 * 2 + 1536 * 4) * 151936
    layer = 2 * (4 * 1536 + 5 * 1536 + 4 * 8960) + 8 * 1536
    assert found["activations"] == 2048 * (28 * 2 * 1536 + layer + 6 * 1536)
    assert found["total"] == sum(value for name, value in found.items() if name != "total")


@pytest.fixture
def batch_of(tmp_path: Any) -> Callable[[GroundedVlm], Any]:
    def make(vlm: GroundedVlm) -> Any:
        pixels = np.random.default_rng(0).integers(0, 256, (112, 112, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        turns = (("Where is the liver? " * 12, "It is at (120,345). " * 12),)
        row = vlm.encoder.encode(Dialogue("a", (tmp_path / "a.png",), turns, "vg", "ct", "g", "train"))
        return vlm.encoder.collate([row, row])

    return make


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", ["full", "frozen_vision", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_gradients_and_states_are_the_real_ones(
    family: Any, training: Any, dtype: torch.dtype, vlm_folder: Callable, batch_of: Callable
):
    lora = LoraSettings(rank=4, dropout=0)
    vlm = GroundedVlm.load(vlm_folder(family), training=training, lora=lora, dtype=dtype).train()
    learns = [p for p in vlm.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learns, foreach=False)
    for p in learns:
        p.grad = torch.zeros_like(p)
    optimizer.step()
    found = memory_estimate(vlm.config, training=training, lora=lora, tokens=1, dtype=dtype)
    assert found["weights"] == sum(p.nbytes for p in vlm.parameters())
    assert found["gradients"] == sum(p.grad.nbytes for p in learns)
    states = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert found["optimizer"] == sum(value.nbytes for value in states)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("training", ["full", "lora"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_near_what_autograd_keeps(
    family: Any, checkpointing: bool, training: Any, dtype: torch.dtype, vlm_folder: Callable, batch_of: Callable
):
    """The storages that are saved for the backward pass, each once, without parameters."""
    lora = LoraSettings(rank=4, dropout=0)
    vlm = GroundedVlm.load(vlm_folder(family), training=training, lora=lora, dtype=dtype).train()
    if checkpointing:
        vlm.checkpoint_activations()
    batch = batch_of(vlm)
    known = {p.untyped_storage().data_ptr() for p in vlm.parameters()}
    saved: dict[int, torch.UntypedStorage] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage  # held, so that no address comes twice
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        found = vlm(batch)
    measured = sum(storage.nbytes() for storage in saved.values())
    tokens, patches = batch["input_ids"].numel(), len(batch["pixel_values"])
    text = vlm.config.text_config
    options = {"training": training, "lora": lora, "dtype": dtype, "checkpointing": checkpointing}
    want = memory_estimate(vlm.config, tokens=tokens, patches=patches, **options)["activations"]
    if checkpointing:  # what one layer keeps comes in the backward pass
        layers = memory_estimate(vlm.config, tokens=tokens, **options | {"checkpointing": False})["activations"]
        want -= (layers - tokens * (4 + dtype.itemsize) * text.hidden_size) // text.num_hidden_layers
    assert found.hidden.isfinite().all()
    assert measured == pytest.approx(want, rel=0.25)


def test_an_unknown_optimizer_is_named():
    with pytest.raises(UserError, match="optimizer 'adam' is not known; did you mean 'adamw'"):
        memory_estimate(qwen2_vl("2B"), tokens=1, optimizer="adam")  # type: ignore[arg-type]
