"""Train on real MR cases with coarse voxels, evaluate and segment one of them."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest

import preceptor
from tests.segmentation.conftest import recipe

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.slow,
]


def test_real_cases_train_and_predict(tmp_path: Path) -> None:
    root = Path(os.environ["PRECEPTOR_DATA"]) / "mri"
    settings = [
        "data.name=brats",
        f"data.root={root}",
        "data.spacing=[4, 4, 4]",
        "data.patch_size=[32, 32, 32]",
        "data.intensity=percentile",
        "data.validation_fraction=0.25",
        "data.test_fraction=0.25",
        "data.regions={core: [1, 4], whole: [1, 2, 4]}",
        "train.epochs=4",
        "stages=[distilled]",
    ]
    run = preceptor.train(recipe(tmp_path, *settings))
    results = run.results
    assert results["data"]["train"] == 2
    scores = results["protocols"]["brats/by-patient/A"]
    assert (len(scores["subsets"]), scores["n"]) == (15, 1)
    assert len(results["elections"]) >= 2
    source = root / "glioma_tcga_du_7294"
    case = tmp_path / "case"
    case.mkdir()
    shutil.copy(source / "glioma_tcga_du_7294_flair.nii.gz", case)
    result = run.model().segment(case)
    assert result.missing == ("t1", "t1ce", "t2")
    mask = nibabel.load(result.save(tmp_path / "mask.nii.gz"))
    image = nibabel.load(case / "glioma_tcga_du_7294_flair.nii.gz")
    assert mask.shape == image.shape
    assert np.allclose(mask.affine, image.affine)
    assert set(np.unique(np.asarray(mask.dataobj))) <= {0, 1, 2, 4}
