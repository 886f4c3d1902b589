"""An empty split is an error of `preceptor doctor` in every task, and stops only what needs the split."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
from PIL import Image

import preceptor
from preceptor.errors import UserError
from preceptor.grounding.config import DialogueDataConfig
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data


def draw(folder: Path, number: int) -> str:
    Image.new("L", (32, 32), number).save(folder / f"{number}.png")
    return f"{number}.png"


def table(folder: Path, groups: int, split: str | None = None) -> Path:
    rows = [
        {"image": draw(folder, n), "question": f"Q{n}?", "answer": "yes", "group": f"g{n % groups}"} for n in range(8)
    ]
    rows = [row | ({"split": split} if split else {}) for row in rows]
    (folder / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "t.jsonl"


def dialogues(folder: Path, split: str | None = None) -> Path:
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "in the left lung"}]
    names = [draw(folder, n) for n in range(9)]
    rows = [{"images": [names[n], names[n + 1]], "conversations": turns, "task": "mia"} for n in range(8)]
    rows = [row | ({"split": split} if split else {}) for row in rows]
    (folder / "d.json").write_text(json.dumps(rows))
    return folder / "d.json"


def cases(folder: Path) -> Path:
    lines = ["case,t1,flair,mask,patient_id"]
    for number in range(4):
        voxels = np.random.default_rng(number).integers(0, 99, (8, 8, 8)).astype(np.int16)
        for name, values in (("t1", voxels), ("flair", voxels + 1), ("mask", voxels % 2)):
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), folder / f"{number}-{name}.nii.gz")
        lines.append(f"c{number},{number}-t1.nii.gz,{number}-flair.nii.gz,{number}-mask.nii.gz,p0")
    (folder / "cases.csv").write_text("\n".join(lines))
    return folder / "cases.csv"


def errors(recipe: str, name: str, root: Path, *overrides: str) -> list[str]:
    settings = [f"data.name={name}", f"data.root={root}", f"output={root.parent / 'run'}", *overrides]
    found = preceptor.check(recipe, settings)["findings"]
    return [finding["reason"] for finding in found if finding["severity"] == "error"]


def test_doctor_reports_empty_splits_of_questions(tmp_path: Path) -> None:
    (reason,) = errors("mhkd-path-vqa", "table", table(tmp_path, 2))
    assert reason == (
        "t has no validation rows: there are 8 rows in 2 groups (patients or images), and a group is in one split; "
        "add groups, or correct the splits that the data name"
    )
    assert errors("mhkd-path-vqa", "table", table(tmp_path, 8)) == []


def test_doctor_reports_empty_splits_of_dialogues(tmp_path: Path) -> None:
    reasons = errors("clinkd-slake", "sharegpt", dialogues(tmp_path))
    assert [reason.split(":")[0] for reason in reasons] == ["d has no validation rows", "d has no test rows"]
    assert all("there are 8 rows in 1 group (patients" in reason for reason in reasons)


def test_doctor_reports_empty_splits_of_cases(tmp_path: Path) -> None:
    reasons = errors(
        "kd-volumes-demo", "volumes", cases(tmp_path), "data.modalities=[t1,flair]", "data.unlabelled=none"
    )
    assert [reason.split(" has ")[1].split(":")[0] for reason in reasons] == ["no validation rows", "no test rows"]
    assert all("there are 4 rows in 1 group (patients" in reason for reason in reasons)


def test_only_the_splits_that_are_needed_must_have_rows(tmp_path: Path) -> None:
    scratch = tmp_path / "scratch"
    questions = DataConfig(name="table", root=str(table(tmp_path, 8, "test")))
    assert len(read_data(questions, scratch, needed=("test",)).split("test")) == 8
    assert not [f for f in read_data(questions, scratch, needed=("test",)).findings if f.severity == "error"]
    with pytest.raises(UserError, match=r"t has no train questions: there are 8 rows in 8 groups .*; add groups, or"):
        read_data(questions, scratch)
    talks = DialogueDataConfig(name="sharegpt", root=str(dialogues(tmp_path, "test")))
    assert len(read_recipe_dialogues(talks, scratch, needed=("test",)).split("test")) == 8
    with pytest.raises(UserError, match=r"d has no train dialogues of the tasks .*: there are 8 rows in 1 group "):
        read_recipe_dialogues(talks, scratch)
