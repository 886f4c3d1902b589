from __future__ import annotations

import json

import pytest

from preceptor.data.segmentation.cases import read_volumes
from preceptor.errors import UserError
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
