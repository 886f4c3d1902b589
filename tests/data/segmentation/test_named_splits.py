from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from preceptor.data.findings import Finding
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.layouts import patient_of
from preceptor.data.segmentation.named_splits import named_splits
from preceptor.data.segmentation.split_files import apply_split, read_split
from preceptor.data.types import Case, VolumeFile
from preceptor.errors import UserError
from preceptor.tasks import load_recipe
from tests.data.volume_files import write_case

CONTRASTS = ("flair", "t1", "t1ce", "t2")
CUBES = "brats20-cubes-210-45-45"
RATES = {"1379": (200, 156, 68, 23), "2258": (179, 180, 111, 44), "2285": (179, 180, 43, 113)}
RATES |= {"2468": (184, 135, 90, 43), "5528": (113, 111, 185, 42), "5582": (113, 111, 42, 186)}
RATES |= {"8825": (46, 44, 189, 118), "8852": (46, 44, 116, 190)}
"""Training cases of BraTS 2020 that have t1, t1ce, flair and t2, as PASSION's generate_imb_mr.py says."""


README = Path(named_splits.__code__.co_filename).with_name("README.md")


def cases(names, modalities=CONTRASTS) -> list[Case]:
    images = {name: VolumeFile(Path(f"{name}.nii")) for name in modalities}
    return [Case(name, images, None, patient_of(name), "train") for name in names]


def listed(name: str, *parts: str) -> list[str]:
    return [case for case, entry in read_split(named_splits()[name]).items() if entry.split in parts]


def applied(name: str, given: list[Case]) -> tuple[list[Case], list[Finding]]:
    findings: list[Finding] = []
    return apply_split(given, named_splits()[name], findings, key="data.split"), findings


@pytest.mark.parametrize("name", named_splits())
def test_shipped_splits_have_the_sizes_in_their_names_and_divide_no_patient(name):
    entries = read_split(named_splits()[name])
    sizes = Counter(entry.split for entry in entries.values())
    train, validation, test = map(int, name.split("-")[-3:] if name == CUBES else name.split("-")[1:4])
    assert sizes == {"train": train, "validation": validation, "test": test}
    patients: dict[str, str] = {}
    for case, entry in entries.items():
        assert patients.setdefault(patient_of(case), entry.split) == entry.split
    assert name in README.read_text("utf-8") or f"`-{name.split('-')[-1]}`" in README.read_text("utf-8")


def test_published_splits_hold_all_cases_of_their_release():
    whole = {f"BraTS20_Training_{number:03d}" for number in range(1, 370)}
    assert set(read_split(named_splits()["brats2020-219-50-100"])) == whole
    first, *others = (set(read_split(named_splits()[f"brats2018-199-29-57-split{k}"])) for k in (1, 2, 3))
    assert len(first) == 285
    assert all(other == first for other in others)


@pytest.mark.parametrize(("rates", "counts"), RATES.items())
def test_imbalanced_rates_are_the_published_counts(rates, counts):
    names = listed("brats2020-219-50-100", "train", "validation", "test")
    made, findings = applied(f"brats2020-219-50-100-mr{rates}", cases(names))
    assert findings == []
    train = [case for case in made if case.split == "train"]
    assert tuple(sum(name in case.images for case in train) for name in ("t1", "t1ce", "flair", "t2")) == counts
    assert all(len(case.images) == 4 for case in made if case.split != "train")


def test_cases_without_any_of_the_chosen_contrasts_are_left_out_and_reported():
    names = listed("brats2020-219-50-100", "train", "validation", "test")
    made, (finding,) = applied("brats2020-219-50-100-mr1379", cases(names, ["t2"]))
    assert Counter(case.split for case in made) == {"train": 23, "validation": 50, "test": 100}
    assert len(finding.sample_ids) == 196


def test_the_split_of_the_cubes_keeps_patients_of_other_data_sets_in_training():
    assert {"brats20_295", "brats20_320"} <= set(listed(CUBES, "train"))


def test_unlisted_cases_are_left_out_with_a_finding():
    names = listed(CUBES, "train", "validation", "test")
    made, (finding,) = applied(CUBES, cases([*names, "brats20_002", "brats20_010"]))
    assert Counter(case.split for case in made) == {"train": 210, "validation": 45, "test": 45}
    assert finding.sample_ids == ("brats20_002", "brats20_010")
    assert finding.reason == (
        f"2 of 302 cases are not in data.split={CUBES} and were left out: brats20_002, brats20_010"
    )


def test_an_incomplete_part_is_an_error_and_an_absent_part_is_none():
    names = listed(CUBES, "train", "validation", "test")
    lost = listed(CUBES, "test")[3]
    with pytest.raises(UserError, match=f"1 of the 45 test cases of data.split={CUBES} are not in the data: {lost};"):
        applied(CUBES, cases([name for name in names if name != lost]))
    made, findings = applied(CUBES, cases(listed(CUBES, "test")))
    assert {case.split for case in made} == {"test"}
    assert findings == []


def test_a_folder_of_other_cases_is_a_test_set_and_cannot_be_trained_on(tmp_path):
    from preceptor.segmentation.data import read_cases

    for seed, name in enumerate(("brats20_002", "brats20_010")):
        write_case(tmp_path / name, name, seed)
    recipe = load_recipe("lckd-brats-cubes", [f"data.root={tmp_path}"])
    data = read_cases(recipe.data, tmp_path, needed=("test",))
    assert [(case.id, case.split) for case in data.samples] == [("brats20_002", "test"), ("brats20_010", "test")]
    assert f"none of the 2 cases is listed in data.split={CUBES}" in data.findings[0].reason
    with pytest.raises(UserError, match=f"has no train case of data.split={CUBES}; give"):
        read_cases(recipe.data, tmp_path)


def test_one_split_is_given(tmp_path):
    write_case(tmp_path / "a", "a", 0)
    (tmp_path / "s.json").write_text('{"train": ["a"]}')
    with pytest.raises(UserError, match=r"data\.split=x cannot be combined with data\.split_file"):
        read_volumes(tmp_path, split="x", split_file=tmp_path / "s.json")
    with pytest.raises(UserError, match=f"fold=0 cannot be combined with the split of {CUBES}"):
        read_volumes(tmp_path, split=CUBES, fold=0)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("brats2020-219-50-10", "did you mean .brats2020-219-50-100"),
        ("brats2023-875-125-251", "no licence.*data.split_file=IM-Fuse/IMFuse/datalist"),
    ],
)
def test_unknown_names_say_what_there_is(name, message):
    with pytest.raises(UserError, match=message):
        load_recipe("lckd-brats-compact", [f"data.split={name}"])


def test_contrasts_of_a_case_are_read_from_a_split_file(tmp_path):
    (tmp_path / "s.csv").write_text("case,split,modalities\na,train,FLAIR+T1c\nb,validation,\nc,test,t2\n")
    made = apply_split(cases("abc"), tmp_path / "s.csv", [])
    assert [list(case.images) for case in made] == [["flair", "t1ce"], list(CONTRASTS), ["t2"]]
    for text, message in (("flar", "contrast 'flar' is not in the data; did you mean 'flair'"), ("t1+", "joined by +")):
        (tmp_path / "s.csv").write_text(f"case,split,modalities\na,train,{text}\n")
        with pytest.raises(UserError, match=message):
            apply_split(cases("abc"), tmp_path / "s.csv", [])


def test_lists_of_im_fuse_are_read_with_their_masks(tmp_path):
    (tmp_path / "train.txt").write_text("BraTS-GLI-00002-000\n")
    (tmp_path / "val15splits.csv").write_text('case,mask\nBraTS-GLI-00006-000,"[True, False, True, False]"\n')
    (tmp_path / "test15splits.csv").write_text('case,mask\nBraTS-GLI-00000-000,"[False, False, False, True]"\n')
    names = [f"BraTS-GLI-{number:05d}-000" for number in (0, 2, 6)]
    made = apply_split(cases(names), tmp_path, [])
    assert [(case.split, list(case.images)) for case in made] == [
        ("test", list(CONTRASTS)),
        ("train", list(CONTRASTS)),
        ("validation", ["flair", "t1"]),
    ]
    (tmp_path / "val15splits.csv").write_text("case,mask\nBraTS-GLI-00006-000,[True]\n")
    with pytest.raises(UserError, match="must be a list of four booleans"):
        read_split(tmp_path)


def test_prefixes_of_published_lists_are_no_part_of_an_id(tmp_path):
    (tmp_path / "train.txt").write_text("HG_BraTS20_Training_002\nLG_BraTS20_Training_333\n")
    made = apply_split(cases(["BraTS20_Training_002", "BraTS20_Training_333"]), tmp_path, [])
    assert [case.id for case in made] == ["BraTS20_Training_002", "BraTS20_Training_333"]
