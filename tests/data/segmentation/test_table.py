from __future__ import annotations

import json

import pytest

from preceptor.data.segmentation.cases import read_volumes
from preceptor.errors import UserError
from preceptor.segmentation.dataset import content_of
from tests.data.dicom_series_files import noise, slices_of, write_slices
from tests.data.volume_files import head, lesion, save


@pytest.fixture
def root(tmp_path):
    for i in range(4):
        for name in ("a", "b"):
            save(tmp_path / "images" / f"{i}{name}.nii.gz", head(i))
        save(tmp_path / "images" / f"{i}m.nii.gz", lesion())
    return tmp_path


def csv(root, *lines: str):
    path = root / "cases.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


GOOD = [f"p{i},images/{i}a.nii.gz,images/{i}b.nii.gz,images/{i}m.nii.gz,42" for i in range(4)]


def test_csv_and_jsonl_say_the_same(root):
    csv(root, "case,T1c,ct,mask,age", *GOOD)
    lesion = {"lesion": [1, 2, 4]}
    data = read_volumes(root, validation_fraction=0.25, test_fraction=0.25, regions=lesion)
    assert data.modalities == ("t1ce", "ct")
    assert [case.id for case in data.samples] == ["p0", "p1", "p2", "p3"]
    rows = [dict(zip(("case", "T1c", "ct", "mask"), line.split(","), strict=False)) for line in GOOD]
    (root / "other.jsonl").write_text("".join(json.dumps({**row, "age": 42}) + "\n" for row in rows))
    other = read_volumes(root / "other.jsonl", validation_fraction=0.25, test_fraction=0.25, regions=lesion)
    assert other.fingerprint() == data.fingerprint()


def test_missing_modalities_groups_and_parts(root):
    csv(
        root,
        "case,group,split,t1,ct,mask",
        "p0,x,train,images/0a.nii.gz,,images/0m.nii.gz",
        "p1,x,train,images/1a.nii.gz,images/1b.nii.gz,images/1m.nii.gz",
        "p2,y,val,,images/2b.nii.gz,images/2m.nii.gz",
        "p3,z,test,images/3a.nii.gz,,images/3m.nii.gz",
    )
    data = read_volumes(root, regions={"lesion": [1, 2, 4]})
    assert [(case.group, case.split, tuple(case.images)) for case in data.samples] == [
        ("x", "train", ("t1",)),
        ("x", "train", ("t1", "ct")),
        ("y", "validation", ("ct",)),
        ("z", "test", ("t1",)),
    ]
    assert data.variant == "given"


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["id,t1,mask", "a,images/0a.nii.gz,"], "no column 'case'"),
        (["case,t1,mask", "a,images/0a.nii.gz"], r"cases.csv:2: 2 fields, but the header has 3"),
        (["case,t1,t1,mask"], "column 't1' occurs twice"),
        (["case,t1,mask"], "has no rows"),
        (["case,t1,T1w,mask", "a,images/0a.nii.gz,images/0b.nii.gz,"], "are the same modality"),
        (["case,t1,mask", "a,none.nii.gz,"], r"none.nii.gz does not exist"),
        (["case,t1,mask", "a,../0a.nii.gz,"], "leaves the folder"),
        (["case,t1,mask", "a,/etc/0a.nii.gz,"], "leaves the folder"),
        (["case,t1,mask", "a,images/0a.nii.gz,x.png"], "is not a .nii or .nii.gz file"),
        (["case,t1,mask", "a,,images/0m.nii.gz", "b,images/0a.nii.gz,"], "case 'a' has no image"),
        (["case,t1,mask", ",images/0a.nii.gz,"], "the case is empty"),
        (["case,t1,mask", "a,images/0a.nii.gz,", "a,images/1a.nii.gz,"], "is also in line 2"),
        (["case,t1,split", "a,images/0a.nii.gz,trian"], "did you mean 'train'"),
        (["case,t1,split", "a,images/0a.nii.gz,train", "b,images/1a.nii.gz,"], "the split is missing, but other rows"),
        (["case,t1,mask", "a,hello,"], "column t1: 'hello' is not a .nii or .nii.gz file or a folder"),
        (
            [
                "case,t1,mask,split,group",
                "a,images/0a.nii.gz,images/0m.nii.gz,train,x",
                "b,images/1a.nii.gz,images/1m.nii.gz,test,x",
            ],
            "patient 'x' is in train",
        ),
    ],
)
def test_mistakes_name_the_place(root, lines, message):
    csv(root, *lines)
    with pytest.raises(UserError, match=message):
        read_volumes(root)


def test_modalities_that_are_asked_for(root):
    csv(root, "case,T1c,ct,mask,age", *GOOD)
    assert read_volumes(root, modalities=("t1ce",)).modalities == ("t1ce",)
    with pytest.raises(UserError, match="no column for the modality 't2'"):
        read_volumes(root, modalities=("t2",))
    (root / "x.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match="instead of a JSON object"):
        read_volumes(root / "x.jsonl")
    (root / "x.txt").write_text("a")
    with pytest.raises(UserError, match="not named as a table"):
        read_volumes(root / "x.txt")


@pytest.mark.parametrize("cell", ["NA", "N/A", "n/a", "-", "none", "NULL", "nan", "0", "missing", "?"])
@pytest.mark.parametrize("column", ["t1", "mask"])
def test_a_cell_is_empty_or_a_file(root, cell, column):
    rows = [{"case": f"p{i}", "t1": f"images/{i}a.nii.gz", "ct": f"images/{i}b.nii.gz"} for i in range(4)]
    rows = [{**row, "mask": f"images/{i}m.nii.gz"} for i, row in enumerate(rows)]
    rows[2][column] = cell
    csv(root, "case,t1,ct,mask", *[",".join(row.values()) for row in rows])
    with pytest.raises(UserError, match=rf"cases.csv:4: column {column}: '.*' is not a .nii or .nii.gz file"):
        read_volumes(root, regions={"lesion": [1, 2, 4]})
    rows[2][column] = ""
    csv(root, "case,t1,ct,mask", *[",".join(row.values()) for row in rows])
    data = read_volumes(root, regions={"lesion": [1, 2, 4]}, test_fraction=0, validation_fraction=0)
    assert data.modalities == ("t1", "ct")
    assert len(data.samples) == (4 if column == "t1" else 3)
    assert sum(len(case.images) for case in data.samples) == (7 if column == "t1" else 6)


@pytest.mark.parametrize("name", ["seg", "label", "segmentation", "lesion", "b1000"])
def test_a_column_is_an_image_only_by_its_name_or_the_user(root, name):
    csv(
        root,
        f"case,t1,mask,{name}",
        *[f"p{i},images/{i}a.nii.gz,images/{i}m.nii.gz,images/{i}b.nii.gz" for i in range(4)],
    )
    data = read_volumes(root, regions={"lesion": [1, 2, 4]})
    assert data.modalities == ("t1",)
    (finding,) = data.findings
    assert f"the column {name!r} names 4 NIfTI files and is not used" in finding.reason
    assert read_volumes(root, regions={"lesion": [1, 2, 4]}, modalities=("t1",), mask="mask").modalities == ("t1",)
    csv(root, f"case,t1,{name}", *[f"p{i},images/{i}a.nii.gz,images/{i}m.nii.gz" for i in range(4)])
    with pytest.raises(UserError, match=f"those in the column {name!r} may be label maps: if so, set data.mask"):
        read_volumes(root)
    assert read_volumes(root, regions={"lesion": [1, 2, 4]}, mask=name).samples[0].mask.path.name == "0m.nii.gz"


def jsonl(root, *rows):
    path = root / "cases.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rows_of(**cells):
    """Return four rows; every keyword is a column with four cells."""
    rows = [{"case": i, "t1": f"images/{i}a.nii.gz", "mask": f"images/{i}m.nii.gz"} for i in range(4)]
    return [{**row, **{name: values[i] for name, values in cells.items()}} for i, row in enumerate(rows)]


def groups(root, **cells):
    data = read_volumes(jsonl(root, *rows_of(**cells)), regions={"lesion": [1, 2, 4]}, test_fraction=0.3)
    return [case.group for case in data.samples], data


@pytest.mark.parametrize(
    ("name", "meant"),
    [("Split", "split"), ("SPLIT", "split"), ("splits", "split"), ("Group", "group"), ("Case", "case")],
)
def test_a_misspelled_column_is_not_ignored(root, name, meant):
    rows = rows_of(split=["train", "train", "val", "test"], group=["a", "b", "c", "d"])
    rows = [{name if key == meant else key: cell for key, cell in row.items()} for row in rows]
    lines = [",".join(rows[0]), *[",".join(map(str, row.values())) for row in rows]]
    for table in (jsonl(root, *rows), csv(root, *lines)):
        with pytest.raises(UserError, match=f"unknown column {name!r}; did you mean {meant!r}"):
            read_volumes(table, regions={"lesion": [1, 2, 4]})


def test_a_misspelled_column_of_label_maps_is_not_ignored(root):
    csv(root, "case,t1,Mask", *[f"p{i},images/{i}a.nii.gz,images/{i}m.nii.gz" for i in range(4)])
    with pytest.raises(UserError, match="unknown column 'Mask'; did you mean 'mask'"):
        read_volumes(root)
    assert len(read_volumes(root, mask="Mask", regions={"lesion": [1, 2, 4]}).samples) == 4


def test_columns_with_similar_words_are_no_misspelling(root):
    rows = rows_of(age_group=[1, 2, 1, 2], mass=[3, 4, 5, 6], grade=["train", "train", "train", "train"])
    data = read_volumes(jsonl(root, *rows), regions={"lesion": [1, 2, 4]})
    assert data.findings == []


@pytest.mark.parametrize("name", ["set", "subset", "partition"])
def test_splits_in_a_column_of_another_name_are_an_error(root, name):
    splits = ["train", "train", "val", "test"]
    table = jsonl(root, *rows_of(**{name: splits}))
    lesion = {"lesion": [1, 2, 4]}
    for arguments in ({}, {"fold": 0, "folds": 2, "validation_fraction": 0}):
        (finding,) = read_volumes(table, regions=lesion, **arguments).findings
        assert finding.severity == "error"
        assert f"column {name!r} contains names of splits and is not read; rename it to split" in finding.reason
    (root / "s.json").write_text(json.dumps({"train": ["0", "1"], "val": ["2"], "test": ["3"]}))
    assert read_volumes(table, regions=lesion, split_file=root / "s.json").findings == []
    table = jsonl(root, *rows_of(**{name: splits, "split": splits}))
    assert read_volumes(table, regions=lesion).findings == []


def test_a_column_of_another_name_for_patients_is_a_finding(root):
    rows = rows_of(patient_group=["a", "a", "a", "a"])
    (finding,) = read_volumes(jsonl(root, *rows), regions={"lesion": [1, 2, 4]}).findings
    assert "column 'patient_group' may name examinations or patients" in finding.reason
    assert "rename the column to group" in finding.reason


def test_patients_in_the_names_of_cases_are_a_note_unless_groups_are_given(root):
    names = ["pat1_scan1", "pat1_scan2", "pat2_scan1", "pat2_scan2"]
    found, data = groups(root, case=names)
    assert found == ["pat1", "pat1", "pat2", "pat2"]
    assert any("4 cases are taken for scans of 2 patients by their names" in note for note in data.notes)
    found, data = groups(root, case=names, group=["a", "b", "c", "d"])
    assert found == ["a", "b", "c", "d"]
    assert not any("by their names" in note for note in data.notes)


def test_patients_decide_groups_and_zero_is_a_name(root):
    assert groups(root, group=[0, 0, 1, 1])[0] == ["0", "0", "1", "1"]
    found, data = groups(root, PatientID=[0, 7, 0, 7.0])
    assert found == ["0", "1", "0", "1"]  # names of cases, not of patients
    assert any("by the column PatientID" in note for note in data.notes)
    # Patients of two columns are merged through their cases.
    assert len(set(groups(root, PatientID=["x", "x", "y", "z"], mrn=[None, 3, 3, None])[0])) == 2
    # An empty cell tells nothing.
    assert groups(root, subject=["", "", "", ""])[0] == ["0", "1", "2", "3"]


def test_a_patient_column_that_is_not_used_is_a_finding(root):
    rows = rows_of(group=["a", "b", "c", "d"], PatientID=["p", "p", "q", "r"], split=["train", "test", "train", "val"])
    data = read_volumes(jsonl(root, *rows), regions={"lesion": [1, 2, 4]})
    (finding,) = data.findings
    assert "column 'PatientID' names 3 patients and is not used" in finding.reason
    assert finding.severity == "error"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"group": ["x"]}, "group is a list"),
        ({"group": {"a": 1}}, "group is a structure"),
        ({"PatientID": True}, "PatientID is true"),
        ({"case": 1.5}, "case is a number that is not whole"),
        ({"case": ["a"]}, "case is a list"),
        ({"t1": 3}, "column t1: int instead of the path of a file"),
        ({"t1": ["images/0a.nii.gz"]}, "column t1: list instead of the path"),
        ({"mask": False}, "column mask: bool instead of the path"),
    ],
)
def test_cells_of_other_types_are_refused(root, change, message):
    with pytest.raises(UserError, match=f"cases.jsonl:1: {message}"):
        read_volumes(jsonl(root, {**rows_of()[0], **change}, *rows_of()[1:]))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"case": "\\ud800"}', "surrogate pair"),
        ('{"a": ' * 100_000, "invalid JSON"),
        ("[" * 100_000, "nested too deeply"),
        ('{"case": "a", "case": "b"}', "the key 'case' occurs twice"),
    ],
)
def test_json_that_cannot_be_used(root, line, message):
    path = root / "cases.jsonl"
    path.write_text(line)
    with pytest.raises(UserError, match=rf"cases.jsonl:1.*{message}") as caught:
        read_volumes(path)
    str(caught.value).encode()


def test_a_cell_may_name_a_folder_of_a_series(root):
    for i in range(4):
        write_slices(
            root / "dicom" / str(i), slices_of(noise((10, 14, 12), seed=i), spacing=(1, 1, 1), origin=(0, 0, 0))
        )
    csv(root, "case,ct,mask", *[f"p{i},dicom/{i},images/{i}m.nii.gz" for i in range(4)])
    data = read_volumes(root, regions={"lesion": [1, 2, 4]})
    assert data.samples[0].images["ct"].path == root / "dicom" / "0"
    assert len({content_of(case, ("ct",)) for case in data.samples}) == 4
    (root / "empty").mkdir()
    for name, message in (("empty", "contains no DICOM file"), ("nowhere", "is not a .nii")):
        csv(root, "case,ct,mask", f"p0,{name},images/0m.nii.gz")
        with pytest.raises(UserError, match=message):
            read_volumes(root)
    csv(root, "case,ct,mask", "p0,dicom/0,dicom/1")
    with pytest.raises(UserError, match=r"column mask: 'dicom/1' is not a .nii or .nii.gz file; leave"):
        read_volumes(root)
