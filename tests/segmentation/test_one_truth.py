"""Volumes and scores are those of the label map as it is saved, read back with another library."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from preceptor.segmentation import evaluate, predict
from preceptor.segmentation.data import examples
from preceptor.segmentation.experiment import SegmentationExperiment
from preceptor.tasks import load_recipe
from tests.command_line import call

sitk = pytest.importorskip("SimpleITK")
pytestmark = pytest.mark.slow

LABELS = {"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)}


def crossing(network, case, config, window, *, overlap=None, only=None):
    """Probabilities whose regions are not nested: each lies partly outside the next larger one."""
    shape = case.images[(slice(None), *case.box)].shape[1:]
    found = torch.zeros((3, *shape))
    for region, start in enumerate((6, 3, 0)):
        found[region, start : start + 9, start : start + 10, 2:9] = 0.9
    return dict.fromkeys(only or [tuple(bool(there) for there in case.available)], found)


def regions_of(path: Path) -> tuple[dict[str, np.ndarray], float]:
    """Return the masks in a file by region, and the volume of a voxel in ml."""
    image = sitk.ReadImage(str(path))
    labels = sitk.GetArrayFromImage(image)
    return {name: np.isin(labels, values) for name, values in LABELS.items()}, float(np.prod(image.GetSpacing())) / 1000


@pytest.mark.parametrize("post", [False, True])
def test_printed_volumes_are_those_of_the_file(trained: Path, tmp_path: Path, monkeypatch, post: bool) -> None:
    monkeypatch.setattr(predict, "predict_case", crossing)
    case = sorted(path for path in (trained / "run" / "data").iterdir() if path.is_dir())[0]
    arguments = ["predict", str(trained / "run"), "--case", str(case), "--output", str(tmp_path), "--json"]
    code, out, err = call(*arguments, *(["--post"] if post else []))
    assert code == 0, err
    (row,) = json.loads(out)
    masks, millilitres = regions_of(Path(row["mask"]))
    assert masks["wt"].any()
    with (tmp_path / "predictions.csv").open() as lines:
        written = next(csv.DictReader(lines))
    for region, mask in masks.items():
        assert row[f"{region}_ml"] == pytest.approx(mask.sum() * millilitres, abs=0.006)
        assert float(written[f"{region}_ml"]) == row[f"{region}_ml"]


def test_scores_are_those_of_the_files_of_the_report(trained: Path, tmp_path: Path, monkeypatch) -> None:
    """Dice of the rows, of `preceptor score` on the saved files, and by the formula on what another library reads."""
    monkeypatch.setattr(evaluate, "predict_case", crossing)
    recipe = load_recipe(str(trained / "run"))
    experiment = SegmentationExperiment.read(recipe)
    cases = examples(recipe, experiment.data, "test", 0)
    rows = evaluate.score_cases(None, cases, recipe)["A"]
    references = {case.id: case.mask.path for case in cases.cases}
    for index in range(len(cases)):
        case = cases.whole(index)
        (probabilities,) = (found for _, found in evaluate.whole_probabilities(None, case, recipe))
        path = tmp_path / f"{case.id}.nii.gz"
        evaluate.save_mask(path, evaluate.label_map(probabilities, cases.regions), case.loaded)
        masks, targets = regions_of(path)[0], regions_of(references[case.id])[0]
        for row in (row for row in rows if row["id"] == case.id):
            mask, target = masks[row["region"]], targets[row["region"]]
            expected = (2 * (mask & target).sum() + 1e-8) / (mask.sum() + target.sum() + 1e-8)
            assert row["dice"] == pytest.approx(expected, abs=1e-9)
    id = f"{experiment.data.name}/{experiment.data.variant}/A"
    code, out, err = call("score", str(tmp_path), "--protocol", id, "--root", str(trained / "run"), "--json")
    assert code == 0, err
    scored = json.loads(out)["protocols"][id]["regions"]
    for region in LABELS:
        mean = np.mean([row["dice"] for row in rows if row["region"] == region])
        assert scored[region] == pytest.approx(mean, abs=1e-9)
