from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.data.findings import Finding
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.split_files import apply_split, read_split
from preceptor.data.segmentation.splits import cut_fold, cut_labelled, cut_splits, require_whole_patients
from preceptor.data.types import Case, VolumeFile
from preceptor.errors import UserError
from tests.data.volume_files import REGIONS, write_case


def cases(groups) -> list[Case]:
    return [Case(f"c{i:03d}", {"t1": VolumeFile(Path("x.nii"))}, None, f"g{g}", "train") for i, g in enumerate(groups)]


groups = st.lists(st.integers(0, 12), min_size=1, max_size=60)


@given(groups, st.integers(0, 5))
def test_no_patient_is_divided_and_none_is_lost(held, seed):
    made = cut_splits(cases(held), 0.2, 0.3, seed)
    require_whole_patients(made, "here")
    assert [case.id for case in made] == [case.id for case in cases(held)]
    assert made == cut_splits(cases(held), 0.2, 0.3, seed)
    if len(set(held)) >= 3:
        assert {case.split for case in made} == {"train", "validation", "test"}


def test_shares_are_those_of_all_cases():
    made = cut_splits(cases(range(200)), 0.1, 0.2, 0)
    assert Counter(case.split for case in made) == {"train": 140, "validation": 20, "test": 40}
    assert {case.split for case in cut_splits(cases(range(20)), 0, 0, 0)} == {"train"}


@given(groups.filter(lambda held: len(set(held)) >= 3), st.integers(0, 5), st.integers(2, 3))
def test_folds_test_every_case_once(held, seed, folds):
    tested = Counter()
    for fold in range(folds):
        made = cut_fold(cases(held), fold, folds, 0.1, seed)
        require_whole_patients(made, "here")
        tested.update(case.id for case in made if case.split == "test")
    assert tested == {case.id: 1 for case in cases(held)}


@given(groups, st.integers(0, 5), st.data())
def test_cases_without_masks_train_and_change_no_split_of_the_others(held, seed, data):
    every = cases(held)
    mask = VolumeFile(Path("seg.nii"))
    every = [replace(case, mask=mask) if data.draw(st.booleans()) else case for case in every]
    labelled = [case for case in every if case.mask is not None]

    def cut(these):
        return cut_splits(these, 0.2, 0.3, seed)

    made = cut_labelled(every, cut)
    require_whole_patients(made, "here")
    assert [case.id for case in made] == [case.id for case in every]
    assert [case for case in made if case.mask is not None] == cut(labelled)
    scored = {case.group for case in cut(labelled) if case.split != "train"}
    for case in made:
        if case.mask is None:
            assert (case.split == "train") == (case.group not in scored)


def test_three_folds_of_285_as_the_published_protocol_has_them():
    made = cut_fold(cases(range(285)), 1, 5, 29 / 285, 0)
    assert Counter(case.split for case in made) == {"train": 199, "validation": 29, "test": 57}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 5, 0.1, 0), "must be from 0 to 4"),
        ((-1, 5, 0.1, 0), "fold=-1"),
        ((0, 1, 0.1, 0), "folds=1 must"),
        ((0, 11, 0.1, 0), "folds=11 must"),
        ((0, 2, 0.5, 0), "no training cases"),
    ],
)
def test_folds_that_do_not_exist(arguments, message):
    with pytest.raises(UserError, match=message):
        cut_fold(cases(range(10)), *arguments)


def test_shares_that_leave_nothing():
    with pytest.raises(UserError, match="must leave training cases"):
        cut_splits(cases(range(10)), 0.5, 0.5, 0)


def split_files(root: Path) -> list[Path]:
    (root / "s.json").write_text(json.dumps({"train": ["c000", "c001"], "val": ["c002"], "test": ["c003"]}))
    (root / "s.csv").write_text("case,split\nc000,train\nc001,Train\nc002,dev\nc003,test\n")
    (root / "lists").mkdir()
    (root / "lists" / "train.txt").write_text("MICCAI_BraTS/HGG/c000\nHGG_c001_vol.npy\n\n")
    (root / "lists" / "val.txt").write_text("c002 0\n")
    (root / "lists" / "test.txt").write_text("LGG\\c003_t1.nii.gz\n")
    return [root / "s.json", root / "s.csv", root / "lists"]


def test_all_forms_of_split_files_say_the_same(tmp_path):
    for file in split_files(tmp_path):
        findings: list[Finding] = []
        made = apply_split(cases(range(5)), file, findings)
        assert [(case.id, case.split) for case in made] == [
            ("c000", "train"),
            ("c001", "train"),
            ("c002", "validation"),
            ("c003", "test"),
        ]
        assert [finding.sample_ids for finding in findings] == [("c004",)]
        assert findings[0].reason == f"1 of 5 cases are not in {file.name} and were left out: c004"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["c0001"]}', r"case 'c0001' is not in the data; did you mean 'c001'"),
        ('{"train": ["zzzzzzzz"]}', r"its cases have names such as 'c000'"),
        ('{"train": ["c000"], "test": ["c000"]}', "is also in train"),
        ('{"train": ["c000"], "test": ["c000.nii.gz"]}', "is also in train"),
        ('{"trian": ["c000"]}', "did you mean 'train'"),
        ('{"train": "c000"}', "must be a list of case names"),
        ("[]", "must be an object"),
        ("{", "cannot be read as JSON"),
        ("{}", "names no case"),
    ],
)
def test_mistakes_in_a_split_file(tmp_path, content, message):
    (tmp_path / "s.json").write_text(content)
    with pytest.raises(UserError, match=message):
        apply_split(cases(range(5)), tmp_path / "s.json", [])


def test_other_files_are_no_split(tmp_path):
    for name, content, message in (
        ("s.csv", "case,part\nc000,train\n", "columns case and split"),
        ("t.csv", "case,split\nc000,trai\n", "did you mean 'train'"),
        ("s.yaml", "", "is not a split file"),
    ):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match=message):
            apply_split(cases(range(5)), tmp_path / name, [])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="contains no train"):
        apply_split(cases(range(5)), tmp_path / "empty", [])


@pytest.mark.parametrize(
    ("header", "cells", "message"),
    [
        ("case,split,Modalities", "t1", "unknown column 'Modalities'; did you mean 'modalities'"),
        ("Case,split", None, "unknown column 'Case'; did you mean 'case'"),
        ("case,Split", None, "unknown column 'Split'; did you mean 'split'"),
        ("case,split,modality", "b1000", "column 'modality' is not read; rename it to modalities"),
        ("case,split,contrasts", "T1-Gd+flair", "column 'contrasts' is not read; rename it to modalities"),
        ("case,split,sequences", "t1 t2w", "column 'sequences' is not read; rename it to modalities"),
    ],
)
def test_columns_of_a_split_file_are_not_ignored(tmp_path, header, cells, message):
    rows = [f"c00{i},{split}" + (f",{cells}" if cells else "") for i, split in enumerate(("train", "test"))]
    (tmp_path / "s.csv").write_text("\n".join([header, *rows]))
    with pytest.raises(UserError, match=message):
        read_split(tmp_path / "s.csv")


def test_other_columns_of_a_split_file_are_ignored(tmp_path):
    lines = ["case,split,modalities,age,scanner,contrast", "c000,train,t1,50,3T MR,t1", "c001,test,,60,,t2"]
    (tmp_path / "s.csv").write_text("\n".join(lines))
    assert [entry.modalities for entry in read_split(tmp_path / "s.csv").values()] == [{"t1"}, None]
    (tmp_path / "s.csv").write_text("case,split,scanner,note\nc000,train,3T MR,\nc001,test,CT 64,\n")
    assert [entry.split for entry in read_split(tmp_path / "s.csv").values()] == ["train", "test"]


def test_a_patient_in_two_parts_is_an_error_and_validation_is_cut_where_there_is_none(tmp_path):
    names = [f"BraTS-GLI-{patient:05d}-{scan:03d}" for patient in range(5) for scan in range(2)]
    for i, name in enumerate(names):
        write_case(tmp_path / "data" / name, name, i, values=(1, 2, 3))
    file = tmp_path / "s.json"
    file.write_text(json.dumps({"train": names[:7], "test": names[7:]}))
    with pytest.raises(UserError, match="patient 'BraTS-GLI-00003' is in train"):
        read_volumes(tmp_path / "data", split_file=file)
    file.write_text(json.dumps({"train": names[:8], "test": names[8:]}))
    data = read_volumes(tmp_path / "data", split_file=file, validation_fraction=0.25)
    assert Counter(case.split for case in data.samples) == {"train": 6, "validation": 2, "test": 2}
    assert data.variant == "s"
    with pytest.raises(UserError, match="cannot be combined"):
        read_volumes(tmp_path / "data", split_file=file, fold=0)
    folded = read_volumes(tmp_path / "data", fold=2, folds=5, validation_fraction=0)
    assert folded.variant == "fold-2-of-5"
    assert len(folded.split("test")) == 2


@pytest.mark.parametrize("kind", ["json", "csv", "folder"])
def test_names_in_another_unicode_form_are_the_same_case(tmp_path, kind):
    name = "caf\u0065\u0301"  # e and an accent
    if kind == "json":
        path = tmp_path / "splits.json"
        path.write_text(json.dumps({"train": [name]}))
    elif kind == "csv":
        path = tmp_path / "splits.csv"
        path.write_text(f"case,split\n{name},train\n", "utf-8")
    else:
        path = tmp_path
        (path / "train.txt").write_text(f"{name}\n", "utf-8")
    assert list(read_split(path)) == ["caf\u00e9"]


def test_the_folds_of_nnunet(tmp_path):
    names = [f"c{i:03d}" for i in range(10)]
    for number, name in enumerate(names):
        write_case(tmp_path / "data" / name, name, number)
    file = tmp_path / "splits_final.json"
    folds = [{"train": [n for n in names if n not in names[k::5]], "val": names[k::5]} for k in range(5)]
    file.write_text(json.dumps(folds))
    for fold in range(5):
        data = read_volumes(tmp_path / "data", split_file=file, fold=fold, regions=REGIONS)
        assert [case.id for case in data.split("test")] == names[fold::5]
        assert data.split("validation")
        assert data.variant == f"splits_final-fold-{fold}"
        assert f"Fold {fold} of splits_final.json: its cases val are the test split." in data.notes
    for fold, message in (
        (None, r"splits_final.json has 5 folds, and set data.fold to one of 0 to 4"),
        (5, r"has 5 folds, and data.fold=5 must be one of 0 to 4"),
    ):
        with pytest.raises(UserError, match=message):
            read_volumes(tmp_path / "data", split_file=file, fold=fold)
    file.write_text(json.dumps([{"train": names[:8], "test": names[8:]}]))
    with pytest.raises(UserError, match=r"fold 0: split 'test' is not known"):
        read_volumes(tmp_path / "data", split_file=file, fold=0)
    file.write_text(json.dumps({"train": names[:8], "test": names[8:]}))
    with pytest.raises(UserError, match=r"fold=0 cannot be combined with the split of .*splits_final.json"):
        read_volumes(tmp_path / "data", split_file=file, fold=0)
