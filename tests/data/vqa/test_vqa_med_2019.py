from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from preceptor.data.vqa.vqa_med_2019 import category_of, read_vqa_med_2019
from preceptor.errors import UserError
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data
from preceptor.vqa.protocols import protocols_for

QUESTIONS = {
    "modality": "is this a ct scan?|no",
    "plane": "in what plane is this film|axial",
    "organ": "what part of the body is being imaged?|skull and contents",
    "abnormality": "is the mri normal?|yes",
}


def release(root: Path, *, names: tuple[str, str] = ("train", "val"), images: str = "images", count: int = 6) -> Path:
    for folder, key in zip(names, ("train", "val"), strict=True):
        (root / folder / images).mkdir(parents=True)
        lines = []
        for number in range(count):
            name = f"synpic{key}{number}"
            Image.new("L", (8, 8), number * 9 + (key == "val")).save(root / folder / images / f"{name}.jpg")
            lines += [f"{name}|{pair}" for pair in QUESTIONS.values()]
        (root / folder / f"All_QA_Pairs_{key}.txt").write_text("\n".join(lines), "utf-8")
    return root


def with_test_file(root: Path, lines: list[str]) -> Path:
    folder = root / "VQAMed2019Test"
    (folder / "VQAMed2019_Test_Images").mkdir(parents=True)
    Image.new("L", (8, 8), 255).save(folder / "VQAMed2019_Test_Images" / "synpict.jpg")
    (folder / "VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_text("\n".join(lines), "utf-8")
    return root


def test_val_scores_the_official_validation_part_and_cuts_validation_by_image(tmp_path):
    data = read_vqa_med_2019(release(tmp_path), validation_fraction=0.2)
    assert len(data.split("test")) == 24
    assert {s.group for s in data.split("train")}.isdisjoint(s.group for s in data.split("validation"))
    assert len(data.split("validation")) == 4
    sample = data.split("test")[0]
    assert (sample.id, sample.answers, sample.answer_type, sample.question_type) == (
        "synpicval0-modality",
        ("no",),
        "closed",
        "modality",
    )
    assert not data.leaking


def test_the_official_folder_names_and_the_test_file_with_alternatives(tmp_path):
    root = release(
        tmp_path, names=("ImageClef-2019-VQA-Med-Training", "ImageClef-2019-VQA-Med-Validation"), images="Train_images"
    )
    with_test_file(root, ["synpict|Abnormality|what is wrong?|a # b#c|d", "synpict|plane|which plane?|axial"])
    data = read_vqa_med_2019(root, variant="test")
    first = data.split("test")[0]
    assert (first.answers, first.question_type) == (("a", "b", "c|d"), "abnormality")
    assert {part: len(data.split(part)) for part in ("train", "validation", "test")} == {
        "train": 24,
        "validation": 24,
        "test": 2,
    }


def test_an_image_under_two_names_is_cut_as_one_and_found_across_parts(tmp_path):
    root = release(tmp_path)
    images = root / "train" / "images"
    for number in (1, 2):
        (images / f"synpictrain{number}.jpg").write_bytes((images / "synpictrain0.jpg").read_bytes())
    data = read_vqa_med_2019(root, validation_fraction=0.2)
    assert {s.group for s in data.samples if s.id.startswith(("synpictrain1-", "synpictrain2-"))} == {"synpictrain0"}
    assert not data.leaking
    (root / "val" / "images" / "synpicval3.jpg").write_bytes((images / "synpictrain0.jpg").read_bytes())
    leaking = read_vqa_med_2019(root)
    assert leaking.leaking
    assert any(note.startswith("Leaking split: 1 of 9 groups") for note in leaking.notes)


def test_what_a_mac_leaves_in_an_archive_is_passed_over(tmp_path):
    root = with_test_file(release(tmp_path), ["synpict|plane|which plane?|axial"])
    (root / "VQAMed2019Test" / "._VQAMed2019_Test_Questions_w_Ref_Answers.txt").write_bytes(b"\x00\x05\x16\x07")
    assert len(read_vqa_med_2019(root, variant="test").split("test")) == 1


# Questions and answers of the challenge's overview paper and of the test set's description.
@pytest.mark.parametrize(
    ("question", "category"),
    [
        ("what is the organ principally shown in this mri?", "organ"),
        ("in what plane is this mammograph taken?", "plane"),
        ("is this a t1 weighted, t2 weighted, or flair image?", "modality"),
        ("what is most alarming about this ultrasound?", "abnormality"),
        ("what is the primary abnormality in this image?", "abnormality"),
    ],
)
def test_published_examples_of_the_categories(question, category):
    assert category_of(question) == category


def test_published_examples_of_test_lines(tmp_path):
    lines = [
        "synpict|abnormality|what is the primary abnormality in this image?|anaplastic oligodendroglioma#multi-cystic "
        "complex mass",
        "synpict|plane|what is the plane?|3d reconstruction",
        "synpict|modality|is \tthis a t1 weighted image?|yes",
    ]
    rows = {
        s.question_type: s
        for s in read_vqa_med_2019(with_test_file(release(tmp_path), lines), variant="test").split("test")
    }
    assert rows["abnormality"].answers == ("anaplastic oligodendroglioma", "multi-cystic complex mass")
    assert rows["modality"].question == "is this a t1 weighted image?"
    assert {kind: s.answer_type for kind, s in rows.items()} == {
        "abnormality": "open",
        "plane": "open",
        "modality": "closed",
    }


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("synpictrain0|only a question", "fields of image.question.answer"),
        ("synpictrain0||yes", "fields of image.question.answer"),
        ("synpictrain0|is it?|#", "no answer between"),
        ("../../secret|is it?|yes", "leaves the folder"),
        ("synpictrain0|is this a ct scan?|no", "occurs twice"),
        ("nowhere|is it?|yes", "1 of 13 image files are missing"),
        (
            "synpictrain0|Modality|what kind of image is this?|cta",
            r"train\.txt:25: 'Modality' is a category, and the form is image\|question\|answer; remove it",
        ),
        ("synpictrain0|what kind of image is this?|cta| modality", "'modality' is a category"),
    ],
)
def test_a_broken_line_is_named(tmp_path, line, said):
    root = release(tmp_path)
    table = root / "train" / "All_QA_Pairs_train.txt"
    table.write_text(table.read_text() + "\n" + line)
    with pytest.raises(UserError, match=said):
        read_vqa_med_2019(root)


def test_an_answer_may_contain_the_separator(tmp_path):
    root = release(tmp_path, count=1)
    table = root / "val" / "All_QA_Pairs_val.txt"
    table.write_text(table.read_text().replace("|axial", "|axial|sagittal plane"))
    answers = {s.question_type: s.answers for s in read_vqa_med_2019(root).split("test")}
    assert answers["plane"] == ("axial|sagittal plane",)


def test_other_bytes_and_missing_files_are_named(tmp_path):
    root = release(tmp_path)
    with pytest.raises(UserError, match=r"set data\.variant=val"):
        read_vqa_med_2019(root, variant="test")
    with pytest.raises(UserError, match="did you mean 'test'"):
        read_vqa_med_2019(root, variant="tets")  # type: ignore[arg-type]
    table = root / "val" / "All_QA_Pairs_val.txt"
    table.write_bytes(table.read_bytes() + b"\nsynpicval0|caf\xe9?|yes")
    with pytest.raises(UserError, match=r"All_QA_Pairs_val\.txt:25: byte 0xe9"):
        read_vqa_med_2019(root)
    table.unlink()
    with pytest.raises(UserError, match="contains no file named All_QA_Pairs_val"):
        read_vqa_med_2019(root)
    with pytest.raises(UserError, match="category 'colour' is not known"):
        read_vqa_med_2019(with_test_file(release(tmp_path / "b"), ["synpict|colour|is it?|yes"]), variant="test")


@pytest.mark.real_data
def test_the_real_files(tmp_path):
    data = read_data(DataConfig(name="vqa-med-2019"), tmp_path)
    assert len(data.split("train")) + len(data.split("validation")) == 12_792
    assert len(data.split("test")) == 2_000
    held_in = [sample for sample in data.samples if sample.split != "test"]
    kinds = Counter(sample.question_type for sample in held_in)
    assert kinds == {"modality": 3200, "plane": 3200, "organ": 3200, "abnormality": 3192}
    assert {len(sample.answers) for sample in data.samples} == {1}
    # One question of each category about every image; eight training images have none about an abnormality.
    asked: dict[str, list[str]] = {}
    for sample in data.samples:
        asked.setdefault(sample.group, []).append(sample.question_type)
    whole = ["abnormality", "modality", "organ", "plane"]
    assert Counter(tuple(sorted(kinds)) for kinds in asked.values()) == {tuple(whole): 3692, tuple(whole[1:]): 8}
    assert {s.group for s in data.split("test")}.isdisjoint(s.group for s in held_in)
    assert not data.leaking
    # Yes and no: 1,294 and 202, all of them about modality and abnormality.
    closed = Counter((s.split == "test", s.question_type) for s in data.samples if s.answer_type == "closed")
    assert closed == {
        (False, "modality"): 1184,
        (False, "abnormality"): 110,
        (True, "modality"): 179,
        (True, "abnormality"): 23,
    }
    (types,) = {tuple(sorted(Counter(map(p.category, data.split("test"))).items())) for p in protocols_for(data)}
    assert dict(types) == {"modality": 321, "plane": 500, "organ": 500, "abnormality": 477, "yes/no": 202}


@pytest.mark.real_data
def test_categories_by_wording_are_those_of_the_release():
    root = Path(os.environ["PRECEPTOR_DATA"]) / "vqa_med_2019"
    seen = 0
    for file in root.glob("*/QAPairsByCategory/C*.txt"):
        category = file.name.split("_")[1].lower()
        for line in file.read_text("utf-8").splitlines():
            seen += 1
            assert category_of(line.split("|")[1]) == category, line
    assert seen == 14_792
