"""Weights, gradients and optimiser states sharded over the processes (FSDP2), if accelerate's settings ask for it.

`accelerate launch` reads its configuration. This module calls PyTorch's `fully_shard` itself, because accelerate does
so on GPUs only. Each transformer layer is gathered when it is computed, all other weights once per step. Master weights
and gathered weights have the type of the model; autocast computes in bf16, as it does without sharding, so that the
numbers are those of DistributedDataParallel up to the order of sums.

Checkpoints and exports hold full tensors, so that they depend neither on sharding nor on the number of processes.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from preceptor.errors import UserError


def shard_settings() -> FullyShardedDataParallelPlugin | None:
    """Return the FSDP settings of `accelerate launch`, None without FSDP.

    Raises UserError for FSDP1 and for settings of FSDP2 that are not supported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"the accelerate configuration asks for fsdp_version {version}; set fsdp_version: 2")
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("fsdp_offload_params: true is not supported; set it to false, and use more processes or LoRA")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        # transformers would load the weights in the first process only.
        raise UserError("fsdp_cpu_ram_efficient_loading: true is not supported; set it to false")
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing: true is not supported; set it to false, and set "
            "student.model.gradient_checkpointing=true in the recipe"
        )
    return plugin


def shard(task: nn.Module, plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator) -> None:
    """Shard a task's parameters in place, by layers of the classes in the settings or in the model's own list.

    Raises UserError if no module is of a class that the settings name.
    """
    device = accelerator.device
    task.to(device)
    own = {name for module in task.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    named = set(plugin.transformer_cls_names_to_wrap or ())
    layers = [module for module in task.modules() if type(module).__name__ in (named or own)]
    if named and not layers:
        raise UserError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(sorted(named))}, but the model has no such layer; "
            f"leave it out to shard {', '.join(sorted(own)) or 'no layer'}"
        )
    autocast_bf16(task, accelerator)
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(task, mesh=mesh, reshard_after_forward=False)
    task.layers_reshard = plugin.reshard_after_forward  # type: ignore[assignment]


def autocast_bf16(task: nn.Module, accelerator: Accelerator) -> None:
    """Run the forward pass under autocast if the precision is bf16, as `Accelerator.prepare_model` does."""
    if accelerator.mixed_precision == "bf16":
        task.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(task.forward)  # type: ignore[method-assign]


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextlib.contextmanager
def summon_full_params(task: nn.Module) -> Iterator[None]:
    """Gather the full weights of a sharded task on every process; changes to them are lost.

    It is for work outside the task's own forward pass, such as generation and exports, and without gradients. The
    processes may run different numbers of forward passes. All processes must enter.
    """
    shards = [module for module in task.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    # FSDP must know the root before a layer runs on its own, and torch has no public function for it.
    task._get_fsdp_state()._lazy_init()  # type: ignore[operator, union-attr]
    try:
        for module in shards:
            module.set_reshard_after_forward(False, recurse=False)
            module.unshard()
        yield
    finally:
        for module in shards:
            module.set_reshard_after_forward(module is not task and bool(task.layers_reshard), recurse=False)
            module.reshard()


def gather_full(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Return the full tensors, on the CPU if they were sharded, in the processes with `keep`, else nothing.

    They are gathered one after the other, to save memory. All processes must call it.
    """
    gathered = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            gathered[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return gathered


def shard_state_dict(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return full tensors, replaced by this process's shard if the tensor of the same name in `like` is sharded."""
    return {name: _part(tensor, like.get(name)) for name, tensor in tensors.items()}


def _part(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    # Every process has the full tensor, so that nothing is sent.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
