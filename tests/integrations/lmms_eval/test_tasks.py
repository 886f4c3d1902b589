from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import yaml
from PIL import Image

import preceptor
from preceptor.data.images import load_image
from preceptor.errors import UserError
from preceptor.integrations.lmms_eval import manifests
from preceptor.integrations.lmms_eval.answering import answer_images
from preceptor.integrations.lmms_eval.tasks import (
    doc_to_target,
    doc_to_text,
    doc_to_visual,
    main,
    mean,
    process_results,
    write_task,
)
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.score import score_file
from tests.vqa.conftest import make_bundle, make_data
from tests.vqa.test_score import SAID, predictions, table


class Loader(yaml.SafeLoader):
    """Reads `!function utils.name` as lmms-eval does, from the utils.py beside the task."""


def load(folder: Path, name: str) -> dict:
    spec = importlib.util.spec_from_file_location("utils", folder / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    Loader.add_constructor("!function", lambda loader, node: getattr(module, node.value.removeprefix("utils.")))
    return yaml.load((folder / f"{name}.yaml").read_text("utf-8"), Loader)


def test_a_task_gives_the_numbers_of_score(tmp_path):
    name = write_task("mine/given", table(tmp_path), tmp_path / "tasks")
    task = load(tmp_path / "tasks", name)
    assert (task["task"], name) == (name, "preceptor_mine_given")
    lines = Path(task["dataset_kwargs"]["data_files"]["test"]).read_text("utf-8").splitlines()
    docs = [json.loads(line) for line in lines]
    said = {"1": " yes.", "2": "LUNG", "3": "three"}
    results = [task["process_results"](doc, [said[doc["id"]]]) for doc in docs]
    metrics = {entry["metric"]: entry["aggregation"] for entry in task["metric_list"]}
    found = {metric: aggregate([result[metric] for result in results]) for metric, aggregate in metrics.items()}
    ours = score_file(predictions(tmp_path, SAID), "mine/given", root=tmp_path / "mine.jsonl").scores
    assert found == pytest.approx(
        {
            "score": ours["accuracy"],
            "open": ours["open"],
            "closed": ours["closed"],
            "bleu": ours["bleu"],
            "f1": ours["f1"],
        }
    )


def test_what_a_model_is_shown(tmp_path):
    name = write_task("mine/given", table(tmp_path), tmp_path / "tasks")
    task = load(tmp_path / "tasks", name)
    doc = json.loads((tmp_path / "tasks" / f"{name}.jsonl").read_text("utf-8").splitlines()[1])
    (image,) = task["doc_to_visual"](doc)
    assert (image.mode, image.size) == ("RGB", (8, 8))
    assert doc_to_text(doc, task["lmms_eval_specific_kwargs"]["default"]).startswith("q\nAnswer the question")
    assert doc_to_text(doc) == "q"
    assert doc_to_target(doc) == "Left lung"
    assert doc_to_visual(doc)[0].tobytes() == Image.new("RGB", (8, 8)).tobytes()


def test_open_questions_say_nothing_of_closed_ones(tmp_path):
    doc = {
        "id": "a",
        "image": "x.png",
        "question": "q",
        "answers": ["lung"],
        "answer_type": "open",
        "question_type": "",
        "protocol": "mine/test",
    }
    assert process_results(doc, ["Lung "]) == {"score": 1.0, "open": 1.0, "closed": None, "bleu": 1.0, "f1": 1.0}
    assert mean([1.0, None, 0.0]) == 0.5
    assert mean([None]) == 0.0


def test_unknown_protocols_are_named(tmp_path):
    with pytest.raises(UserError, match="has no protocol 'mine/other'"):
        write_task("mine/other", table(tmp_path), tmp_path / "tasks")
    with pytest.raises(UserError, match="give --root TABLE"):
        write_task("mine/given", None, tmp_path / "tasks")


def test_the_entry_point_names_the_model(monkeypatch):
    """lmms-eval brings dozens of packages that nothing else here needs, so its classes are stood in for."""

    class ModelManifest:
        def __init__(self, model_id: str, simple_class_path: str) -> None:
            self.model_id, self.simple_class_path = model_id, simple_class_path

    class lmms:
        def __init__(self) -> None:
            self.task_dict: dict = {}

    for name, members in {
        "lmms_eval": {},
        "lmms_eval.models": {},
        "lmms_eval.api": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
        "lmms_eval.api.model": {"lmms": lmms},
    }.items():
        module = types.ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    (manifest,) = manifests()
    assert manifest.model_id == "preceptor"
    place, _, cls = manifest.simple_class_path.rpartition(".")
    monkeypatch.delitem(sys.modules, place, raising=False)
    student = getattr(importlib.import_module(place), cls)
    assert issubclass(student, lmms)
    assert student.is_simple
    monkeypatch.delitem(sys.modules, place, raising=False)
    with pytest.raises(UserError, match="contains no trained model"):
        student(run="/nowhere")


@pytest.mark.slow
def test_a_run_through_lmms_eval_gives_the_numbers_of_score(tmp_path):
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed")
    data = make_data(tmp_path / "data")
    make_bundle(data, 16, 0).save(tmp_path / "model")
    keys = ("id", "question", "answer_type", "question_type")
    rows = [
        {**{key: getattr(s, key) for key in keys}, "image": s.image.name, "answer": s.answer, "split": s.split}
        for s in data.samples
    ]
    toy = tmp_path / "data" / "toy.jsonl"
    toy.write_text("".join(json.dumps(row) + "\n" for row in rows))
    name = write_task("toy/given", toy, tmp_path / "tasks")
    command = [
        sys.executable,
        "-m",
        "lmms_eval",
        "--include_path",
        str(tmp_path / "tasks"),
        "--tasks",
        name,
        "--model",
        "preceptor",
        "--model_args",
        f"run={tmp_path / 'model'}",
        "--batch_size",
        "8",
        "--device",
        "cpu",
        "--output_path",
        str(tmp_path / "out"),
    ]
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    done = subprocess.run(command, env={**os.environ, **offline}, capture_output=True, text=True)
    results = list((tmp_path / "out").rglob("*results.json"))
    assert (done.returncode, len(results)) == (0, 1), done.stdout[-2000:] + done.stderr[-2000:]  # it fails with 0, too
    theirs = json.loads(results[0].read_text("utf-8"))["results"][name]
    asked = [{key: row[key] for key in ("id", "image", "question")} for row in rows if row["split"] == "test"]
    (tmp_path / "data" / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in asked))
    said = [
        {"id": row["id"], "answer": row["answers"][0]["answer"]}
        for row in preceptor.predict(tmp_path / "model", table=tmp_path / "data" / "ask.jsonl", top=1)
    ]
    ours = score_file(predictions(tmp_path, said), "toy/given", root=toy).scores
    for metric, key in (("score", "accuracy"), ("open", "open"), ("closed", "closed"), ("bleu", "bleu"), ("f1", "f1")):
        assert theirs[f"{metric},none"] == pytest.approx(ours[key])


def test_the_answers_are_those_of_predict(tmp_path, caplog):
    data = make_data(tmp_path / "data")
    bundle = make_bundle(data, 16, 0)
    bundle.save(tmp_path / "model")
    samples = data.split("test")
    rows = [{"id": s.id, "image": s.image.name, "question": s.question} for s in samples]
    (samples[0].image.parent / "ask.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = preceptor.predict(tmp_path / "model", table=samples[0].image.parent / "ask.jsonl", top=1)
    expected = {row["id"]: row["answers"][0]["answer"] for row in asked}
    images = [load_image(sample.image) for sample in samples]
    answers = answer_images(VqaBundle.load(tmp_path / "model"), images, [sample.question for sample in samples])
    assert dict(zip([sample.id for sample in samples], answers, strict=True)) == expected
    for question, warned in (("Is it?", False), ("disc " * 60, True)):
        caplog.clear()
        answer_images(bundle, images[:1], [question])
        assert ("A question has more than" in caplog.text) == warned


@pytest.mark.parametrize(
    ("place", "says"), [("a file", "is a file; choose"), ("a file/inner", "a file is in the place of")]
)
def test_an_output_that_is_no_folder_is_a_sentence(place: str, says: str, tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "a file").touch()
    monkeypatch.setattr(sys, "argv", ["tasks", "vqa-rad/clean/451", "--output", str(tmp_path / place)])
    with pytest.raises(SystemExit) as exited:
        main()
    assert exited.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert says in error
