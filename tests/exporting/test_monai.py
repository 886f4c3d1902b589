"""MONAI runs the bundle from anywhere, and its mask is the one of `preceptor predict`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

import preceptor
from tests.command_line import call
from tests.exporting.test_segmentation import write_case

SOURCE = Path(preceptor.__file__).parents[1]
# Fields that the schema of MONAI of 2024-07-25 requires.
REQUIRED = [
    "schema",
    "version",
    "monai_version",
    "pytorch_version",
    "numpy_version",
    "required_packages_version",
    "task",
    "description",
    "authors",
    "copyright",
    "network_data_format",
]
REQUIRED_OF_TENSORS = {"type", "format", "num_channels", "spatial_shape", "dtype", "value_range"}


@pytest.fixture(scope="module")
def bundle(segmentation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("monai") / "bundle"
    preceptor.export(segmentation.model, folder, to="monai")
    return folder


def run(program: list[str], folder: Path) -> None:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(SOURCE), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(
        [sys.executable, *program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr


def same_mask(one: Path, other: Path) -> bool:
    first, second = nibabel.load(one), nibabel.load(other)
    return np.array_equal(first.dataobj, second.dataobj) and np.array_equal(first.affine, second.affine)


def test_monai_writes_the_mask_of_predict(bundle, segmentation, tmp_path):
    affine = np.array([[0, -1.2, 0, 30], [-1, 0, 0, 20], [0, 0, 2.5, -10], [0, 0, 0, 1.0]])
    files = write_case(tmp_path / "case", ("flair", "t2"), (25, 40, 21), affine, sform_code=4)
    assert call("predict", segmentation.model, "--case", tmp_path / "case", "--output", tmp_path / "ours")[0] == 0
    (expected,) = (tmp_path / "ours").glob("*_seg.nii.gz")
    assert nibabel.load(expected).get_fdata().any()
    config = str(bundle / "configs" / "inference.json")
    common = f"from monai.bundle import run; run(config_file={config!r}, bundle_root={str(bundle)!r}, "
    run(["-c", common + "dataset_dir='case', output_dir='masks')"], tmp_path)
    assert same_mask(tmp_path / "masks" / expected.name, expected)
    pairs = {name: str(path) for name, path in files.items()}
    run(["-c", common + f"files={pairs}, output_dir='by-file')"], tmp_path)
    (by_file,) = (tmp_path / "by-file").glob("*_seg.nii.gz")
    assert same_mask(by_file, expected)


def test_the_command_line_of_monai_runs_it(bundle, tmp_path):
    pytest.importorskip("fire")
    write_case(tmp_path / "case", ("flair", "t1", "t2"), (20, 24, 18))
    config = str(bundle / "configs" / "inference.json")
    options = ["--bundle_root", str(bundle), "--dataset_dir", "case", "--output_dir", "masks"]
    run(["-m", "monai.bundle", "run", "--config_file", config, *options], tmp_path)
    assert len(list((tmp_path / "masks").glob("*_seg.nii.gz"))) == 1


def test_the_metadata_has_what_the_schema_of_monai_requires(bundle):
    metadata = json.loads((bundle / "configs" / "metadata.json").read_text())
    assert [name for name in REQUIRED if name not in metadata] == []
    assert metadata["required_packages_version"]["preceptor"] == preceptor.__version__
    formats = metadata["network_data_format"]
    for tensor in (*formats["inputs"].values(), *formats["outputs"].values()):
        assert tensor.keys() >= REQUIRED_OF_TENSORS
    assert formats["inputs"]["images"]["channel_def"] == {"0": "flair", "1": "t1", "2": "t2"}


def test_the_network_of_the_bundle_is_the_model(bundle, segmentation):
    parser = ConfigParser(ConfigParser.load_config_file(bundle / "configs" / "inference.json"))
    parser["bundle_root"] = str(bundle)
    expected = preceptor.load(segmentation.model).network.state_dict()
    found = parser.get_parsed_content("network_def").state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_nothing_in_the_bundle_is_a_pickle(bundle):
    suffixes = {path.suffix for path in bundle.rglob("*") if path.is_file()}
    assert suffixes == {".json", ".md", ".safetensors"}


def test_other_tasks_are_refused(vqa, tmp_path):
    code, out, err = call("export", vqa.model, "--output", tmp_path / "bundle", "--to", "monai")
    assert (code, out) == (2, "")
    assert "is a vqa model, and MONAI bundles are written for segmentation only; use --to hf" in err
    assert list(tmp_path.iterdir()) == []
