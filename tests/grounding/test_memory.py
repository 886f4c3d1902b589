"""The memory estimate before a training, and a teacher that stays on the CPU while it is not needed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

import preceptor
from preceptor.data.types import Dialogue
from preceptor.grounding import memory
from preceptor.grounding import teachers as teaching
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.experiment import GroundingExperiment
from preceptor.grounding.memory import GIB, estimate_memory, free_memory, sentence, warning
from preceptor.grounding.memory_model import memory_estimate
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.new_vlm import new_vlm
from preceptor.tasks import load_recipe
from tests.fault.tiny import CLINKD

TEXTS = ["Where is the liver?", "On the left.", "What is it?", "An MR."]


@pytest.fixture(scope="module")
def vlm(tmp_path_factory) -> GroundedVlm:
    return GroundedVlm.load(new_vlm(tmp_path_factory.mktemp("vlm") / "tiny", TEXTS * 3, max_pixels=56 * 56))


def tiny(**changes) -> GroundingRecipe:
    return GroundingRecipe.model_validate(yaml.safe_load(CLINKD) | changes)


def check(recipe: GroundingRecipe) -> tuple[list[str], list[str]]:
    """Return the notes and the reasons of the findings of `preceptor doctor`."""
    experiment = GroundingExperiment.for_check(recipe)
    reasons = [finding.reason for finding in experiment.findings()]
    return experiment.data.notes, reasons


def test_the_longest_dialogue_of_a_micro_batch_counts(vlm):
    recipe = tiny()
    rows = [Dialogue(str(i), (), ((TEXTS[0] * i, TEXTS[1]),), "mia", "mr", "g", "train") for i in (1, 9, 3)]
    found = estimate_memory(recipe.student, vlm.config, vlm.encoder, rows)
    tokens = len(vlm.encoder.encode(rows[1]).input_ids)
    assert found == memory_estimate(vlm.config, tokens=8 * tokens, dtype=torch.float32)
    recipe.student.train.gradient_accumulation_steps = 4
    assert estimate_memory(recipe.student, vlm.config, vlm.encoder, rows) == memory_estimate(
        vlm.config, tokens=2 * tokens, dtype=torch.float32
    )


def test_shares_of_a_sharded_training(vlm):
    """Each of two processes has half of the states. The larger of gathered weights and activations counts."""
    options = {"dtype": torch.float32, "tokens": 1}
    alone, half = (memory_estimate(vlm.config, shares=n, **options) for n in (1, 2))
    for part in ("weights", "gradients", "optimizer"):
        assert half[part] == alone[part] // 2
    assert half["gathered"] == alone["weights"]
    sharded = half["weights"] + half["gradients"] + half["optimizer"]
    assert half["total"] == sharded + max(half["gathered"], half["activations"] + half["logits"])
    assert "gathered" not in alone


def test_the_estimate_and_the_warning_as_sentences(vlm):
    recipe = tiny()
    parts = {"weights": 3 * GIB, "gradients": 0, "activations": GIB // 2, "teacher": 2 * GIB, "total": 6 * GIB}
    assert sentence("memory of prior", parts, 8 * GIB) == (
        "memory of prior: about 6.0 GiB of 8.0 per device (weights 3.0, activations 0.5, teacher 2.0)"
    )
    assert warning("prior", parts, 8 * GIB, recipe.student, recipe) is None
    found = warning("prior", parts, 4 * GIB, recipe.student, recipe)
    assert found is not None
    assert found.startswith("prior is expected to need 6.0 GiB, but the device has 4.0; try ")
    for fix in (
        "student.model.gradient_checkpointing=true",
        "student.model.training=lora",
        "max_pixels than 3136",
        "method.teacher_offload=cpu",
        "FSDP2",
    ):
        assert fix in found


def test_free_memory(tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal:  2048 kB\nMemAvailable:    1024 kB\n")
    assert free_memory(tmp_path / "meminfo") == 1024 * 1024
    assert free_memory(tmp_path / "none") > 0


@pytest.mark.slow
def test_doctor_estimates_the_memory_of_a_recipe(tmp_path, monkeypatch):
    changes = {"output": str(tmp_path / "run"), "method": {"name": "clinkd"}}
    recipe = tiny(**changes)
    recipe.data.root = str(tmp_path / "phantom")
    found = [note for note in preceptor.check(recipe)["notes"] if note.startswith("memory to train the")]
    assert [note.split(":")[0].split()[-1] for note in found] == ["teacher", "student"]
    assert "teacher" in found[1].split("(")[1]
    assert not (tmp_path / "run" / "new-student").exists()
    monkeypatch.setattr(memory, "available", lambda: 1)
    monkeypatch.setattr("preceptor.grounding.experiment.available", lambda: 1)
    reasons = [finding["reason"] for finding in preceptor.check(recipe)["findings"]]
    assert any("training the student is expected to need" in reason for reason in reasons)
    recipe.student.model.source = str(tmp_path / "nowhere")
    reasons = [finding["reason"] for finding in preceptor.check(recipe)["findings"]]
    assert any("the memory that the student needs is not estimated" in reason for reason in reasons)


@pytest.fixture
def moves(monkeypatch) -> list[str]:
    """The devices that the teacher was moved to. The computing device is `cpu:0`, to tell it from `cpu`."""
    sent: list[str] = []
    move = GroundedVlm.to

    def watched(self, device, *more):
        sent.append(str(device))
        return move(self, device, *more)

    monkeypatch.setattr(GroundedVlm, "to", watched)
    monkeypatch.setattr(teaching, "processes", lambda: SimpleNamespace(device=torch.device("cpu", 0)))
    return sent


def test_an_offloaded_teacher_is_on_the_device_only_while_it_answers(vlm, moves, monkeypatch):
    answered: list[int] = []
    monkeypatch.setattr(teaching, "asker", lambda *_: lambda *_: answered.append(len(moves)) or [["yes"]])
    for offload in ("none", "cpu"):
        recipe = tiny()
        recipe.method.teacher_offload = offload  # type: ignore[assignment]
        ask = teaching.corrector(SimpleNamespace(recipe=recipe), vlm)  # type: ignore[arg-type]
        assert ask([], 1, 0.0, 0) == [["yes"]]
    assert answered == [0, 1], "it was moved before it answered"
    assert moves == ["cpu:0", "cpu"]
    with pytest.raises(RuntimeError, match="broke off"), teaching.on_device(vlm, "cpu"):
        raise RuntimeError("broke off")
    assert len(moves) == 4, "it is moved back after an error, too"


@pytest.mark.parametrize("offload", ["none", "cpu"])
def test_the_signal_of_an_offloaded_teacher_stays_on_the_device(vlm, moves, offload):
    """It equals the signal of a teacher that is never moved."""
    from preceptor.grounding.dataset import DialogueExamples, TrainingExample

    examples = DialogueExamples([], vlm.encoder)
    row = Dialogue("a", (), ((TEXTS[0], TEXTS[1]),), "mia", "mr", "g", "train")
    batch = examples.collate([examples.read(TrainingExample(row))])
    with torch.no_grad():
        want = vlm.eval()(batch.tensors)
    found = teaching.OnlineTokenTeacher(vlm, vlm, offload).signal(batch).tokens
    assert torch.equal(found.hidden_TE, want.hidden)
    assert not isinstance(found.weight_WE, torch.nn.Parameter)
    assert torch.equal(found.weight_WE, vlm.lm_head_weight)
    assert moves == (["cpu:0", "cpu"] if offload == "cpu" else [])


@pytest.mark.parametrize("name", ["clinkd-med-grit-qwen2-vl", "clinkd-med-grit-lora"])
def test_recipes_for_med_grit_have_the_settings_of_the_published_code(name):
    recipe = load_recipe(name)
    assert isinstance(recipe, GroundingRecipe)
    assert recipe.stages == ("teacher", "baseline", "guided", "distilled", "clinkd")
    for run, size in ((recipe.teacher, "7B"), (recipe.student, "2B")):
        assert f"Qwen2-VL-{size}" in str(run.model.source)
        assert run.model.max_length == 2048
        assert run.model.gradient_checkpointing
        assert (run.train.epochs, run.train.schedule, run.train.precision) == (3, "cosine", "bf16")
    labels = recipe.method.pseudo_labels
    assert (labels.alpha, labels.temperature, labels.t_squared) == (0.5, 0.5, False)
    guidance = recipe.method.guidance
    assert (guidance.kind, guidance.gap, guidance.row_step, guidance.column_step) == ("fixed", 2, 1, 1)
    if name.endswith("lora"):
        assert recipe.student.model.lora.base == "bfloat16"
    else:
        assert recipe.student.train.learning_rate == 5e-5
        assert recipe.student.model.training == "full"


def test_adapters_are_float32_on_weights_in_half_precision(vlm, tmp_path):
    from preceptor.data.types import GroundingDataset
    from preceptor.grounding.context import RunContext

    recipe = tiny()
    recipe.student.model.training = "lora"
    recipe.student.model.lora.base = "bfloat16"
    vlm.save(tmp_path / "start")
    context = RunContext(recipe, GroundingDataset("none", "given", Path(), []))
    found = context.load(str(tmp_path / "start"), recipe.student.model, None, 0)
    kinds = {p.requires_grad: p.dtype for p in found.model.parameters()}
    assert kinds == {True: torch.float32, False: torch.bfloat16}
    parts = memory_estimate(
        found.config,
        training="lora",
        lora=memory.LoraSettings(),
        tokens=1,
        dtype=torch.bfloat16,
        autocast=torch.bfloat16,
    )
    assert parts["weights"] == sum(p.nbytes for p in found.model.parameters())
