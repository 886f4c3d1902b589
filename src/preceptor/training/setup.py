"""Set up a training: the accelerator with its precision, and the optimiser with its parameter groups."""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs

from preceptor.config import TrainConfig
from preceptor.errors import UserError
from preceptor.task import Task


def native_bf16() -> bool:
    """Return whether this machine has bf16 instructions: on its GPU, or on a CPU with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def uses_bf16(config: TrainConfig) -> bool:
    """Return whether a training computes in bf16 on this machine."""
    return config.precision == "bf16" or (config.precision == "auto" and native_bf16())


def require_trackers(trackers: Sequence[str], key: str) -> None:
    """Raise UserError if the package of a tracker in the section `key` of a recipe is not installed."""
    missing = [name for name in trackers if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(
            f"{key}.trackers names {', '.join(missing)}, which is not installed: pip install {' '.join(missing)}"
        )


def make_accelerator(config: TrainConfig, folder: Path) -> Accelerator:
    bf16 = uses_bf16(config)
    if bf16 and not native_bf16():
        logging.getLogger("preceptor").warning(
            "train.precision=bf16: this processor has no bf16 instructions, so that a step may take ten times as long; "
            "train.precision=auto chooses fp32"
        )
    # Terms whose scheduled weight is 0 leave projectors without a gradient.
    handlers = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    # The state is global and would refuse a second stage with another precision.
    AcceleratorState._reset_state()
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision="bf16" if bf16 else "no",
        kwargs_handlers=handlers,
        log_with=list(config.trackers) or None,
        project_dir=str(folder),
    )


def make_optimizer(task: Task, config: TrainConfig) -> tuple[torch.optim.Optimizer, list[str]]:
    """Return the optimiser of all trained parameters, and their names in its order.

    Pretrained weights have `pretrained_lr_scale` times the learning rate, parameters in `task.learning_rates` their
    own. Weight decay applies to the parameters `weight` with two or more axes: those of linear layers, convolutions of
    any kind and embeddings. It does not apply to biases, norms, positions and other parameters.

    Raises:
        UserError: `pretrained_lr_scale` is 0, and all weights of the student are pretrained.
    """
    weights = [getattr(module, "weight", None) for module in task.modules()]
    decaying = {id(weight) for weight in weights if isinstance(weight, torch.nn.Parameter) and weight.dim() > 1}
    pretrained = task.pretrained_parameters
    groups: dict[tuple[float, float], list[tuple[str, torch.nn.Parameter]]] = {}
    for name, parameter in task.named_parameters():
        scale = config.pretrained_lr_scale if name in pretrained else 1.0
        if name in task.learning_rates:
            scale = task.learning_rates[name] / config.learning_rate
        if scale == 0:
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            decay = config.weight_decay if id(parameter) in decaying else 0.0
            groups.setdefault((scale, decay), []).append((name, parameter))
    names = [name for group in groups.values() for name, _ in group]
    if config.pretrained_lr_scale == 0 and not any(name.startswith("student.") for name in names):
        raise UserError(
            "train.pretrained_lr_scale=0 freezes all weights of the model, because all of them are pretrained, and "
            "nothing is left to train; set it above 0"
        )
    settings = [
        {"params": [p for _, p in group], "lr": config.learning_rate * scale, "scale": scale, "weight_decay": decay}
        for (scale, decay), group in groups.items()
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(settings, lr=config.learning_rate, momentum=0.99, nesterov=True), names
    return torch.optim.AdamW(settings, lr=config.learning_rate, betas=(0.9, config.beta2), fused=True), names
