"""Compare the gradients of a sharded task in two processes, one of them without images, with those of one process.

Arguments: a folder, and the cases, each a family of models and what is trained of it, joined by a hyphen.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from PIL import Image

from preceptor.data.types import Dialogue
from preceptor.distributed import processes
from preceptor.grounding.clinkd import ClinkdConfig
from preceptor.grounding.dataset import DialogueExamples, TrainingExample
from preceptor.grounding.model import GroundedVlm, LoraSettings
from preceptor.grounding.new_vlm import new_vlm
from preceptor.grounding.task import ClinkdTask
from preceptor.task import Batch
from preceptor.training.fsdp import gather_full, shard, summon_full_params
from tests.grounding.conftest import dinov2_folder

TEXTS = ["Where is the liver?", "It is at <|box_start|>(120,345),(567,890)<|box_end|>", "What is it?", "An MR."]


def compare(folder: Path, family: str, training: str) -> None:
    state = processes()
    assert state.num_processes == 2
    with state.main_process_first():
        if state.is_main_process:
            folder.mkdir()
            vision = dinov2_folder(folder / "dinov2") if family == "qwen2_vl_dinov2" else None
            kind: Any = "qwen2_vl" if vision else family
            new_vlm(folder / "vlm", TEXTS * 3, family=kind, max_pixels=56 * 56, vision=vision)
            pixels = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "a.png")
    rows = [
        Dialogue("a", (folder / "a.png",), ((TEXTS[0], TEXTS[1]),), "vg", "ct", "g", "train"),
        Dialogue("b", (), ((TEXTS[2], TEXTS[3]),), "mia", "mr", "h", "train"),
    ]

    def task() -> ClinkdTask:
        torch.manual_seed(0)
        vlm = GroundedVlm.load(folder / "vlm", training=training, lora=LoraSettings(4, 8, 0.0))  # type: ignore[arg-type]
        return ClinkdConfig().build_task(vlm.train())

    alone, shared = task(), task()
    examples = DialogueExamples([], alone.student.encoder)
    batches: list[Batch] = [examples.collate([examples.read(TrainingExample(row))]) for row in rows]
    for batch in batches:
        alone(batch).total({"tokens": 2.0}).backward()  # a mean over two processes halves the sum
    accelerator = Accelerator(cpu=True)
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap")
    shard(shared, plugin, accelerator)
    parts = sum(p.to_local().numel() for p in shared.parameters())  # type: ignore[operator]
    total = sum(p.numel() for p in alone.parameters())
    assert 0.4 * total < parts < 0.6 * total, (parts, total)
    shared(batches[state.process_index]).total({"tokens": 1.0}).backward()
    gradients = {name: p.grad for name, p in shared.named_parameters() if p.grad is not None}
    found = gather_full(gradients, keep=True)
    checked = 0
    for name, p in alone.named_parameters():
        if p.grad is None:
            assert name not in found or not found[name].any(), name
            continue
        worst = (found[name] - p.grad).abs().max()
        assert worst <= 1e-5 + 1e-4 * p.grad.abs().max(), (name, worst)
        checked += 1
    assert checked > 10
    with summon_full_params(shared):
        want = alone.student.generate(rows, max_new_tokens=4)
        assert [a[0].tokens for a in shared.student.generate(rows, max_new_tokens=4)] == [a[0].tokens for a in want]
    # The layers are sharded again, and the next step is like the first.
    shared.zero_grad()
    shared(batches[state.process_index]).total({"tokens": 1.0}).backward()
    again = gather_full({name: p.grad for name, p in shared.named_parameters() if p.grad is not None}, keep=True)
    assert all(torch.allclose(again[name], value, atol=1e-6) for name, value in found.items())
    print(f"{family} {training}: the same", flush=True)


if __name__ == "__main__":
    for case in sys.argv[2:]:
        compare(Path(sys.argv[1]) / case, *case.split("-"))
