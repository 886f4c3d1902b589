from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from preceptor.config import TrainConfig, require_used_settings
from preceptor.errors import UserError
from preceptor.recipe import differences
from preceptor.task import Batch, LossTerms, Task
from preceptor.tasks import load_recipe
from preceptor.training.average import WeightAverage
from preceptor.training.guards import NonFiniteError, SkipCounter
from preceptor.training.loop import FitArguments, Interrupted, fit
from preceptor.training.setup import make_optimizer, require_trackers

ROWS = 24


class Toy(Task):
    """A regression in two terms with different units: every sample counts, but only labelled ones have a label."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 1))
        self.projector = nn.Linear(8, 2)
        self.steps: list[int] = []

    def forward(self, batch: Batch) -> LossTerms:
        x, y, known = batch["x"], batch["y"], batch["known"]
        out = self.student(x)[:, 0]
        terms = LossTerms()
        terms.add("label", ((out - y).square() * known).sum(), 1.0, "labelled")
        terms.add("hidden", self.projector(self.student[0](x)).square().mean(1).sum(), 0.1)
        return terms

    def units(self, batch: Batch) -> dict[str, int]:
        return {"samples": len(batch), "labelled": int(batch["known"].sum())}

    def after_step(self, step: int) -> None:
        self.steps.append(step)


class Rows:
    def __init__(self, poison: int | None = None) -> None:
        rng = np.random.default_rng(0)
        self.x = torch.from_numpy(rng.normal(size=(ROWS, 4)).astype(np.float32))
        self.y = self.x.sum(1)
        self.known = torch.tensor([float(i % 5 != 0 and i > 2) for i in range(ROWS)])
        if poison is not None:
            self.x[poison, 0] = float("nan")

    def loader(self, batches):
        for items in batches:
            index = [i for i, _ in items]
            tensors = {"x": self.x[index], "y": self.y[index], "known": self.known[index]}
            yield Batch(tensors, [f"row{i}" for i in index], [str(i) for i in index])


def job_of(folder: Path, rows: Rows, **changes) -> FitArguments:
    def export(task: Task, target: Path) -> None:
        target.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in task.student.state_dict().items()}, target / "model.safetensors")

    def validate(task: Task) -> dict[str, float]:
        with torch.no_grad():
            task.student.eval()
            return {"score": -float((task.student(rows.x)[:, 0] - rows.y).square().nanmean())}

    settings = {"validate": validate, "resume_config": {"recipe": {"lr": 1}}, **changes}
    return FitArguments(
        folder=folder,
        loader=rows.loader,
        samples=ROWS,
        epoch_samples=ROWS,
        export=export,
        differences=differences,
        seed=1,
        **settings,
    )


def config(**changes) -> TrainConfig:
    base = {"epochs": 4, "batch_size": 12, "learning_rate": 0.01, "precision": "fp32", "log_every": 1}
    return TrainConfig.model_validate({**base, **changes})


def curve(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_accumulation_weighs_units_and_not_micro_batches(tmp_path):
    for name, accumulation in (("one", 1), ("three", 3)):
        fit(Toy(), job_of(tmp_path / name, Rows()), config(gradient_accumulation_steps=accumulation))
    assert curve(tmp_path / "one") == pytest.approx(curve(tmp_path / "three"), rel=1e-5)
    # What the defect would have given: the mean of the micro-batches' own means differs at the first step.
    task, batch = Toy(), next(iter(Rows().loader([[(i, 0) for i in range(12)]])))
    parts = [Batch({k: v[i : i + 4] for k, v in batch.tensors.items()}, batch.ids[i : i + 4], []) for i in (0, 4, 8)]
    counts = [task.units(part)["labelled"] for part in parts]
    assert len(set(counts)) > 1
    naive = sum(float(task(p).sums["label"].detach()) / c for p, c in zip(parts, counts, strict=True)) / 3
    exact = float(task(batch).sums["label"].detach()) / sum(counts)
    assert abs(naive - exact) > 1e-3


def test_logged_losses_are_means_over_steps_and_their_sum_is_weighted(tmp_path):
    logs = {}
    for every in (1, 2):
        fit(Toy(), job_of(tmp_path / str(every), Rows()), config(log_every=every))
        lines = map(json.loads, (tmp_path / str(every) / "metrics.jsonl").read_text().splitlines())
        logs[every] = [line for line in lines if "loss" in line]
    for line in logs[1]:
        assert line["loss"] == pytest.approx(line["label"] + 0.1 * line["hidden"])
    for name in ("label", "hidden", "loss"):
        first, second = ([line[name] for line in logs[1][start::2]] for start in (0, 1))
        means = [(a + b) / 2 for a, b in zip(first, second, strict=True)]
        assert [line[name] for line in logs[2]] == pytest.approx(means)


def test_the_best_validation_is_exported(tmp_path):
    scores = iter([0.1, 0.7, 0.3, 0.7])
    seen = []

    def validate(task):
        seen.append({k: v.clone() for k, v in task.student.state_dict().items()})
        return {"score": next(scores)}

    state = fit(Toy(), job_of(tmp_path, Rows(), validate=validate), config())
    assert (state.best_step, state.best_score) == (4, 0.7)
    kept = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(kept[k], seen[1][k]) for k in kept)


def test_the_last_step_is_exported_when_asked(tmp_path):
    scores = iter([0.1, 0.7, 0.3, 0.2])
    task = Toy()
    state = fit(task, job_of(tmp_path, Rows(), validate=lambda task: {"score": next(scores)}), config(select="last"))
    assert (state.best_step, state.kept_step, state.step) == (4, 8, 8)
    kept = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(kept[k], v) for k, v in task.student.state_dict().items())


def test_the_last_step_is_validated_too(tmp_path):
    state = fit(Toy(), job_of(tmp_path, Rows()), config(epochs=2.5))
    assert [line["step"] for line in state.validations] == [2, 4, 5]


def test_early_stopping(tmp_path):
    scores = iter([0.5, 0.4, 0.3, 0.9])
    state = fit(Toy(), job_of(tmp_path, Rows(), validate=lambda task: {"score": next(scores)}), config(patience=2))
    assert state.finished
    assert state.step == 6


def test_a_finished_run_is_not_trained_again(tmp_path):
    fit(Toy(), job_of(tmp_path, Rows()), config())
    again = Toy()
    assert fit(again, job_of(tmp_path, Rows()), config()).finished
    assert again.steps == []


@pytest.mark.parametrize("poison", [0, 7])
def test_a_non_finite_loss_moves_nothing_and_names_the_sample(tmp_path, poison):
    task = Toy()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(NonFiniteError, match=rf"comes from samples row{poison}\b.*last checkpoint is intact"):
        fit(task, job_of(tmp_path, Rows(poison)), config(batch_size=24))
    assert task.steps == []
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_a_non_finite_gradient_is_caught_too(tmp_path):
    class Kink(Toy):
        def forward(self, batch: Batch) -> LossTerms:
            terms = super().forward(batch)
            zero = (self.student[0].weight * 0).sum()
            terms.add("kink", zero.sqrt(), 1.0)  # finite value, infinite slope
            return terms

    task = Kink()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    with pytest.raises(NonFiniteError, match="a gradient is not finite"):
        fit(task, job_of(tmp_path, Rows()), config())
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())


def test_clipping_covers_the_projectors(tmp_path):
    """With all gradients in one norm, a tiny limit slows every parameter; SGD's first step is then limit x lr long."""
    task = Toy()
    before = {name: value.clone() for name, value in task.state_dict().items()}
    limit, rate = 1e-3, 0.01
    settings = config(epochs=0.5, clip_norm=limit, optimizer="sgd", weight_decay=0, warmup=0, learning_rate=rate)
    fit(task, job_of(tmp_path, Rows()), settings)
    moved = {name: value - before[name] for name, value in task.state_dict().items()}
    length = sum(float(value.square().sum()) for value in moved.values()) ** 0.5
    assert moved["projector.weight"].abs().sum() > 0
    # Nesterov's first step is (1 + momentum) times the gradient.
    assert length == pytest.approx(limit * rate * 1.99, rel=1e-2)


def test_only_weights_of_maps_decay_and_pretrained_ones_go_slower():
    task = Toy()
    task.norm = nn.LayerNorm(8)
    task.pretrained_parameters = {"student.0.weight"}
    optimizer, names = make_optimizer(task, config(pretrained_lr_scale=0.1, weight_decay=0.3))
    found = {}
    place = iter(names)
    for group in optimizer.param_groups:
        for _ in group["params"]:
            found[next(place)] = (group["scale"], group["weight_decay"])
    assert found["student.0.weight"] == (0.1, 0.3)
    assert found["student.3.weight"] == (1.0, 0.3)
    assert found["student.3.bias"] == (1.0, 0.0)
    assert found["norm.weight"] == (1.0, 0.0)
    assert len(found) == 8


def test_a_scale_of_0_freezes_pretrained_weights_and_must_leave_some():
    task = Toy()
    names = {name for name, _ in task.named_parameters()}
    task.pretrained_parameters = {"student.0.weight"}
    _, trained = make_optimizer(task, config(pretrained_lr_scale=0))
    assert set(trained) == names - {"student.0.weight"}
    assert not task.student[0].weight.requires_grad
    task = Toy()
    task.pretrained_parameters = {name for name in names if name.startswith("student.")}
    with pytest.raises(UserError, match=r"train\.pretrained_lr_scale=0 freezes all weights"):
        make_optimizer(task, config(pretrained_lr_scale=0))  # the projector alone would learn
    assert set(make_optimizer(Toy(), config(pretrained_lr_scale=0))[1]) == names, "nothing is pretrained"


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_grounding_refuses_a_scale_that_it_does_not_apply(role):
    for scale in (0, 0.1, 0.5, 2):
        message = rf"{role}\.train: pretrained_lr_scale={scale:g} has no effect in grounding, .* remove it"
        recipe = load_recipe("clinkd-demo", [f"{role}.train.pretrained_lr_scale={scale}"])
        with pytest.raises(UserError, match=message):
            require_used_settings(recipe)
    for overrides in ([f"{role}.train.pretrained_lr_scale=1"], []):
        recipe = load_recipe("clinkd-demo", overrides)
        require_used_settings(recipe)
        assert getattr(recipe, role).train.pretrained_lr_scale == 1


def test_ctrl_c_saves_and_the_next_run_ends_byte_equal(tmp_path):
    settings = config(checkpoint_every=100, ema_decay=0.9)

    class Stopping(Toy):
        def after_step(self, step: int) -> None:
            if step == 3:
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="step 3 of 8"):
        fit(Stopping(0.2), job_of(tmp_path / "cut", Rows()), settings)
    resumed = Toy(0.2)
    fit(resumed, job_of(tmp_path / "cut", Rows()), settings)
    whole = Toy(0.2)
    fit(whole, job_of(tmp_path / "whole", Rows()), settings)
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), whole.parameters(), strict=True))
    for name in (
        "model/model.safetensors",
        "checkpoints/step-8/task.safetensors",
        "checkpoints/step-8/average.safetensors",
    ):
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert curve(tmp_path / "cut") == curve(tmp_path / "whole")


def test_a_changed_recipe_is_refused_with_its_differences(tmp_path):
    fit(Toy(), job_of(tmp_path, Rows()), config())
    with pytest.raises(UserError, match=r"recipe\.lr: 1 -> 2.*resume=never"):
        fit(Toy(), job_of(tmp_path, Rows(), resume_config={"recipe": {"lr": 2}}), config())
    assert fit(Toy(), job_of(tmp_path, Rows(), resume_config={"recipe": {"lr": 2}}, resume=False), config()).finished


def test_weight_average_in_closed_form():
    task = Toy()
    parameter = task.projector.bias
    with torch.no_grad():
        parameter.zero_()
    average = WeightAverage(dict(task.named_parameters()), 0.5)
    want = 0.0
    for step in range(1, 12):
        with torch.no_grad():
            parameter.fill_(float(step))
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * step
    with average.applied():
        assert parameter[0].item() == pytest.approx(want)
    assert parameter[0].item() == 11


def test_weight_average_without_warm_up_equals_that_of_torch():
    model = torch.nn.Linear(3, 2)
    average = WeightAverage(dict(model.named_parameters()), 0.9, warmup=False)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    oracle.n_averaged += 1  # its first update copies the weights otherwise
    for step in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        average.update(step)
        oracle.update_parameters(model)
    for name, expected in oracle.module.named_parameters():
        torch.testing.assert_close(average.values[name], expected.detach())


def test_skips_are_counted_once_and_capped():
    skips = SkipCounter(0.1, 20)
    skips.add(["a", "b"])
    skips.add(["a"])
    with pytest.raises(UserError, match=r"3 of 20 training rows.*skip_limit=0\.1"):
        skips.add(["c"])


def test_a_missing_tracker_is_said():
    import importlib.util

    if importlib.util.find_spec("mlflow"):
        return
    with pytest.raises(UserError, match="pip install mlflow"):
        require_trackers(["mlflow"], "train")


def test_every_micro_batch_of_every_step_has_a_seed_of_its_own(tmp_path):
    seeds = []

    class Seeing(Toy):
        def forward(self, batch: Batch) -> LossTerms:
            seeds.append(torch.initial_seed())
            return super().forward(batch)

    fit(Seeing(), job_of(tmp_path, Rows()), config(gradient_accumulation_steps=3))
    assert len(set(seeds)) == len(seeds) == 8 * 3
