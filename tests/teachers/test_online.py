import copy

import pytest
import torch
from torch import nn

from preceptor.errors import UserError
from preceptor.teachers.cache import CachedTeacher, write_cache
from preceptor.teachers.online import EmaTeacher, EnsembleTeacher, OnlineTeacher, weights_fingerprint
from tests.teachers.tiny_teacher import Samples, TinyNet, cache_key, forward, teacher


@pytest.fixture
def batch():
    return Samples(6).batch([0, 1, 2, 3, 4, 5])


def test_fingerprint_sees_values_names_dtypes_and_shapes():
    first = weights_fingerprint(TinyNet(0))
    assert first == weights_fingerprint(TinyNet(0))
    assert first != weights_fingerprint(TinyNet(1))
    one_bit, buffer = TinyNet(0), TinyNet(0)
    with torch.no_grad():
        one_bit.head.bias[0] = torch.nextafter(one_bit.head.bias[0], torch.tensor(9.0))
        buffer.norm.running_mean[0] += 1
    assert len({first, weights_fingerprint(one_bit), weights_fingerprint(buffer)}) == 3

    def holder(name, tensor):
        module = nn.Module()
        module.register_buffer(name, tensor)
        return weights_fingerprint(module)

    zeros = [
        holder("a", torch.zeros(4)),
        holder("b", torch.zeros(4)),
        holder("a", torch.zeros(2, 2)),
        holder("a", torch.zeros(4, dtype=torch.int32)),
        holder("a", torch.zeros(8, dtype=torch.bfloat16)),
        holder("a", torch.tensor(0.0)),
    ]
    assert len(set(zeros)) == 6
    strided = torch.arange(6.0).view(2, 3)
    assert holder("a", strided.t()) == holder("a", strided.t().contiguous())


def test_online_teacher_is_in_eval_mode_whatever_train_is_called_on(batch):
    net = TinyNet()
    source = OnlineTeacher(net, forward)
    expected = source.signal(batch)
    statistics = net.norm.running_mean.clone()
    for wake in (net.train, net.dropout.train, net.norm.train):
        wake()
        again = source.signal(batch)
        assert torch.equal(again.logits, expected.logits)
        assert torch.equal(again.features["fusion"], expected.features["fusion"])
        assert not any(module.training for module in net.modules())
    assert torch.equal(net.norm.running_mean, statistics)
    # The same network in training mode does answer otherwise, so the equalities above can fail.
    net.train()
    assert not torch.equal(forward(net, batch).logits, expected.logits)


def test_a_task_that_holds_a_teacher_neither_trains_nor_saves_nor_wakes_it(batch):
    task = nn.Module()
    task.student, task.teacher = nn.Linear(2, 2), teacher()
    task.train()
    assert set(task.state_dict()) == {"student.weight", "student.bias"}
    assert len(list(task.parameters())) == 2
    assert not any(parameter.requires_grad for parameter in task.teacher.model.parameters())
    assert torch.equal(task.teacher.signal(batch).logits, teacher().signal(batch).logits)


def test_signal_has_no_gradient_but_can_be_saved_for_backward(batch):
    signal = teacher().signal(batch)
    assert not signal.logits.requires_grad
    assert not signal.logits.is_inference()
    scale = torch.ones((), requires_grad=True)
    (scale * signal.logits).sum().backward()
    torch.testing.assert_close(scale.grad, signal.logits.sum())


def test_autocast_surrounds_the_forward_pass(batch):
    source = OnlineTeacher(TinyNet(), forward, lambda: torch.autocast("cpu", torch.bfloat16))
    assert source.signal(batch).logits.dtype == torch.bfloat16


def test_online_fingerprint_is_that_of_the_weights_and_computed_once(monkeypatch):
    source = teacher()
    assert source.fingerprint == weights_fingerprint(TinyNet())
    monkeypatch.setattr("preceptor.teachers.online.weights_fingerprint", lambda module: pytest.fail("computed again"))
    assert source.to("cpu").fingerprint == source.fingerprint


def test_ensemble_softmax_is_the_mean_of_the_members_probabilities(batch):
    members = [teacher(0), teacher(1), teacher(2)]
    signal = EnsembleTeacher(members).signal(batch)
    mean = sum(member.signal(batch).logits.softmax(-1) for member in members) / 3
    torch.testing.assert_close(signal.logits.softmax(-1), mean)
    # Logits are the log-probabilities themselves, not merely equal up to a constant.
    torch.testing.assert_close(signal.logits, mean.log())
    assert torch.equal(signal.features["fusion"], members[0].signal(batch).features["fusion"])
    assert torch.equal(signal.mask, members[0].signal(batch).mask)


def test_ensemble_stays_finite_where_members_exclude_a_class(batch):
    member = teacher()
    with torch.no_grad():
        member.model.head.bias[0] = -1e4
    assert EnsembleTeacher([member, member]).signal(batch).logits.isfinite().all()


def test_ensemble_refuses_other_classes_and_emptiness(batch):
    with pytest.raises(UserError, match="have 5, 7 answer classes"):
        EnsembleTeacher([teacher(0), teacher(1, classes=7)]).signal(batch)
    with pytest.raises(UserError, match="empty"):
        EnsembleTeacher([])


def test_ensemble_fingerprint_depends_on_members_and_order():
    one, two = teacher(0), teacher(1)
    prints = [EnsembleTeacher(sources).fingerprint for sources in ([one], [one, two], [two, one], [one, one])]
    assert len({*prints, one.fingerprint}) == 5


@pytest.mark.parametrize("warmup", [False, True])
def test_ema_is_the_weighted_sum_of_all_students(warmup):
    student = TinyNet(0)
    ema = EmaTeacher(copy.deepcopy(student), forward, decay=0.3, warmup=warmup)
    history = [student.head.weight.detach().clone()]
    decays = []
    for step in range(6):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
            student.norm.running_mean.add_(1)
            student.norm.num_batches_tracked.add_(1)
        history.append(student.head.weight.detach().clone())
        decays.append(min(0.3, (1 + step) / (10 + step)) if warmup else 0.3)
        ema.update(student)
    # Closed form: w_0 * prod(d) + sum_t w_t * (1 - d_t) * prod_{u > t} d_u.
    d = torch.tensor(decays, dtype=torch.float64)
    closed = history[0].double() * d.prod()
    for t in range(6):
        closed += history[t + 1].double() * (1 - d[t]) * d[t + 1 :].prod()
    torch.testing.assert_close(ema.model.head.weight.double(), closed, rtol=1e-5, atol=1e-6)
    assert torch.equal(ema.model.norm.running_mean, student.norm.running_mean)
    assert ema.model.norm.num_batches_tracked == student.norm.num_batches_tracked
    assert student.head.weight.requires_grad
    assert not ema.model.head.weight.requires_grad


def test_ema_warm_up_starts_at_a_tenth_and_ends_at_the_decay():
    student = nn.Linear(1, 1, bias=False)
    ema = EmaTeacher(copy.deepcopy(student), forward, decay=0.9)
    decays = []
    for _ in range(100):
        with torch.no_grad():
            ema.model.weight.fill_(1.0)
            student.weight.fill_(0.0)
        ema.update(student)
        decays.append(float(ema.model.weight))
    assert decays[:3] == pytest.approx([1 / 10, 2 / 11, 3 / 12])
    assert decays[-1] == pytest.approx(0.9)


def test_ema_averages_in_float32_a_student_in_bfloat16():
    student = TinyNet(0).to(torch.bfloat16)
    ema = EmaTeacher(copy.deepcopy(student), forward, decay=0.999, warmup=False)
    before = ema.model.head.weight.clone()
    with torch.no_grad():
        student.head.weight.add_(0.5)
    ema.update(student)
    # Steps of 0.0005 are lost in bfloat16, which has 8 bits.
    assert ema.model.head.weight.dtype == torch.float32
    torch.testing.assert_close(ema.model.head.weight - before, torch.full_like(before, 5e-4), rtol=0.02, atol=1e-6)


def test_ema_state_resumes_exactly_and_moves_the_fingerprint(batch):
    def walk(student, ema, steps):
        for seed in steps:
            torch.manual_seed(seed)
            with torch.no_grad():
                for parameter in student.parameters():
                    parameter.add_(torch.randn_like(parameter))
            ema.update(student)

    student = TinyNet(0)
    ema = EmaTeacher(copy.deepcopy(student), forward, decay=0.9)
    prints = [ema.fingerprint]
    walk(student, ema, range(3))
    prints.append(ema.fingerprint)
    saved = {name: tensor.clone() for name, tensor in ema.state_dict().items()}
    saved_student = copy.deepcopy(student)
    walk(student, ema, range(3, 5))
    prints.append(ema.fingerprint)
    assert len(set(prints)) == 3

    resumed = EmaTeacher(TinyNet(7), forward, decay=0.9)
    assert resumed.fingerprint not in prints
    resumed.load_state_dict(saved)
    assert resumed.fingerprint == prints[1]
    walk(saved_student, resumed, range(3, 5))
    assert resumed.fingerprint == prints[2]
    assert torch.equal(resumed.signal(batch).logits, ema.signal(batch).logits)
    resumed.model.train()
    assert torch.equal(resumed.signal(batch).logits, ema.signal(batch).logits)


def test_ema_state_survives_safetensors(tmp_path):
    from safetensors.torch import load_file, save_file

    ema = EmaTeacher(TinyNet(0), forward, decay=0.9)
    save_file(ema.state_dict(), tmp_path / "ema.safetensors")
    other = EmaTeacher(TinyNet(1), forward, decay=0.9)
    other.load_state_dict(load_file(tmp_path / "ema.safetensors"))
    assert other.fingerprint == ema.fingerprint


def test_ema_refuses_another_network_and_a_bad_decay():
    ema = EmaTeacher(TinyNet(0), forward, decay=0.9)
    with pytest.raises(UserError, match=r"model\.head"):
        ema.load_state_dict(EmaTeacher(TinyNet(0, classes=9), forward, decay=0.9).state_dict())
    with pytest.raises(UserError, match=r"in \(0, 1\), not 1\.0"):
        EmaTeacher(TinyNet(0), forward, decay=1.0)


def test_all_teachers_answer_alike(batch, tmp_path):
    """One network behind every kind of teacher gives one distribution."""
    online = teacher()
    write_cache(tmp_path / "cache", online, [batch], cache_key(online))
    sources = [
        EmaTeacher(TinyNet(), forward, decay=0.9),
        EnsembleTeacher([online, teacher()]),
        CachedTeacher.open(tmp_path / "cache", cache_key(online)),
    ]
    for source in sources:
        signal = source.to("cpu").signal(batch)
        torch.testing.assert_close(signal.logits.softmax(-1), online.signal(batch).logits.softmax(-1))
