"""What `preceptor predict` prints about one segmented case."""

from __future__ import annotations

import csv
import gzip
from pathlib import Path

import numpy as np

from tests.command_line import call
from tests.fuzz.case_tables import nifti
from tests.fuzz.model_folders import templates


def predicted(folder: Path, *contrasts: str) -> tuple[str, dict[str, str]]:
    """Return what is printed about a case of noise, and its row of predictions.csv."""
    rng = np.random.default_rng(0)
    files = []
    for name in contrasts:
        path = folder / f"{name}.nii.gz"
        path.write_bytes(gzip.compress(nifti(rng.integers(1, 99, (16, 16, 16)).astype(np.int16))))
        files.append(f"{name}={path}")
    code, text, _ = call("predict", templates() / "segmentation", *files, "--output", folder / "out")
    assert code == 0
    with (folder / "out" / "predictions.csv").open(newline="") as opened:
        (row,) = csv.DictReader(opened)
    return text, row


def test_volumes_expected_dice_and_the_mask_are_those_of_the_table(tmp_path):
    text, row = predicted(tmp_path, "flair", "t1")
    lines = text.splitlines()
    assert lines[0] == f"{row['id']}: segmented from flair+t1"
    assert lines[1] == f"volumes in ml: whole {float(row['whole_ml']):.2f}"
    dice = float(row["whole_expected_dice"])
    assert lines[2] == f"expected Dice of these modalities, from the validation cases: whole {dice:.3f}"
    assert lines[3:] == [f"mask: {row['mask']}"]


def test_a_missing_modality_is_named(tmp_path):
    text, row = predicted(tmp_path, "t1")
    assert text.splitlines()[0] == f"{row['id']}: segmented from t1; missing: flair"
    known = row["whole_expected_dice"] != ""
    assert ("expected Dice" in text) == known
