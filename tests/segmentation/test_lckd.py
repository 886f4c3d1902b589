from __future__ import annotations

import copy

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

from preceptor.config import TrainConfig
from preceptor.distill.loss_term import LossTerm
from preceptor.distill.projectors import projector
from preceptor.segmentation.cross_modal import cross_modal
from preceptor.segmentation.kd import KdConfig
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.losses import bce_loss, binary_kl, dice_loss, mean_available
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.settings import ModalityDropoutConfig
from preceptor.segmentation.task import SegmentationTask
from preceptor.segmentation.teachers import full_modality_teacher
from preceptor.task import Batch
from preceptor.training.guards import offenders
from preceptor.training.setup import make_optimizer

MODALITIES, REGIONS = ("flair", "t1", "t1ce", "t2"), ("et", "tc", "wt")
ALL = {"kind": "none"}


def network(seed: int = 0) -> MultimodalUNet:
    return MultimodalUNet(MultimodalUNetConfig(MODALITIES, REGIONS, channels=(4, 4, 8)), seed=seed)


def batch(rows: int = 2, seed: int = 0) -> Batch:
    g = torch.Generator().manual_seed(seed)
    available = torch.ones(rows, 4, dtype=torch.bool)
    available[0, 1] = False
    masks = (torch.rand(rows, 3, 16, 16, 16, generator=g) < 0.2).float()
    images = torch.randn(rows, 4, 16, 16, 16, generator=g) * available[:, :, None, None, None]
    names = [f"case{i}" for i in range(rows)]
    labelled = torch.ones(rows, dtype=torch.bool)
    return Batch({"images": images, "available": available, "masks": masks, "labelled": labelled}, names, names)


SCORES = torch.tensor([[0.1, 0.2, 0.9], [0.0, 0.0, 0.1], [0.8, 0.7, 0.3], [0.1, 0.3, 0.8]])


def task(student: MultimodalUNet, asked: list | None = None, **method) -> SegmentationTask:
    def votes(net: MultimodalUNet) -> torch.Tensor:
        assert net is student
        assert not net.training
        if asked is not None:
            asked.append(len(asked))
        return SCORES

    config = LckdConfig.model_validate({"name": "lckd", "modality_dropout": ALL, **method})
    return config.build_task(student, stage="distilled", votes=votes, steps_per_epoch=0.6)  # 5 epochs: 3 steps


def test_without_distillation_the_masks_alone_teach():
    student = network()
    alone = LckdConfig().build_task(student, stage="baseline")
    torch.manual_seed(0)
    loss = alone(batch())
    assert set(loss.sums) == {"dice", "bce"}
    assert alone.task_state() == {}
    assert alone.results() == {}


@pytest.mark.parametrize(("kind", "teachers"), [("single", [2]), ("multi", [0, 2])])
@pytest.mark.parametrize("levels", ["bottleneck", "all"])
def test_the_elected_teach(kind, teachers, levels):
    student = network()
    t = task(student, teachers=kind, cross_modal={"weight": 0.3, "levels": levels, "students": "all", "pairs": "sum"})
    t.on_interval(0.0)
    b = batch()
    loss = t(b)
    features = student(b["images"], b["available"]).features
    chosen = features if levels == "all" else features[-1:]
    want = sum(cross_modal(f, b["available"], teachers, students="all", pairs="sum")[0].sum() for f in chosen)
    assert torch.allclose(loss.sums["cross_modal"], want / len(chosen))
    assert loss.weights["cross_modal"] == 0.3


@pytest.mark.parametrize("levels", ["bottleneck", "all"])
def test_students_may_be_compared_through_a_map_of_their_own(levels):
    student = network()
    plain, projecting = (
        task(student, cross_modal={"levels": levels, "projector": projector}) for projector in (False, True)
    )
    names = [name for name, _ in projecting.named_parameters() if "projectors" in name]
    assert len(names) == 2 * 4 * (3 if levels == "all" else 1)
    assert not any("projectors" in name for name in student.state_dict())
    for t in (plain, projecting):
        t.on_interval(0.0)
    assert not torch.allclose(projecting(batch()).sums["cross_modal"], plain(batch()).sums["cross_modal"])
    for linear in projecting.terms[-1].projectors.values():
        torch.nn.init.eye_(linear.weight)
    loss = projecting(batch()).sums["cross_modal"]
    assert torch.allclose(loss, plain(batch()).sums["cross_modal"])
    loss.backward()
    # Elected are flair and t1ce: the maps of the two that learn alone get a gradient.
    taught = {
        name
        for name, linear in projecting.terms[-1].projectors.items()
        if linear.weight.grad is not None and linear.weight.grad.abs().sum() > 0
    }
    assert {name.split()[1] for name in taught} == {"t1", "t2"}


def test_the_seed_draws_the_parameters_of_the_terms():
    """Those of seed 0 are the numbers that the generator of seed 0 draws, in the order of levels and modalities."""

    def weights(seed: int, student_seed: int = 0) -> list[torch.Tensor]:
        config = LckdConfig.model_validate({"cross_modal": {"projector": True, "levels": "all"}})
        built = config.build_task(network(student_seed), stage="distilled", votes=lambda _: SCORES, seed=seed)
        return [linear.weight for linear in built.terms[-1].projectors.values()]

    generator = torch.Generator().manual_seed(0)
    for weight in weights(0):
        assert torch.equal(weight, torch.empty_like(weight).normal_(0, weight.shape[1] ** -0.5, generator=generator))
    for one, same, other in zip(weights(1), weights(1, student_seed=5), weights(2), strict=True):
        assert torch.equal(one, same)
        assert not torch.equal(one, other)


class Drawing(LossTerm):
    name = "drawing"

    def prepare(self, student, teacher_config, generator):
        self.drawn = torch.nn.Parameter(torch.rand(3, generator=generator))


def test_own_terms_draw_from_the_seed():
    method = LckdConfig.model_validate({"losses": [{"loss": f"{__name__}:Drawing"}], "cross_modal": {"weight": 0}})
    built = [method.build_task(network(), stage="distilled", seed=seed) for seed in (0, 1)]
    for seed, task in enumerate(built):
        expected = torch.rand(3, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(task.terms[-1].drawn.data, expected)


def test_per_task_each_teacher_speaks_where_its_region_lies():
    student = network()
    t = task(student, teachers="per_task", cross_modal={"students": "others"})
    t.on_interval(0.0)
    b = batch()
    b["masks"].zero_()
    b["masks"][:, 2, :8] = 1  # wt alone: its teacher is flair, in the lower half
    loss = t(b)
    f = student(b["images"], b["available"]).features[-1]
    below = f[:, :, :, : f.shape[3] // 2]
    want = cross_modal(below, b["available"], [0], students="others", pairs="mean")[0].sum() / 3
    assert torch.allclose(loss.sums["cross_modal"], want, atol=1e-6)


def test_an_election_before_the_first_step_and_then_every_few_steps():
    asked: list = []
    t = task(network(), asked)
    for step in range(7):
        t.on_interval(step / 7)
        t.after_step(step + 1)
    assert [vote["step"] for vote in t.results()["elections"]] == [0, 3, 6]
    other = task(network(), [])
    other.load_task_state(t.task_state())
    assert other.results()["elections"] == t.results()["elections"]
    other.on_interval(6 / 7)  # a resumed run does not vote again
    assert len(other.results()["elections"]) == 3
    assert t.student.training


def test_the_appointed_teacher_puts_off_the_first_vote():
    asked: list = []
    t = task(network(), asked, election={"initial": "flair"})
    t.on_interval(0.0)
    assert asked == []
    t.after_step(3)
    assert asked == [0]


def test_a_full_teacher_is_not_trained_and_teaches_nothing_to_its_equal():
    student = network()
    full = copy.deepcopy(student)
    config = LckdConfig.model_validate(
        {
            "name": "lckd",
            "modality_dropout": ALL,
            "cross_modal": {"weight": 0},
            "full": {"weight": 2.0, "features": 0.5},
        }
    )
    t = config.build_task(student, stage="distilled", teacher=full)
    b = batch()
    loss = t(b)
    assert float(loss.sums["full/output"].detach()) == pytest.approx(0, abs=1e-6)
    assert float(loss.sums["full/features"].detach()) == pytest.approx(0, abs=1e-6)
    assert (loss.weights["full/output"], loss.weights["full/features"]) == (2.0, 1.0)
    assert all(name.startswith("student.") for name in t.state_dict())
    loss.total({"samples": 2.0, "labelled": 2.0}).backward()
    assert all(p.grad is None for p in full.parameters())
    t.train()
    assert not any(module.training for module in full.modules())


def test_what_the_full_teacher_segments_stands_in_for_masks_that_are_unknown():
    student, full = network(), network(seed=1).eval()
    config = LckdConfig.model_validate(
        {"name": "lckd", "modality_dropout": ALL, "cross_modal": {"weight": 0}, "full": {"weight": 1.0}}
    )
    b = batch()
    known = b["masks"].clone()
    b.tensors["labelled"] = torch.tensor([True, False])
    b.tensors["masks"][1] = 0
    student.eval()
    with torch.no_grad():
        found = student(b["images"], b["available"]).logits
        theirs = full(b["images"], b["available"]).logits
        loss = config.build_task(student, stage="distilled", teacher=full)(b)
    hard = (theirs[1:] > 0).float()
    assert 0 < float(hard.mean()) < 1
    for name, of in (("dice", dice_loss), ("bce", bce_loss)):
        expected = of(found[:1], known[:1]) + of(found[1:], hard)
        torch.testing.assert_close(loss.sums[name], expected)
    torch.testing.assert_close(loss.sums["full/output"], binary_kl(found, theirs, 2.0).sum())


def test_binary_kl_is_that_of_bernoulli_variables():
    g = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 4, 4, 4, generator=g), torch.randn(2, 3, 4, 4, 4, generator=g)
    want = 9 * kl_divergence(Bernoulli(logits=t / 3), Bernoulli(logits=s / 3)).flatten(1).mean(1)
    assert torch.allclose(binary_kl(s, t, 3.0), want, atol=1e-5)
    assert torch.isfinite(binary_kl(s * 1e4, t * 1e4, 1.0)).all()


def test_mean_of_what_is_available():
    f = torch.randn(2, 3, 4, 1, 2, 2)
    available = torch.tensor([[True, False, True], [False, True, False]])
    got = mean_available(f, available)
    assert torch.allclose(got[0], (f[0, 0] + f[0, 2]) / 2, atol=1e-6)
    assert torch.allclose(got[1], f[1, 1], atol=1e-6)


def test_plain_distillation_adds_the_kl_of_every_voxel_to_the_loss_of_the_masks():
    student, full = network().eval(), network(seed=1).eval()
    method = KdConfig.model_validate({"modality_dropout": ALL, "output": {"weight": 0.7, "temperature": 3.0}})
    t = method.build_task(student, stage="distilled", teacher=full)
    b = batch()
    loss = t(b)
    with torch.no_grad():
        s, f = (net(b["images"], b["available"]).logits for net in (student, full))
    want = 9 * kl_divergence(Bernoulli(logits=f / 3), Bernoulli(logits=s / 3)).mean(dim=(1, 2, 3, 4)).mean()
    total = (dice_loss(s, b["masks"]) + bce_loss(s, b["masks"])) / 2 + 0.7 * want
    torch.testing.assert_close(loss.total({"samples": 2.0, "labelled": 2.0}), total, rtol=1e-4, atol=1e-5)
    assert set(method.build_task(student, stage="baseline")(b).sums) == {"dice", "bce"}
    assert method.needs_teacher("distilled")
    assert not method.needs_teacher("baseline")


def test_the_teacher_stage_drops_nothing():
    student = network().eval()
    b = batch()
    task = LckdConfig().build_task(student, stage="teacher")
    torch.testing.assert_close(task(b).sums["dice"], dice_loss(student(b["images"], b["available"]).logits, b["masks"]))


def test_an_own_term_taps_modules_of_both_networks():
    class Stems(LossTerm):
        name = "stems"
        student_features = teacher_features = ("decoder.head",)

        def prepare(self, student, teacher_config, generator):
            self.projector = projector(len(student.config.regions), len(teacher_config.regions), generator)

        def forward(self, student, teacher, batch):
            s = self.projector(student.features["decoder.head"].flatten(2).mean(dim=2))
            return (s - teacher.features["decoder.head"].flatten(2).mean(dim=2)).square().sum()

    student, full = network(), network(seed=1)
    teacher = full_modality_teacher(full, ["decoder.head"])
    modality_dropout = ModalityDropoutConfig(kind="none")
    task = SegmentationTask(
        student, [Stems()], modality_dropout=modality_dropout, teacher=teacher, teacher_config=full.config
    )
    task(batch()).sums["stems"].backward()
    assert task.terms[0].projector.weight.grad.abs().sum() > 0
    assert next(student.parameters()).grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in full.parameters())


def test_the_case_with_a_broken_voxel_is_named():
    t, b = task(network()), batch(rows=3)
    t.on_interval(0.0)
    b["images"][1, 2, 3, 4, 5] = torch.nan
    counts = {"samples": 1.0, "labelled": 1.0}
    assert not torch.isfinite(t(b).total(counts))
    assert offenders([b], lambda one: t(one).total(counts)) == ["case1"]


@pytest.mark.parametrize("net", ["compact", "reference", "early"])
def test_every_convolution_decays_and_no_norm_or_bias_does(net):
    with torch.device("meta"):
        student = MultimodalUNet(MultimodalUNetConfig(MODALITIES, REGIONS, net=net))
    task = LckdConfig().build_task(student, stage="baseline")
    optimizer, names = make_optimizer(task, TrainConfig(weight_decay=0.3, optimizer="sgd"))
    shapes = {name: parameter.dim() for name, parameter in task.named_parameters()}
    decays = [group["weight_decay"] for group in optimizer.param_groups for _ in group["params"]]
    assert dict(zip(names, decays, strict=True)) == {name: 0.3 if dims > 1 else 0.0 for name, dims in shapes.items()}
    assert any("joins.0.weight" in name for name in names)


def test_samples_without_masks_have_no_part_in_the_losses_of_the_masks():
    student = network().eval()
    t = task(student, cross_modal={"levels": "all"})
    t.on_interval(0.0)
    b = batch(rows=3)
    whole = t(b)
    b.tensors["labelled"] = torch.tensor([True, False, True])
    loss = t(b)
    assert t.units(b) == {"samples": 3, "labelled": 2}
    logits = student(b["images"], b["available"]).logits
    rows = [0, 2]
    torch.testing.assert_close(loss.sums["dice"], dice_loss(logits[rows], b["masks"][rows]))
    torch.testing.assert_close(loss.sums["bce"], bce_loss(logits[rows], b["masks"][rows]))
    torch.testing.assert_close(loss.sums["cross_modal"], whole.sums["cross_modal"])
    b.tensors["labelled"] = torch.zeros(3, dtype=torch.bool)
    nothing = t(b)
    assert float(nothing.sums["dice"].detach()) == float(nothing.sums["bce"].detach()) == 0
    nothing.total({"samples": 3.0, "labelled": 1.0}).backward()
