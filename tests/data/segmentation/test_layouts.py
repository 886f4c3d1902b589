"""Names of files are never guessed, and every file that is not used is named."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

from preceptor.data.dicom_series import read_series
from preceptor.data.segmentation.case_files import find_case, find_cases
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.layouts import maybe_one_patient, patient_of, patients_by_names
from preceptor.data.segmentation.modalities import FileNames, infer_regions
from preceptor.data.types import Case, VolumeFile
from preceptor.data.volumes import load_case
from preceptor.errors import UserError
from tests.data.dicom_series_files import noise, slices_of, write_slices
from tests.data.volume_files import head, lesion, save, write_case

FOUR = ("flair", "t1", "t1ce", "t2")


def brats(root: Path, number: int = 3) -> Path:
    for i in range(number):
        write_case(root / f"p{i}", f"p{i}", i)
    return root


def reasons(data) -> str:
    return " | ".join([finding.reason for finding in data.findings] + data.notes)


@pytest.mark.parametrize(
    "name",
    ["brain_mask", "mask", "liver_mask", "roi", "bet_mask", "seg_old", "segmentation_auto", "brain_seg", "t1_seg"],
)
@pytest.mark.parametrize("flat", [True, False])
def test_nothing_is_a_label_map_by_guess(tmp_path, name, flat):
    """Of three cases one has another mask instead of its label map: it is left out, and both are named."""
    brats(tmp_path)
    (tmp_path / "p1" / "p1_seg.nii.gz").rename(tmp_path / "p1" / f"p1_{name}.nii.gz")
    if flat:
        for file in list(tmp_path.glob("*/*.nii.gz")):
            file.rename(tmp_path / file.name)
    data = read_volumes(tmp_path, test_fraction=0, validation_fraction=0)
    assert [case.id for case in data.samples] == ["p0", "p2"]
    assert "1 cases without a label map were left out: p1" in reasons(data)
    assert f"p1_{name}.nii.gz" in reasons(data)
    only = tmp_path / "only"
    only.mkdir()
    for file in list(tmp_path.rglob("p1_*")):
        shutil.copy(file, only / file.name)
    with pytest.raises(UserError, match=f"none of 1 cases has a label map.*p1_{name}.nii.gz may be label maps"):
        read_volumes(only)


def test_the_user_names_the_label_maps(tmp_path):
    brats(tmp_path)
    for i in range(3):
        (tmp_path / f"p{i}" / f"p{i}_seg.nii.gz").rename(tmp_path / f"p{i}" / f"p{i}_lesion_mask.nii.gz")
        save(tmp_path / f"p{i}" / f"p{i}_brain_mask.nii.gz", lesion(values=(1,)))
    data = read_volumes(tmp_path, mask="lesion_mask")
    assert [case.mask.path.name for case in data.samples] == [f"p{i}_lesion_mask.nii.gz" for i in range(3)]
    assert "p0/p0_brain_mask.nii.gz" in reasons(data)


def test_an_image_of_another_kind_is_not_its_contrast(tmp_path):
    for name in ("ADC_t2", "brain_t1", "T1map", "t2_tse_fs", "dwi_b0", "T2star", "sub_t1"):
        save(brats(tmp_path) / "p0" / f"p0_{name}.nii.gz", head(5))
    data = read_volumes(tmp_path)
    assert {file.path.name for file in data.samples[0].images.values()} == {f"p0_{name}.nii.gz" for name in FOUR}
    for name in ("ADC_t2", "brain_t1", "T1map", "t2_tse_fs", "dwi_b0", "T2star", "sub_t1"):
        assert f"p0/p0_{name}.nii.gz" in reasons(data)


def test_two_spellings_of_a_case_are_not_two_cases(tmp_path):
    save(tmp_path / "a_t1.nii", head(0))
    save(tmp_path / "A_t2.nii", head(1))
    with pytest.raises(UserError, match="differ only in upper and lower case"):
        read_volumes(tmp_path)


def bids(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        folder = root / name.split("_")[0] / "anat"
        save(folder / f"{name}.nii.gz", lesion(values=(1,)) if name.endswith(("dseg", "mask")) else head(number))
    return root


def test_bids(tmp_path):
    bids(
        tmp_path,
        "sub-00_T1w",
        "sub-00_ce-gadolinium_T1w",
        "sub-00_part-phase_T2w",
        "sub-00_acq-tse_T2w",
        "sub-00_desc-brain_mask",
        "sub-00_dseg",
        "sub-01_ses-1_T1w",
        "sub-01_ses-1_dseg",
        "sub-01_ses-2_T1w",
        "sub-01_ses-2_dseg",
        "sub-02_FLAIR",
        "sub-02_dseg",
    )
    data = read_volumes(tmp_path, modalities=("t1", "t1ce", "t2", "flair"), test_fraction=0.3)
    assert [(case.id, case.group) for case in data.samples] == [
        ("sub-00", "sub-00"),
        ("sub-01_ses-1", "sub-01"),
        ("sub-01_ses-2", "sub-01"),
        ("sub-02", "sub-02"),
    ]
    assert {name: file.path.name for name, file in data.samples[0].images.items()} == {
        "t1": "sub-00_T1w.nii.gz",
        "t1ce": "sub-00_ce-gadolinium_T1w.nii.gz",
        "t2": "sub-00_acq-tse_T2w.nii.gz",
    }
    assert "sub-00_part-phase_T2w.nii.gz" in reasons(data)
    assert "sub-00_desc-brain_mask.nii.gz" in reasons(data)


@pytest.mark.parametrize("second", ["run-2", "acq-tse", "rec-norm", "echo-2", "desc-preproc", "space-MNI"])
def test_two_images_of_one_contrast_are_named(tmp_path, second):
    bids(tmp_path, "sub-00_T1w", f"sub-00_{second}_T1w", "sub-00_dseg")
    with pytest.raises(
        UserError, match=rf"sub-00_T1w.nii.gz and .*sub-00_{second}_T1w.nii.gz are both its t1|are both"
    ):
        read_volumes(tmp_path)
    chosen = read_volumes(tmp_path, modalities=(f"{second}_T1w",), test_fraction=0, validation_fraction=0)
    assert chosen.samples[0].images[f"{second}_T1w"].path.name == f"sub-00_{second}_T1w.nii.gz"


def test_predict_reads_names_as_training_does(tmp_path):
    bids(tmp_path, "sub-00_ce-gadolinium_T1w")
    case = find_case(tmp_path / "sub-00" / "anat", ("t1", "t1ce"))
    assert list(case.images) == ["t1ce"]
    with pytest.raises(UserError, match="none of the modalities t1"):
        find_case(tmp_path / "sub-00" / "anat", ("t1",))
    for file in (save(tmp_path / "p_ADC_t2.nii", head(0)), save(tmp_path / "q" / "p_fs_t2.nii", head(0)).parent):
        with pytest.raises(UserError, match=r"before t2 may .* give it as t2=FILE if it is t2"):
            find_case(file, ("t2",))
    with pytest.raises(UserError, match=r"x_flair.nii is named as flair, and the name ends in none of t1"):
        find_case(save(tmp_path / "x_flair.nii", head(0)), ("t1",))
    save(tmp_path / "p" / "p_t1.nii", head(0))
    save(tmp_path / "p" / "q_t2.nii", head(0))
    with pytest.raises(UserError, match=r"files of several cases \(p, q\)"):
        find_case(tmp_path / "p", ("t1", "t2"))


def test_links_to_folders_are_followed_once(tmp_path):
    store = brats(tmp_path / "store", 4)
    root = tmp_path / "root"
    root.mkdir()
    for i in range(4):
        (root / f"p{i}").symlink_to(store / f"p{i}", target_is_directory=True)
    data = read_volumes(root)
    assert [case.id for case in data.samples] == ["p0", "p1", "p2", "p3"]
    assert not data.findings
    (root / "again").symlink_to(store / "p0", target_is_directory=True)
    (root / "gone.nii.gz").symlink_to(tmp_path / "nowhere.nii.gz")
    data = read_volumes(root)
    assert len(data.samples) == 4
    assert "1 links lead to a folder that was read before, and were left out: p0" in reasons(data)
    assert "1 links lead to nothing, and were left out; correct or remove them: gone.nii.gz" in reasons(data)
    (store / "p0" / "loop").symlink_to(store / "p0", target_is_directory=True)
    with pytest.raises(UserError, match="loop is a link to a folder that contains it"):
        read_volumes(root)


def test_every_file_that_is_skipped_is_named(tmp_path):
    brats(tmp_path)
    save(tmp_path / "p0" / "._p0_t1.nii.gz", head(0))
    for name in ("p1/.DS_Store", "Thumbs.db", "p2/p2_t1.json"):
        (tmp_path / name).write_text("x")
    nibabel.Nifti1Pair(head(0), None).to_filename(tmp_path / "p1" / "p1_ct.img")
    data = read_volumes(tmp_path)
    text = reasons(data)
    assert "4 hidden files or files that are not volumes were ignored" in text
    for name in ("p0/._p0_t1.nii.gz", "p1/.DS_Store", "Thumbs.db", "p2/p2_t1.json"):
        assert name in text
    assert "2 files of other volume formats were left out" in text
    assert "p1/p1_ct.img" in text


def test_a_folder_that_cannot_be_read(tmp_path, monkeypatch):
    brats(tmp_path)
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("p1"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match="p1 cannot be read"):
        read_volumes(tmp_path)


def test_regions_of_brats_are_those_of_brats_only(tmp_path):
    for i in range(3):
        save(tmp_path / f"p{i}_ct.nii", head(i))
        save(tmp_path / f"p{i}_seg.nii", lesion(values=(1, 2)))
    for name in ("volumes", "brats"):
        with pytest.raises(UserError, match=r"labels 1, 2, which are not those of BraTS in its four contrasts"):
            read_volumes(tmp_path, name=name)
    assert read_volumes(tmp_path, regions={"liver": [1, 2], "tumour": [2]}).regions["tumour"] == (2,)
    # Three tissues in a T1 image are not a tumour.
    with pytest.raises(UserError, match="meaning is not known"):
        infer_regions([1, 2, 3], "maps", ("t1",), brats=False)
    assert infer_regions([1, 2, 3], "maps", ("t1",), brats=True)[0]["et"] == (3,)
    assert infer_regions([1, 2, 4], "maps", ("T1w", "t2f"), brats=False)[0]["et"] == (4,)
    assert infer_regions([1, 2], "maps", ("t1",), brats=True, enhancing=3)[0]["et"] == (3,)


def test_the_resection_cavity_of_brats_2024_is_not_the_enhancing_tumour(tmp_path):
    endings = {"t1ce": "-t1c", "t1": "-t1n", "flair": "-t2f", "t2": "-t2w"}
    for i in range(3):
        write_case(tmp_path, f"BraTS-GLI-{i:05d}-100", i, endings, values=(1, 2, 4))
    with pytest.raises(UserError, match=r"labels 1, 2, 4, .*BraTS 2024, where 4 is the resection cavity"):
        read_volumes(tmp_path, name="brats")
    regions = {"et": [3], "tc": [1, 3], "wt": [1, 2, 3], "rc": [4]}
    assert read_volumes(tmp_path, name="brats", regions=regions).regions["rc"] == (4,)


@pytest.mark.parametrize(("labels", "enhancing"), [([4], 3), ([1, 2, 3, 4], 3), ([1, 2, 3], 4), ([1, 2, 3, 4], 4)])
def test_labels_that_contradict_the_names_of_brats_are_asked_for(labels, enhancing):
    with pytest.raises(
        UserError, match=rf"BraTS \(1, 2 and {enhancing}, by the names of the cases\).*set data.regions"
    ):
        infer_regions(labels, "maps", FOUR, brats=True, enhancing=enhancing)
    assert infer_regions([1, 2, enhancing], "maps", FOUR, brats=True, enhancing=enhancing)[0]["et"] == (enhancing,)


def test_a_table_of_metadata_is_not_the_table_of_the_cases(tmp_path):
    brats(tmp_path)
    (tmp_path / "cases.csv").write_text("case,age\np0,50\n")
    data = read_volumes(tmp_path, name="brats")
    assert len(data.samples) == 3
    assert "cases.csv is not read, because data.name=brats" in reasons(data)
    with pytest.raises(UserError, match="no column is named as a known modality"):
        read_volumes(tmp_path, name="volumes")
    (tmp_path / "cases.jsonl").write_text("{}")
    with pytest.raises(UserError, match="are both tables of cases"):
        read_volumes(tmp_path, name="volumes")


def test_series_by_the_names_of_their_folders(tmp_path):
    for i in range(3):
        for seed, name in enumerate(("t1", "T1_Gd")):
            write_slices(tmp_path / f"p{i}" / name, slices_of(noise(seed=10 * i + seed)))
        series = write_slices(tmp_path / f"p{i}" / "localizer", slices_of(noise(seed=50 + i)))
        image = load_case(find_case(tmp_path / f"p{i}", ("t1",))).geometry
        save(tmp_path / f"p{i}" / f"p{i}_seg.nii.gz", lesion(image.shape, values=(1,))[:, :, :], image.affine)
    data = read_volumes(tmp_path)
    assert data.modalities == ("t1", "t1ce")
    assert [case.id for case in data.samples] == ["p0", "p1", "p2"]
    loaded = load_case(data.samples[1], data)
    assert loaded.images["t1ce"].shape == loaded.label.shape == (5, 6, 4)
    assert f"p2/{series.name}" in reasons(data)
    assert [case.id for case in find_cases(tmp_path, ("t1ce", "flair"))] == ["p0", "p1", "p2"]
    case = find_case(tmp_path / "p0", ("flair", "t1ce"))
    assert (case.id, {name: file.path.name for name, file in case.images.items()}) == ("p0", {"t1ce": "T1_Gd"})
    assert find_case(tmp_path / "p0" / "t1", ("t1", "t2")).images["t1"].path == tmp_path / "p0" / "t1"
    with pytest.raises(UserError, match=r"localizer has a DICOM series and 1 channel for 2 modalities"):
        find_case(tmp_path / "p0" / "localizer", ("t1", "t2"))
    # The free text of a series ("t2 flair" here) names no contrast.
    with pytest.raises(UserError, match="none of the modalities flair"):
        find_case(tmp_path / "p0", ("flair",))


def test_cases_with_the_same_image_are_in_one_split(tmp_path):
    brats(tmp_path, 6)
    shutil.copy(tmp_path / "p1" / "p1_t1.nii.gz", tmp_path / "p4" / "p4_t1.nii.gz")
    data = read_volumes(tmp_path, test_fraction=0.5)
    assert data.samples[1].group == data.samples[4].group
    assert data.samples[1].split == data.samples[4].split
    assert "1 cases share an image with another case and are in its split: p4" in reasons(data)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sub-1_ce-none_T1w", "ce-none may tell of an image without a contrast agent"),
        ("sub-1_ce-pre_T1w", "ce-pre may tell"),
        ("sub-1_acq-gd_T1w", "acq-gd may change the image"),
        ("sub-1_acq-mprageGd_T1w", "acq-mprageGd may change"),
        ("sub-1_desc-postContrast_T1w", "desc-postContrast may change"),
        ("sub-1_rec-sub_T1w", "rec-sub may change"),
        ("sub-1_desc-synthetic_FLAIR", "desc-synthetic may change"),
    ],
)
def test_labels_of_bids_that_may_change_the_image_are_unclear(name, reason):
    assert reason in FileNames().parse(name).unclear


@pytest.mark.parametrize(
    "name", ["acq-mprage", "desc-preproc", "desc-preprocessed", "acq-preop", "space-MNI152NLin2009cAsym_desc-preproc"]
)
def test_labels_of_bids_that_keep_the_contrast(name):
    parsed = FileNames().parse(f"sub-1_{name}_T1w")
    assert (parsed.case, parsed.kind, parsed.unclear) == ("sub-1", "t1", "")


@pytest.mark.parametrize(
    ("case", "patient"),
    [
        ("BraTS-MEN-RT-0001-2", "BraTS-MEN-RT-0001"),
        ("UPENN-GBM-00008_21", "UPENN-GBM-00008"),
        ("UCSF-PDGM-0429_FU003d", "UCSF-PDGM-0429"),
        ("OAS2_0001_MR2", "OAS2_0001"),
        ("OAS30001_MR_d0129", "OAS30001"),
        ("100101A", "100101"),
        *[(f"pat0_{word}", "pat0") for word in ("scan1", "exam1", "day1", "run1", "study1", "acq1", "year1", "first")],
        ("Patient-001_week-000-1", "Patient-001"),
        ("patient001_frame12", "patient001"),
        ("P0_second", "P0"),
        ("C12_day2", "C12"),
        ("p7_visit2", "p7"),
        ("p7-tp-03", "p7"),
        ("p7_baseline", "p7"),
        ("BraTS20_Training_001", "BraTS20_Training_001"),
        ("BraTS2021_00003", "BraTS2021_00003"),
        ("scan_001", "scan_001"),
        ("IXI002-Guys-0828", "IXI002-Guys-0828"),
        ("site1_mr_000", "site1_mr_000"),
        ("3T_mr_00", "3T_mr_00"),
        ("ds105_mr_01", "ds105_mr_01"),
        ("mr_train_1001", "mr_train_1001"),
        ("patient_001", "patient_001"),
        ("sub-01", "sub-01"),
    ],
)
def test_visits_of_one_patient_are_one_group(case, patient):
    assert patient_of(case) == patient


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("training{0:02d}_{1:02d}", "have names that differ only in the last number"),
        ("pat{0}/s{0}{1}", "are in one folder"),
        ("R{0}_first{1}", "have names that differ only in the last number or word"),
        ("R{0}{1}_HGG", None),
        ("site_mr_{0}{1}", None),
        ("3T_mr_{0}{1}", None),
        ("BraTS20_Training_{0}{1}", None),
        ("pat{0}/p{0}_visit{1}", None),
    ],
)
def test_cases_that_may_be_one_patient_are_a_finding(tmp_path, pattern, found):
    for number in range(6):
        name = pattern.format(number // 2, number % 2)
        save(tmp_path / f"{name}_t1.nii.gz", head(number))
        save(tmp_path / f"{name}_seg.nii.gz", lesion(values=(1,)))
    data = read_volumes(tmp_path)
    assert [found in f.reason for f in data.findings] == ([True] if found else [])


@pytest.mark.parametrize("names", [("P{}a", "P{}b"), ("R{}_first", "R{}_second"), ("R{}_scan1", "R{}_scan2")])
def test_words_and_letters_after_a_number_may_be_scans(names):
    cases = [Case(name.format(i), {}, None, name.format(i), "train") for i in range(3) for name in names]
    for case in cases:
        case.images["t1"] = VolumeFile(Path(f"{case.id}_t1.nii.gz"))
    finding = maybe_one_patient(cases, Path())
    assert finding is not None
    assert finding.sample_ids == tuple(case.id for case in cases)


def named(*names: str) -> list[Case]:
    return [Case(name, {}, None, patient_of(name), "train") for name in names]


def test_patients_by_names_are_a_note():
    notes, findings = patients_by_names(named("p1_visit1", "p1_visit2", "p2_visit1", "x"))
    assert notes == [
        "2 cases are taken for scans of 1 patient by their names, such as p1_visit1 and p1_visit2; all cases of a "
        "patient are in one split."
    ]
    assert findings == []
    assert patients_by_names(named("p1", "p2", "site1_mr_000", "site1_mr_001")) == ([], [])


@pytest.mark.parametrize(
    ("names", "number"),
    [
        ([f"2020_week_{i:02d}" for i in range(6)], 6),  # one patient has all the cases
        ([f"site{s}_visit_{i:02d}" for s in range(2) for i in range(11)], 11),
        ([f"sub-01_ses-{i:02d}" for i in range(20)], 0),  # BIDS defines the patient
        ([f"p{p}_visit{i}" for p in range(2) for i in range(10)], 0),
    ],
)
def test_a_patient_with_implausibly_many_cases_is_a_finding(names, number):
    _, findings = patients_by_names(named(*names))
    assert {len(finding.sample_ids) for finding in findings} == ({number} if number else set())
    for finding in findings:
        assert finding.severity == "warning"
        assert f"{number} cases are taken for scans of one patient by their names" in finding.reason
        assert finding.reason.endswith("write a table with a column group")


def made(root: Path, folders: list[str]) -> Path:
    """Write a case into each folder, whose files are named by the contrast alone."""
    for number, folder in enumerate(folders):
        save(root / folder / "T1.nii.gz", head(number))
        save(root / folder / "seg.nii.gz", lesion(values=(1,)))
    return root


def visits(pattern: str, patients: int = 4, number: int = 2) -> list[str]:
    return [pattern.format(patient, visit) for patient in range(patients) for visit in range(number)]


@pytest.mark.parametrize(
    ("folders", "first"),
    [
        (visits("{0:05d}/20{0}{1}0115"), ("20000115", "00000")),
        (visits("PAT{0:03d}/2011{0}{1}15"), ("20110015", "PAT000")),
        (visits("PAT{0}/week-{1:03d}"), ("PAT0_week-000", "PAT0")),
        (visits("{0}/{0}{1}/anat"), ("0_00_anat", "0")),  # an examination in each folder, two in that of the patient
        (visits("train/{0}/v{1}", 2) + visits("test/a{0}/v{1}", 2), ("0_v0", "0")),
        (visits("centre/PAT{0}/v{1}", 12, 3), ("centre_PAT0_v0", "centre/PAT0")),
        (visits("PAT{0}/month{1:02d}-x", 3, 8), ("PAT0_month00-x", "PAT0")),  # persons may have many
    ],
)
def test_the_folder_above_those_of_cases_is_the_patient(tmp_path, folders, first):
    data = read_volumes(made(tmp_path, folders), test_fraction=0.3, regions={"lesion": [1]})
    by_folder = {case.images["t1"].path.parent.relative_to(tmp_path).as_posix(): case for case in data.samples}
    case = by_folder[folders[0]]
    assert (case.id, case.group) == first
    assert len({case.id for case in data.samples}) == len(folders)
    assert {case.split for case in data.samples} == {"train", "validation", "test"}
    splits: dict[str, set[str]] = {}
    for folder, case in by_folder.items():
        splits.setdefault(folder.split("/")[-3 if "anat" in folder else -2], set()).add(case.split)
    assert all(len(its_splits) == 1 for its_splits in splits.values())
    assert f"{len(folders)} cases are taken for scans of" in reasons(data)
    assert not data.findings
    cases = find_cases(tmp_path, ["t1"])
    assert {case.id for case in cases} == {case.id for case in data.samples}


@pytest.mark.parametrize(
    ("folders", "found"),
    [
        (visits("centre{0}/c{0}{1}", 2, 8), True),  # more than four in each
        (visits("a{0}/c{0}{1}") + visits("b{0}/c{0}{1}x", 1, 11), True),  # more than ten in one
        ([*visits("a{0}/c{0}{1}"), "c"], True),  # one case is in no folder
        (visits("HGG/h{0}{1}") + visits("LGG/l{0}{1}"), False),
        (visits("imagesTr/h{0}{1}") + visits("imagesTs/l{0}{1}"), False),
        (visits("all/c{0}{1}"), False),
        (visits("c{0}{1}"), False),
        (visits("x{0}/BraTS20_Training_{0}0{1}"), False),  # the published id is that of a patient
        (visits("{0}/c{0}", 8, 1), False),
    ],
)
def test_folders_above_cases_that_may_not_be_patients(tmp_path, folders, found):
    data = read_volumes(made(tmp_path, folders), test_fraction=0.2, regions={"lesion": [1]})
    assert all(case.group == case.id == case.images["t1"].path.parent.name for case in data.samples)
    doubts = [finding.reason for finding in data.findings if "are in folders with other cases" in finding.reason]
    assert len(doubts) == found
    assert not [note for note in data.notes if "by the folders above" in note]


def test_trees_of_images_and_labels_are_of_the_same_cases(tmp_path):
    for i in range(4):
        save(tmp_path / "images" / f"c{i}" / "T1.nii.gz", head(i))
        save(tmp_path / "labels" / f"c{i}" / "seg.nii.gz", lesion(values=(1,)))
    data = read_volumes(tmp_path, test_fraction=0.3)
    assert [(case.id, case.group) for case in data.samples] == [(f"c{i}", f"c{i}") for i in range(4)]


def test_two_trees_of_the_same_images_ask_for_the_case(tmp_path):
    made(tmp_path, [f"{tree}/c{i}" for tree in ("raw", "registered") for i in range(6)])
    with pytest.raises(UserError, match=r"both named after their folder c0.*rename the files as CASE_t1.nii.gz"):
        read_volumes(tmp_path)


def write_series(root: Path, ids: dict[str, str]) -> None:
    for number, (case, patient) in enumerate(ids.items()):
        slices = slices_of(noise(seed=number))
        for one in slices:
            one.PatientID = patient
        write_slices(root / case / "t1", slices)
        grid = read_series(root / case / "t1")[1]
        label = np.zeros(grid.shape, np.uint8)
        label[1, 1, 1] = 1
        save(root / case / f"{case}_seg.nii.gz", label, grid.affine)


def test_cases_with_one_patient_id_are_in_one_split(tmp_path):
    write_series(tmp_path, {f"c{i}": f"SECRET{i % 4}" for i in range(8)} | {"x": "ANON", "y": "ANON", "z": ""})
    data = read_volumes(tmp_path, test_fraction=0.3, regions={"lesion": [1]})
    groups = {case.id: case.group for case in data.samples}
    assert groups == {f"c{i}": f"c{i % 4}" for i in range(8)} | {name: name for name in "xyz"}
    assert "8 cases are scans of 4 patients by the Patient ID of their DICOM files" in reasons(data)
    assert "SECRET" not in repr(data)


@pytest.mark.parametrize("ids", [{f"c{i}": "X" for i in range(5)}, {f"c{i}": f"X{i // 11}" for i in range(13)}])
def test_a_patient_id_of_many_cases_is_no_patient(tmp_path, ids):
    """Programs that remove the patient from a file often write one text into all of them."""
    write_series(tmp_path, ids)
    data = read_volumes(tmp_path, test_fraction=0.3, regions={"lesion": [1]})
    (finding,) = [finding for finding in data.findings if "Patient ID" in finding.reason]
    assert len(finding.sample_ids) == min(11, len(ids))
    assert {case.id: case.group for case in data.samples if case.id in finding.sample_ids} == {
        id: id for id in finding.sample_ids
    }


def test_two_separators_before_the_contrast_do_not_belong_to_the_case():
    assert FileNames().parse("CHUM-001__CT").case == "CHUM-001"


@pytest.mark.parametrize("name", ["gtv", "CHUM-labels-1", "approved"])
def test_without_a_label_map_every_file_that_may_be_one_is_named(tmp_path, name):
    for i in range(3):
        save(tmp_path / f"p{i}_CT.nii.gz", head(i))
        save(tmp_path / f"p{i}_{name}.nii.gz", lesion(values=(1,)))
    with pytest.raises(UserError, match=f"p0_{name}.nii.gz, .*may be label maps: if so, set data.mask"):
        read_volumes(tmp_path)


def test_labels_of_paediatric_brats_are_asked_for(tmp_path):
    for i in range(3):
        write_case(tmp_path, f"BraTS-PED-{i:05d}-000", i, {"t1ce": "-t1c"}, values=(1, 2, 3))
    with pytest.raises(UserError, match=r"BraTS-PED .* set data.regions"):
        read_volumes(tmp_path, name="brats")
    assert read_volumes(tmp_path, name="brats", regions={"et": [3], "wt": [1, 2, 3]}).regions["et"] == (3,)


@pytest.mark.parametrize("ending", ["unstripped", "bias"])
def test_variants_of_the_contrasts_of_brats_have_its_regions(tmp_path, ending):
    for i in range(4):
        save(tmp_path / f"UPENN-GBM-{i:05d}_11_T1GD_{ending}.nii.gz", head(i))
        save(tmp_path / f"UPENN-GBM-{i:05d}_11_segm.nii.gz", lesion())
    data = read_volumes(tmp_path, modalities=[f"T1GD_{ending}"], mask="segm")
    assert data.regions == {"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}


def test_what_a_prediction_leaves_out_is_a_remark(tmp_path):
    brats(tmp_path)
    save(tmp_path / "p0" / "t1_Warped.nii.gz", head(9))
    cases = find_cases(tmp_path, FOUR)
    assert "p0/t1_Warped.nii.gz" in cases[0].remarks[0]
    assert not cases[1].remarks
    assert find_case(tmp_path / "p0", FOUR).remarks == ("Not used, by their names: t1_Warped.nii.gz.",)


def test_empty_label_maps_are_a_finding(tmp_path):
    brats(tmp_path, 4)
    save(tmp_path / "p1" / "p1_seg.nii.gz", np.zeros_like(lesion()))
    (finding,) = read_volumes(tmp_path).findings
    assert finding.sample_ids == ("p1",)
    assert finding.reason == "1 of the 4 label maps that were read are empty: p1"
