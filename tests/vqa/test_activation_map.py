from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from preceptor.task import Batch
from preceptor.vqa.activation_map import OPACITY, activation_map, color_map, describe_peak, token_grid
from preceptor.vqa.model import VqaTransformer, VqaTransformerConfig
from preceptor.vqa.vision import ConvVision, TransformersVision
from tests.vqa.conftest import make_bundle, make_data

VISION = {"channels": [4, 6, 8], "blocks": [1, 1, 1], "token_stages": [1, 2]}  # 32 px: 3 global, 4x4 and 2x2 tokens


class LinearModel(nn.Module):
    """logit_c = sum over tokens i and channels d of v_i(question) w_cd A_id, so every derivative is known."""

    def __init__(self, tokens_ID: torch.Tensor, weights_CD: torch.Tensor, values_VI: torch.Tensor) -> None:
        super().__init__()
        self.vision = ConvVision(VISION)
        self.embed_image = Constant(tokens_ID)
        self.weights_CD = nn.Parameter(weights_CD)
        self.values_VI = values_VI

    def forward(self, pixels, input_ids, attention_mask):
        image_ID = self.embed_image(self.vision(pixels))[0]
        values_I = self.values_VI[int(input_ids[0, 0])]
        return SimpleNamespace(logits=(values_I @ image_ID @ self.weights_CD.T)[None])


class Constant(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.value = value

    def forward(self, x):
        return self.value[None]


def question(token: int = 0, size: int = 32) -> Batch:
    tensors = {
        "pixels": torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)),
        "input_ids": torch.tensor([[token, 1]]),
        "attention_mask": torch.ones(1, 2, dtype=torch.int64),
    }
    return Batch(tensors, ["a"], ["k"])


def linear_model() -> LinearModel:
    generator = torch.Generator().manual_seed(1)
    tokens, weights, values = (torch.randn(*shape, generator=generator) for shape in ((23, 5), (3, 5), (2, 23)))
    return LinearModel(tokens, weights, values)


@pytest.mark.parametrize("token", [0, 1])
@pytest.mark.parametrize("chosen", [0, 1, 2])
def test_map_equals_the_closed_form_of_a_linear_model(token: int, chosen: int):
    model = linear_model()
    grid_ND = model.embed_image.value[-4:].numpy()
    weights_D = model.values_VI[token, -4:].mean().item() * model.weights_CD[chosen].detach().numpy()
    expected = np.maximum(grid_ND @ weights_D, 0)
    expected /= expected.max()
    found = activation_map(model, question(token), chosen)
    assert found.shape == (2, 2)
    np.testing.assert_allclose(found, expected.reshape(2, 2), atol=1e-5)


def test_without_a_class_the_most_probable_one_is_mapped():
    model = linear_model()
    best = int(model(**question().tensors).logits[0].argmax())
    maps = [activation_map(model, question(), label) for label in range(3)]
    np.testing.assert_array_equal(activation_map(model, question()), maps[best])
    assert not np.allclose(maps[best], maps[(best + 1) % 3])


def test_a_question_that_turns_the_sign_turns_the_map():
    model = linear_model()
    model.values_VI = torch.stack([torch.ones(23), -torch.ones(23)])
    yes, no = (activation_map(model, question(token), 0) for token in (0, 1))
    assert not ((yes > 0) & (no > 0)).any()
    assert ((yes > 0) | (no > 0)).all()


def test_nothing_that_speaks_for_the_class_is_a_map_of_zeros():
    model = linear_model()
    model.embed_image.value = torch.ones(23, 5)
    model.weights_CD.data = -torch.ones(3, 5)
    model.values_VI = torch.ones(2, 23)
    found = activation_map(model, question(), 0)
    assert (found == 0).all()
    assert describe_peak(found) == "no part of the image speaks for this answer"


@pytest.fixture(scope="module")
def model() -> VqaTransformer:
    text = {
        "model_type": "electra",
        "vocab_size": 30,
        "embedding_size": 8,
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "max_position_embeddings": 32,
    }
    torch.manual_seed(0)
    config = VqaTransformerConfig(
        vision={"kind": "conv", **VISION},
        text=text,
        width=8,
        layers=1,
        heads=2,
        image_size=32,
        num_labels=4,
        dropout=0.3,
    )
    return VqaTransformer(config)


def test_map_of_the_real_model_equals_finite_differences(model: VqaTransformer):
    """The gradient of the logit by central differences on the image tokens, then the formula of the paper."""
    batch = question(7)
    model.double().eval()
    batch.tensors["pixels"] = batch["pixels"].double()
    with torch.no_grad():
        image_1ID = model.embed_image(model.vision(batch["pixels"]))
    gradient_ID = torch.zeros(image_1ID.shape[1:], dtype=torch.float64)

    def logit(shift: float, i: int, d: int) -> float:
        moved = image_1ID.clone()
        moved[0, i, d] += shift
        handle = model.embed_image.register_forward_hook(lambda *_: moved)
        with torch.no_grad():
            value = model(**batch.tensors).logits[0, 2].item()
        handle.remove()
        return value

    for i in range(19, 23):
        for d in range(8):
            gradient_ID[i, d] = (logit(0.02, i, d) - logit(-0.02, i, d)) / 0.04
    expected = torch.relu(image_1ID[0, -4:] @ gradient_ID[-4:].mean(0))
    found = activation_map(model, batch, 2)
    model.float()
    # The logits are single precision, hence the wide step and the tolerance.
    np.testing.assert_allclose(found, (expected / expected.max()).reshape(2, 2).numpy(), atol=2e-3)


def test_map_moves_with_the_question(model: VqaTransformer):
    # Both classes, since one alone may speak for nothing in an untrained model.
    here, there = (np.stack([activation_map(model, question(token), label) for label in range(4)]) for token in (7, 20))
    assert np.abs(here - there).max() > 1e-4


def test_gradients_modes_and_hooks_are_left_as_they_were(model: VqaTransformer):
    model.train()
    model.text.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    model.zero_grad()
    model.head.weight.grad = torch.full_like(model.head.weight, 7.0)
    with torch.no_grad():
        first = activation_map(model, question(7), 1)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert (model.head.weight.grad == 7).all()
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["head.weight"]
    assert not model.embed_image._forward_hooks
    # Dropout was off: the same map again.
    np.testing.assert_array_equal(first, activation_map(model, question(7), 1))
    model.zero_grad()


def test_a_frozen_model_has_the_same_map(model: VqaTransformer):
    before = activation_map(model, question(9), 1)
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.requires_grad_(False)
    frozen = activation_map(model, question(9), 1)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    np.testing.assert_array_equal(before, frozen)


def test_a_failing_forward_leaves_no_hook(model: VqaTransformer):
    model.train()
    broken = question(7)
    broken.tensors["input_ids"] = torch.full((1, 2), 10**6)
    with pytest.raises(IndexError):
        activation_map(model, broken, 0)
    assert not model.embed_image._forward_hooks
    assert model.training


@pytest.mark.parametrize(("size", "stages", "side"), [(32, [1, 2], 2), (112, [1], 14), (100, [2], 7), (32, [0], 8)])
def test_grid_of_a_convolutional_backbone(size: int, stages: list[int], side: int):
    vision = ConvVision({**VISION, "token_stages": stages})
    tokens = vision(torch.zeros(1, 3, size, size)).shape[1]
    assert tokens == vision.tokens(size)
    assert token_grid(vision, size, tokens) == (tokens - side * side, side)


def test_grid_of_a_vision_transformer_leaves_out_global_and_classification_tokens():
    config = {
        "model_type": "vit",
        "hidden_size": 8,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "image_size": 32,
        "patch_size": 8,
    }
    vision = TransformersVision({"config": config, "depths": [1, -1], "image_size": 32})
    assert vision.tokens(32) == 2 + 1 + 16
    assert token_grid(vision, 32, 19) == (3, 4)


def test_end_to_end_on_a_bundle(tmp_path):
    data = make_data(tmp_path, test=2)
    bundle = make_bundle(data, 16, 0)
    found = activation_map(bundle.model, question(5))
    assert found.shape == (4, 4)
    assert found.min() >= 0
    assert found.max() in (0, 1)


def test_the_colours_are_transparent_where_the_map_is_zero():
    activation = np.zeros((4, 4))
    assert not np.asarray(color_map(activation, 40))[..., 3].any()
    activation[0, 3] = 1
    image = color_map(activation, 40)
    assert (image.mode, image.size) == ("RGBA", (40, 40))
    alpha = np.asarray(image)[..., 3]
    assert alpha.max() == alpha[0, 39] == round(255 * OPACITY)
    assert not alpha[20:].any()
    assert not alpha[:, :20].any()


@pytest.mark.parametrize(
    ("cell", "words"),
    [((0, 0), "upper left"), ((6, 6), "lower right"), ((3, 3), "the centre"), ((3, 0), "middle left")],
)
def test_the_peak_in_words(cell: tuple[int, int], words: str):
    activation = np.zeros((7, 7))
    activation[cell] = 1
    assert words in describe_peak(activation)
