"""Training loop. It handles devices, steps and checkpoints, and is independent of the task and of distillation.

The state of a run is a function of the recipe and the step: sample order, augmentation, dropout and learning rate are
computed from the seed and the position. A resumed run therefore needs only the weights, the optimiser state and a few
numbers, and its final weights are byte-equal to those of an uninterrupted run.
"""

from __future__ import annotations

import contextlib
import logging
import math
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from preceptor.config import TrainConfig
from preceptor.distributed import broadcast_from_main
from preceptor.errors import UserError
from preceptor.files import new_folder, recover
from preceptor.task import Batch, LossTerms, Task
from preceptor.training import checkpoint
from preceptor.training.average import WeightAverage
from preceptor.training.fsdp import gather_full, is_sharded, shard, shard_settings, shard_state_dict, summon_full_params
from preceptor.training.guards import SkipCounter, offenders, refuse_non_finite
from preceptor.training.lr_schedule import factor
from preceptor.training.metrics_file import MetricsFile
from preceptor.training.progress import Progress
from preceptor.training.sampler import StepBatches, mix_seed
from preceptor.training.setup import make_accelerator, make_optimizer
from preceptor.training.stop import Stop, stop_signals


class Interrupted(Exception):
    """The run was stopped by Ctrl-C or SIGTERM after saving its state."""


@dataclass
class TrainState:
    """The part of the training state that consists of plain numbers, stored in checkpoints."""

    step: int = 0
    best_score: float = -math.inf
    best_step: int = -1
    kept_step: int = -1
    worse: int = 0
    validations: list[dict[str, float]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    finished: bool = False
    seconds: float = 0.0

    def summary(self, batch_size: int) -> dict[str, Any]:
        """Return the entry of a training in results.json."""
        return {
            "steps": self.step,
            "best_step": self.best_step,
            "kept_step": self.kept_step,
            "seconds": round(self.seconds, 1),
            "samples_per_second": round(self.step * batch_size / max(1e-9, self.seconds), 2),
            "skipped": self.skipped,
            "validations": self.validations,
        }


@dataclass
class FitArguments:
    """Arguments of `fit`.

    Attributes:
        folder: Output folder of the stage.
        loader: Builds a data loader from a batch sampler.
        samples: Number of samples that are drawn from.
        epoch_samples: Number of samples per epoch. It is smaller than `samples` if some have only a teacher's labels.
        validate: Returns metrics with a `score` (higher is better). It is called on every process.
        export: Writes the selected model. It is called on the main process only.
        resume_config: Settings that must not change when the run is resumed.
        differences: Compares two such settings and returns the differences as texts.
        seed: Seed of sample order and dropout.
        skip_limit: Largest fraction of samples that may be skipped because they are broken.
        resume: Whether to resume from the newest valid checkpoint.
        title: Title of the progress bar.
    """

    folder: Path
    loader: Callable[[StepBatches], DataLoader]
    samples: int
    epoch_samples: int
    validate: Callable[[Task], dict[str, float]]
    export: Callable[[Task, Path], None]
    resume_config: dict[str, Any]
    differences: Callable[[dict[str, Any], dict[str, Any]], list[str]]
    seed: int
    skip_limit: float = 0.0
    resume: bool = True
    title: str = ""
    start: Callable[[], None] = lambda: None
    """Called on the main process after the checks of `resume_config`."""


def fit(task: Task, job: FitArguments, config: TrainConfig) -> TrainState:
    """Train `task` and write the model that `config.select` chooses to ``job.folder / "model"``.

    Raises:
        UserError: the recipe differs from that of the checkpoint.
        NonFiniteError: the loss or the gradient is not finite.
        Interrupted: the run was stopped; its state is saved.
    """
    settings = shard_settings()
    accelerator = make_accelerator(config, job.folder)
    if settings is not None and accelerator.num_processes > 1:
        shard(task, settings, accelerator)
    steps = max(1, round(config.epochs * job.epoch_samples / config.batch_size))
    per_epoch = job.epoch_samples / config.batch_size
    evaluate_every = max(1, round(config.evaluate_every * per_epoch))
    checkpoint_every = max(1, round(config.checkpoint_every * per_epoch))
    root, student = job.folder / "checkpoints", job.folder / "model"

    optimizer, names = make_optimizer(task, config)
    if accelerator.is_main_process:
        checkpoint.clear_temporaries(root)
        recover(student)
    accelerator.wait_for_everyone()
    trained = {name: parameter for name, parameter in task.named_parameters() if parameter.requires_grad}
    average = WeightAverage(trained, config.ema_decay)
    state = _resume(task, optimizer, names, average, root, job, accelerator)
    if accelerator.is_main_process:
        job.start()
    if state.finished:
        return state
    # `prepare` would use its own sampler; `StepBatches` already gives each process its share.
    model = task if is_sharded(task) else accelerator.prepare_model(task)
    average.to(accelerator.device)
    optimizer = accelerator.prepare_optimizer(optimizer)
    try:
        batches = StepBatches(
            job.samples,
            batch_size=config.batch_size,
            accumulation=config.gradient_accumulation_steps,
            steps=steps,
            start_step=state.step,
            seed=job.seed,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
        )
    except ValueError as error:
        raise UserError(f"train.{error}") from error
    if config.trackers:
        accelerator.init_trackers("preceptor")
    metrics = MetricsFile(job.folder / "metrics.jsonl", state.step) if accelerator.is_main_process else None
    skips = SkipCounter(job.skip_limit, job.samples)
    skips.ids.update(state.skipped)
    window = _Window(accelerator)
    begun = time.monotonic() - state.seconds
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def save() -> None:
        if accelerator.num_processes > 1:  # each process has seen a different share of the samples
            skips.ids.update(gather_object(sorted(skips.ids)))
        state.skipped, state.seconds = sorted(skips.ids), time.monotonic() - begun
        tensors = {}
        if accelerator.is_main_process or is_sharded(task):
            tensors = {
                "task": task.state_dict() | {f"state:{k}": v for k, v in task.task_state().items()},
                "optimizer": checkpoint.optimizer_tensors(optimizer.optimizer, names),
                "average": average.values,
            }
        if is_sharded(task):
            tensors = {name: gather_full(group, accelerator.is_main_process) for name, group in tensors.items()}
        if accelerator.is_main_process:
            body = {"progress": asdict(state), "resume_config": job.resume_config}
            checkpoint.save(root, state.step, tensors, body, config.keep_checkpoints)
        accelerator.wait_for_everyone()

    task.train()  # pretrained parts are loaded in eval mode
    with (
        _reading(job.loader(batches), config.gradient_accumulation_steps) as groups,
        stop_signals() as stop,
        Progress(job.title, steps, state.step, accelerator.is_main_process) as progress,
    ):
        while state.step < steps:
            group = [batch.to(accelerator.device) for batch in next(groups)]
            skips.add([name for batch in group for name in batch.skipped])
            rate = factor(
                state.step,
                steps,
                kind=config.schedule,
                warmup=config.warmup,
                power=config.poly_power,
                restart=config.poly_restart,
            )
            for settings in optimizer.param_groups:
                settings["lr"] = config.learning_rate * settings["scale"] * rate
            task.on_interval(state.step / steps)
            norm = _step(model, task, group, accelerator, optimizer, parameters, config, job, state.step, window)
            state.step += 1
            average.update(state.step)
            task.after_step(state.step)
            if state.step % config.log_every == 0 or state.step == steps:
                line = window.line(state.step, state.step / per_epoch, config.learning_rate * rate, norm)
                progress.update(line)
                if metrics:
                    metrics.write(line)
                if config.trackers:
                    accelerator.log({k: v for k, v in line.items() if k != "step"}, step=state.step)
            progress.advance(state.step)
            if state.step % evaluate_every == 0 or state.step == steps:
                with average.applied(), summon_full_params(task):
                    last = state.step == steps if config.select == "last" else None
                    _validate(task, job, state, student, accelerator, metrics, progress, last)
                state.finished = state.step == steps or bool(config.patience and state.worse >= config.patience)
            interrupted = _any(accelerator, stop)
            if state.finished or interrupted or state.step % checkpoint_every == 0:
                save()
            if state.finished:
                break
            if interrupted:
                raise Interrupted(f"stopped at step {state.step} of {steps}; run the same command again to resume")
    if metrics:
        metrics.close()
    if config.trackers:
        accelerator.end_training()
    return state


def _step(model, task, group, accelerator, optimizer, parameters, config, job, step, window) -> torch.Tensor:
    """Take one optimiser step over the micro-batches of `group`, and return the gradient norm on the device."""
    counts = _counts(task, group, accelerator)
    loss_sum = torch.zeros((), device=accelerator.device)
    for number, batch in enumerate(group):
        last = number == len(group) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            # Seed dropout by position, so that a resumed run is exact.
            torch.manual_seed(mix_seed(job.seed, step, accelerator.process_index, number))
            terms: LossTerms = model(batch)
            loss = terms.total(counts)
            loss_sum += loss.detach()
            window.add(terms, counts)
            # DDP averages gradients over processes, our counts are already global.
            accelerator.backward(loss * accelerator.num_processes)
    window.step_done(counts)
    limit = config.clip_norm if config.clip_norm is not None else math.inf
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
    norm = gather_full({"norm": norm}, keep=True)["norm"]
    # The one synchronisation of a step, and the price of never taking a broken one.
    if not bool(torch.isfinite(norm + accelerator.reduce(loss_sum))):
        guilty = gather_object(offenders(group, lambda one: task(one).total(counts)))
        everyone = gather_object([name for batch in group for name in batch.ids])
        refuse_non_finite(step, float(loss_sum), float(norm), guilty, everyone)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return norm


def _counts(task: Task, group: list[Batch], accelerator: Accelerator) -> dict[str, float]:
    """Return the number of units of each kind in the global batch, over micro-batches and processes."""
    totals: dict[str, int] = {}
    for batch in group:
        for unit, count in task.units(batch).items():
            totals[unit] = totals.get(unit, 0) + count
    if accelerator.num_processes > 1:
        units = sorted(totals)
        values = torch.tensor([totals[unit] for unit in units], device=accelerator.device, dtype=torch.int64)
        totals = dict(zip(units, accelerator.reduce(values).tolist(), strict=True))
    return {unit: float(max(1, count)) for unit, count in totals.items()}


@contextlib.contextmanager
def _reading(loader: Iterable[Batch], size: int) -> Iterator[Iterator[list[Batch]]]:
    """Read groups of `size` micro-batches.

    Ctrl-C and SIGTERM reach all processes of a group, but the workers of the loader ignore them, because the batch that
    they read is needed to finish the step. The workers end with this context.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))  # inherited by the workers
    try:
        batches = iter(loader)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield iter(lambda: list(islice(batches, size)), [])
    finally:
        getattr(batches, "close", lambda: None)()  # ends the workers


def _validate(task, job, state, student, accelerator, metrics, progress, keep: bool | None) -> None:
    """Validate, and export the model if it is the best so far, or, unless `keep` is None, if `keep` is true."""
    # The processes must agree on which score is the best, and a sum of floats may differ between them.
    scores = broadcast_from_main(job.validate(task))
    task.train()
    score = scores["score"]
    line = {"step": state.step, **{f"validation/{key}": value for key, value in scores.items()}}
    state.validations.append({"step": state.step, **scores})
    if metrics:
        metrics.write(line)
    if accelerator.trackers:
        accelerator.log({key: value for key, value in line.items() if key != "step"}, step=state.step)
    better = score > state.best_score
    progress.message(f"step {state.step}: validation {score:.4f}{' (best so far)' if better else ''}")
    if better:
        state.best_score, state.best_step, state.worse = score, state.step, 0
    else:
        state.worse += 1
    if not (better if keep is None else keep):
        return
    state.kept_step = state.step
    if accelerator.is_main_process:
        with new_folder(student, student.with_name(".model.tmp")) as temporary:
            job.export(task, temporary)
    accelerator.wait_for_everyone()


def _resume(task, optimizer, names, average, root: Path, job: FitArguments, accelerator: Accelerator) -> TrainState:
    folder = None
    if job.resume and accelerator.is_main_process:
        folder = checkpoint.newest(root, logging.getLogger("preceptor").warning)
    folder = broadcast_from_main(folder)
    if folder is None:
        return TrainState()
    try:
        return _restore(folder, task, optimizer, names, average, job)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        if isinstance(error, UserError | torch.OutOfMemoryError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{folder} is not a checkpoint of this model ({type(error).__name__}: {reason}); delete it to resume from "
            "an earlier one, or start again with resume=never"
        ) from error


def _restore(folder: Path, task, optimizer, names, average, job: FitArguments) -> TrainState:
    tensors, body = checkpoint.load(folder)
    changed = job.differences(body["resume_config"], job.resume_config)
    if changed:
        raise UserError(
            f"{job.folder} contains a run of another recipe ({'; '.join(changed[:12])}); restore these values, set "
            "output=FOLDER to another folder, or start again with resume=never"
        )
    extra = {name: value for name, value in tensors["task"].items() if name.startswith("state:")}
    weights = {name: value for name, value in tensors["task"].items() if name not in extra}
    task.load_state_dict(shard_state_dict(weights, task.state_dict()))
    task.load_task_state({name.removeprefix("state:"): value for name, value in extra.items()})
    parameters = dict(task.named_parameters())
    moments = {path: parameters[path.rpartition("/")[0]] for path, t in tensors["optimizer"].items() if t.dim()}
    checkpoint.load_optimizer(optimizer, names, shard_state_dict(tensors["optimizer"], moments))
    average.load(shard_state_dict(tensors["average"], parameters))
    return TrainState(**body["progress"])


class _Window:
    """Means of the loss terms since the last logged step. They stay on the device until they are logged."""

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.reset()

    def reset(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}
        self.samples, self.steps, self.begun = 0.0, 0, time.monotonic()

    def add(self, terms: LossTerms, counts: dict[str, float]) -> None:
        for name, value in terms.sums.items():
            mean = value.detach() / counts[terms.units[name]]
            self.sums[name] = self.sums.get(name, 0) + mean
            weighted = terms.weights[name] * mean
            self.sums["loss"] = self.sums.get("loss", 0) + weighted

    def step_done(self, counts: dict[str, float]) -> None:
        self.samples += counts["samples"]
        self.steps += 1

    def line(self, step: int, epoch: float, rate: float, norm: torch.Tensor) -> dict[str, float]:
        names = sorted(self.sums)
        values = self.accelerator.reduce(torch.stack([self.sums[name].float() for name in names])).tolist()
        seconds = max(1e-9, time.monotonic() - self.begun)
        line = {"step": step, "epoch": round(epoch, 4), "lr": rate, "grad_norm": float(norm)}
        line |= {name: value / self.steps for name, value in zip(names, values, strict=True)}
        line["samples/s"] = round(self.samples / seconds, 2)
        self.reset()
        return line


def _any(accelerator: Accelerator, stop: Stop) -> bool:
    """Return whether any process received a stop signal, so that all of them save at the same step."""
    if accelerator.num_processes == 1:
        return stop.requested
    return bool(accelerator.reduce(torch.tensor(int(stop.requested), device=accelerator.device)))
