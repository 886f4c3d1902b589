"""From a file of one's own to a model that marks an image: the verbs in their order, with faults in the file."""

from __future__ import annotations

import json
import random
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image, ImageDraw

from preceptor.errors import UserError
from preceptor.grounding import metrics as dialogues
from tests.command_line import call
from tests.fault.tiny import CLINKD

pytestmark = pytest.mark.slow
QUICK = [
    "stages=[baseline]",
    "student.train.epochs=2",
    "student.train.ema_decay=0",
    "data.train_share=1",
    "data.unlabelled=none",
    "data.tasks=[vg,roc,mia]",
    "method.guidance.kind=fixed",
]


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    def missing() -> None:
        raise UserError("caption scores need Java")

    monkeypatch.setattr(dialogues, "require_captions", missing)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run_command(*arguments: object) -> tuple[int, str, str]:
    code, out, err = call(*arguments)
    assert "Traceback" not in err
    return code, out, err


def recipe(folder: Path) -> Path:
    raw = yaml.safe_load(CLINKD)
    del raw["data"]["tasks"]
    (folder / "r.yaml").write_text(yaml.safe_dump(raw))
    return folder / "r.yaml"


def picture(file: Path, number: int) -> tuple[int, int, int, int]:
    """Write an image of 100 x 50 pixels with a bright box; return the box in thousandths."""
    x, y = random.Random(number).randrange(50), random.Random(number).randrange(20)
    image = Image.new("L", (100, 50), 30)
    ImageDraw.Draw(image).rectangle((x, y, x + 30, y + 20), fill=220)
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
    return 10 * x, 20 * y, 10 * x + 300, 20 * y + 400


def written(box: tuple[int, int, int, int]) -> str:
    return "<ref>liver</ref><box>({},{}),({},{})</box>".format(*box)


def asked(box: tuple[int, int, int, int], text: str | None = None) -> list[list[str]]:
    return [["Where is the liver?", text or written(box)]]


def med_grit(root: Path, faulty: str | None = None) -> Path:
    """A folder in the form of Med-GRIT-270k: train.json, test.json, images/; `faulty` is an answer of the second
    training record."""
    for part, numbers in (("train", range(16)), ("test", range(16, 20))):
        records = []
        for n in numbers:
            name = f"{('ct', 'mr')[n % 2]}_made_{n}"
            box = picture(root / "images" / f"{name}.png", n)
            records.append({"id": name, "conversations": asked(box, faulty if n == 1 else None)})
            records.append({"id": name, "conversations": [["What is at " + written(box)[16:] + "?", "liver"]]})
            records.append({"id": name, "conversations": [["Is a liver shown?", "yes, a liver is shown"]]})
        (root / f"{part}.json").write_text(json.dumps(records))
    return root


SWAPPED = "<box>(900,100),(300,500)</box>"


def test_a_folder_of_med_grit(tmp_path):
    root, run = med_grit(tmp_path / "grit"), tmp_path / "run"
    data = ["data.name=med-grit", f"data.root={root}"]
    code, out, err = run_command("train", recipe(tmp_path), *data, *QUICK, f"output={run}", "data.test_rows=4")
    assert code == 0, err
    assert "med-grit/given/birdeval (n = 12)" in out
    results = json.loads((run / "results.json").read_text())
    scores = results["protocols"]["med-grit/given/strict"]
    assert set(scores["modalities"]) == {"ct", "mr"}
    assert {task: entry["n"] for task, entry in scores["tasks"].items()} == {"vg": 4, "roc": 4, "mia": 4}
    assert "There is no validation.json" in " ".join(results["notes"])
    page = (run / "report.html").read_text()
    assert "<h2>Boxes</h2>" in page
    assert str(tmp_path) not in page

    said = tmp_path / "predictions.jsonl"
    code, out, err = call(
        "predict", run, "--image", root / "images", "--question", "Where is the liver?", "--output", said
    )
    assert code == 0, err
    rows = [json.loads(line) for line in said.read_text().splitlines()]
    assert [row["id"] for row in rows] == sorted(f"{('ct', 'mr')[n % 2]}_made_{n}.png" for n in range(20))
    assert all(0 < row["answers"][0]["probability"] <= 1 for row in rows)
    assert all(len(box) == 4 for row in rows for box in row["boxes"])

    file = run / "predictions" / "med-grit-given-strict.jsonl"
    code, out, err = run_command("score", file, "--protocol", "med-grit/given/strict", "--json")
    assert code == 0, err
    assert json.loads(out)["protocols"]["med-grit/given/strict"] == scores


def test_faulty_boxes_are_refused_repaired_or_left_out(tmp_path):
    root = med_grit(tmp_path / "grit", SWAPPED)
    common = ["data.name=med-grit", f"data.root={root}", *QUICK, "student.train.epochs=0.3", "data.test_rows=1"]
    code, _, err = run_command("train", recipe(tmp_path), *common, f"output={tmp_path / 'a'}")
    assert code == 2
    assert "train.json, record 3: box (900,100),(300,500)" in err
    assert "swapped corners" in err
    assert "boxes=repair" in err
    code, out, err = run_command("doctor", recipe(tmp_path), *common, "--json")
    assert code == 1, "what stops a training is an error"
    assert {"severity": "error", "ids": [], "file": "train.json, record 3", "reason": "box: swapped corners"} in (
        json.loads(out)["findings"]
    )
    for policy, rows in (("repair", 48), ("drop", 47)):
        run = tmp_path / policy
        code, _, err = run_command("train", recipe(tmp_path), *common, f"data.boxes={policy}", f"output={run}")
        assert code == 0, err
        found = json.loads((run / "results.json").read_text())["data"]
        assert found["faults"] == {"swapped corners": 1}
        assert found["faulty"] == ["train.json, record 3: swapped corners"]
        assert found["train"] + found["validation"] == rows
        page = (run / "report.html").read_text()
        assert "swapped corners: 1. The first of them: train.json, record 3: swapped corners." in page
        assert ("1 of 60 records with faulty boxes were left out" in page) == (policy == "drop")


@pytest.mark.parametrize("form", ["conversations", "messages"])
def test_a_file_of_ones_own(tmp_path, form):
    speaker, text = {
        "conversations": (("human", "gpt"), ("from", "value")),
        "messages": (("user", "assistant"), ("role", "content")),
    }[form]
    rows = []
    for n in range(20):
        box = picture(tmp_path / "images" / f"{n}.png", n)
        for question, answer in (*asked(box), ("Is a liver shown?", "yes")):
            turns = [dict(zip(text, pair, strict=True)) for pair in zip(speaker, (question, answer), strict=True)]
            rows.append(
                {
                    "id": f"{n}-{len(rows) % 2}",
                    "image": f"{n}.png",
                    "modality": "ct",
                    "group": f"p{n // 2}",
                    form: turns,
                }
            )
    if form == "messages":
        (tmp_path / "mine.json").write_text(json.dumps(rows))
    else:
        (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file, run = next(tmp_path.glob("mine.*")), tmp_path / "run"
    data = ["data.name=sharegpt", f"data.root={file}", f"data.images={tmp_path / 'images'}"]
    assert run_command("doctor", recipe(tmp_path), *data)[0] == 0
    code, out, err = run_command("train", recipe(tmp_path), *data, *QUICK, f"output={run}")
    assert code == 0, err
    assert "mine/by-group/strict" in out
    (tmp_path / "ask.jsonl").write_text(json.dumps({"image": "images/3.png", "question": "Is a liver shown?"}) + "\n")
    code, out, err = run_command("predict", run, "--table", tmp_path / "ask.jsonl", "--modality", "ct", "--json")
    assert code == 0, err
    assert len(json.loads(out)) == 1
    file = run / "predictions" / "mine-by-group-birdeval.jsonl"
    code, out, err = run_command("score", file, "--protocol", "mine/by-group/birdeval", "--json")
    assert code == 0, err
    stored = json.loads((run / "results.json").read_text())["protocols"]
    assert json.loads(out)["protocols"]["mine/by-group/birdeval"] == stored["mine/by-group/birdeval"]


def test_the_how_to_page_runs_as_written(tmp_path, monkeypatch):
    page = (Path(__file__).parents[2] / "docs" / "how-to" / "grounding.md").read_text("utf-8")
    example = json.loads(re.findall(r"```json\n(.*?)\n```", page)[0])
    records = []
    for n in range(20):
        name = "ab"[n] if n < 2 else str(n)
        box = picture(tmp_path / "images" / f"{name}.png", n)
        turns = example["conversations"]
        said = turns[1] | {"value": SWAPPED if n == 1 else turns[1]["value"] if n == 0 else written(box)}
        records.append(
            example
            | {
                "id": f"{name}-1",
                "image": f"images/{name}.png",
                "group": f"patient-{name}",
                "conversations": [turns[0], said],
            }
        )
    assert records[0] == example
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.chdir(tmp_path)
    blocks = [block.replace("\\\n", "") for block in re.findall(r"```sh\n(.*?)```", page, re.DOTALL)]
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line.split()[1] for line in lines] == ["doctor", "train", "train", "predict", "predict", "predict", "score"]
    for line in lines:
        code, out, err = run_command(*shlex.split(line)[1:])
        assert code == (1 if "doctor" in line else 0), f"{line}: {err}"
        if "doctor" in line:
            assert "mine.jsonl:2" in out
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    assert len((tmp_path / "predictions.jsonl").read_text().splitlines()) == 20


@pytest.mark.parametrize("key", ["student.model.source", "teacher.model.source", "method.teaching_run"])
def test_a_checkpoint_that_is_not_there_is_said_before_any_training(tmp_path, key):
    run = tmp_path / "run"
    code, _, err = run_command("train", recipe(tmp_path), f"{key}={tmp_path / 'nowhere'}", f"output={run}")
    assert code == 2
    missing = key == "method.teaching_run"
    assert f"error: {key}" in err
    assert ("does not exist" if missing else "is neither a folder with a config.json") in err
    assert not (run / "teacher").exists()
