"""Folders with a dataset.json: the Decathlon, and both versions of nnU-Net."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from preceptor.data.segmentation.case_files import find_cases
from preceptor.data.segmentation.cases import read_volumes
from preceptor.data.segmentation.decathlon import label_regions
from preceptor.errors import UserError
from tests.data.volume_files import head, lesion, save


def nnunet(root: Path, **changes: Any) -> Path:
    """Write a data set of nnU-Net 2 with two channels and four cases; None removes a key of dataset.json."""
    for i in range(4):
        for channel in range(2):
            save(root / "imagesTr" / f"case_{i}_{channel:04d}.nii.gz", head(10 * i + channel))
        save(root / "labelsTr" / f"case_{i}.nii.gz", lesion(values=(1, 2)))
    content = {
        "channel_names": {"0": "T1", "1": "FLAIR"},
        "labels": {"background": 0, "oedema": 1, "core": 2},
        "numTraining": 4,
        "file_ending": ".nii.gz",
    }
    content |= changes
    (root / "dataset.json").write_text(json.dumps({k: v for k, v in content.items() if v is not None}))
    return root


def listed(number: int = 4) -> list[dict[str, str]]:
    return [{"image": f"./imagesTr/case_{i}.nii.gz", "label": f"./labelsTr/case_{i}.nii.gz"} for i in range(number)]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"channel_names": None, "modality": {"0": "T1", "1": "FLAIR"}, "training": listed()},
        {"labels": {"0": "background", "1": "oedema", "2": "core"}},
    ],
)
def test_nnunet_has_a_file_for_each_channel(tmp_path, changes):
    data = read_volumes(nnunet(tmp_path, **changes))
    assert data.modalities == ("flair", "t1")
    assert data.regions == {"oedema": (1,), "core": (2,)}
    assert [case.id for case in data.samples] == ["case_0", "case_1", "case_2", "case_3"]
    names = {name: (file.path.name, file.channel) for name, file in data.samples[2].images.items()}
    assert names == {"flair": ("case_2_0001.nii.gz", None), "t1": ("case_2_0000.nii.gz", None)}
    assert data.samples[2].mask.path.name == "case_2.nii.gz"
    assert not data.findings


def test_regions_of_nnunet(tmp_path):
    labels = {"background": 0, "whole": [1, 2], "core": [2]}
    assert read_volumes(nnunet(tmp_path, labels=labels)).regions == {"whole": (1, 2), "core": (2,)}
    brain = {"background": 0, "edema": 1, "non-enhancing tumor": 2, "enhancing tumor": 3}
    assert label_regions(brain, tmp_path)[0] == {"et": (3,), "tc": (2, 3), "wt": (1, 2, 3)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"numTraining": 5}, "numTraining is 5, but there are 4 training cases"),
        ({"training": listed(5), "numTraining": 5}, r"training entry 5: .*case_4.nii.gz does not exist"),
        ({"training": [*listed(), *listed(1)]}, "case 'case_0' is in training twice"),
        ({"labels": {"background": 0, "tumour": "1"}}, "label 'tumour' is '1'"),
        ({"labels": {"background": 0, "tumour": True}}, "label 'tumour' is True"),
        ({"labels": {"background": 0, "tumour": 1.0}}, "label 'tumour' is 1.0"),
        ({"labels": {"0": "background", "1": "a", "2": "a"}}, "the label name 'a' occurs twice"),
        ({"labels": {"0": "background"}}, "names no label but the background"),
        ({"labels": {"background": 0, "a": 1, "ignore": 2}}, "'ignore' is not supported"),
        ({"labels": {"background": 0, "a": 300}}, r"dataset\.json: region 'a' has the labels"),
        ({"labels": {"background": -1, "a": 1}}, r"dataset\.json: region 'background' has the labels"),
        ({"labels": ["background"]}, "has no 'labels'"),
        ({"file_ending": ".nrrd"}, "files of type '.nrrd'"),
        ({"channel_names": {"0": "T1", "1": "T1w"}}, "does not number distinct channels"),
        ({"channel_names": {"0": 1, "1": 2}}, "does not number distinct channels"),
        ({"training": {"a": 1}}, "training is not a list"),
        ({"name": "\ud800"}, "half of a surrogate pair"),
    ],
)
def test_a_list_that_contradicts_the_files_is_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message) as caught:
        read_volumes(nnunet(tmp_path, **changes))
    assert str(tmp_path) in str(caught.value)
    str(caught.value).encode()


@pytest.mark.parametrize("channels", [{"0": "CT"}, {"0": "T1", "1": "FLAIR"}])
def test_numbers_of_cases_may_look_like_those_of_channels(tmp_path, channels):
    for i in range(4):
        for channel in range(len(channels)):
            save(tmp_path / "imagesTr" / f"case_{i:04d}_{channel:04d}.nii.gz", head(10 * i + channel))
        save(tmp_path / "labelsTr" / f"case_{i:04d}.nii.gz", lesion(values=(1,)))
    content = {"channel_names": channels, "labels": {"background": 0, "x": 1}, "numTraining": 4}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    data = read_volumes(tmp_path)
    assert [case.id for case in data.samples] == ["case_0000", "case_0001", "case_0002", "case_0003"]
    assert data.samples[0].images[data.modalities[-1]].path.name == "case_0000_0000.nii.gz"
    assert not data.findings
    predicted = find_cases(tmp_path / "imagesTr", data.modalities)
    assert [case.id for case in predicted] == [case.id for case in data.samples]


def test_missing_channels_and_unlisted_files(tmp_path):
    nnunet(tmp_path)
    save(tmp_path / "imagesTr" / "case_9_0000.nii.gz", head(3))
    (finding,) = read_volumes(tmp_path).findings
    assert "1 files are not training cases of dataset.json and were left out: imagesTr/case_9_0000" in finding.reason
    (tmp_path / "imagesTr" / "case_1_0001.nii.gz").unlink()
    with pytest.raises(UserError, match=r"case_1_0001.nii.gz does not exist, but other channels of the case do"):
        read_volumes(tmp_path)


def test_nested_json_is_one_sentence(tmp_path):
    nnunet(tmp_path)
    (tmp_path / "dataset.json").write_text('{"labels": ' * 200_000)
    with pytest.raises(UserError, match=r"dataset.json cannot be read as JSON"):
        read_volumes(tmp_path)


@pytest.mark.parametrize("number", [1, 3])
def test_a_file_with_another_number_of_channels_is_refused(tmp_path, number):
    nnunet(tmp_path, training=listed())
    for i in range(4):
        image = np.stack([head(10 * i + channel) for channel in range(number if i == 2 else 2)], -1)
        save(tmp_path / "imagesTr" / f"case_{i}.nii.gz", image[..., 0] if image.shape[-1] == 1 else image)
    with pytest.raises(UserError, match=rf"case_2.nii.gz has {number} channels, but .* names 2 \(t1, flair\)"):
        read_volumes(tmp_path)


def test_channels_with_one_name_are_numbered(tmp_path):
    """In nnU-Net 2, the name of a channel chooses its normalisation: all phases of a CT are named CT."""
    for i in range(3):
        for channel in range(3):
            save(tmp_path / "imagesTr" / f"c{i}_{channel:04d}.nii.gz", head(10 * i + channel))
        save(tmp_path / "labelsTr" / f"c{i}.nii.gz", lesion(values=(1,)))
    content = {"channel_names": {"0": "CT", "1": "pet", "2": "ct"}, "labels": {"background": 0, "tumour": 1}}
    (tmp_path / "dataset.json").write_text(json.dumps({**content, "numTraining": 3, "file_ending": ".nii.gz"}))
    data = read_volumes(tmp_path, test_fraction=0.3)
    assert data.modalities == ("ct_0", "ct_2", "pet")
    assert data.samples[0].images["ct_2"].path.name == "c0_0002.nii.gz"
    assert "Channels with one name in dataset.json have their numbers as well: ct_0, ct_2." in data.notes
    (case, *_) = find_cases(tmp_path / "imagesTr", ["pet", "ct_2"])
    assert [file.path.name for file in case.images.values()] == ["c0_0001.nii.gz", "c0_0002.nii.gz"]
