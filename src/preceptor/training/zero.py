"""Gradients and optimiser states shared out over the processes by DeepSpeed (ZeRO-2), where accelerate's settings ask.

`accelerate launch` reads its configuration, and this room starts DeepSpeed's engine itself: accelerate would do so on
GPUs alone, and the loop's steps, checkpoints and schedule stay its own. Weights are whole on every process, in float32;
autocast computes in bf16, as it does without DeepSpeed, so that the numbers are those of DistributedDataParallel up to
the order of sums. One thing differs: a parameter that a step has no gradient of takes a step with a gradient of zero.

DeepSpeed's own checkpoints are pickles. Ours hold whole tensors, gathered and set through `deepspeed.utils`.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from preceptor.config import TrainConfig
from preceptor.distributed import DEEPSPEED
from preceptor.errors import UserError
from preceptor.training.fsdp import computed_in_bf16

MOMENTS = ("exp_avg", "exp_avg_sq")


def zero_asked(config: TrainConfig) -> bool:
    """Return whether the accelerate configuration asks for DeepSpeed.

    Raises UserError for another stage than ZeRO-2, for offloading, a file of DeepSpeed's own, another optimiser than
    AdamW, and where DeepSpeed is not installed.
    """
    if os.environ.get(DEEPSPEED, "false").lower() != "true":
        return False
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage != "2":
        raise UserError(
            f"the accelerate configuration asks for zero_stage {stage} of DeepSpeed; set zero_stage: 2, or take "
            "fsdp2.yaml, which shares out the weights as ZeRO-3 does"
        )
    for kind in ("OPTIMIZER", "PARAM"):
        device = os.environ.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{kind}_DEVICE", "none")
        if device != "none":
            raise UserError(f"offload_{kind.lower()}_device: {device} is not supported; set it to none")
    if file := os.environ.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
        raise UserError(f"deepspeed_config_file: {file} is not read; leave it out, and set zero_stage: 2")
    if config.optimizer != "adamw":
        raise UserError(f"train.optimizer={config.optimizer} does not train with DeepSpeed; take adamw, or fsdp2.yaml")
    if importlib.util.find_spec("deepspeed") is None:
        raise UserError(
            "the accelerate configuration asks for DeepSpeed, which is not installed: pip install deepspeed"
        )
    return True


class ZeroModel:
    """A task whose optimiser is DeepSpeed's, by ZeRO-2."""

    def __init__(
        self,
        task: nn.Module,
        optimizer: torch.optim.Optimizer,
        names: Sequence[str],
        config: TrainConfig,
        accelerator: Accelerator,
    ) -> None:
        """Take over an optimiser, with what it has of moments; `names` are the parameters' in the groups' order."""
        import deepspeed.ops
        from deepspeed.utils import logger, safe_set_full_optimizer_state

        logger.setLevel("WARNING")
        # On CPUs it would compile a kernel that inference alone uses, behind a lock that a killed run leaves for ever.
        deepspeed.ops.__compatible_ops__ = {}
        self.task, self.names = task, list(names)
        self.parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        kept = [optimizer.state.pop(parameter, {}) for parameter in self.parameters]
        task.to(accelerator.device)
        computed_in_bf16(task, accelerator)
        settings = {
            "train_micro_batch_size_per_gpu": 1,  # for its logs alone: batches are ours
            "gradient_accumulation_steps": config.accumulation,
            "gradient_clipping": config.clip_norm or 0.0,
            "zero_optimization": {"stage": 2},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 2**31,
        }
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=task, optimizer=optimizer, config=settings, dist_init_required=False
        )
        # Made now, for all groups at once: DeepSpeed links what there is after the first group's first step.
        step = max((float(state["step"]) for state in kept if "step" in state), default=0.0)
        own = self.optimizer.optimizer
        for group in own.param_groups:
            for part in group["params"]:
                own.state[part] = {"step": torch.tensor(step, device=part.device)}
                own.state[part] |= {name: torch.zeros_like(part) for name in MOMENTS}
        self.optimizer._lazy_init_hp_params_optimizer_state()
        for parameter, state in zip(self.parameters, kept, strict=True):
            for name in MOMENTS:
                if name in state:
                    safe_set_full_optimizer_state(parameter, state[name].to(accelerator.device), name)

    def __call__(self, batch: Any) -> Any:
        return self.engine(batch)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add a micro-batch's gradients; DeepSpeed takes their mean over processes."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss, scale_wrt_gas=False)

    def step(self) -> Tensor:
        """Clip, take the step, and return the gradients' norm. One that is not finite changes no weight."""
        self.engine.step()
        return torch.as_tensor(self.engine.get_global_grad_norm())

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """Return the optimiser's state as `checkpoint.optimizer_tensors` does, whole. All processes must call it."""
        from deepspeed.utils import safe_get_full_optimizer_state

        own = self.optimizer.optimizer
        step = own.state[own.param_groups[0]["params"][0]]["step"]
        found: dict[str, Tensor] = {}
        for name, parameter in zip(self.names, self.parameters, strict=True):
            found[f"{name}/step"] = step
            found |= {f"{name}/{key}": safe_get_full_optimizer_state(parameter, key).cpu() for key in MOMENTS}
        return found
