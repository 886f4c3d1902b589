"""Region prototypes: similarity maps against numbers by hand, what they do not depend on, and the term in a task."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.autograd import gradcheck

from preceptor.errors import UserError
from preceptor.segmentation.kd import KdConfig
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.prototypes import class_weights, prototype_loss, similarities
from tests.segmentation.test_lckd import ALL, MODALITIES, REGIONS, batch, network
from tests.segmentation.test_teachers import dropped

WEIGHT = {"prototypes": {"weight": 0.1}}


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def masks(rows: int = 3, seed: int = 9) -> torch.Tensor:
    found = (draw(rows, 2, 4, 4, 4, seed=seed) > 0.8).double()
    found[:, 1] = found.amax(dim=1)  # the regions are nested
    return found


def test_a_small_case_by_hand():
    """Two voxels in the region with features (1, 0) and (0, 1), and one outside with (-1, 0)."""
    f = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, 0.0]]).view(1, 2, 1, 1, 3)
    region = torch.tensor([1.0, 1.0, 0.0]).view(1, 1, 1, 1, 3)
    half = math.sqrt(0.5)
    got = similarities(f, class_weights(region, (1, 1, 3)))
    torch.testing.assert_close(got, torch.tensor([[[half, half, -half], [-1.0, 0.0, 1.0]]]))
    # A teacher for whom the voxels of the region are alike, and opposite to the one outside.
    t = torch.tensor([[2.0, 3.0, -1.0], [0.0, 0.0, 0.0]]).view(1, 2, 1, 1, 3)
    want = ((half - 1) ** 2 * 2 + (1 - half) ** 2 + 0 + 1 + 0) / 6
    assert prototype_loss(f, t, region).item() == pytest.approx(want)


def test_equal_features_have_nothing_to_learn():
    f = draw(3, 5, 4, 4, 4)
    assert prototype_loss(f, f.clone(), masks()).abs().max() < 1e-20


def test_neither_scale_nor_basis_nor_width_of_the_features_matters():
    s, t = draw(3, 5, 4, 4, 4), draw(3, 5, 4, 4, 4, seed=1)
    want = prototype_loss(s, t, masks())
    assert (want > 1e-3).all()
    torch.testing.assert_close(prototype_loss(7 * s, 0.01 * t, masks()), want, atol=1e-8, rtol=1e-5)
    rotation = torch.linalg.qr(draw(8, 5, seed=2))[0]  # five orthonormal columns: also a wider network
    turned = torch.einsum("dc,bcxyz->bdxyz", rotation, t)
    torch.testing.assert_close(prototype_loss(s, turned, masks()), want)


def test_the_order_of_the_voxels_does_not_matter():
    s, t, m = draw(3, 5, 4, 4, 4), draw(3, 5, 4, 4, 4, seed=1), masks()
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    mixed = [x.flatten(2)[..., order].view_as(x) for x in (s, t, m)]
    torch.testing.assert_close(prototype_loss(*mixed), prototype_loss(s, t, m))


def test_an_empty_region_takes_no_part():
    s, t, m = draw(3, 5, 4, 4, 4), draw(3, 5, 4, 4, 4, seed=1), masks()
    m[1, 0] = 0
    got = prototype_loss(s, t, m)
    torch.testing.assert_close(got[1], prototype_loss(s, t, m[:, 1:])[1])
    assert not torch.isclose(got[0], prototype_loss(s, t, m[:, 1:])[0])
    for filled in (torch.zeros_like(m), torch.ones_like(m)):  # the rest alone, and no rest
        student = s.clone().requires_grad_()
        loss = prototype_loss(student, t, filled)
        (gradient,) = torch.autograd.grad(loss.sum(), [student])
        assert torch.isfinite(loss).all()
        assert torch.isfinite(gradient).all()


def test_features_of_zero_have_a_finite_gradient():
    student = torch.zeros(3, 5, 4, 4, 4, requires_grad=True)
    loss = prototype_loss(student, draw(3, 5, 4, 4, 4), masks())
    (gradient,) = torch.autograd.grad(loss.sum(), [student])
    assert torch.isfinite(gradient).all()


def test_masks_are_shares_on_a_coarser_grid():
    m = torch.zeros(1, 1, 4, 4, 4)
    m[0, 0, :2, :2, 0] = 1  # half of the first cell
    weights = class_weights(m, (2, 2, 2))
    assert weights[0, 0].tolist() == [0.5] + [0] * 7
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(1, 8))
    torch.testing.assert_close(class_weights(m, (4, 4, 4))[0, 0], m.flatten())


def test_the_gradient_flows_into_the_student_alone():
    s, t = draw(2, 3, 2, 2, 2).requires_grad_(), draw(2, 3, 2, 2, 2, seed=1).requires_grad_()
    m = (draw(2, 1, 2, 2, 2, seed=3) > 0).double()
    assert gradcheck(lambda x: prototype_loss(x, t.detach(), m), (s,))
    prototype_loss(s, t, m).sum().backward()
    assert t.grad is None


def test_half_precision_is_computed_in_single():
    s, t, m = draw(3, 5, 4, 4, 4), draw(3, 5, 4, 4, 4, seed=1), masks()
    with torch.autocast("cpu", torch.bfloat16):
        half = prototype_loss(s.bfloat16(), t.bfloat16(), m)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), prototype_loss(s.bfloat16().double(), t.bfloat16().double(), m))


def task(student: MultimodalUNet, full: MultimodalUNet | None = None, /, **settings):
    return KdConfig.model_validate({**WEIGHT, **settings}).build_task(student, stage="distilled", teacher=full)


def maps(net: MultimodalUNet, images: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """The input of the head."""
    found = []
    decoder = net.own.decoder if net.config.net == "early" else net.decoder
    handle = decoder.head.register_forward_hook(lambda module, inputs, output: found.append(inputs[0]))
    net(images, visible)
    handle.remove()
    return found[0]


@pytest.mark.parametrize("net", ["compact", "early"])
@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_the_term_compares_the_last_maps_of_the_decoder(net, teacher):
    config = MultimodalUNetConfig(MODALITIES, REGIONS, net=net, channels=(4, 4, 8))
    student, b = MultimodalUNet(config, seed=0), batch(rows=4)
    loss, visible = dropped(task(student, teacher=teacher), b)
    s, t = (maps(student, b["images"], seen) for seen in (visible, b["available"]))
    want = prototype_loss(s, t, b["masks"]).sum()
    torch.testing.assert_close(loss.sums["prototypes"], want, rtol=1e-3, atol=1e-6)
    assert (loss.weights["prototypes"], loss.units["prototypes"]) == (0.1, "labelled")
    first = next(student.parameters())
    got, expected = (torch.autograd.grad(x, [first])[0] for x in (loss.sums["prototypes"], want))
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-5)


def test_a_trained_teacher_may_be_wider_and_is_not_trained():
    config = MultimodalUNetConfig(MODALITIES, REGIONS, channels=(8, 8, 8))
    full, student, b = MultimodalUNet(config, seed=1).eval(), network(), batch()
    loss = task(student, full, modality_dropout=ALL)(b)
    want = prototype_loss(*(maps(n, b["images"], b["available"]) for n in (student, full)), b["masks"]).sum()
    torch.testing.assert_close(loss.sums["prototypes"], want, rtol=1e-4, atol=1e-6)
    loss.sums["prototypes"].backward()
    assert all(parameter.grad is None for parameter in full.parameters())


def test_rows_without_masks_take_no_part():
    b = batch(rows=3)
    b.tensors["labelled"] = torch.tensor([True, False, True])
    t = task(network(), teacher="self")
    loss, visible = dropped(t, b)
    rows = copy.deepcopy(b)
    rows.tensors = {name: x[[0, 2]] for name, x in b.tensors.items()}
    s, full = (maps(t.student, rows["images"], seen) for seen in (visible[[0, 2]], rows["available"]))
    torch.testing.assert_close(
        loss.sums["prototypes"], prototype_loss(s, full, rows["masks"]).sum(), rtol=1e-3, atol=1e-6
    )
    b.tensors["labelled"] = torch.zeros(3, dtype=torch.bool)
    assert float(t(b).sums["prototypes"].detach()) == 0


def test_without_its_weight_nothing_is_computed_and_the_settings_are_as_before():
    student = network()
    t = task(student, teacher="self", prototypes={"weight": 0})
    assert [term.name for term in t.terms] == ["dice", "bce", "output"]
    assert t._forward.paths == []
    assert t.teacher.forward.paths == []
    assert "prototypes" not in KdConfig(teacher="self").stage_settings("distilled")
    assert KdConfig.model_validate(WEIGHT).stage_settings("distilled")["prototypes"]["weight"] == 0.1


def test_prototypes_alone_do_not_learn_from_cases_without_masks():
    assert not KdConfig.model_validate({"teacher": "self", "output": {"weight": 0}, **WEIGHT}).learns_without_masks
    assert KdConfig.model_validate({"teacher": "self", **WEIGHT}).learns_without_masks


def test_networks_that_cannot_be_compared_are_refused():
    with torch.device("meta"):
        reference = MultimodalUNet(MultimodalUNetConfig(MODALITIES, REGIONS, net="reference"))
    with pytest.raises(UserError, match=r"the teacher has model\.net=reference and the student compact"):
        task(network(), reference)
    own = MultimodalUNetConfig(MODALITIES, REGIONS, net="torch.nn:Identity")
    student = network()
    student.config = own
    with pytest.raises(UserError, match=r"the student is your own network torch\.nn:Identity"):
        task(student, teacher="self")
