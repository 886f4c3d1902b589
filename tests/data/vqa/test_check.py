from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from preceptor.data.types import Dataset, Sample, Split
from preceptor.data.vqa import check
from preceptor.data.vqa.check import check_data, check_images


def sample(id: str, image: Path, answer: str = "yes", split: Split = "train") -> Sample:
    return Sample(id, image, "Q?", (answer,), "closed", id, split)


@pytest.fixture
def broken(tmp_path) -> list[Sample]:
    Image.new("L", (8, 8)).save(tmp_path / "good.png")
    Image.effect_noise((64, 64), 50).save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:900])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (100, 100)).save(tmp_path / "large.png")
    names = ["good.png", "cut.jpg", "good.png", "gone.png", "empty.png", "cut.jpg", "text.png", "large.png"]
    return [sample(f"s{i}", tmp_path / name) for i, name in enumerate(names)]


@pytest.mark.parametrize("workers", [0, 2])
def test_broken_images_are_listed_with_their_rows(broken, workers):
    findings = check_images(broken, workers=workers, max_pixels=9_999)
    assert [(f.file.name, f.sample_ids) for f in findings if f.file] == [
        ("cut.jpg", ("s1", "s5")),
        ("gone.png", ("s3",)),
        ("empty.png", ("s4",)),
        ("text.png", ("s6",)),
        ("large.png", ("s7",)),
    ]
    words = ["truncated", "no such file", "empty", "not an image", "limit"]
    assert all(word in f.reason for word, f in zip(words, findings, strict=True))
    assert {f.severity for f in findings} == {"error"}


def test_every_image_is_decoded_once(broken, monkeypatch):
    decoded = []
    monkeypatch.setattr(check, "load_image", lambda path, **_: decoded.append(path.name))
    assert check_images(broken) == []
    assert sorted(decoded) == ["cut.jpg", "empty.png", "gone.png", "good.png", "large.png", "text.png"]


def test_sound_data_has_no_findings(tmp_path):
    rows = [sample("a", tmp_path / "a"), sample("b", tmp_path / "b", "Yes ", "test")]
    assert check_data(Dataset("x", "given", tmp_path, rows)) == []


def test_rows_amiss(tmp_path):
    image = tmp_path / "a"
    rows = [
        sample("a", image),
        sample("a", image, "no"),
        replace(sample("b", image), question=" \t"),
        sample("c", image, " "),
        sample("d", image, "NO", "test"),
        sample("e", image, "liver", "test"),
        sample("f", image, "spleen", "validation"),
        replace(sample("g", image, "left", "test"), answers=("left", "no")),
    ]
    errors = check_data(Dataset("x", "given", tmp_path, rows))
    assert [(f.sample_ids, f.severity) for f in errors] == [
        (("a",), "error"),
        (("b",), "error"),
        (("c",), "error"),
        ((), "warning"),
    ]
    assert "several rows" in errors[0].reason
    assert "question is empty" in errors[1].reason
    assert "answer is empty" in errors[2].reason
    assert errors[3].reason.startswith("1 of 3 test questions")
    assert "66.7%" in errors[3].reason


def test_data_without_a_training_part_is_no_finding(tmp_path):
    rows = [sample("a", tmp_path / "a", split="test")]
    assert check_data(Dataset("x", "given", tmp_path, rows)) == []


def findings_of(*answers: str) -> dict[str, str]:
    rows = [sample(f"s{n}", Path(f"{n}.png"), answer) for n, answer in enumerate(answers)]
    return {f.reason: f.severity for f in check_data(Dataset("x", "given", Path(), rows))}


@pytest.mark.parametrize(
    ("answers", "words", "severity"),
    [
        (("['yes', 'no']", "{'text': 'yes'}"), "2 answers, such as", "error"),
        (("NA", "nan", "left"), "2 answers, such as 'NA', look like a missing value", "warning"),
        (("True", "FALSE"), "look like truth values", "warning"),
        (("1", "1.0", "2"), "1 numbers are written in several ways, such as 1 and 1.0", "warning"),
        (("1E5", "100000"), "1 numbers are written in several ways, such as 100000 and 1e5", "warning"),
        (("-1", "1"), "1 answers, such as '-1', contain numbers whose sign", "warning"),
        (("1,5",), "1 answers, such as '1,5', contain numbers whose sign, decimal comma", "warning"),
        (("10²", "1½"), "2 answers, such as '10²', contain numbers whose sign, decimal comma, power", "warning"),
        (("('yes',)", "b'no'", "np.str_('x')", "Timestamp('2020-01-01')"), "4 answers, such as", "error"),
        (("1,5 cm", "15 cm"), "1 answers, such as '1,5 cm', contain numbers whose sign, decimal comma", "warning"),
        (("2,5-3 cm", "253 cm"), "1 answers, such as '2,5-3 cm', contain", "warning"),
        (("T-score -2.5", "5-10 - 3 mm", "L4,5"), "3 answers, such as '5-10 - 3 mm', contain", "warning"),
        (("#NAME?", "#REF!", "#VALUE!", "#DIV/0!", "#NUM!", "#NULL!", "#WERT!"), "7 answers .* spreadsheet", "warning"),
        (("yes_x000D_", "left"), "1 questions or answers contain _x000D_, a control character", "warning"),
        (("?", "undefined"), "2 answers, such as '?', look like a missing value", "warning"),
        (("HER2+", "her2-"), "1 answer classes contain answers that differ in signs .* 'HER2+' and 'her2-'", "warning"),
        (("<5 mm", "> 5 mm", "left"), "1 answer classes contain .* '<5 mm' and '> 5 mm', because", "warning"),
        (("HER2 (+)", "HER2 (-)", "ER+", "ER"), "2 answer classes contain .* 'HER2 (+)' and 'HER2 (-)'", "warning"),
        (("-left", "left"), "1 answer classes contain", "warning"),
        (("T1 = T2", "T1 T2"), "1 answer classes contain", "warning"),
        (("ER\uff0b", "ER\u2212"), "1 answer classes contain", "warning"),  # full-width plus, minus
    ],
)
def test_texts_that_a_program_wrote_are_findings(answers, words, severity):
    ((reason, found),) = findings_of(*answers).items()
    assert all(part in reason for part in words.split(" .* "))
    assert found == severity


@pytest.mark.parametrize(
    "answers",
    [
        ("x-ray", "X ray", "xray"),
        ("T2-weighted", "T2 weighted."),
        ("effusion - left", "effusion, left"),
        ("HER2+", "HER2 +", "her2+."),
        ("HER2-", "HER2\u2212", "PD-L1", "PD L1"),
        ("<5 mm", "< 5 mm."),
        ("yes", "Yes!", "(yes)"),
        ("5-10", "5 10"),
    ],
)
def test_other_spellings_of_one_answer_are_no_findings(answers):
    assert findings_of(*answers) == {}


def test_a_normaliser_that_keeps_signs_merges_no_answers():
    rows = [sample(f"s{n}", Path(f"{n}.png"), answer) for n, answer in enumerate(["HER2+", "HER2-"])]
    assert len(check_data(Dataset("x", "given", Path(), rows), "vqa-v2")) == 1
    assert check_data(Dataset("x", "given", Path(), rows), "lower") == []


def test_usual_answers_are_no_findings():
    assert findings_of("yes", "None", "5.6 cm", "(a)", "1", "2.5", "left [lung]") == {}
    assert (
        findings_of("1,500 ml", "5-10", "two 5 mm lesions", "3 cm²", "L4-L5", "2/3", "PD-1", "1, 2 and 3", "#2") == {}
    )
