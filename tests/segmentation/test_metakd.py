"""MetaKD: the weighted pairs, and the importance of modalities that held-out cases teach."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from preceptor.data.types import Case, SegmentationDataset, VolumeFile
from preceptor.errors import UserError
from preceptor.segmentation.data import hold_out
from preceptor.segmentation.importance import held_out_loss, weighted_pairs
from preceptor.segmentation.losses import bce_loss, dice_loss
from preceptor.segmentation.metakd import MetaKdConfig
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from tests.segmentation.test_lckd import ALL, MODALITIES, REGIONS, batch, network


def features(*rows: list[float]) -> torch.Tensor:
    """Constant features (B, N, 2, 3, 3, 3): entry i is the value of modality i."""
    return torch.tensor(rows)[:, :, None, None, None, None].expand(-1, -1, 2, 3, 3, 3).clone().requires_grad_()


def test_pairs_are_weighted_by_the_ratio_of_their_importance():
    s = torch.tensor([0.5, 0.3, 0.2])
    got = weighted_pairs(features([1.0, 3.0, 7.0], [1.0, 3.0, 7.0]), torch.tensor([[1, 1, 1], [1, 0, 1]]).bool(), s)
    pair = {(i, j): float(s[i] / s[j]) for i in range(3) for j in range(3)}
    both = pair[0, 2] * 6 + pair[2, 0] * 6
    assert got.tolist() == pytest.approx(
        [2 * pair[0, 1] + 2 * pair[1, 0] + both + 4 * pair[1, 2] + 4 * pair[2, 1], both]
    )


def test_gradients_reach_the_learning_modality_of_each_pair_alone():
    s, f = torch.tensor([0.8, 0.2], requires_grad=True), features([0.0, 1.0])
    weighted_pairs(f, torch.ones(1, 2, dtype=torch.bool), s).sum().backward()
    # d|f_i - f_j| / d f_j is +-1 over the number of cells; f_1 learns with weight s_0/s_1 = 4, f_0 with 1/4.
    assert f.grad.sum(dim=(2, 3, 4, 5)).tolist() == [pytest.approx([-0.25, 4.0])]
    assert s.grad is None


def test_absent_features_are_not_read():
    f = features([1.0, float("nan"), 2.0])
    got = weighted_pairs(f, torch.tensor([[True, False, True]]), torch.full((3,), 1 / 3))
    assert got.tolist() == [2.0]
    got.sum().backward()
    assert torch.isfinite(f.grad).all()


def task(student, held_out, **settings):
    config = MetaKdConfig.model_validate({"modality_dropout": ALL, **settings})
    return config.build_task(student, stage="distilled", held_out=held_out, steps_per_epoch=2.0)


@pytest.mark.parametrize("levels", ["bottleneck", "all"])
def test_the_loss_has_the_features_of_one_or_all_levels(levels):
    student, b = network(), batch()
    t = task(student, lambda n: batch(), pairs={"levels": levels})
    loss = t(b)
    found = student(b["images"], b["available"]).features
    chosen = found if levels == "all" else found[-1:]
    want = sum(weighted_pairs(f, b["available"], torch.full((4,), 0.25)).sum() for f in chosen) / len(chosen)
    torch.testing.assert_close(loss.sums["pairs"], want)
    assert loss.weights["pairs"] == 0.1


@pytest.mark.parametrize("fill", ["all_levels", "bottleneck"])
def test_the_held_out_loss_multiplies_each_feature_by_its_importance(fill):
    config = MultimodalUNetConfig(MODALITIES, REGIONS, channels=(4, 4, 8), fill=fill)
    student, b = MultimodalUNet(config, seed=0), batch()
    s = torch.tensor([0.1, 0.2, 0.3, 0.4])
    got = held_out_loss(student, b, s)
    weighted = copy.deepcopy(student)
    with torch.no_grad():
        # A feature times s is the same as the weights of its join times s, if none is filled in.
        for join in weighted.decoder.joins:
            join.weight.view(join.outside, 4, join.inside).mul_(s[None, :, None])
        b["available"][:] = True
        whole = held_out_loss(student, b, s)
        logits = weighted(b["images"], b["available"]).logits
    want = (dice_loss(logits, b["masks"]) + bce_loss(logits, b["masks"])) / 2
    torch.testing.assert_close(whole, want, rtol=1e-4, atol=1e-5)
    assert torch.isfinite(got)
    assert student.training


def test_importance_descends_on_held_out_cases_and_the_network_gets_no_gradient():
    student = network()
    t = task(student, lambda n: batch(seed=n), importance={"every": 2, "learning_rate": 0.05})
    term = t.terms[-1]
    loss = held_out_loss(student, batch(seed=0), term.importance())
    (gradient,) = torch.autograd.grad(loss, [term.scores_N])
    t.after_step(1)
    assert term.importance().tolist() == [0.25] * 4
    t.after_step(2)
    # The first step of Adam is the learning rate against the sign of the gradient.
    torch.testing.assert_close(term.scores_N.detach(), -0.05 * gradient.sign(), rtol=1e-3, atol=1e-4)
    assert all(parameter.grad is None for parameter in student.parameters())
    assert [entry["step"] for entry in t.results()["importance"]] == [2]
    assert sum(t.results()["importance"][0][m] for m in MODALITIES) == pytest.approx(1)
    trained = {name for name, _ in t.named_parameters()}
    assert all(name.startswith("student.") for name in trained), "the optimiser of the network does not train s"


def test_a_resumed_importance_goes_on_as_if_it_had_not_stopped():
    student = network()
    asked: list[int] = []

    def held_out(number):
        asked.append(number)
        return batch(seed=number)

    straight, first, second = (task(student, held_out, importance={"every": 1}) for _ in range(3))
    for step in range(1, 7):
        straight.after_step(step)
    for step in range(1, 4):
        first.after_step(step)
    second.load_task_state({name: value.clone() for name, value in first.task_state().items()})
    asked.clear()
    for step in range(4, 7):
        second.after_step(step)
    assert asked == [3, 4, 5]
    assert second.results() == straight.results()
    for name, value in straight.task_state().items():
        assert torch.equal(second.task_state()[name], value), name


def test_a_held_out_case_with_a_broken_voxel_is_named():
    b = batch()
    b["images"][1, 0, 3, 4, 5] = torch.nan
    with pytest.raises(UserError, match="held-out cases case0, case1 is not finite at step 4"):
        task(network(), lambda n: b).after_step(4)


def test_a_network_without_features_is_refused():
    config = MultimodalUNetConfig(MODALITIES, REGIONS, net="early", channels=(4, 4, 8))
    with pytest.raises(UserError, match=r"method\.pairs compares features, and the network early"):
        task(MultimodalUNet(config), lambda n: batch())


def dataset(tmp_path, *rows: tuple[str, str, str]) -> SegmentationDataset:
    """Cases (id, group, split), each with an image of its own."""
    cases = []
    for name, group, split in rows:
        path = tmp_path / f"{name}.nii.gz"
        path.write_text(name)
        cases.append(Case(id=name, images={"flair": VolumeFile(path)}, mask=VolumeFile(path), group=group, split=split))
    return SegmentationDataset(
        name="volumes", variant="own", samples=cases, modalities=("flair",), regions={"a": (1,)}, root=tmp_path
    )


def test_patients_are_held_out_as_a_whole(tmp_path):
    rows = [(f"p{i}-{visit}", f"p{i}", "train") for i in range(10) for visit in range(2)]
    data = dataset(tmp_path, *rows, ("v", "v", "validation"))
    held_out = hold_out(data, 0.3, seed=0)
    groups = {case.group for case in held_out}
    assert (len(held_out), len(groups)) == (6, 3)
    assert hold_out(data, 0.3, seed=0) == held_out
    assert {case.group for case in hold_out(data, 0.3, seed=1)} != groups


def test_held_out_cases_that_select_the_model_are_refused(tmp_path):
    rows = [("a", "one", "train"), ("b", "one", "train"), ("c", "two", "train"), ("v", "v", "validation")]
    data = dataset(tmp_path, *rows)
    held = hold_out(data, 0.5, seed=0)
    same_patient = replace(data.split("validation")[0], group=held[0].group)
    data.samples = [same_patient if case.id == "v" else case for case in data.samples]
    with pytest.raises(UserError, match=r"held_out holds out the cases .* also among the validation cases"):
        hold_out(data, 0.5, seed=0)
    same_image = replace(data.split("validation")[0], group="v", images=held[0].images)
    data.samples = [same_image if case.id == "v" else case for case in data.samples]
    with pytest.raises(UserError, match=r"also among the validation cases"):
        hold_out(data, 0.5, seed=0)


def test_an_unlabelled_case_of_a_held_out_patient_is_refused(tmp_path):
    rows = [("a", "one", "train"), ("c", "two", "train"), ("v", "v", "validation")]
    data = dataset(tmp_path, *rows)
    held = hold_out(data, 0.5, seed=0)
    data = dataset(tmp_path, *rows, ("u", held[0].group, "unlabelled"))
    with pytest.raises(UserError, match=r"also among the training cases"):
        hold_out(data, 0.5, seed=0)


def test_something_must_be_left_to_train_on(tmp_path):
    data = dataset(tmp_path, ("a", "one", "train"), ("v", "v", "validation"))
    with pytest.raises(UserError, match=r"held_out=0.1 holds out 0 of 1 training cases"):
        hold_out(data, 0.1, seed=0)
