"""One ceiling: doctor, audit and evaluation report the same share for the same table."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from preceptor.auditing.run import audit
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.data.vqa.check import check_data
from preceptor.data.vqa.table import read_table


def test_doctor_audit_and_training_agree(tmp_path: Path):
    """Eight test questions, seven of which have an answer class; two of them only after normalisation."""
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    train = ["yes", "no", "left lung", "x-ray"]
    test = ["Yes.", "no", "the left  lung", "yes", "no", "X-ray", "no", "fracture"]
    rows = [
        {"id": f"{split}-{i}", "image": "a.png", "question": f"{split} {i}?", "answer": answer, "split": split}
        for split, answers in (("train", train), ("test", test))
        for i, answer in enumerate(answers)
    ]
    (tmp_path / "table.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = read_table(tmp_path / "table.jsonl")
    ceiling = AnswerVocabulary.build(data.split("train")).ceiling(data.split("test"))
    assert ceiling == 7 / 8
    (finding,) = (f.reason for f in check_data(data) if "answer classes" in f.reason)
    assert re.search(r"^1 of 8 test questions .* at most 87\.5%$", finding)
    assert audit(data).ceiling == pytest.approx(ceiling)
