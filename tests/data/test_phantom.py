from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preceptor.data.phantom import write_phantom
from preceptor.data.phantom_questions import VISIBLE, ask, make_view
from preceptor.data.phantom_volume import ENHANCING, NECROSIS, OEDEMA, make_case
from preceptor.data.table import read_table
from preceptor.errors import UserError

ARGUMENTS = {"cases": 12, "questions_per_image": 5, "images_per_case": 3, "seed": 3, "image_size": 48}


def digest(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("phantom") / "data"
    write_phantom(target, **ARGUMENTS)
    return target


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "questions.jsonl").read_text().splitlines()]


def test_same_arguments_same_bytes(folder: Path, tmp_path):
    write_phantom(tmp_path / "again", **ARGUMENTS)
    assert digest(tmp_path / "again") == digest(folder)
    write_phantom(tmp_path / "other", **{**ARGUMENTS, "seed": 4})
    assert digest(tmp_path / "other")["questions.jsonl"] != digest(folder)["questions.jsonl"]


def test_it_is_used_again_and_anything_else_is_refused(folder: Path, tmp_path):
    before = digest(folder)
    assert write_phantom(folder, **ARGUMENTS) == folder / "questions.jsonl"
    assert digest(folder) == before
    with pytest.raises(UserError, match="something other than the phantom"):
        write_phantom(folder, **{**ARGUMENTS, "cases": 13})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"another data\.root"):
        write_phantom(tmp_path / "mine", **ARGUMENTS)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_it_says_that_it_is_synthetic(folder: Path):
    text = (folder / "README.txt").read_text()
    assert text.startswith("SYNTHETIC")
    assert "seed 3" in text


def test_cases_are_never_divided_and_the_table_reads(folder: Path):
    data = read_table(folder / "questions.jsonl", name="phantom")
    parts = {part: {sample.group for sample in data.part(part)} for part in ("train", "validation", "test")}
    assert sum(len(groups) for groups in parts.values()) == len(set.union(*parts.values())) == 12
    assert [len(parts[part]) for part in ("validation", "test")] == [2, 2]
    assert not data.leaking


def test_boxes_lie_inside_the_image(folder: Path):
    for row in rows_of(folder):
        with Image.open(folder / row["image"]) as image:
            width, height = image.size
        for x0, y0, x1, y1 in row["boxes"].values():
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height


def heads(number: int):
    for index in range(number):
        case = make_case(5, index, region="head", size=48)
        if (case.label == ENHANCING).sum() > 30 and (case.label == OEDEMA).sum() > 30:
            yield case


def test_lesions_show_in_the_contrasts_that_they_should():
    found = 0
    for case in heads(14):
        found += 1
        brain = case.organ_mask("brain") & (case.label == 0) & ~case.organ_mask("ventricles")
        around = {name: float(case.contrast(name)[brain].mean()) for name in ("t1", "t1ce", "t2", "flair")}
        ring = {name: float(case.contrast(name)[case.label == ENHANCING].mean()) for name in around}
        oedema = {name: float(case.contrast(name)[case.label == OEDEMA].mean()) for name in around}
        assert ring["t1ce"] > 1.25 * around["t1ce"]
        assert ring["t1"] < 1.05 * around["t1"]
        assert oedema["flair"] > 1.25 * around["flair"]
        assert oedema["t2"] > 1.1 * around["t2"]
        assert oedema["t1"] < 1.1 * around["t1"]
    assert found >= 4


def test_labels_are_nested_as_in_brats():
    case = next(heads(14))
    assert set(np.unique(case.label)) <= {0, NECROSIS, OEDEMA, ENHANCING}
    assert np.array_equal(case.label > 0, case.lesion_index > 0)


def test_answers_follow_from_the_geometry():
    """Recomputed from the label map, in another way than the questions are made."""
    checked: Counter = Counter()
    for index in range(10):
        for region in ("head", "torso"):
            case = make_case(9, index, region=region, size=48, contrasts=())
            for number in range(6):
                rng = np.random.default_rng([index, number])
                view = make_view(case, rng)
                if view.plane == "frontal":
                    continue
                stack = sum(
                    (mask.astype(int) * lesion.index for lesion, mask in view.lesions.items()), np.zeros((48, 48), int)
                )
                seen = [i for i in np.unique(stack) if i and (stack == i).mean() >= VISIBLE]
                for asked in ask(view, rng, 8):
                    if asked.kind == "count":
                        assert asked.answer == str(len(seen))
                    elif asked.kind == "presence":
                        assert asked.answer == ("yes" if seen else "no")
                    elif asked.kind == "side" and asked.answer in ("left", "right"):
                        # The patient's right is on the image's left.
                        middle = np.argwhere(np.isin(stack, seen))[:, 1].mean()
                        assert asked.answer == ("left" if middle > 23.5 else "right")
                    elif asked.kind == "plane" and asked.answer in ("axial", "coronal", "sagittal"):
                        assert asked.answer == view.plane
                    else:
                        continue
                    checked[asked.kind] += 1
    assert all(checked[kind] > 10 for kind in ("count", "presence", "side", "plane")), checked


def test_wording_gives_little_away(tmp_path):
    write_phantom(tmp_path / "data", **{**ARGUMENTS, "cases": 60})
    closed = Counter(row["answer"] for row in rows_of(tmp_path / "data") if row["answer_type"] == "closed")
    assert 0.4 < closed["yes"] / sum(closed.values()) < 0.6
    kinds = {row["question_type"] for row in rows_of(tmp_path / "data")}
    assert kinds == {"modality", "plane", "organ", "presence", "side", "count", "size", "abnormality"}
