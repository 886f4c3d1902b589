from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch

from preceptor.config import TermConfig
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.distill.schedule import scheduled_weight
from preceptor.errors import UserError
from preceptor.task import Batch, TeacherSignal
from preceptor.teachers.online import EnsembleTeacher, OnlineTeacher
from preceptor.training.guards import offenders
from preceptor.vqa.bundle import VqaBundle, build_bundle, make_tokenizer
from preceptor.vqa.config import ModelConfig
from preceptor.vqa.dataset import Preprocessing
from preceptor.vqa.kd import KdConfig
from preceptor.vqa.losses import FeatureLoss, LabelLoss, RelationLoss
from preceptor.vqa.method import VqaMethod
from preceptor.vqa.mhkd import MhkdConfig
from preceptor.vqa.task import VqaTask, token_axes
from preceptor.vqa.teachers import ema_teacher

QUESTIONS = ["is there a lesion in the left lung?", "which plane is this?", "what organ is shown?", "ct or mri?"]
EVERY = {"relation": {"weight": 0.3}, "output": {"weight": 1.0}, "embedding": {"weight": 0.5}}


def model(
    layers: int, width: int, seed: int, *, stages: int = 2, answers: tuple[str, ...] = ("yes", "no", "axial")
) -> VqaBundle:
    config = ModelConfig.model_validate(
        {
            "vision": {"conv": {"channels": [8] * stages, "blocks": [1] * stages, "token_stages": [1]}},
            "text": {"scratch": {"embedding": 8, "width": 16, "layers": 1, "heads": 2}},
            "width": width,
            "layers": layers,
            "heads": 2,
            "dropout": 0.0,
        }
    )
    tokenizer = make_tokenizer(QUESTIONS * 3)
    return build_bundle(config, tokenizer, Preprocessing(32), AnswerVocabulary(list(answers)), seed=seed)


def batch_of(bundle: VqaBundle, labels: list[int]) -> Batch:
    texts = [QUESTIONS[i % len(QUESTIONS)] for i in range(len(labels))]
    tokens = bundle.tokenizer(texts, padding=True, return_tensors="pt")
    pixels = torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    tensors = {
        "pixels": pixels,
        "input_ids": tokens["input_ids"],
        "attention_mask": tokens["attention_mask"],
        "labels": torch.tensor(labels),
        "answered": torch.ones(len(labels), dtype=torch.bool),
    }
    names = [f"q{i}" for i in range(len(labels))]
    return Batch(tensors, names, names)


def task_of(student: VqaBundle, teacher: VqaBundle | None, **settings) -> VqaTask:
    return build(MhkdConfig.model_validate({**EVERY, **settings}), student, teacher)


def build(method: VqaMethod, student: VqaBundle, teacher: VqaBundle | None) -> VqaTask:
    if teacher is None:
        return method.build_task(student.model)
    forward = method.teacher_forward(student.model.config.layers, teacher.model.config.layers)
    source = OnlineTeacher(teacher.model, forward)
    return method.build_task(student.model, teacher=source, teacher_config=teacher.model.config)


def test_a_student_that_is_its_teacher_has_nothing_to_learn():
    student = model(2, 16, 0)
    teacher = copy.deepcopy(student)
    task = task_of(
        student, teacher, hidden={"weight": 1, "layers": [[0, 0], [1, 1]]}, attention={"weight": 1, "kind": "mse"}
    )
    terms = task(batch_of(student, [0, 1, 2, 0]))
    # The projectors stand between the hidden layers; all that has none must vanish.
    for name in ("output", "attention/0-0", "attention/1-1", "relation"):
        assert terms.sums[name].abs() < 1e-4, name
    assert terms.sums["label"] > 1


def test_every_level_is_there_and_weighted():
    student, teacher = model(2, 16, 0), model(4, 24, 1)
    task = task_of(student, teacher)
    terms = task(batch_of(student, [0, 1, -100, 0]))
    assert set(terms.sums) == {
        "label",
        "output",
        "embedding/image",
        "embedding/question",
        "hidden/0-1",
        "hidden/1-3",
        "attention/0-1",
        "attention/1-3",
        "relation",
    }
    c = MhkdConfig.model_validate(EVERY)
    assert terms.weights["embedding/image"] + terms.weights["embedding/question"] == pytest.approx(c.embedding.weight)
    assert terms.weights["hidden/0-1"] + terms.weights["hidden/1-3"] == pytest.approx(c.hidden.weight)
    assert task.units(batch_of(student, [0, 1, -100, 0])) == {"samples": 4, "labelled": 3, "answered": 4}
    want = sum(terms.weights[n] * terms.sums[n] / (3 if n == "label" else 4) for n in terms.sums)
    assert torch.allclose(terms.total({"samples": 4, "labelled": 3}), want)


def test_everything_of_the_student_and_nothing_of_the_teacher_learns():
    student, teacher = model(2, 16, 0), model(4, 24, 1)
    task = task_of(student, teacher).train()
    task(batch_of(student, [0, 1, 2, 0])).total({"samples": 4, "labelled": 4}).backward()
    silent = [n for n, p in task.named_parameters() if p.requires_grad and (p.grad is None or p.grad.abs().sum() == 0)]
    # The key bias of a softmax attention shifts all scores of a row alike; the embeddings of unused words stay still.
    assert [name for name in silent if "qkv.bias" not in name and "key.bias" not in name] == []
    assert all(p.grad is None for p in teacher.model.parameters())
    assert not any("teacher" in name for name in task.state_dict())
    assert not any("projector" in name for name in task.student.state_dict())
    assert not teacher.model.training


def test_sums_add_up_over_micro_batches():
    student, teacher = model(2, 16, 0), model(4, 24, 1)
    task = task_of(student, teacher, relation={"weight": 0})
    whole = batch_of(student, [0, 1, -100, 2, 1])
    terms = [task(b).sums for b in (whole, whole.narrow(0, 2), whole.narrow(2, 3))]
    for name, value in terms[0].items():
        assert torch.allclose(value, terms[1][name] + terms[2][name], rtol=1e-4), name


@pytest.mark.parametrize("kind", ["kl", "mse"])
def test_more_padding_changes_no_term(kind: str):
    student, teacher = model(2, 16, 0), model(4, 24, 1)
    task = task_of(student, teacher, attention={"weight": 1, "kind": kind}).eval()
    batch = batch_of(student, [0, 1, 2, 0])
    wider = {name: torch.nn.functional.pad(batch[name], (0, 5)) for name in ("input_ids", "attention_mask")}
    before, after = (task(one).sums for one in (batch, replace(batch, tensors={**batch.tensors, **wider})))
    for name, value in before.items():
        assert torch.allclose(after[name], value, rtol=1e-4), name


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_the_scale_of_the_teachers_features_has_no_effect(kind: str):
    loss = FeatureLoss("hidden", TermConfig(weight=1.0), "fusion.0", "fusion.0", kind=kind)
    loss.projector = torch.nn.Identity()
    s, t = torch.randn(2, 2, 3, 64, generator=torch.Generator().manual_seed(0))
    batch = Batch({"attention_mask": torch.ones(2, 3)}, ["a", "b"], ["", ""])
    values = [
        loss(*(TeacherSignal(None, {"fusion.0": x}, torch.ones(2, 3)) for x in pair), batch).item()
        for pair in ((s, t), (s, 7 * t))
    ]
    assert values[1] == pytest.approx(values[0], rel=1e-4)
    assert values[0] > 0.1


def test_the_relation_is_that_of_the_first_tokens_of_the_last_layers():
    s = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    t = torch.cat([s[:, :1], torch.randn(3, 3, 8)], dim=1)
    loss = MhkdConfig.model_validate(EVERY).loss_terms(2, 4)[-1]
    assert isinstance(loss, RelationLoss)
    value = loss(TeacherSignal(None, {"fusion.1": s}, None), TeacherSignal(None, {"fusion.3": t}, None), None)
    assert value.item() == pytest.approx(0, abs=1e-9)


def test_without_a_teacher_only_the_label_teaches():
    student = model(2, 16, 0)
    batch = batch_of(student, [0, 1, 2, -100])
    logits = student.model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits
    terms = task_of(student, None)(batch)
    want = torch.nn.functional.cross_entropy(logits, batch["labels"], reduction="sum")
    assert set(terms.sums) == {"label"}
    assert torch.allclose(terms.sums["label"], want)
    soft = task_of(student, None, label={"kind": "bce"})(batch)
    scores = torch.zeros_like(logits)
    scores[[0, 1, 2], [0, 1, 2]] = 1
    want = torch.nn.functional.binary_cross_entropy_with_logits(logits, scores, reduction="sum")
    assert torch.allclose(soft.sums["label"], want)


@pytest.mark.parametrize("kind", ["ce", "bce"])
def test_rows_without_an_answer_have_no_label_term(kind: str):
    student = model(2, 16, 0)
    task = task_of(student, None, label={"kind": kind})
    batch = batch_of(student, [0, -100, 1, -100])
    batch.tensors["answered"] = torch.tensor([True, False, True, False])
    labelled = replace(batch, tensors={name: tensor[[0, 2]] for name, tensor in batch.tensors.items()}, ids=["0", "2"])
    counts = task.units(batch)
    assert counts == {"samples": 4, "labelled": 2, "answered": 2}
    torch.testing.assert_close(task(batch).total(counts), task(labelled).total(task.units(labelled)))

    logits = torch.zeros(4, 3, requires_grad=True)
    batch.tensors |= {"labels": torch.full((4,), -100), "answered": torch.zeros(4, dtype=torch.bool)}
    loss = LabelLoss(TermConfig(weight=1.0), kind)(TeacherSignal(logits, {}, None), None, batch)
    loss.backward()
    assert loss.item() == 0
    assert not logits.grad.any()


def test_an_answer_outside_the_classes_makes_every_class_wrong():
    logits = torch.zeros(2, 3, requires_grad=True)
    batch = Batch({"labels": torch.tensor([-100, -100]), "answered": torch.tensor([True, False])}, ["a", "b"], ["", ""])
    loss = LabelLoss(TermConfig(weight=1.0), "bce")
    value = loss(TeacherSignal(logits, {}, None), None, batch)
    value.backward()
    assert loss.unit == "answered"
    assert value.item() == pytest.approx(3 * math.log(2))
    assert logits.grad.tolist() == [[0.5] * 3, [0.0] * 3]


def test_ensemble_and_moving_average_teach():
    student, one, two = model(2, 16, 0), model(2, 16, 1), model(2, 16, 2)
    config = MhkdConfig.model_validate(EVERY)
    source = EnsembleTeacher(
        [
            OnlineTeacher(one.model, config.teacher_forward(2, 2)),
            OnlineTeacher(two.model, config.teacher_forward(2, 2, features=False)),
        ]
    )
    batch = batch_of(student, [0, 1, 2, 0])
    task = config.build_task(student.model, teacher=source, teacher_config=one.model.config)
    assert torch.isfinite(task(batch).total({"samples": 4, "labelled": 4}))
    probabilities = (
        one.model(**_inputs(batch)).logits.softmax(-1) + two.model(**_inputs(batch)).logits.softmax(-1)
    ) / 2
    assert torch.allclose(source.signal(batch).logits.softmax(-1), probabilities, atol=1e-5)

    ema = ema_teacher(student.model, config)
    task = config.build_task(student.model, teacher=ema, teacher_config=student.model.config)
    before = {k: v.clone() for k, v in task.task_state().items()}
    with torch.no_grad():
        student.model.head.weight += 1
    task.after_step(1)
    moved = [k for k, v in task.task_state().items() if not torch.equal(v, before[k])]
    assert any("head.weight" in name for name in moved)
    task.load_task_state(before)
    assert all(torch.equal(v, before[k]) for k, v in task.task_state().items())


def _inputs(batch: Batch) -> dict[str, torch.Tensor]:
    return {k: batch[k] for k in ("pixels", "input_ids", "attention_mask")}


def test_other_answers_are_refused():
    student = model(1, 16, 0)
    with pytest.raises(UserError, match="same data and split"):
        task_of(student, model(1, 16, 1, answers=("no", "yes", "axial")))


def test_other_image_tokens_are_refused_with_the_fix():
    student, teacher = model(1, 16, 0), model(1, 16, 1, stages=3)
    with pytest.raises(UserError, match="token_stages"):
        task_of(student, teacher)(batch_of(student, [0, 1]))


@pytest.mark.parametrize(
    ("progress", "want"),
    [(0.0, 0.0), (0.2, 0.0), (0.25, 0.5), (0.3, 1.0), (0.39, 1.9), (0.5, 2.0), (0.8, 2.0), (0.9, 0.0)],
)
def test_schedule(progress: float, want: float):
    term = TermConfig(weight=2.0, start=0.2, ramp=0.2, end=0.8)
    assert scheduled_weight(term, progress) == pytest.approx(want)


def test_token_axes_of_the_taps():
    assert token_axes("embed_image") == ()
    assert token_axes("embed_question") == (1,)
    assert token_axes("fusion.3") == (1,)
    assert token_axes("fusion.3.attention.probabilities") == (2, 3)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_plain_distillation_is_hintons_formula(alpha: float):
    """The oracle is torch's own kl_div and cross_entropy."""
    student, teacher = model(1, 16, 0), model(2, 24, 1)
    task = build(KdConfig(alpha=alpha, temperature=3.0), student, teacher)
    batch = batch_of(student, [0, 1, -100, 2])
    s, t = (m.model(**_inputs(batch)).logits for m in (student, teacher))
    ce = torch.nn.functional.cross_entropy(s, batch["labels"])
    kl = torch.nn.functional.kl_div(
        (s / 3).log_softmax(-1), (t / 3).log_softmax(-1), reduction="batchmean", log_target=True
    )
    want = (1 - alpha) * ce + alpha * 9 * kl
    torch.testing.assert_close(task(batch).total({"samples": 4, "labelled": 3}), want)
    assert [term.name for term in task.terms] == ["label", "output"]
    assert KdConfig().teacher_features(1, 2) == []


def test_plain_distillation_of_labels_alone_keeps_their_weight():
    student = model(1, 16, 0)
    task = build(KdConfig(alpha=0.9), student, None)
    assert task(batch_of(student, [0, 1])).weights == {"label": 1.0}


def test_a_layer_that_is_not_there_is_refused_before_the_training():
    student, teacher = model(1, 16, 0), model(1, 16, 1)
    task = build(MhkdConfig.model_validate(EVERY), student, teacher)
    task.terms[-1].student_features = ("fusion.7",)
    with pytest.raises(UserError, match=r"fusion\.7"):
        VqaTask(student.model, task.terms, teacher=task.teacher, teacher_config=teacher.model.config)


def test_the_question_with_a_broken_image_is_named():
    student, teacher = model(2, 16, 0), model(4, 24, 1)
    task, batch = task_of(student, teacher, relation={"weight": 0}), batch_of(student, [0, 1, 2, 0])
    batch["pixels"][2, 0, 5, 5] = torch.nan
    counts = {"samples": 1.0, "labelled": 1.0}
    assert not torch.isfinite(task(batch).total(counts))
    assert offenders([batch], lambda one: task(one).total(counts)) == ["q2"]
