from __future__ import annotations

import shutil
from dataclasses import replace

import nibabel
import numpy as np
import pytest

from preceptor.data.groups import note_leaks
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.check import cheap_findings, check_cases
from preceptor.data.types import VolumeFile
from preceptor.segmentation.intensity import bounding_box
from tests.data.volume_files import LPS, REGIONS, head, lesion, save, write_case


@pytest.fixture
def data(tmp_path):
    for i in range(6):
        write_case(tmp_path / f"c{i}", f"c{i}", i)
    return read_volumes(tmp_path, test_fraction=0.3, validation_fraction=0.2, regions=REGIONS)


def test_nothing_is_found_where_nothing_is_amiss(data):
    assert check_cases(data) == []


def test_everything_is_found_at_once(data, tmp_path):
    moved = LPS.copy()
    moved[2, 3] = 4
    nan = head(1).astype(np.float32)
    nan[4, 4, 4] = np.nan
    save(tmp_path / "c0" / "c0_t1.nii.gz", nan)
    save(tmp_path / "c0" / "c0_t2.nii.gz", head(99), moved)
    save(tmp_path / "c0" / "c0_seg.nii.gz", lesion(values=(1, 3)))
    save(tmp_path / "c1" / "c1_flair.nii.gz", head(5)[:-1])
    save(tmp_path / "c1" / "c1_seg.nii.gz", np.zeros_like(lesion()))
    shutil.copy(tmp_path / "c2" / "c2_t1.nii.gz", tmp_path / "c2" / "c2_t1ce.nii.gz")
    (tmp_path / "c3" / "c3_t2.nii.gz").unlink()
    (tmp_path / "c4" / "c4_t2.nii.gz").write_text("x")
    save(tmp_path / "c5" / "c5_t2.nii.gz", np.zeros_like(head(0)))
    found = [(f.sample_ids[0], f.file.name, f.severity, f.reason) for f in check_cases(data)]
    expected = [
        ("c0", "c0_t1.nii.gz", "error", "1 voxels are NaN"),
        ("c0", "c0_t2.nii.gz", "error", "by up to 4 mm"),
        ("c0", "c0_seg.nii.gz", "error", "label 3 is in no region"),
        ("c1", "c1_t1.nii.gz", "error", "c1_flair.nii.gz has 11 x"),
        ("c1", "c1_t1ce.nii.gz", "error", "c1_flair.nii.gz has 11"),
        ("c1", "c1_t2.nii.gz", "error", "c1_flair.nii.gz has 11"),
        ("c1", "c1_seg.nii.gz", "error", "c1_flair.nii.gz has 11"),
        ("c1", "c1_seg.nii.gz", "warning", "label map is empty"),
        ("c2", "c2_t1ce.nii.gz", "error", "t1ce of case c2 is the same file as t1"),
        ("c3", "c3_t2.nii.gz", "error", "does not exist"),
        ("c4", "c4_t2.nii.gz", "error", "not a readable NIfTI"),
        ("c5", "c5_t2.nii.gz", "error", "every voxel is 0"),
    ]
    assert [row[:3] for row in found] == [row[:3] for row in expected]
    for row, (*_, words) in zip(found, expected, strict=True):
        assert words in row[3]


def test_what_concerns_several_cases(data):
    cases = [replace(case, group="p", split="train" if i else "test") for i, case in enumerate(data.samples)]
    cases[1] = replace(cases[1], images={"t1": cases[1].images["t1"]})
    cases[2] = replace(cases[2], images={**cases[2].images, "t1": cases[0].images["t1"]})
    cases[3] = replace(cases[3], mask=None)
    cases[4] = replace(cases[4], images={})
    data = replace(data, samples=cases)
    found = {f.reason: (f.sample_ids, f.severity) for f in [*check_cases(data), *cheap_findings(data)]}
    assert found == {
        "case c3 has no label map; training and scoring need one": (("c3",), "error"),
        "case c4 has no image; give at least one modality": (("c4",), "error"),
        "1 of 6 cases have a single modality (t1 1), so that no modality can teach another in them": ((), "warning"),
    }
    note_leaks(data)
    assert [(f.reason, f.severity) for f in data.findings] == [
        ("Leaking split: 1 of 1 groups are in more than one split, so that held-out scores are too high.", "error"),
        ("Leaking split: 1 of 16 images are in more than one split, so that held-out scores are too high.", "error"),
    ]
    assert data.findings[1].sample_ids == ("c0", "c2")
    assert data.leaking


def test_a_modality_that_training_never_sees(data):
    cases = [
        replace(case, images={n: f for n, f in case.images.items() if n != "t2"}) if case.split == "train" else case
        for case in data.samples
    ]
    found = cheap_findings(replace(data, samples=cases))
    assert [f.reason for f in found] == ["no training case has the modality t2, so that nothing can be learned from it"]

    held_back = replace(data.samples[0], id="held back", split="unlabelled", mask=None)
    found = cheap_findings(replace(data, samples=[*cases, held_back]))
    assert any(
        f.reason.startswith("no training case with a mask has the modality t2") and f.severity == "warning"
        for f in found
    )
    assert not any("nothing can be learned" in f.reason for f in found)


def test_channels_of_one_file_are_no_copies(data, tmp_path):
    path = save(tmp_path / "four.nii.gz", np.stack([head(50 + c) for c in range(4)], -1))
    images = {name: VolumeFile(path, channel) for channel, name in enumerate(data.modalities)}
    cases = [replace(data.samples[0], images=images), *data.samples[1:]]
    assert cheap_findings(replace(data, samples=cases)) == []


def test_doubts_about_headers_are_one_finding_for_each_kind(data, tmp_path):
    assert cheap_findings(data) == []
    for name in ("c0", "c1"):
        path = tmp_path / name / f"{name}_t1.nii.gz"
        image = nibabel.load(path)
        image = nibabel.Nifti1Image(np.asarray(image.dataobj), LPS)
        moved = LPS.copy()
        moved[0, 3] = 50 + 10 * (name == "c1")
        image.set_qform(moved, 1)
        image.to_filename(path)
    (finding,) = cheap_findings(data)
    assert finding.severity == "warning"
    assert finding.sample_ids == ("c0", "c1")
    assert "c0_t1.nii.gz: qform and sform place voxels up to 50 units apart" in finding.reason
    assert finding.reason.endswith("(so in 2 files)")


def test_labels_outside_the_foreground_are_counted(data, tmp_path):
    """The heads leave two background voxels all around; the box around them is the largest of all contrasts."""
    foreground_box = lambda image: bounding_box(image > 0)  # noqa: E731
    assert check_cases(data, foreground_box=foreground_box) == []
    label = lesion()
    label[:2, :3, 5] = 1
    save(tmp_path / "c1" / "c1_seg.nii.gz", label)
    wide = head(3)
    wide[1, 5, 5] = 150
    save(tmp_path / "c1" / "c1_t2.nii.gz", wide)
    (finding,) = check_cases(data, foreground_box=foreground_box)
    assert (finding.sample_ids, finding.file.name, finding.severity) == (("c1",), "c1_seg.nii.gz", "warning")
    # Of the labels at x = 0 and 1, y = 0 to 2, those at x = 1, y = 2 are in the box.
    assert finding.reason.startswith(f"5 of {np.count_nonzero(label)} labelled voxels of case c1 are outside the box")
    assert check_cases(data) == []
