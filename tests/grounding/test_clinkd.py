from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from preceptor.config import TrainConfig
from preceptor.data.types import Dialogue
from preceptor.grounding.clinkd import ClinkdConfig
from preceptor.grounding.dataset import DialogueExamples, TrainingExample, last_answer
from preceptor.grounding.guided_rope import Guidance
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.new_vlm import new_vlm
from preceptor.grounding.reflection import Correction
from preceptor.grounding.task import ClinkdTask
from preceptor.grounding.teachers import OnlineTokenTeacher
from preceptor.task import Batch
from preceptor.training.guards import offenders
from preceptor.training.setup import make_optimizer

TEXTS = ["Where is the liver?", "It is at <|box_start|>(120,345),(567,890)<|box_end|>", "What is it?", "An MR.", "No."]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return new_vlm(tmp_path_factory.mktemp("vlm") / "tiny", TEXTS * 3, max_pixels=56 * 56)


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> list[Dialogue]:
    pictures, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    paths = []
    for number, size in enumerate([(40, 56, 3), (56, 28, 3), (28, 28, 3)]):
        paths.append(pictures / f"{number}.png")
        Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(paths[-1])
    turns = (TEXTS[0], TEXTS[1]), (TEXTS[2], TEXTS[3])
    return [
        Dialogue("a", tuple(paths[:2]), turns, "vg", "ct", "g", "train"),
        Dialogue("b", (), (turns[1],), "mia", "mr", "h", "train"),
        Dialogue("c", (paths[2],), ((TEXTS[2], TEXTS[4]),), "mia", "x", "i", "train"),
        Dialogue("d", (paths[0],), (turns[0],), "vg", "x", "j", "train"),
    ]


def config(**settings) -> ClinkdConfig:
    return ClinkdConfig.model_validate({"name": "clinkd", **settings})


def batch(vlm: GroundedVlm, rows: list[Dialogue], **lesson) -> Batch:
    examples = DialogueExamples([], vlm.encoder)
    return examples.collate([examples.read(TrainingExample(row, **lesson)) for row in rows])


def plain(vlm: GroundedVlm, rows: Batch) -> torch.Tensor:
    """The sum of the tokens' cross-entropy, by torch alone."""
    states = vlm(rows.tensors)
    return F.cross_entropy(states.hidden @ vlm.lm_head_weight.T, states.targets, reduction="sum")


def test_answers_alone(folder, rows):
    vlm = GroundedVlm.load(folder).eval()
    task = config().build_task(vlm)
    given = batch(vlm, rows)
    loss = task(given)
    assert set(loss.sums) == {"answers"}
    assert torch.allclose(loss.sums["answers"], plain(vlm, given), rtol=1e-5)
    assert task.units(given) == {"samples": 4, "tokens": int((given["labels"][:, 1:] >= 0).sum())}
    assert task.task_state() == {}


def test_the_last_answer_alone(folder, rows):
    vlm = GroundedVlm.load(folder)
    every, last = (batch(vlm, rows[:1], last=last)["labels"][0] for last in (False, True))
    assert vlm.encoder.decode(last[last >= 0].tolist()) == TEXTS[3]
    assert vlm.encoder.decode(every[every >= 0].tolist()).startswith(TEXTS[1])
    labels = torch.tensor([-100, 5, 6, -100, -100, 7, -100])
    assert last_answer(labels).tolist() == [-100, -100, -100, -100, -100, 7, -100]
    assert last_answer(torch.full((3,), -100)).tolist() == [-100] * 3


@pytest.mark.parametrize("count", [1, 2, 3])
def test_the_first_rows_of_a_batch(folder, rows, count):
    vlm = GroundedVlm.load(folder).eval()
    whole, part = vlm(batch(vlm, rows).tensors), vlm(batch(vlm, rows).narrow(0, count).tensors)
    kept = whole.rows < count
    assert torch.equal(whole.targets[kept], part.targets)
    assert torch.allclose(whole.hidden[kept], part.hidden, atol=1e-5)


def test_every_row_of_a_batch_narrows_to_its_own_images(folder, rows):
    """The dialogues have 2, 0, 1 and 1 images of different sizes, packed in one tensor."""
    vlm = GroundedVlm.load(folder).eval()
    packed = batch(vlm, rows)
    for number, row in enumerate(rows):
        part, single = packed.narrow(number, 1), batch(vlm, [row])
        assert (part.ids, part.keys) == (single.ids, single.keys)
        assert part.tensors.keys() == single.tensors.keys()
        for name in ("pixel_values", "image_grid_thw", "images"):
            if name in single.tensors:
                assert torch.equal(part[name], single[name]), name
        a, b = vlm(part.tensors), vlm(single.tensors)
        assert torch.equal(a.targets, b.targets)
        assert torch.allclose(a.hidden, b.hidden, atol=1e-5)


def test_the_dialogue_with_a_broken_image_is_named(folder, rows):
    vlm = GroundedVlm.load(folder).eval()
    task, given = config().build_task(vlm), batch(vlm, rows)
    patches = given["image_grid_thw"].prod(dim=1)
    given["pixel_values"][int(patches[:2].sum())] = torch.nan  # the first patch of the third image, of dialogue c
    counts = {"tokens": 1.0, "samples": 1.0}
    assert not torch.isfinite(task(given).total(counts))
    assert offenders([given], lambda one: task(one).total(counts)) == ["c"]


def test_a_loss_that_is_not_finite_names_the_dialogue_of_the_image(folder, rows):
    """Patches of all images are packed, so that the row of a patch is not that of its dialogue."""
    vlm = GroundedVlm.load(folder)
    packed = batch(vlm, rows)
    guilty = next(number for number in reversed(range(len(rows))) if packed["images"][number])
    begin = len(packed["pixel_values"]) - len(packed.narrow(guilty, len(rows) - guilty)["pixel_values"])
    packed["pixel_values"][begin] = float("nan")
    assert offenders([packed], lambda one: plain(vlm, one)) == [packed.ids[guilty]]


def test_narrowing_to_a_dialogue_without_images(folder, rows):
    vlm = GroundedVlm.load(folder).eval()
    given = batch(vlm, [rows[1], rows[0]]).narrow(0, 1)
    assert "pixel_values" not in given.tensors
    assert torch.allclose(vlm(given.tensors).hidden, vlm(batch(vlm, [rows[1]]).tensors).hidden, atol=1e-5)


def test_the_prior_weighs_by_the_curriculum_and_learns_the_teachers_words(folder, rows):
    vlm, teacher = GroundedVlm.load(folder).eval(), GroundedVlm.load(folder).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    c = config(pseudo_labels={"alpha": 0.5, "temperature": 0.5, "curriculum": {"begin": 0.8, "end": 0.2, "over": 1.0}})
    task = c.build_task(vlm, pseudo_labels=True, teacher=OnlineTokenTeacher(teacher, vlm))
    given = batch(vlm, rows)
    given.tensors["confidence"] = torch.tensor([0.9, 0.7, 0.9, 0.1])
    given.tensors["margin"] = torch.tensor([0.9, 0.7, 0.75, 0.1])
    task.on_interval(0.0)
    loss = task(given)
    # Scores 0.9, 0.7, 0.825, 0.1: the first and the third have entered.
    states, theirs = vlm(given.tensors), teacher(given.tensors)
    weights = torch.tensor([0.9, 0.0, 0.825, 0.0])[states.rows]
    mine, other = states.hidden @ vlm.lm_head_weight.T, theirs.hidden @ teacher.lm_head_weight.T
    entropy = (F.cross_entropy(mine, states.targets, reduction="none") * weights).sum()
    kl = F.kl_div((mine / 0.5).log_softmax(-1), (other / 0.5).log_softmax(-1), reduction="none", log_target=True)
    kl = (kl.sum(-1) * weights).sum()
    assert kl > 0.1
    assert torch.allclose(loss.sums["answers"], entropy, rtol=1e-4)
    assert torch.allclose(loss.sums["teacher"], kl, rtol=1e-4)
    assert torch.allclose(loss.sums["distilled"], (0.5 * kl + entropy) / 1.5, rtol=1e-4)
    assert (loss.weights["distilled"], loss.weights["answers"], loss.weights["teacher"]) == (1.0, 0.0, 0.0)
    assert task.units(given)["tokens"] == int((weights > 0).sum())
    assert not any(p.grad is not None for p in teacher.parameters())
    loss.sums["distilled"].backward()
    (want,) = torch.autograd.grad((0.5 * kl + entropy) / 1.5, [vlm.lm_head_weight])
    assert torch.allclose(vlm.lm_head_weight.grad, want, atol=1e-4)


def reflecting(vlm: GroundedVlm, asked: list[int], **settings) -> ClinkdTask:
    def reflect(number, buffer):
        asked.append(number)
        buffer.add(Correction(f"c{number}", "q", "wrong", TEXTS[3], "unlike", number))
        buffer.close_round(4, {"unlike": 1}, 1)

    def collate(corrections):
        taught = [Dialogue(c.id, (), ((c.question, c.corrected),), "mia", "ct", "g", "train") for c in corrections]
        return batch(vlm, taught, last=True)

    c = config(reflection={"rounds": 3, "ratio": 0.5} | settings)
    return c.build_task(vlm, reflect=reflect, collate=collate, seed=5)


def test_corrections_take_the_place_of_the_last_rows(folder, rows):
    vlm, asked = GroundedVlm.load(folder).eval(), []
    task = reflecting(vlm, asked)
    given = batch(vlm, rows)
    task.on_interval(0.0)
    assert set(task(given).sums) == {"answers"}
    task.on_interval(0.25)
    assert asked == [0]
    fresh = batch(vlm, rows)
    units, loss = task.units(fresh), task(fresh)
    assert set(loss.sums) == {"answers", "corrections"}
    # Half of four rows are two, but there is only one correction, and no batch holds it twice.
    assert torch.allclose(loss.sums["answers"], plain(vlm, fresh.narrow(0, 3)), rtol=1e-5)
    taught = Dialogue("c0", (), (("q", TEXTS[3]),), "mia", "ct", "g", "train")
    correction = batch(vlm, [taught])
    assert torch.allclose(loss.sums["corrections"], plain(vlm, correction), rtol=1e-5)
    tokens = (fresh.narrow(0, 3)["labels"][:, 1:] >= 0).sum() + (correction["labels"][:, 1:] >= 0).sum()
    assert units == {"samples": 4, "tokens": int(tokens)}


def test_a_small_ratio_is_kept_over_the_steps_and_every_correction_is_used_equally_often(folder, rows):
    """A twentieth of 4 rows is no row: it is carried over, to one correction in five steps."""
    vlm = GroundedVlm.load(folder)
    task = reflecting(vlm, [], ratio=0.05, uses=2)
    task.buffer.rounds = [{}] * 3  # no further rounds
    for number in range(4):
        task.buffer.add(Correction(f"c{number}", "q", "wrong", TEXTS[3], "unlike", 0))
    used: list[str] = []
    per_step = []
    for step in range(60):
        if step == 27:  # a resumed run goes on with the same corrections
            resumed = reflecting(vlm, [], ratio=0.05, uses=2)
            resumed.load_task_state(task.task_state())
            task = resumed
        task.on_interval(step / 60)
        given = batch(vlm, rows)
        task.units(given)
        names = dict(task._split(given))
        per_step.append(len(names["corrections"]) if "corrections" in names else 0)
        used += names["corrections"].ids if "corrections" in names else []
        task.after_step(step + 1)
    assert sum(per_step[:40]) == 8
    assert sum(per_step[40:]) == 0, "each was used twice and is forgotten"
    assert sorted(used[:4]) == sorted(used[4:]) == ["c0", "c1", "c2", "c3"]
    assert len(task.buffer) == 0


def test_micro_batches_of_a_step_have_different_corrections(folder, rows):
    vlm = GroundedVlm.load(folder)
    task = reflecting(vlm, [], ratio=0.5)
    for number in range(5):
        task.buffer.add(Correction(f"c{number}", "q", "wrong", TEXTS[3], "unlike", 0))
    task.on_interval(0.0)
    group = [batch(vlm, rows), batch(vlm, rows[::-1]), batch(vlm, [rows[1], rows[0], *rows[2:]])]
    for given in group:
        task.units(given)
    drawn = [[part.ids for name, part in task._split(given) if name == "corrections"] for given in group]
    ids = [id for parts in drawn for part in parts for id in part]
    assert [len(parts) for parts in drawn] == [1, 1, 1]
    assert sorted(ids) == ["c0", "c1", "c2", "c3", "c4"]


def corrections_used(vlm: GroundedVlm, steps: list[list[list[Dialogue]]], **settings) -> tuple[list[list[int]], int]:
    """Return the number of corrections in each micro-batch of each step, and the number of rows counted."""
    task = reflecting(vlm, [], **settings)
    task.buffer.rounds = [{}] * 3  # no further rounds
    counts = []
    for number, micro_batches in enumerate(steps):
        for name in "abcdefgh":  # never too few
            task.buffer.add(Correction(f"{name}{number}", "q", "wrong", TEXTS[3], "unlike", 0))
        task.on_interval(number / len(steps))
        group = [batch(vlm, rows) for rows in micro_batches]
        for given in group:
            task.units(given)
        parts = [dict(task._split(given)) for given in group]
        assert [sum(map(len, part.values())) for part in parts] == [len(rows) for rows in micro_batches]
        counts.append([len(part["corrections"]) if "corrections" in part else 0 for part in parts])
        task.after_step(number + 1)
    return counts, int(task.task_state()["rows"])


@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_the_ratio_does_not_depend_on_the_size_of_the_micro_batches(folder, rows, size):
    """A ratio of 0.3 of five steps of 8 rows are 12 corrections: 2, 4, 7, 9 and 12 in total after each step."""
    vlm = GroundedVlm.load(folder)
    step = [(rows * 2)[begin : begin + size] for begin in range(0, 8, size)]
    counts, counted = corrections_used(vlm, [step] * 5, ratio=0.3)
    assert [sum(step) for step in counts] == [2, 2, 3, 2, 3]
    assert counted == 40, "micro-batches with the same rows count, too"


def test_a_micro_batch_that_consists_of_corrections(folder, rows):
    vlm = GroundedVlm.load(folder).eval()
    task = reflecting(vlm, [], ratio=0.5)
    task.buffer.rounds = [{}] * 3
    task.buffer.add(Correction("c0", "q", "wrong", TEXTS[3], "unlike", 0))
    task.on_interval(0.5)
    group = [batch(vlm, rows[:1]) for _ in range(2)]
    units, losses = [task.units(given) for given in group], [task(given) for given in group]
    correction = batch(vlm, [Dialogue("c0", (), (("q", TEXTS[3]),), "mia", "ct", "g", "train")])
    expected = {"answers": plain(vlm, group[0]), "corrections": plain(vlm, correction)}
    for name, loss in zip(("answers", "corrections"), losses, strict=True):
        assert set(loss.sums) == {"answers", "corrections"}
        assert torch.allclose(loss.sums[name], expected[name], rtol=1e-5)
        assert loss.total({"tokens": 1.0}).item() == pytest.approx(expected[name].item(), rel=1e-5)
    tokens = [int((given["labels"][:, 1:] >= 0).sum()) for given in (group[0], correction)]
    assert units == [{"samples": 1, "tokens": count} for count in tokens]
    losses[1].total({"tokens": 1.0}).backward()
    assert vlm.lm_head_weight.grad.abs().sum() > 0


def test_pseudo_labels_that_have_not_entered_are_not_computed(folder, rows):
    """Neither the student nor the teacher sees them, and the losses are those of all rows with their weights."""
    vlm, teacher = GroundedVlm.load(folder).eval(), GroundedVlm.load(folder).eval()
    sizes: dict[str, list[int]] = {"student": [], "teacher": []}

    class Counted(OnlineTokenTeacher):
        def signal(self, batch):
            sizes["teacher"].append(len(batch))
            return super().signal(batch)

    vlm.register_forward_pre_hook(lambda _, arguments: sizes["student"].append(len(arguments[0]["labels"])))
    c = config(pseudo_labels={"curriculum": {"begin": 0.8, "end": 0.2, "over": 1.0}})
    task = c.build_task(vlm, pseudo_labels=True, teacher=Counted(teacher, vlm))
    given = batch(vlm, rows)
    given.tensors["confidence"] = given.tensors["margin"] = torch.tensor([0.1, 0.9, 0.7, 0.9])
    task.on_interval(0.0)
    assert task.units(given)["samples"] == 4
    loss = task(given)
    assert sizes == {"student": [2], "teacher": [2]}
    weights = torch.tensor([0.0, 0.9, 0.0, 0.9])[vlm(given.tensors).rows]
    states = vlm(given.tensors)
    entropy = F.cross_entropy(states.hidden @ vlm.lm_head_weight.T, states.targets, reduction="none")
    assert torch.allclose(loss.sums["answers"], (weights * entropy).sum(), rtol=1e-5)

    nothing = batch(vlm, rows)
    nothing.tensors["confidence"] = nothing.tensors["margin"] = torch.zeros(4)
    nothing.keys[:] = "efgh"
    empty = task(nothing)
    assert sizes["student"][-1] == 1, "every process runs the model"
    assert empty.sums["distilled"].item() == 0
    assert task.units(nothing)["tokens"] == 0


def test_rounds_are_even_and_not_repeated_after_a_stop(folder, rows):
    vlm, asked = GroundedVlm.load(folder), []
    task = reflecting(vlm, asked)
    for step in range(10):
        task.on_interval(step / 10)
    assert asked == [0, 1, 2]
    again = reflecting(vlm, asked)
    again.load_task_state(task.task_state())
    again.on_interval(0.9)
    assert asked == [0, 1, 2]
    assert again.buffer.state() == task.buffer.state()
    given = batch(vlm, rows)
    task.on_interval(0.9)
    drawn = [t._split(given)[1][1].ids for t in (task, again)]
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("guidance", "message"),
    [
        ({"kind": "clip"}, "kind=clip has the same three intervals for all modalities, which is kind=fixed"),
        ({"kind": "clip", "gap": 3, "table": {"ct": [3, 1, 1]}}, "which is kind=fixed"),
        ({"kind": "clip", "table": {"CT": [3, 1, 1]}}, "CT"),
    ],
)
def test_guidance_by_modality_that_is_the_same_for_all_is_refused(guidance, message):
    with pytest.raises(ValueError, match=message):
        config(guidance=guidance)
    assert config(guidance={"kind": "clip", "table": {"ct": [3, 1, 1]}}).guidance.rows[:2] == [(3, 1, 1), (2, 1, 1)]


def test_the_table_has_a_learning_rate_of_its_own(folder):
    c = config(guidance={"kind": "clip", "learnable": True, "learning_rate": 0.02})
    task = c.build_task(GroundedVlm.load(folder, guidance=Guidance("clip", learnable=True)))
    optimizer, names = make_optimizer(task, TrainConfig(learning_rate=5e-5))
    rates = [group["lr"] for group in optimizer.param_groups for _ in group["params"]]
    by_name = dict(zip(names, rates, strict=True))
    assert by_name.pop("student.guidance.log_table") == pytest.approx(0.02)
    assert set(by_name.values()) == {5e-5}
