"""A ClinKD recipe from start to report, on tiny generated images."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from preceptor.grounding.run import run_vlm
from preceptor.grounding.serve import check_dialogues, evaluate_vlm
from preceptor.vqa.serve import answer_image

from preceptor.errors import UserError
from preceptor.grounding import metrics as dialogues
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.score import score_dialogue_file
from tests.fault.tiny import CLINKD

pytestmark = pytest.mark.slow


def recipe(root: Path, **changes) -> GroundingRecipe:
    raw = yaml.safe_load(CLINKD)
    raw |= {"output": str(root / "run"), "stages": ["teacher", "baseline", "guided", "distilled", "clinkd"]}
    raw["data"] |= {"root": str(root / "phantom"), **changes.pop("data", {})}
    raw["data"]["tasks"] = ["vg", "roc", "rc", "mia"]
    raw["method"] |= changes.pop("method", {})
    return GroundingRecipe.model_validate(raw | changes)


@pytest.fixture(scope="module", autouse=True)
def without_java():
    """Texts are scored by Java programs, each of which takes seconds to start; test_dialogues has them."""

    def missing() -> None:
        raise UserError("caption scores need Java")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dialogues, "require_captions", missing)
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, without_java) -> Path:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("clinkd")
    run_vlm(recipe(root))
    torch.set_num_threads(threads)
    return root


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_run_folder(trained):
    run = trained / "run"
    stages = ("teacher", "baseline", "guided", "distilled", "clinkd")
    for stage in stages:
        for file in (
            "recipe.yaml",
            "metrics.jsonl",
            "results.json",
            "model/config.json",
            "model/model.safetensors",
            "model/guidance.json",
            "model/README.md",
            "model/tokenizer.json",
        ):
            assert (run / stage / file).is_file(), f"{stage}/{file}"
    over = results(run)
    assert list(over["stages"]) == list(stages)
    assert set(over["protocols"]) == {"phantom-grounding/given/birdeval", "phantom-grounding/given/strict"}
    pairs = set(over["comparison"]["phantom-grounding/given/strict"])
    assert {"guided - baseline", "distilled - guided", "clinkd - distilled", "clinkd selected - clinkd"} <= pairs
    page = (run / "report.html").read_text()
    for part in ("Reflection", "Pseudo-labels", "Selective generation", "By modality", "Boxes"):
        assert f"<h2>{part}</h2>" in page
    assert str(trained) not in page


@pytest.mark.parametrize("protocol", ["birdeval", "strict"])
def test_predictions_are_scored_again_as_they_were(trained, protocol):
    id = f"phantom-grounding/given/{protocol}"
    for stage in ("teacher", "baseline", "clinkd"):
        file = trained / "run" / stage / "predictions" / f"{id.replace('/', '-')}.jsonl"
        found = score_dialogue_file(file, id)[0]
        assert json.loads(json.dumps(found["protocols"])) == {id: results(trained / "run" / stage)["protocols"][id]}


def test_each_stage_adds_its_part(trained):
    run = trained / "run"
    kinds = {
        s: json.loads((run / s / "model" / "guidance.json").read_text())["kind"]
        for s in ("teacher", "baseline", "guided", "clinkd")
    }
    assert kinds == {"teacher": "none", "baseline": "none", "guided": "clip", "clinkd": "clip"}
    told = {s: set(results(run / s)) & {"pseudo_labels", "reflection", "selection"} for s in kinds | {"distilled": ""}}
    assert told == {
        "teacher": set(),
        "baseline": set(),
        "guided": set(),
        "distilled": {"pseudo_labels"},
        "clinkd": {"pseudo_labels", "reflection", "selection"},
    }
    rounds = results(run / "clinkd")["reflection"]["rounds"]
    assert [entry["round"] for entry in rounds] == [0, 1, 2]
    assert all(entry["asked"] == 6 for entry in rounds)
    lines = [json.loads(line) for line in (run / "clinkd" / "metrics.jsonl").read_text().splitlines()]
    assert any("corrections" in line for line in lines)
    prior = [json.loads(line) for line in (run / "prior" / "metrics.jsonl").read_text().splitlines()]
    assert any("teacher" in line for line in prior)


def test_every_student_takes_the_same_number_of_steps(trained):
    run = trained / "run"
    students = ("baseline", "guided", "distilled", "clinkd")
    steps = {stage: results(run / stage)["training"]["steps"] for stage in students}
    prior = [json.loads(line)["step"] for line in (run / "prior" / "metrics.jsonl").read_text().splitlines()][-1]
    assert steps["baseline"] == steps["guided"]
    assert steps["distilled"] == steps["clinkd"]
    assert abs(steps["distilled"] + prior - steps["baseline"]) <= 1


def test_what_was_learnt_by_whom(trained):
    data = read_recipe_dialogues(recipe(trained).data, trained / "phantom")
    unlabelled = data.split("unlabelled")
    assert unlabelled
    assert all(row.turns[-1][1] == "" for row in unlabelled)
    assert not {row.group for row in unlabelled} & {row.group for row in data.split("train")}
    assert results(trained / "run" / "distilled")["pseudo_labels"]["rows"] <= len(unlabelled) + len(data.split("train"))


def test_a_teacher_that_learnt_elsewhere(trained, tmp_path):
    shares = {"root": str(trained / "phantom"), "train_share": 0.25, "teacher_share": 0.5}
    config = recipe(tmp_path, data=shares, stages=["teacher"])
    data = read_recipe_dialogues(config.data, tmp_path)
    train, apart, rest = ({row.group for row in data.split(part)} for part in ("train", "teacher", "unlabelled"))
    assert train
    assert not (train & apart) | (train & rest) | (apart & rest)
    assert len(apart) > len(train)
    # The students' rows are those that a recipe without the share has.
    alone = read_recipe_dialogues(recipe(tmp_path, data=shares | {"teacher_share": 0.0}).data, tmp_path)
    assert {row.group for row in alone.split("train")} == train
    assert {row.group for row in alone.split("unlabelled")} == apart | rest
    run_vlm(config)
    training = config.teacher.train
    steps = results(Path(config.output_folder))["training"]["steps"]
    assert steps == round(training.epochs * len(data.split("teacher")) / training.batch_size)


def test_a_finished_run_is_read_back(trained):
    before = (trained / "run" / "clinkd" / "results.json").stat().st_mtime_ns
    again = run_vlm(recipe(trained))
    assert (trained / "run" / "clinkd" / "results.json").stat().st_mtime_ns == before
    assert again["protocols"] == results(trained / "run")["protocols"]


def test_a_changed_recipe_is_refused(trained):
    with pytest.raises(UserError, match=r"another recipe .*method\.guidance\.gap: 1\.5 -> 3"):
        run_vlm(recipe(trained, method={"guidance": {"kind": "clip", "gap": 3.0, "learnable": True}}))


def test_the_verbs(trained):
    folder = trained / "run" / "clinkd" / "model"
    found = evaluate_vlm(folder, recipe(trained), "phantom-grounding/given/strict", trained / "again", whole=True)
    old = results(trained / "run" / "clinkd")["protocols"]["phantom-grounding/given/strict"]
    assert found["protocols"]["phantom-grounding/given/strict"]["tasks"]["roc"] == old["tasks"]["roc"]
    with pytest.raises(UserError, match=r"did you mean 'phantom-grounding/given/strict'"):
        evaluate_vlm(folder, recipe(trained), "phantom-grounding/given/strikt", trained / "again", whole=False)
    image = min((trained / "phantom" / "images").iterdir())
    with pytest.raises(UserError, match="give --modality, one of ct, mr"):
        answer_image(folder, image, "what imaging modality is this?", 1)
    (said,) = answer_image(folder, image, "what imaging modality is this?", 1, "mr")
    assert said["answers"][0]["answer"]
    assert 0 < said["answers"][0]["probability"] <= 1
    assert check_dialogues(recipe(trained))["findings"] == []


def test_doctor_lists_broken_and_faulty_boxes(tmp_path, trained):
    images = sorted((trained / "phantom" / "images").iterdir())[:2]
    (tmp_path / "good.png").write_bytes(images[0].read_bytes())
    (tmp_path / "cut.png").write_bytes(images[1].read_bytes()[:100])
    box = "<|box_start|>(900,0),(100,50)<|box_end|>"
    rows = [
        {
            "id": name,
            "image": f"{name}.png",
            "conversations": [{"from": "human", "value": "Where is it?"}, {"from": "gpt", "value": answer}],
        }
        for name, answer in (("good", box), ("cut", "nowhere"))
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = recipe(trained, data={"name": "sharegpt", "root": str(tmp_path / "rows.jsonl"), "boxes": "repair"})
    found = {f["severity"]: f for f in check_dialogues(config)["findings"]}
    assert found["error"]["file"] == "cut.png"
    assert found["error"]["ids"] == ["cut"]
    assert "1 boxes are swapped corners" in found["warning"]["reason"]


def test_the_student_is_an_ordinary_checkpoint(trained):
    from transformers import AutoModelForImageTextToText

    folder = trained / "run" / "clinkd" / "model"
    theirs = AutoModelForImageTextToText.from_pretrained(folder).state_dict()
    ours = GroundedVlm.load(folder).base.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


def test_recipes_that_do_not_fit_together(tmp_path):
    with pytest.raises(ValueError, match="need a teacher"):
        recipe(tmp_path, stages=["baseline", "clinkd"])
    with pytest.raises(ValueError, match="nothing is left out"):
        recipe(tmp_path, data={"train_share": 1.0})
    with pytest.raises(ValueError, match=r"train_share 0.5 and data.teacher_share 0.7 are together above 1"):
        recipe(tmp_path, data={"teacher_share": 0.7})
