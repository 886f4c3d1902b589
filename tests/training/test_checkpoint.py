from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from preceptor.files import recover, replace_folder, write_text
from preceptor.training import checkpoint
from preceptor.training.metrics_file import MetricsFile, read_metrics


def save(root: Path, step: int, keep: int = 2) -> Path:
    tensors = {"task": {"w": torch.full((3,), float(step))}, "optimizer": {}}
    return checkpoint.save(root, step, tensors, {"progress": {"step": step, "best": 0.5}}, keep)


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [step for step, _ in checkpoint.folders(tmp_path)] == [2, 10]
    tensors, state = checkpoint.load(checkpoint.newest(tmp_path, pytest.fail))
    assert torch.equal(tensors["task"]["w"], torch.full((3,), 10.0))
    assert state["progress"] == {"step": 10, "best": 0.5}


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def replace_text(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


DAMAGE = {
    "flipped": lambda f: flip(f / "task.safetensors"),
    "truncated": lambda f: (f / "task.safetensors").write_bytes((f / "task.safetensors").read_bytes()[:-4]),
    "missing": lambda f: (f / "optimizer.safetensors").unlink(),
    "a wrong digit in the state": lambda f: replace_text(f / "state.json", '"best": 0.5', '"best": 0.7'),
    "no state": lambda f: (f / "state.json").unlink(),
    "cut state": lambda f: (f / "state.json").write_text((f / "state.json").read_text()[:20]),
    "other format": lambda f: (f / "state.json").write_text(json.dumps({"format": 99, "sha256": {}})),
    "a list": lambda f: (f / "state.json").write_text("[]"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(tmp_path, kind):
    save(tmp_path, 1)
    DAMAGE[kind](save(tmp_path, 2))
    said = []
    assert checkpoint.newest(tmp_path, said.append) == tmp_path / "step-1"
    assert len(said) == 1
    assert "skipping checkpoint step-2" in said[0]


def test_nothing_valid_is_no_checkpoint(tmp_path):
    assert checkpoint.newest(tmp_path / "absent", pytest.fail) is None
    DAMAGE["flipped"](save(tmp_path, 1))
    said = []
    assert checkpoint.newest(tmp_path, said.append) is None
    assert len(said) == 1


def test_a_damaged_later_checkpoint_does_not_push_out_a_valid_one(tmp_path):
    save(tmp_path, 4)
    DAMAGE["truncated"](save(tmp_path, 6))
    save(tmp_path, 5, keep=1)
    assert checkpoint.newest(tmp_path, lambda text: None) == tmp_path / "step-5"


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space"):
        save(tmp_path, 1)
    assert checkpoint.newest(tmp_path, pytest.fail) == tmp_path / "step-1"


def test_leftovers_of_a_kill_are_mended(tmp_path):
    save(tmp_path, 1)
    (tmp_path / ".tmp-step-2").mkdir()
    (tmp_path / "step-1").rename(tmp_path / ".step-1.old")
    checkpoint.clear_temporaries(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1"]


def test_a_replacement_cut_in_half_gives_the_old_folder_back(tmp_path):
    old, new = tmp_path / "model", tmp_path / ".model.tmp"
    for folder, text in ((old, "old"), (new, "new")):
        folder.mkdir()
        write_text(folder / "config.json", text)
    old.rename(tmp_path / ".model.old")  # killed here
    recover(old)
    assert (old / "config.json").read_text() == "old"
    replace_folder(new, old)
    assert (old / "config.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_optimizer_state_comes_back_exactly():
    def pair():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        names = [name for name, _ in model.named_parameters()]
        return model, names, torch.optim.AdamW(model.parameters(), 0.1, fused=True)

    def step(model, optimizer, seed):
        x = torch.randn(5, 3, generator=torch.Generator().manual_seed(seed))
        model(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    one, names, first = pair()
    for seed in range(3):
        step(one, first, seed)
    two, _, second = pair()
    two.load_state_dict(one.state_dict())
    kept = {name: value.clone() for name, value in checkpoint.optimizer_tensors(first, names).items()}
    checkpoint.load_optimizer(second, names, kept)
    step(one, first, 9)
    step(two, second, 9)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)


def test_metrics_of_steps_trained_anew_are_cut(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    file = MetricsFile(path, 2)
    file.write({"step": 3, "loss": 1.0})
    file.close()
    assert read_metrics(path) == [{"step": 1}, {"step": 2}, {"step": 3, "loss": 1.0}]
