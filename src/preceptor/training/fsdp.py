"""Weights, gradients and optimiser states shared out over the processes (FSDP2), where accelerate's settings say so.

`accelerate launch` reads its configuration, and this room calls PyTorch's `fully_shard` itself, because accelerate does
so on GPUs alone. Each transformer layer is gathered when it is computed, everything else once a step. Master weights
and what is gathered are in the type of the weights; autocast computes in bf16, as it does without sharding, so that the
numbers are those of DistributedDataParallel up to the order of sums.

Checkpoints and exports hold whole tensors: they do not depend on how many processes wrote them, or whether by sharding.
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
    """Return the settings of FSDP that `accelerate launch` was given; None where it was given none.

    Raises UserError for FSDP1, and settings of FSDP2 that are not taken up here.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true":
        return None
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise UserError(f"the accelerate configuration asks for fsdp_version {version}; set fsdp_version: 2")
    plugin = FullyShardedDataParallelPlugin()
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("fsdp_offload_params: true is not supported; set it to false, or take more processes or LoRA")
    if os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING", "false").lower() == "true":
        # transformers would leave the weights of all processes but the first one empty.
        raise UserError("fsdp_cpu_ram_efficient_loading: true is not supported; set it to false")
    if plugin.activation_checkpointing:
        raise UserError(
            "fsdp_activation_checkpointing: true is not read; set it to false, and in the recipe "
            "student.model.gradient_checkpointing=true"
        )
    return plugin


def shard(task: nn.Module, plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator) -> None:
    """Share out a task's parameters in place, by layers: the classes that the settings name, or the model's own list.

    Raises UserError where no module is of a class that the settings name.
    """
    device = accelerator.device
    task.to(device)
    own = {name for module in task.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    named = set(plugin.transformer_cls_names_to_wrap or ())
    layers = [module for module in task.modules() if type(module).__name__ in (named or own)]
    if named and not layers:
        raise UserError(
            f"fsdp_transformer_layer_cls_to_wrap names {', '.join(sorted(named))}, of which the model has none; leave "
            f"it out to take {', '.join(sorted(own)) or 'no layer'}"
        )
    computed_in_bf16(task, accelerator)
    mesh = init_device_mesh(device.type, (accelerator.num_processes,))
    for layer in layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=plugin.reshard_after_forward)
    fully_shard(task, mesh=mesh, reshard_after_forward=False)
    task.layers_reshard = plugin.reshard_after_forward  # type: ignore[assignment]


def computed_in_bf16(task: nn.Module, accelerator: Accelerator) -> None:
    """Do what `Accelerator.prepare_model` does to a model that it wraps, where bf16 is asked for."""
    if accelerator.mixed_precision == "bf16":
        task.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(task.forward)  # type: ignore[method-assign]


def is_sharded(module: nn.Module) -> bool:
    return isinstance(module, FSDPModule)


@contextlib.contextmanager
def summon_full_params(task: nn.Module) -> Iterator[None]:
    """Put the whole weights into the modules of a task that is sharded, on every process; changes to them are lost.

    For what runs apart from the task's own forward pass, such as generation and exports: within, processes need not
    take the same number of forward passes but must do alike, and no gradient is computed. All must enter.
    """
    shards = [module for module in task.modules() if isinstance(module, FSDPModule)]
    if not shards:
        yield
        return
    # The root must be known before a layer runs by itself, and torch has no public name for it.
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
    """Return tensors as they are without sharding, one after the other on the CPU, to the processes that `keep` them.

    All processes must call it.
    """
    found = {}
    for name, tensor in tensors.items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if keep:
            found[name] = full.cpu() if isinstance(tensor, DTensor) else full
    return found


def shard_state_dict(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whole tensors, each with this process's part alone where its namesake in `like` is sharded."""
    return {name: _part(tensor, like.get(name)) for name, tensor in tensors.items()}


def _part(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor):
        return tensor
    # Every process has the whole tensor: none is asked for it.
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
