from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from preceptor.data.segmentation.case_files import find_case
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.modalities import FileNames, brats_regions
from preceptor.data.volumes import load_case
from preceptor.errors import UserError
from tests.data.volume_files import head, lesion, save, write_case

BRATS_2023 = {"t1ce": "-t1c", "t1": "-t1n", "flair": "-t2f", "t2": "-t2w"}
FOUR = ("flair", "t1", "t1ce", "t2")


def test_brats_2021(tmp_path):
    for i in range(10):
        write_case(tmp_path / f"BraTS2021_{i:05d}", f"BraTS2021_{i:05d}", i)
    data = read_volumes(tmp_path)
    assert data.modalities == FOUR
    assert data.regions == brats_regions(4)
    assert [len(data.split(p)) for p in ("train", "validation", "test")] == [7, 1, 2]
    case = next(case for case in data.samples if case.id == "BraTS2021_00003")
    assert {name: file.path.name for name, file in case.images.items()} == {
        name: f"BraTS2021_00003_{name}.nii.gz" for name in FOUR
    }
    assert case.mask.path.name == "BraTS2021_00003_seg.nii.gz"
    assert any("enhancing tumour is label 4" in note for note in data.notes)


def test_brats_2018_in_folders_of_grade_with_a_misnamed_label_map(tmp_path):
    write_case(tmp_path / "HGG" / "Brats18_2013_2_1", "Brats18_2013_2_1", 1)
    write_case(tmp_path / "LGG" / "Brats18_2013_10_1", "Brats18_2013_10_1", 2)
    odd = tmp_path / "HGG" / "Brats18_2013_2_1"
    (odd / "Brats18_2013_2_1_seg.nii.gz").rename(odd / "W39_1998.09.19_Segm.nii.gz")
    save(odd / "._Brats18_2013_2_1_t1.nii.gz", head(0))
    data = read_volumes(tmp_path, test_fraction=0)
    assert {case.id: case.tags["grade"] for case in data.samples} == {
        "Brats18_2013_2_1": "HGG",
        "Brats18_2013_10_1": "LGG",
    }
    assert {case.group for case in data.samples} == {"Brats18_2013_2", "Brats18_2013_10"}
    assert data.samples[1].mask.path.name == "W39_1998.09.19_Segm.nii.gz"


def test_brats_2023_two_scans_of_a_patient_stay_together(tmp_path):
    for patient in range(6):
        for scan in range(2):
            name = f"BraTS-GLI-{patient:05d}-{scan:03d}"
            write_case(tmp_path / name, name, 2 * patient + scan, BRATS_2023, values=(1, 2, 3))
    data = read_volumes(tmp_path, test_fraction=0.4)
    assert data.modalities == FOUR
    assert data.regions == brats_regions(3)
    for patient in range(6):
        held = [case for case in data.samples if case.group == f"BraTS-GLI-{patient:05d}"]
        assert len(held) == 2
        assert len({case.split for case in held}) == 1
    assert data.samples[0].images["t1ce"].path.name == "BraTS-GLI-00000-000-t1c.nii.gz"


def decathlon(root: Path, channels: dict[str, str], labels: dict[str, str], cases: int = 4) -> Path:
    for i in range(cases):
        image = np.stack([head(10 * i + c) for c in range(len(channels))], -1)
        save(root / "imagesTr" / f"BRATS_{i:03d}.nii.gz", image if len(channels) > 1 else image[..., 0])
        save(root / "labelsTr" / f"BRATS_{i:03d}.nii.gz", lesion(values=tuple(int(v) for v in labels if v != "0")))
    rows = [
        {"image": f"./imagesTr/BRATS_{i:03d}.nii.gz", "label": f"./labelsTr/BRATS_{i:03d}.nii.gz"} for i in range(cases)
    ]
    content = {"modality": channels, "labels": labels, "training": rows}
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_decathlon_takes_channels_and_labels_from_its_list(tmp_path):
    channels = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    labels = {"0": "background", "1": "edema", "2": "non-enhancing tumor", "3": "enhancing tumour"}
    data = read_volumes(decathlon(tmp_path, channels, labels))
    assert data.modalities == FOUR
    assert data.regions == {"et": (3,), "tc": (2, 3), "wt": (1, 2, 3)}
    chosen = read_volumes(tmp_path, modalities=("t2", "t1c"))
    assert [file.channel for file in chosen.samples[0].images.values()] == [3, 2]
    loaded = load_case(chosen.samples[1], chosen)
    # LPS to (feet to head, back to front, left to right): two axes are mirrored, then all are reversed.
    assert np.array_equal(loaded.images["t1c"], head(12)[::-1, ::-1].transpose(2, 1, 0))
    with pytest.raises(UserError, match="modality 'pet' is not known"):
        read_volumes(tmp_path, modalities=("pet",))


def test_decathlon_of_another_organ(tmp_path):
    data = read_volumes(decathlon(tmp_path, {"0": "CT"}, {"0": "background", "1": "liver", "2": "cancer"}))
    assert data.modalities == ("ct",)
    assert data.regions == {"liver": (1,), "cancer": (2,)}
    assert data.samples[0].images["ct"].channel is None
    load_case(data.samples[0], data)


@pytest.mark.parametrize(
    "change",
    [
        {"modality": {"1": "CT"}},
        {"training": [{"image": "../x.nii.gz", "label": "y"}]},
        {"training": [{}]},
        {"labels": None},
    ],
)
def test_a_changed_list_is_refused(tmp_path, change):
    decathlon(tmp_path, {"0": "CT"}, {"0": "background", "1": "liver"})
    content = json.loads((tmp_path / "dataset.json").read_text()) | change
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"dataset\.json"):
        read_volumes(tmp_path)


def test_flat_files_of_any_modality_and_missing_ones(tmp_path):
    for i in range(6):
        for name in ("ct", "pet") if i else ("ct",):
            save(tmp_path / f"lung-{i}_{name}.nii", head(i))
        save(tmp_path / f"lung-{i}_mask.nii", lesion(values=(1,)))
    save(tmp_path / "lung-7_ct.nii", head(0))
    save(tmp_path / "lung-0_dose.nii", head(0))
    with pytest.raises(UserError, match=r"lung-0_mask.nii, .* may be label maps: if so, set data.mask"):
        read_volumes(tmp_path)
    data = read_volumes(tmp_path, mask="mask")
    assert data.modalities == ("ct", "pet")
    assert data.regions == {"lesion": (1,)}
    assert list(data.samples[0].images) == ["ct"]
    assert any("1 of 6 cases lack" in note for note in data.notes)
    reasons = [finding.reason for finding in data.findings]
    assert any("1 cases without a label map were left out: lung-7" in reason for reason in reasons)
    assert any("lung-0_dose.nii" in reason for reason in reasons)


def test_own_names_of_modalities(tmp_path):
    for i in range(4):
        write_case(tmp_path, f"c{i}", i, {"a": "_fat_sat", "b": "_T1w"})
    data = read_volumes(tmp_path, modalities=("fat_sat", "t1"), regions={"lesion": [1, 2, 4]})
    assert data.modalities == ("fat_sat", "t1")
    with pytest.raises(UserError, match=r"no case has the modality 't2', only t1"):
        read_volumes(tmp_path, modalities=("t1", "t2"))
    with pytest.raises(UserError, match="are the same"):
        read_volumes(tmp_path, modalities=("t1c", "t1ce"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a_t1", ("a", "t1")),
        ("a_T1CE", ("a", "t1ce")),
        ("a-t2f", ("a", "flair")),
        ("a_t2_flair", ("a", "flair")),
        ("a_seg", ("a", "mask")),
        ("t1", ("", "t1")),
        ("at1", None),
        ("a_t3", None),
        ("_t1", None),
        ("sub-01_T1w", ("sub-01", "t1")),
        ("sub-01_ses-2_acq-mprage_run-1_T1w", ("sub-01_ses-2", "t1")),
        ("sub-01_ce-gadolinium_T1w", ("sub-01", "t1ce")),
        ("sub-01_ce-gd_run-2_FLAIR", "unclear"),
        ("sub-01_part-phase_T2w", "unclear"),
        ("sub-01_ses-1_dseg", ("sub-01_ses-1", "mask")),
        ("sub-01_desc-brain_dseg", "unclear"),
        ("sub-01_desc-brain_mask", None),
        ("sub-01_T1map", None),
        ("a_b-t1_t2", "unclear"),
        ("p_ADC_t2", "unclear"),
        ("p_ce-gadolinium_T1w", "unclear"),
        ("p_fs_t1", "unclear"),
        ("p_t1_seg", "unclear"),
        ("p_brain_mask", None),
        ("p_mask", None),
        ("p_seg_old", None),
        ("p_T2star", None),
        ("p_t2_tse_fs", None),
        ("p_dwi_b0", None),
        ("a-T1.Gd", ("a", "t1ce")),
    ],
)
def test_a_name_must_end_in_whole_words(name, expected):
    parsed = FileNames().parse(name)
    if expected == "unclear":
        assert parsed.unclear
    else:
        assert parsed == expected if expected is None else (parsed.case, parsed.kind, parsed.unclear) == (*expected, "")


def test_two_files_for_one_modality(tmp_path):
    write_case(tmp_path / "a", "a")
    shutil.copy(tmp_path / "a" / "a_t1.nii.gz", tmp_path / "a" / "a_t1w.nii.gz")
    with pytest.raises(UserError, match="are both its t1; keep one"):
        read_volumes(tmp_path)


def test_labels_that_are_not_brats_need_regions(tmp_path):
    for i in range(3):
        write_case(tmp_path / f"c{i}", f"c{i}", i, values=(1, 5, 7))
    with pytest.raises(UserError, match="labels 1, 5, 7, which are not those of BraTS"):
        read_volumes(tmp_path)
    assert read_volumes(tmp_path, regions={"a": [1, 5], "b": [7]}).regions == {"a": (1, 5), "b": (7,)}
    for wrong in ({}, {"a": []}, {"a": [0]}, {"a": [1, 1]}, {"a": [256]}):
        with pytest.raises(UserError, match="region"):
            read_volumes(tmp_path, regions=wrong)


def test_a_broken_label_map_does_not_hide_the_labels_of_the_others(tmp_path):
    for i in range(3):
        write_case(tmp_path / f"c{i}", f"c{i}", i)
    for i in range(3):
        assert i == 2 or read_volumes(tmp_path).regions == brats_regions(4)
        (tmp_path / f"c{i}" / f"c{i}_seg.nii.gz").write_text("x")
    with pytest.raises(UserError, match="c0_seg"):
        read_volumes(tmp_path)


def test_nothing_to_read(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_volumes(tmp_path / "none")
    save(tmp_path / "a" / "a_xyz.nii.gz", head(0))
    with pytest.raises(UserError, match=r"the names end in xyz; set data.modalities"):
        read_volumes(tmp_path)
    save(tmp_path / "a" / "a_t1.nii.gz", head(0))
    with pytest.raises(UserError, match="none of 1 cases has a label map"):
        read_volumes(tmp_path)


def test_one_case_to_predict_on(tmp_path):
    folder = write_case(tmp_path / "new", "BraTS-GLI-00007-001", 0, BRATS_2023)
    case = find_case(folder, ("t1ce", "flair", "pet"))
    assert (case.id, case.group, case.split) == ("BraTS-GLI-00007-001", "BraTS-GLI-00007", "test")
    assert list(case.images) == ["t1ce", "flair"]
    assert case.mask is not None
    files = [folder / f"BraTS-GLI-00007-001{ending}.nii.gz" for ending in ("-t1n", "-t2w")]
    assert list(find_case(files, FOUR).images) == ["t1", "t2"]
    assert list(find_case(files[0], FOUR).images) == ["t1"]
    with pytest.raises(UserError, match="none of the modalities ct"):
        find_case(folder, ("ct",))
    with pytest.raises(UserError, match="ends in none of t1, t2"):
        find_case([files[0], save(tmp_path / "x_flair.nii.gz", head(0))], ("t1", "t2"))
    with pytest.raises(UserError, match="are both t1"):
        find_case([files[0], save(tmp_path / "x_t1.nii.gz", head(0))], FOUR)
    with pytest.raises(UserError, match="files of several cases"):
        find_case([files[0], save(tmp_path / "x_flair.nii.gz", head(0))], FOUR)
    with pytest.raises(UserError, match="does not exist"):
        find_case(tmp_path / "none", FOUR)


def test_one_4d_file_to_predict_on(tmp_path):
    path = save(tmp_path / "p.nii.gz", np.stack([head(c) for c in range(3)], -1))
    case = find_case(path, ("t2", "t1", "ct"))
    assert {name: file.channel for name, file in case.images.items()} == {"t2": 0, "t1": 1, "ct": 2}
    with pytest.raises(UserError, match="3 channels for 2 modalities"):
        find_case(path, ("t2", "t1"))
    assert list(find_case(save(tmp_path / "q.nii.gz", head(0)), ("ct",)).images) == ["ct"]
    with pytest.raises(UserError, match="1 channel for 2 modalities"):
        find_case(tmp_path / "q.nii.gz", ("t2", "t1"))


@pytest.mark.parametrize(
    "name",
    [
        "p1_brain_mask",
        "p1_T1map",
        "p1_t2_tse",
        "p1_T1+C",
        "p1_lesion",
        "p1_ADC_map",
        "p1_seg_old",
        "p1_T2star",
        "p1_t1_fs",
    ],
)
def test_a_network_of_one_modality_does_not_segment_anything(tmp_path, name):
    file = save(tmp_path / "p1" / f"{name}.nii.gz", head(0))
    for path in (file, [file], file.parent):
        with pytest.raises(UserError, match=r"may be another image, because its name contains .*give it as t1=PATH"):
            find_case(path, ["t1"])


@pytest.mark.parametrize("name", ["p1", "sub-01", "p1_T1_brain", "p1_T1w_MNI", "100101A"])
def test_a_file_that_does_not_name_the_only_modality(tmp_path, name):
    file = save(tmp_path / "p1" / f"{name}.nii.gz", head(0))
    for path in (file, [file]):
        case = find_case(path, ["t1"])
        assert list(case.images) == ["t1"]
        assert case.remarks == (f"The name of {name}.nii.gz does not end in a modality, so it was taken as t1.",)
    with pytest.raises(UserError, match=rf"{name}.nii.gz does not name its modality; give it as t1=PATH if it is t1"):
        find_case(file.parent, ["t1"])
    assert find_case(save(tmp_path / "p2" / "p2_t1.nii.gz", head(0)).parent, ["t1"]).remarks == ()


def test_a_user_names_the_modality_as_the_file(tmp_path):
    file = save(tmp_path / "p1" / "p1_ADC_map.nii.gz", head(0))
    assert find_case(file.parent, ["ADC_map"]).remarks == ()


def test_a_4d_file_of_the_decathlon_says_its_channels(tmp_path):
    channels = {"0": "FLAIR", "1": "T1w", "2": "t1gd", "3": "T2w"}
    decathlon(tmp_path, channels, {"0": "background", "1": "x"})
    path = save(tmp_path / "imagesTs" / "BRATS_9.nii.gz", np.stack([head(c) for c in range(4)], -1))
    case = find_case(path, ("t1ce", "flair", "pet"))
    assert {name: file.channel for name, file in case.images.items()} == {"t1ce": 2, "flair": 0}


@pytest.mark.real_data
def test_real_cases():
    root = Path(os.environ["PRECEPTOR_DATA"]) / "mri"
    data = read_volumes(root)
    assert data.modalities == FOUR
    assert data.regions == brats_regions(4)
    assert [case.id for case in data.samples] == [
        "glioma_tcga_du_7294",
        "glioma_tcga_fg_6692",
        "ms_patient07",
        "ms_patient19",
    ]
    assert {len(case.images) for case in data.samples} == {4}
