"""Which samples belong together, and what crosses the splits."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from preceptor.data import groups
from preceptor.data.groups import equal_files, folder_findings, group_by_content, note_leaks, renew_leaks, unread_splits
from preceptor.data.identifying_columns import identifier_findings, names_examination, names_patient
from preceptor.data.types import Case, Dataset, Dialogue, Sample, VolumeFile
from preceptor.data.vqa.table import read_table
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data


@pytest.mark.parametrize(
    "name",
    [
        *("patient", "patient_id", "PatientID", "Patient ID", "MRN", "mrn_hash", "subject", "SubjectKey", "pid"),
        *("anon_patient_id", "participant_id", "PATIENT-NUMBER", "subj", "donor_id"),
        *("id_patient", "NHS Number", "USUBJID", "UHID", "person_id_anon", "patient_uuid", "patient_id_1", "病人ID"),
        *("medical_record_no", "hospital_number", "study_subject_id", "Patienten-ID", "患者编号"),
        *("patient_pseudonym", "PatientPseudonym", "pseudonym", "patient_ref", "patient_token", "Patientennummer"),
        *("patient_id_x", "PatientID_y", "subject_reference"),
    ],
)
def test_names_of_patients(name):
    assert names_patient(name)


@pytest.mark.parametrize(
    "name",
    [
        *("patient_age", "subject_matter", "id", "name", "group", "image", "study_id", ""),
        *("reader_pseudonym", "patient_label", "num_patients", "model_ref", "token", "position_x", "sub_label"),
    ],
)
def test_names_of_other_things(name):
    assert not names_patient(name)


@pytest.mark.parametrize(
    "name",
    [
        *(
            "study_instance_uid",
            "StudyInstanceUID",
            "accession",
            "AccessionNumber",
            "study_id",
            "case_no",
            "CaseID",
            "hn",
        ),
        *("hadm_id", "encounter_id", "mr_no", "SeriesInstanceUID", "study_id_x"),
        *("patient_label", "anon_id", "pseudo_id", "mrn_x", "source_patient_id", "tcia_subject_id", "anon_study_id"),
    ],
)
def test_names_of_examinations(name):
    assert names_examination(name)
    assert not names_patient(name)


@pytest.mark.parametrize(
    "name",
    [
        *("patient_id", "study_date", "case_report_text", "series", "scan", "image_id", "visit", "number", "examiner"),
        *("", "patient_age", "PatientSex", "PatientPosition", "subject_matter", "sub_category", "sub_question_id"),
        *("original_name", "unique_id", "pseudo_label", "question_id", "num_patients", "id_2", "anon"),
    ],
)
def test_names_of_no_examination(name):
    assert not names_examination(name)


@pytest.mark.parametrize("split", [True, False])
def test_examinations_in_several_splits_are_a_warning_of_a_table(tmp_path: Path, split: bool):
    rows = ["image,question,answer,accession_no" + ",split" * split]
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"image %d" % number)
        rows.append(f"{number}.png,Q{number}?,yes,A{number // 20}" + f",{'train' if number % 2 else 'test'}" * split)
    (tmp_path / "questions.csv").write_text("\n".join(rows))
    (finding,) = read_table(tmp_path).findings
    assert finding.severity == "warning"
    assert "2 of its 2 values are in several splits" in finding.reason
    assert "A1" not in finding.reason


@pytest.mark.parametrize("column", ["patient_pseudonym", "patient_id_x", "Patientennummer"])
def test_patients_in_other_words_decide_the_groups(tmp_path: Path, column: str):
    data = read_table(table(tmp_path, column, *(f"P{number % 3}" for number in range(24))))
    assert {len({s.group for s in data.samples if int(s.image.stem) % 3 == patient}) for patient in range(3)} == {1}
    assert len({s.group for s in data.samples}) == 3
    assert any(f"Groups follow the column {column}" in note for note in data.notes)


@pytest.mark.parametrize("column", ["patient_label", "anon_id"])
def test_a_column_that_may_name_patients_in_several_splits_is_a_warning(tmp_path: Path, column: str):
    splits = ["train"] * 12 + ["val"] * 6 + ["test"] * 6
    rows = [f"P{number % 3},{split}" for number, split in enumerate(splits)]
    (finding,) = read_table(table(tmp_path, f"{column},split", *rows)).findings
    assert (finding.severity, len(finding.sample_ids)) == ("warning", 24)
    assert f"column {column!r} may name examinations or patients and does not decide the splits" in finding.reason
    assert "3 of its 3 values are in several splits" in finding.reason


def test_a_column_that_may_name_patients_within_their_splits_is_none(tmp_path: Path):
    assert read_table(table(tmp_path, "patient_label,split", "a,train", "a,train", "b,test", "c,val")).findings == []


@pytest.mark.parametrize(
    ("values", "found"),
    [
        (["Train", "Test", "Development"], True),
        (["tr", "va", "te", None, ""], True),
        (["train", "train"], False),  # one value
        (["train", "ward"], False),
        ([], False),
    ],
)
def test_values_that_are_names_of_splits(values: list, found: bool):
    finding = unread_splits("phase", values)
    assert (finding is not None) == found
    if finding:
        assert finding.severity == "error"
        assert finding.reason == "column 'phase' contains names of splits and is not read; rename it to split"


def test_a_known_patient_decides_before_the_examination(tmp_path: Path):
    rows = ["image,question,answer,visit_id,study_id,patient"]
    for number in range(40):
        (tmp_path / f"{number}.png").write_bytes(b"image %d" % number)
        rows.append(f"{number}.png,Q{number}?,yes,{number % 2},{number % 2},P{number // 2}")
    (tmp_path / "questions.csv").write_text("\n".join(rows))
    assert read_table(tmp_path).findings == []


@pytest.mark.parametrize(
    "names",
    [
        ("p1", "P1"),
        ("007", "7"),
        ("7.0", "7"),
        ("P\u200b1", "P1"),
        ("\uff30\uff11", "P1"),
        ("A-1", "A\u20111"),
        ("A 1", "A1"),
    ],
)
def test_identifiers_that_look_alike_are_a_warning_without_their_text(names):
    (finding,) = identifier_findings("patient", [*names, "other"])
    assert "1 names are written in several ways" in finding.reason
    assert not any(name in finding.reason.replace("1 names", "") for name in names if name != "7")


def test_other_identifiers_are_no_warning():
    assert identifier_findings("patient", ["p1", "p11", "p1.5", "", "1.5", "15", "é", "e"]) == []


@pytest.mark.parametrize("name", ["nan", "NaN", "N/A", "unknown", "-", "None"])
def test_a_missing_identifier_is_the_name_of_a_group_and_a_warning(name):
    (finding,) = identifier_findings("patient", [name, name, "p1"])
    assert f"2 rows contain {name!r}" in finding.reason


def test_only_files_of_equal_size_and_middle_are_read_as_a_whole(tmp_path: Path, monkeypatch):
    contents = {"a": b"x" * 300_000, "b": b"x" * 300_000, "c": b"y" * 300_000, "d": b"x" * 10, "e": b"", "f": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    whole = []
    content_hash = groups.content_hash
    monkeypatch.setattr(groups, "content_hash", lambda path: whole.append(path.name) or content_hash(path))
    assert {path.name for path in equal_files([*(tmp_path / name for name in contents), tmp_path / "gone"])} == {
        "a",
        "b",
    }
    assert sorted(whole) == ["a", "b"]


def rows_of(task: str, folder: Path):
    for name in ("a", "copy"):
        (folder / name).write_bytes(b"image")
    (folder / "b").write_bytes(b"other")
    for number, (name, split) in enumerate([("a", "train"), ("copy", "test"), ("b", "unlabelled")]):
        path = folder / name
        if task == "vqa":
            yield Sample(f"s{number}", path, "Q?", ("yes",), "closed", name, split)  # type: ignore[arg-type]
        elif task == "segmentation":
            yield Case(f"s{number}", {"t1": VolumeFile(path)}, None, name, split)  # type: ignore[arg-type]
        else:
            yield Dialogue(f"s{number}", (path, folder / "b"), (("Q", "A"),), "mia", "ct", name, "train")


@pytest.mark.parametrize("task", ["vqa", "segmentation"])
def test_a_copy_in_another_split_is_a_finding_of_every_task(tmp_path: Path, task: str):
    data = Dataset("x", "given", tmp_path, list(rows_of(task, tmp_path)))
    note_leaks(data)
    assert data.leaking
    assert [(f.severity, f.sample_ids) for f in data.findings] == [("error", ("s0", "s1"))]
    assert "1 of 2 images are in more than one split (1 of them under several names)" in data.findings[0].reason
    assert data.notes == [data.findings[0].reason]
    merged = group_by_content(data.samples)
    assert [row.group for row in merged] == ["a", "a", "b"]
    later = Dataset("x", "given", tmp_path, list(rows_of(task, tmp_path)))
    note_leaks(later, published=True)
    assert [f.severity for f in later.findings] == ["warning"]


def test_dialogues_that_share_one_of_their_images(tmp_path: Path):
    rows = list(rows_of("grounding", tmp_path))
    assert len({row.group for row in group_by_content(rows)}) == 1
    rows[0] = replace(rows[0], split="validation")
    data = Dataset("x", "given", tmp_path, rows)
    note_leaks(data)
    assert "2 of 2 images" in data.findings[0].reason


def table(folder: Path, header: str, *rows: str) -> Path:
    for number in range(len(rows)):
        (folder / f"{number}.png").write_bytes(bytes([number + 1]))
    path = folder / "t.csv"
    path.write_text(f"image,question,answer,{header}\n" + "".join(f"{n}.png,Q?,yes,{r}\n" for n, r in enumerate(rows)))
    return path


def test_columns_that_name_patients_decide_the_groups_of_a_table(tmp_path: Path):
    data = read_table(table(tmp_path, "patient_id,MRN", "0,a", "0,", "1,a", "2,", ",b", ",b"))
    groups = [sample.group for sample in data.samples]
    assert groups[0] == groups[1] == groups[2]  # 0 is a patient, and the record number joins 0 with 1
    assert groups[4] == groups[5]
    assert len(set(groups)) == 3
    assert "Groups follow the columns patient_id and MRN, which name patients." in data.notes
    assert all(len({s.split for s in data.samples if s.group == group}) == 1 for group in groups)


def test_a_patient_column_beside_a_group_is_a_finding_with_its_number(tmp_path: Path):
    data = read_table(table(tmp_path, "group,subject,split", "0,Doe,train", "1,Doe,test", "2,x,test", "3,y,val"))
    (finding,) = data.findings
    assert "column 'subject' names 3 patients and is not used" in finding.reason
    assert "1 of them are in several splits" in finding.reason
    assert "Doe" not in finding.reason
    assert finding.sample_ids == ("row-2", "row-3")
    assert data.samples[0].group == "0"


def test_given_splits_that_divide_a_patient_leak(tmp_path: Path):
    data = read_table(table(tmp_path, "patient,split", "p,train", "p,test", "q,val"))
    assert data.leaking
    assert "1 of 2 groups are in more than one split" in data.findings[0].reason


def test_copies_stay_in_one_split_that_the_program_cuts(tmp_path: Path):
    path = table(tmp_path, "comment", *("x" for _ in range(40)))
    for number in range(0, 40, 2):
        (tmp_path / f"{number}.png").write_bytes(b"same")
    data = read_table(path)
    assert len({s.split for s in data.samples if int(s.image.stem) % 2 == 0}) == 1
    assert not data.leaking


def test_leaks_are_counted_again_after_samples_were_left_out(tmp_path: Path):
    data = Dataset("x", "given", tmp_path, list(rows_of("vqa", tmp_path)))
    note_leaks(data)
    assert data.leaking
    data.samples = [sample for sample in data.samples if sample.split != "train"]
    renew_leaks(data)
    assert (data.leaking, data.findings, data.notes) == (False, [], [])


def folders_are_doubted(*images: tuple[str, str]) -> bool:
    return bool(folder_findings((Path(name), split) for name, split in images))  # type: ignore[misc]


def test_folders_and_names_that_are_in_several_splits_are_a_warning():
    assert folders_are_doubted(("p0/a.png", "train"), ("p0/b.png", "test"), ("p1/c.png", "train"))
    assert folders_are_doubted(("p0/s0/a.png", "train"), ("p0/s1/b.png", "test"), ("p1/s2/c.png", "train"))
    assert folders_are_doubted(("t1/p0.png", "train"), ("t2/p0.png", "test"))
    assert not folders_are_doubted(("a.png", "train"), ("b.png", "test"))
    assert not folders_are_doubted(("images/a.png", "train"), ("images/b.png", "test"))
    assert not folders_are_doubted(("train/a.png", "train"), ("train/b.png", "train"), ("test/c.png", "test"))
    assert not folders_are_doubted(("train/a.png", "train"), ("train/b.png", "unlabelled"), ("test/c.png", "test"))
    assert not folders_are_doubted(("p0/a.png", "train"), ("p1/b.png", "test"))
    numbered = [(f"{split}/{number}.png", split) for split in ("train", "test") for number in range(2)]
    assert not folders_are_doubted(*numbered)


def test_a_table_with_patients_as_folders_is_a_warning(tmp_path: Path):
    names = [f"p{patient}/{patient}-{number}.png" for patient in range(8) for number in range(4)]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    rows = [{"image": name, "question": "Q?", "answer": "yes"} for name in names]

    def reasons(**column: Any) -> list[str]:
        cells = [row | {key: value(row["image"]) for key, value in column.items()} for row in rows]
        (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, cells)))
        return [finding.reason for finding in read_table(tmp_path / "t.jsonl").findings]

    (reason,) = reasons()
    assert "no group and no patient is given for images in several folders" in reason
    assert reasons(group=lambda name: name[:2]) == []
    assert reasons(patient_id=lambda name: name[:2]) == []
    assert reasons(split=lambda name: ("train", "validation", "test")[int(name[1]) // 3]) == []


def test_an_own_reader_without_groups_is_a_warning(tmp_path: Path, monkeypatch):
    (tmp_path / "own_rows.py").write_text(
        "from preceptor.data.types import Dataset, Sample\n"
        "def read(root, group):\n"
        "    names = [f'p{n // 4}/{n}.png' for n in range(16)]\n"
        "    splits = ['train', 'validation', 'test', 'train']\n"
        "    rows = [Sample(n, root / n, 'Q?', ('yes',), 'closed', n[:2] if group else n, s)"
        " for n, s in zip(names, splits * 4)]\n"
        "    return Dataset('own', 'given', root, rows)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def found(group: bool) -> list[str]:
        config = DataConfig.model_validate(
            {"name": "own_rows:read", "root": str(tmp_path), "arguments": {"group": group}}
        )
        return [finding.reason for finding in read_data(config, tmp_path / "scratch").findings]

    (reason,) = found(False)
    assert "no group and no patient is given" in reason
    assert all(reason.startswith("Leaking split:") for reason in found(True))
