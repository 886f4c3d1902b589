"""Teachers of segmentation: the student itself, its moving average, and networks dedicated to one modality."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace

import pytest
import torch
from torch.distributions import Bernoulli, kl_divergence

import preceptor
from preceptor import api
from preceptor.errors import UserError
from preceptor.segmentation.kd import KdConfig
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.specialist_networks import SpecialistNetworks
from preceptor.segmentation.specialists import SpecialistsConfig
from preceptor.strict_yaml import read_yaml, write_yaml
from preceptor.tasks import load_recipe
from preceptor.teachers.online import EmaTeacher
from tests.segmentation.test_lckd import ALL, MODALITIES, REGIONS, batch, network

SEEN = ("images", "available")


def kl(student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> torch.Tensor:
    """T^2 KL of Bernoulli variables: the sum over samples of the mean over regions and voxels."""
    pairs = (Bernoulli(logits=x / temperature) for x in (teacher, student))
    return temperature**2 * kl_divergence(*pairs).flatten(1).mean(1).sum()


def kd(student: MultimodalUNet, **settings):
    return KdConfig.model_validate(settings).build_task(student, stage="distilled")


def dropped(task, b):
    """Return (loss terms, visible): the terms of a batch, and which modalities the student saw."""
    seen = {}
    prepare = task.prepare

    def record(batch, teacher):
        seen["visible"] = batch["visible"]
        return prepare(batch, teacher)

    task.prepare = record
    torch.manual_seed(3)
    return task(b), seen["visible"]


def test_the_student_learns_from_its_own_prediction_from_all_modalities():
    student, b = network(), batch(rows=4)
    task = kd(student, teacher="self", output={"weight": 0.5, "temperature": 3.0, "ramp": 0.4})
    loss, visible = dropped(task, b)
    assert not torch.equal(visible, b["available"])
    s, t = (student(b["images"], subset).logits for subset in (visible, b["available"]))
    torch.testing.assert_close(loss.sums["output"], kl(s, t.detach(), 3.0), rtol=1e-4, atol=1e-6)
    (got,) = torch.autograd.grad(loss.sums["output"], [student.decoder.head.weight])
    (want,) = torch.autograd.grad(kl(s, t.detach(), 3.0), [student.decoder.head.weight])
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-6)
    task.on_interval(0.1)
    assert task(b).weights["output"] == pytest.approx(0.5 * 0.1 / 0.4)


def test_a_student_that_sees_everything_has_nothing_to_learn_from_itself():
    loss = kd(network(), teacher="self", modality_dropout=ALL)(batch())
    assert float(loss.sums["output"].detach()) == pytest.approx(0, abs=1e-7)


def test_own_predictions_come_without_dropout_and_do_not_change_the_mode():
    student = network().train()
    modes = []
    student.register_forward_hook(lambda module, inputs, output: modes.append(module.training))
    kd(student, teacher="self")(batch())
    assert modes == [False, True]
    assert student.training


def test_the_mean_teacher_is_the_moving_average_of_the_student():
    student, b = network(), batch(rows=3)
    task = kd(student, teacher="ema", ema_decay=0.9)
    assert isinstance(task.teacher, EmaTeacher)
    expected = copy.deepcopy(student)
    for step in range(12):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
        task.after_step(step + 1)
        decay = min(0.9, (1 + step) / (10 + step))  # warm-up
        with torch.no_grad():
            for average, parameter in zip(expected.parameters(), student.parameters(), strict=True):
                average.mul_(decay).add_(parameter, alpha=1 - decay)
    loss, visible = dropped(task, b)
    with torch.no_grad():
        want = kl(student(b["images"], visible).logits, expected(b["images"], b["available"]).logits)
    torch.testing.assert_close(loss.sums["output"].detach(), want, rtol=1e-3, atol=1e-6)
    assert all(name.startswith("student.") for name in task.state_dict()), "the average is not exported"

    resumed = kd(copy.deepcopy(student), teacher="ema", ema_decay=0.9)
    resumed.load_task_state({name: value.clone() for name, value in task.task_state().items()})
    assert resumed.teacher.fingerprint == task.teacher.fingerprint
    assert resumed.teacher.step == 12


@pytest.mark.parametrize("teacher", ["self", "ema"])
def test_cases_without_masks_learn_from_the_logits_alone(teacher):
    student, b = network(), batch(rows=3)
    task = kd(student, teacher=teacher, modality_dropout=ALL)
    whole = task(b)
    b.tensors["labelled"] = torch.tensor([True, False, True])
    loss = task(b)
    assert task.units(b) == {"samples": 3, "labelled": 2}
    assert loss.sums["bce"] < whole.sums["bce"]
    torch.testing.assert_close(loss.sums["output"], whole.sums["output"])


def test_a_teacher_of_some_modalities_is_given_those_alone():
    """It draws the masks of cases that have other modalities too."""
    student, own, b = network(), single("", 1, ("t1ce", "flair")), batch(rows=3)
    method = KdConfig.model_validate({"modality_dropout": ALL})
    teacher = method.combine_teachers({"method.teaching_run": own}, MODALITIES)
    task = method.build_task(student, stage="distilled", teacher=teacher)
    b.tensors["labelled"] = torch.tensor([True, True, False])
    with torch.no_grad():
        logits = own(b["images"][:, [2, 0]], b["available"][:, [2, 0]]).logits
        want = kl(student(b["images"], b["available"]).logits, logits)
    torch.testing.assert_close(task(b).sums["output"].detach(), want, rtol=1e-4, atol=1e-6)
    masks = task.prepare(b, task.teacher.signal(b))["masks"]
    assert torch.equal(masks[:2], b["masks"][:2])
    assert torch.equal(masks[2], (logits[2] > 0).float())


@pytest.mark.parametrize("prototypes", [0.0, 0.1])
def test_the_terms_of_a_teacher_are_means_over_the_samples_that_it_sees(prototypes):
    """The others learn from their masks, if they have any, whatever the teacher would say."""
    student, own, b = network(), single("", 1, ("t1ce", "flair")), batch(rows=4)
    b.tensors["available"] = b["available"] & torch.tensor([[True] * 4, [False, True, False, True]])[[0, 1, 0, 1]]
    b.tensors["images"] = b["images"] * b["available"][:, :, None, None, None]
    b.tensors["labelled"] = torch.tensor([True, True, False, False])
    method = KdConfig.model_validate({"modality_dropout": ALL, "prototypes": {"weight": prototypes}})
    teacher = method.combine_teachers({"method.teaching_run": own}, MODALITIES)
    task = method.build_task(student, stage="distilled", teacher=teacher)
    seen = method.build_task(student, stage="distilled", teacher=teacher)
    assert task.units(b) == {"samples": 4, "labelled": 3, "taught": 2}
    loss = task(b)
    two = replace(b, tensors={k: v[[0, 2]] for k, v in b.tensors.items()}, ids=["0", "2"], keys=["0", "2"])
    alone = seen(two)
    for name in ("output", "prototypes")[: 1 + (prototypes > 0)]:
        assert (loss.units[name], alone.units[name]) == ("taught", "taught")
        torch.testing.assert_close(loss.sums[name], alone.sums[name], rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        want = kl(student(two["images"], two["available"]).logits, own(*(two[k][:, [2, 0]] for k in SEEN)).logits)
    torch.testing.assert_close(loss.sums["output"].detach(), want, rtol=1e-4, atol=1e-6)
    masks = task.prepare(
        replace(b, tensors={**b.tensors, "taught": teacher.sees(b["available"])}), task.teacher.signal(b)
    )
    assert masks["labelled"].tolist() == [True, True, True, False]
    assert torch.equal(masks["masks"][:2], b["masks"][:2])
    # Nothing teaches a sample without a mask that the teacher does not see.
    changed = replace(b, tensors={**b.tensors, "images": b["images"].clone()})
    changed.tensors["images"][3] *= 2
    for name, value in task(changed).sums.items():
        torch.testing.assert_close(value, loss.sums[name], rtol=1e-4, atol=1e-6)


def test_a_batch_of_samples_that_the_teacher_does_not_see_has_no_gradient_from_it():
    student, own, b = network(), single("", 1, ("t1ce",)), batch(rows=2)
    b.tensors["available"] = b["available"] & torch.tensor([True, True, False, True])
    method = KdConfig.model_validate({"modality_dropout": ALL})
    task = method.build_task(
        student, stage="distilled", teacher=method.combine_teachers({"method.teaching_run": own}, MODALITIES)
    )
    loss = task(b)
    assert task.units(b)["taught"] == 0
    assert loss.sums["output"].item() == 0
    gradients = torch.autograd.grad(loss.sums["output"], list(student.parameters()), allow_unused=True)
    assert all(one is None or not bool(one.any()) for one in gradients)


def test_a_teacher_of_other_modalities_or_with_other_features_is_refused():
    full = {"cross_modal": {"weight": 0}, "full": {"weight": 1, "features": 0.1}}
    for method, own in ((KdConfig(), ("flair", "pd")), (LckdConfig.model_validate(full), ("flair", "t1ce"))):
        with pytest.raises(UserError, match=r"network of method\.teaching_run has the modalities \['flair', '"):
            method.combine_teachers({"method.teaching_run": single("", 1, own)}, MODALITIES)


def test_no_other_teacher_is_accepted_beside_the_student(tmp_path):
    with pytest.raises(UserError, match=r"method\.teacher=ema has no other teacher.*remove it"):
        preceptor.train("lckd-demo", ["method={name: kd, teacher: ema, teaching_run: runs/a}"])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            "{name: lckd, teaching_run: runs/a}",
            r"full\.weight=0 has no other .*=runs/a is not used; remove it, or set meth",
        ),
        ("{name: metakd, teaching_run: runs/a}", r"method\.name=metakd has no other .*=runs/a is not used; remove it"),
    ],
)
def test_a_teaching_run_without_effect_is_refused(method, message):
    with pytest.raises(UserError, match=message):
        preceptor.train("lckd-demo", [f"method={method}", "data.unlabelled=none"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lckd", "metakd"])
def test_a_finished_run_with_a_teaching_run_without_effect_is_evaluated(trained, tmp_path, method):
    """Earlier versions accepted it. Nothing is trained, so that it need not exist."""
    run = shutil.copytree(trained / "run", tmp_path / "run")
    for place in (run / "recipe.yaml", run / "distilled" / "recipe.yaml"):
        raw = read_yaml(place.read_text("utf-8"), str(place))
        raw["method"] = (raw["method"] if method == "lckd" else {"name": method}) | {"teaching_run": "runs/gone"}
        place.write_text(write_yaml(raw), "utf-8")
    scores = json.loads((run / "distilled" / "results.json").read_text("utf-8"))["protocols"]
    assert preceptor.evaluate(run, output=tmp_path / "other")["protocols"] == scores
    assert preceptor.evaluate(run)["protocols"] == scores
    assert api.report(run).is_file()
    assert preceptor.compare([run / "distilled", run / "baseline"], output=tmp_path / "compared").groups
    with pytest.raises(UserError, match=r"method\.teaching_run=runs/gone is not used; remove it"):
        preceptor.train(run)


@pytest.mark.parametrize(
    "method", ["{name: lckd, full: {weight: 1}, teaching_run: RUN}", "{name: kd, teaching_run: RUN}"]
)
def test_a_teaching_run_with_effect_is_accepted(tmp_path, method):
    recipe = load_recipe("lckd-demo", [f"method={method.replace('RUN', str(tmp_path))}", "stages=[distilled]"])
    assert recipe.method.teaching_run == str(tmp_path)


def test_a_student_cannot_start_from_itself():
    with pytest.raises(UserError, match=r"initialise_from_teacher=true needs a trained teacher, and .*=self has none"):
        load_recipe("lckd-demo", ["method={name: kd, teacher: self, initialise_from_teacher: true}"])


def single(name: str, seed: int, modalities=None) -> MultimodalUNet:
    config = MultimodalUNetConfig(tuple(modalities or [name]), REGIONS, channels=(4, 4, 8))
    return MultimodalUNet(config, seed=seed).eval()


def specialists(**networks: MultimodalUNet) -> SpecialistNetworks:
    return SpecialistNetworks(networks, MODALITIES)


def subset(*names: str) -> torch.Tensor:
    return torch.tensor([name in names for name in MODALITIES])


@pytest.mark.parametrize("other", [None, MODALITIES, ("t2", "t1ce")])
def test_a_single_modality_is_taught_by_its_specialist(other):
    """The specialist has its modality alone, all of them, or some in another order."""
    own, full = single("t1ce", 1, other), network(seed=2).eval()
    b = batch(rows=3)
    visible = torch.stack([subset("t1ce"), subset("t1ce", "t2"), subset("flair")])
    with torch.no_grad():
        got = specialists(t1ce=own, full=full)(b["images"], visible, b["available"])
        place = own.config.modalities.index("t1ce")
        alone = torch.zeros(1, len(own.config.modalities), 16, 16, 16)
        alone[:, place] = b["images"][:1, 2]
        available = torch.zeros(1, len(own.config.modalities), dtype=torch.bool)
        available[:, place] = True
        torch.testing.assert_close(got[:1], own(alone, available).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[1:], full(b["images"][1:], b["available"][1:]).logits, rtol=1e-4, atol=1e-5)


def test_without_a_full_network_the_probabilities_of_the_specialists_are_averaged():
    networks = {name: single(name, seed) for seed, name in enumerate(MODALITIES)}
    b = batch(rows=2)
    visible = torch.stack([subset("flair", "t2"), subset("t1", "t1ce", "t2")])
    with torch.no_grad():
        got = specialists(**networks)(b["images"], visible, b["available"]).sigmoid()
        one = torch.ones(2, 1, dtype=torch.bool)
        p = {n: net(b["images"][:, [i]], one).logits.sigmoid() for i, (n, net) in enumerate(networks.items())}
        torch.testing.assert_close(got[0], (p["flair"][0] + p["t2"][0]) / 2, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(got[1], (p["t1"][1] + p["t1ce"][1] + p["t2"][1]) / 3, rtol=1e-4, atol=1e-6)


def test_certain_specialists_have_a_finite_mean():
    networks = {name: single(name, 0) for name in MODALITIES}
    for sign, net in zip((1, -1, 1, 1), networks.values(), strict=True):
        torch.nn.init.constant_(net.decoder.head.bias, sign * 1e4)
    b = batch(rows=1)
    got = specialists(**networks)(b["images"], subset("flair", "t1")[None], b["available"])
    torch.testing.assert_close(got.detach(), torch.zeros_like(got), atol=20, rtol=0)


def test_the_student_learns_from_the_teacher_of_the_subset_that_it_sees():
    student = network()
    method = SpecialistsConfig.model_validate({"runs": dict.fromkeys([*MODALITIES, "full"], "run")})
    networks = {name: single(name, 5 + i) for i, name in enumerate(MODALITIES)} | {"full": network(seed=3).eval()}
    teacher = method.combine_teachers({f"method.runs.{name}": net for name, net in networks.items()}, MODALITIES)
    task = method.build_task(student, stage="distilled", teacher=teacher)
    b = batch(rows=6)
    loss, visible = dropped(task, b)
    with torch.no_grad():
        target = teacher(b["images"], visible, b["available"])
        want = kl(student(b["images"], visible).logits, target)
    torch.testing.assert_close(loss.sums["output"].detach(), want, rtol=1e-4, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in teacher.parameters())


def test_a_network_that_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"method\.runs\.t1 has the modalities \['flair'\]; it must have t1"):
        specialists(t1=single("flair", 0))
    with pytest.raises(UserError, match=r"network of method\.runs\.full has the modalities \['flair'\]"):
        specialists(full=single("flair", 0))


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ("{flare: a}", r"method\.runs\.flare is neither full nor among data\.modalities"),
        ("{flair: a, t1: b}", r"method\.runs has no teacher for t1ce, t2"),
        ("{}", r"method\.specialists\.runs|method\.runs"),
    ],
)
def test_runs_must_cover_the_modalities(runs, message):
    with pytest.raises(UserError, match=message):
        load_recipe("lckd-demo", [f"method={{name: specialists, runs: {runs}}}"])


def test_a_missing_run_is_named(tmp_path):
    import preceptor

    recipe = ["method={name: specialists, runs: {full: no/such/run}}", f"output={tmp_path}", "stages=[distilled]"]
    with pytest.raises(UserError, match=r"method\.runs\.full=no/such/run does not exist"):
        preceptor.train("lckd-demo", recipe)
