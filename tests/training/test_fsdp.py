"""Accelerate's configurations: what is shipped, what is read of them, what is refused. `tests/distributed` shards."""

from __future__ import annotations

import os

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_multi_gpu_env

from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.recipe import accelerate_file
from preceptor.training.fsdp import shard_settings


def environment(name: str) -> dict[str, str]:
    """What `accelerate launch` sets for a configuration, by accelerate's own reading of it."""
    arguments = launch_command_parser().parse_args(["--config_file", str(accelerate_file(name)), "script.py"])
    arguments, _, _ = _validate_launch_command(arguments)
    return prepare_multi_gpu_env(arguments)


@pytest.mark.parametrize(("name", "reshard"), [("fsdp2", True), ("fsdp2-zero2", False)])
def test_shipped_configurations(name, reshard, monkeypatch):
    read = load_config_from_file(str(accelerate_file(name)))
    assert str(read.distributed_type).endswith("FSDP")
    for key, value in environment(name).items():
        if key.startswith(("ACCELERATE_", "FSDP_")):
            monkeypatch.setenv(key, value)
    settings = shard_settings()
    assert settings is not None
    assert settings.fsdp_version == 2
    assert settings.reshard_after_forward is reshard
    assert settings.transformer_cls_names_to_wrap is None
    assert os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "false"


def test_an_unknown_configuration_is_named():
    with pytest.raises(UserError, match="no accelerate configuration 'fsdp3'; did you mean 'fsdp2"):
        accelerate_file("fsdp3")


def test_without_settings_nothing_is_sharded(monkeypatch):
    monkeypatch.delenv("ACCELERATE_USE_FSDP", raising=False)
    assert shard_settings() is None


def test_deepspeed_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(UserError, match="asks for DeepSpeed, which is not supported: use FSDP2"):
        processes()


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version 1; set fsdp_version: 2"),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "fsdp_offload_params"),
        ({"FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}, "fsdp_cpu_ram_efficient_loading"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "gradient_checkpointing=true"),
    ],
)
def test_what_is_not_supported_is_refused(variables, said, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        shard_settings()
