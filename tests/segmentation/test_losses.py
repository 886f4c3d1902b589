from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from preceptor.config import TermConfig
from preceptor.segmentation.losses import BceLoss, DiceLoss, FusedFeatureLoss, bce_loss, dice_loss, soft_dice
from preceptor.task import Batch, TeacherSignal


def draw(*shape: int, seed: int = 0, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


LOGITS, TARGETS = draw(3, 2, 3, 4, 5), (draw(3, 2, 3, 4, 5, seed=1) > 0.3).double()
TARGETS[1, 0] = 0


def test_soft_dice_by_hand():
    p = torch.tensor([0.5, 1.0, 0.0, 0.25]).view(1, 1, 1, 2, 2)
    y = torch.tensor([1.0, 1.0, 1.0, 0.0]).view(1, 1, 1, 2, 2)
    assert soft_dice(p, y).item() == pytest.approx(2 * 1.5 / (1.75 + 3 + 1))
    assert soft_dice(p, torch.zeros_like(y)).item() == 0
    assert soft_dice(p.bool(), y.bool()).item() == pytest.approx(2 * 2 / (3 + 3 + 1))


def test_dice_equals_monai():
    from monai.losses import DiceLoss

    peer = DiceLoss(sigmoid=True, smooth_nr=0, smooth_dr=1)
    assert dice_loss(LOGITS, TARGETS).item() == pytest.approx(3 * peer(LOGITS, TARGETS).item())


@pytest.mark.parametrize("regions", ["mean", "sum"])
def test_bce_oracle(regions: str):
    want = 0.0
    for b in range(3):
        for x, y in zip(LOGITS[b].flatten().tolist(), TARGETS[b].flatten().tolist(), strict=True):
            p = 1 / (1 + math.exp(-x))
            want -= (y * math.log(p) + (1 - y) * math.log(1 - p)) / 60 / (2 if regions == "mean" else 1)
    assert bce_loss(LOGITS, TARGETS, regions).item() == pytest.approx(want)


@pytest.mark.parametrize("loss", [dice_loss, bce_loss, lambda x, y: bce_loss(x, y, "sum")])
def test_gradients_and_half_precision(loss):
    assert gradcheck(lambda x: loss(x, TARGETS), (LOGITS.clone().requires_grad_(),))
    half = loss(LOGITS.bfloat16(), TARGETS.bfloat16())
    assert half.dtype == torch.float32
    assert half.item() == pytest.approx(loss(LOGITS.bfloat16().double(), TARGETS).item(), rel=1e-5)


def test_losses_add_up_over_micro_batches():
    for loss in (dice_loss, bce_loss):
        parts = loss(LOGITS[:1], TARGETS[:1]) + loss(LOGITS[1:], TARGETS[1:])
        assert loss(LOGITS, TARGETS).item() == pytest.approx(parts.item())


def test_fused_features_are_those_that_each_network_saw():
    student, teacher = (torch.tensor(values).reshape(1, 2, 1, 1, 1, 1) for values in ([1.0, 5.0], [1.0, 7.0]))
    batch = Batch({"visible": torch.tensor([[True, False]]), "available": torch.tensor([[True, True]])}, ["a"], [""])
    loss = FusedFeatureLoss("full/features", TermConfig(weight=2.0), 0.5)
    value = loss(TeacherSignal(None, {"bottleneck": student}), TeacherSignal(None, {"bottleneck": teacher}), batch)
    assert value.item() == abs(1 - (1 + 7) / 2)
    assert loss.weight_at(0.5) == 2.0 * 0.5


@pytest.mark.parametrize(("term", "function"), [(DiceLoss, dice_loss), (BceLoss, bce_loss)])
def test_samples_without_masks_add_nothing(term, function):
    batch = Batch({"masks": TARGETS, "labelled": torch.tensor([True, False, True])}, ["a", "b", "c"], [""] * 3)
    value = term(TermConfig(weight=1.0))(TeacherSignal(LOGITS), None, batch)
    assert value.item() == pytest.approx(function(LOGITS[[0, 2]], TARGETS[[0, 2]]).item())
