from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from preceptor.data.synthetic import questions_table as phantom
from preceptor.data.synthetic.anatomy import ENHANCING, NECROSIS, OEDEMA, bounding_box, make_case
from preceptor.data.synthetic.questions import (
    VISIBLE,
    _lesion_questions,
    _modality,
    _organ,
    _plane,
    _x_ray,
    ask,
    make_view,
)
from preceptor.data.synthetic.questions_table import write_phantom
from preceptor.data.vqa.table import read_table
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
    with pytest.raises(UserError, match="does not contain the requested phantom"):
        write_phantom(folder, **{**ARGUMENTS, "cases": 13})
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match=r"another data\.root"):
        write_phantom(tmp_path / "mine", **ARGUMENTS)
    assert (tmp_path / "mine" / "thesis.txt").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"another data\.root"):
        write_phantom(tmp_path / "file", **ARGUMENTS)


@pytest.mark.parametrize("damage", ["cut the table", "lose an image", "change an image"])
def test_a_damaged_phantom_is_not_used(folder: Path, tmp_path, damage: str):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    image = next((copy / "images").iterdir())
    if damage == "cut the table":
        (copy / "questions.jsonl").write_bytes((copy / "questions.jsonl").read_bytes()[:-40])
    elif damage == "lose an image":
        image.unlink()
    else:
        image.write_bytes(image.read_bytes() + b"x")
    with pytest.raises(UserError, match="changed after it was written"):
        write_phantom(copy, **ARGUMENTS)


def test_too_few_cases_are_refused(tmp_path):
    with pytest.raises(UserError, match="cases=2"):
        write_phantom(tmp_path / "few", **{**ARGUMENTS, "cases": 2})


def test_another_process_that_finishes_first_wins(folder: Path, tmp_path, monkeypatch):
    target = tmp_path / "data"
    write = phantom._write

    def overtaken(temporary: Path, arguments: dict) -> None:
        write(temporary, arguments)
        shutil.copytree(folder, target)

    monkeypatch.setattr(phantom, "_write", overtaken)
    assert write_phantom(target, **ARGUMENTS) == target / "questions.jsonl"
    assert digest(target) == digest(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


def test_nothing_is_left_where_writing_fails(tmp_path, monkeypatch):
    def full(path, *arguments, **keywords):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(OSError, match="no space"):
        write_phantom(tmp_path / "data", **ARGUMENTS)
    assert list(tmp_path.iterdir()) == []


def test_it_says_that_it_is_synthetic(folder: Path):
    text = (folder / "README.txt").read_text()
    assert text.startswith("SYNTHETIC")
    assert "seed 3" in text


def test_cases_are_never_divided_and_the_table_reads(folder: Path):
    data = read_table(folder / "questions.jsonl", name="phantom")
    parts = {part: {sample.group for sample in data.split(part)} for part in ("train", "validation", "test")}
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


def test_boxes_of_the_images_fit_the_masks():
    """Against the mask, by brute force: no voxel outside, and every edge touches one."""
    checked = 0
    for index, region in enumerate(("head", "torso") * 4):
        view = make_view(make_case(2, index, region=region, size=48, contrasts=()), np.random.default_rng(index))
        lesions = {f"lesion {lesion.index}": mask for lesion, mask in view.lesions.items()}
        for name, (x0, y0, x1, y1) in view.boxes().items():
            mask = {**view.masks, **lesions}[name]
            assert mask[y0:y1, x0:x1].sum() == mask.sum() > 0
            for edge in (mask[y0, x0:x1], mask[y1 - 1, x0:x1], mask[y0:y1, x0], mask[y0:y1, x1 - 1]):
                assert edge.any()
            checked += 1
    assert checked > 10


def test_an_organ_lies_where_its_box_says_in_the_image():
    """The eyes are the brightest thing inside their own box in t2, and the lungs the darkest part of a ct."""
    head = make_case(1, 0, region="head", size=48)
    z0, y0, x0, z1, y1, x1 = bounding_box(head.organ_mask("left eye"))
    eye = head.contrast("t2")[z0:z1, y0:y1, x0:x1]
    inside = head.organ_mask("left eye")[z0:z1, y0:y1, x0:x1]
    assert eye[inside].mean() > 1.3 * eye[~inside].mean()
    assert (x0 + x1) / 2 > 24  # the patient's left is on the right of the image
    torso = make_case(1, 1, region="torso", size=48, contrasts=("ct",))
    z0, y0, x0, z1, y1, x1 = bounding_box(torso.organ_mask("right lung"))
    assert torso.contrast("ct")[torso.organ_mask("right lung") & (torso.label == 0)].mean() < -600
    assert (x0 + x1) / 2 < 24


def test_contrasts_do_not_depend_on_the_order_they_are_asked_in():
    first = make_case(4, 0, region="head", size=48, contrasts=("t1", "flair"))
    second = make_case(4, 0, region="head", size=48, contrasts=("ct", "flair"))
    assert first.contrasts["flair"].dtype == np.float32
    assert np.array_equal(first.contrast("flair"), second.contrast("flair"))


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
        # Against what surrounds it, the ring stands out bright in t1ce alone.
        assert ring["t1ce"] > 1.25 * oedema["t1ce"]
        assert all(ring[name] < 1.05 * oedema[name] for name in ("t1", "t2", "flair"))
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
                    if asked.kind == "count" and asked.answer_type == "closed":
                        assert asked.answer == ("yes" if len(seen) > 1 else "no")
                    elif asked.kind == "count":
                        assert asked.answer == str(len(seen))
                    elif asked.kind == "presence":
                        assert asked.answer == ("yes" if seen else "no")
                    elif asked.kind == "side":
                        # The patient's right is on the image's left.
                        side = "left" if np.argwhere(np.isin(stack, seen))[:, 1].mean() > 23.5 else "right"
                        truth = "yes" if side in asked.question else "no"
                        assert asked.answer == (side if asked.answer_type == "open" else truth)
                    elif asked.kind == "plane" and asked.answer in ("axial", "coronal", "sagittal"):
                        assert asked.answer == view.plane
                    else:
                        continue
                    checked[asked.kind] += 1
    assert all(checked[kind] > 10 for kind in ("count", "presence", "side", "plane")), checked


def test_x_rays_are_asked_only_about_what_they_show():
    seen = 0
    for index in range(8):
        case = make_case(6, index, region=("head", "torso")[index % 2], size=48, contrasts=())
        view = _x_ray(case)
        for asked in ask(view, np.random.default_rng(index), 30):
            seen += 1
            if asked.kind == "organ" and asked.answer == "yes":
                assert "lung" in asked.question or "heart" in asked.question
            if asked.kind in ("presence", "abnormality", "side"):
                assert case.region == "torso"
                assert all(lesion.organ == "lung" for lesion in case.lesions)
            assert asked.kind not in ("plane", "count", "size")
    assert seen > 20


def phrasings():
    """Yield the phrasings of every question, as the module lists them, over views of many kinds."""
    for index in range(60):
        case = make_case(8, index, region=("head", "torso")[index % 2], size=48, contrasts=())
        view = make_view(case, np.random.default_rng(index))
        for kind in (_modality, _plane, _organ, _lesion_questions):
            yield from (candidate.phrases for candidate in kind(view))


def test_wording_gives_nothing_away(tmp_path):
    """In each part yes and no differ by at most one per meaning, whatever the phrasing."""
    write_phantom(tmp_path / "data", **{**ARGUMENTS, "cases": 40})
    rows = rows_of(tmp_path / "data")
    meaning = {phrase: phrases[0] for phrases in phrasings() for phrase in phrases}
    counts: dict[tuple[str, str], Counter] = {}
    for row in rows:
        if row["answer_type"] == "closed":
            counts.setdefault((row["split"], meaning[row["question"]]), Counter())[row["answer"]] += 1
    assert all(abs(count["yes"] - count["no"]) <= 1 for count in counts.values()), counts
    assert sum(count.total() for count in counts.values()) > 0.3 * len(rows)
    kinds = {row["question_type"] for row in rows}
    assert kinds == {"modality", "plane", "organ", "presence", "side", "count", "size", "abnormality"}


def test_a_reader_of_questions_alone_guesses(tmp_path):
    """The most frequent training answer of each wording, the best that can be had without an image."""
    write_phantom(tmp_path / "data", **{**ARGUMENTS, "cases": 40})
    votes: dict[str, Counter] = {}
    rows = rows_of(tmp_path / "data")
    for row in rows:
        if row["split"] == "train":
            votes.setdefault(row["question"], Counter())[row["answer"]] += 1
    held = [row for row in rows if row["split"] != "train" and row["question"] in votes]
    right = [votes[row["question"]].most_common(1)[0][0] == row["answer"] for row in held]
    assert np.mean(right) < 0.55
