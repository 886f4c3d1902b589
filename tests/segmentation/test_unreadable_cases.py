"""`data.broken=skip`: cases that cannot be read score 0 in validation and test, and have no vote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import preceptor
from preceptor.api import run_recipe
from preceptor.data.nifti import VolumeError
from preceptor.errors import UserError
from preceptor.pipeline.run_dir import read_predictions
from preceptor.segmentation import metrics
from preceptor.segmentation.data import examples, read_cases
from preceptor.segmentation.evaluate import dice_by_case, votes
from preceptor.segmentation.experiment import SegmentationExperiment
from tests.segmentation.conftest import recipe

pytestmark = pytest.mark.slow
SETTINGS = ["data.name=brats", "data.phantom.test=2", "data.phantom.missing=0", "train.epochs=1"]


@pytest.fixture
def cases(tmp_path: Path) -> list[str]:
    """Settings of a copy of the generated cases, of which the last of validation and of test are truncated."""
    root = tmp_path / "cases"
    data = read_cases(recipe(tmp_path, *SETTINGS[1:]).data, root)
    for split in ("validation", "test"):
        path = data.split(split)[-1].images["flair"].path
        path.write_bytes(path.read_bytes()[:-300])
    return [*SETTINGS, f"data.root={root}", f"data.split_file={root / 'splits.json'}"]


@pytest.fixture
def skipping(tmp_path: Path, cases: list[str]) -> Any:
    return recipe(tmp_path, *cases, "data.broken=skip", "data.skip_limit=0.5")


def test_a_run_scores_them_0_and_names_them(tmp_path: Path, skipping: Any, cases: list[str]) -> None:
    results = run_recipe(skipping)["stages"]["distilled"]
    data = read_cases(skipping.data, tmp_path / "data")
    whole, broken = (case.id for case in data.split("test"))
    run = tmp_path / "run" / "distilled"
    for protocol, scores in results["protocols"].items():
        rows = read_predictions(run, protocol)
        assert scores["n"] == 2
        for id in (whole, broken):
            assert len({row["subset"] for row in rows if row["id"] == id}) == 15
            assert len([row for row in rows if row["id"] == id]) == 45
        lost = [row for row in rows if row["id"] == broken]
        assert {(row["dice"], row["hd95"]) for row in lost} == {(0.0, metrics.EMPTY_HD95)}
        of_whole = [row["dice"] for row in rows if row["id"] == whole]
        assert scores["dice"] == pytest.approx(sum(of_whole) / len(of_whole) / 2)
    notes = [note for note in results["notes"] if "could not be read" in note]
    assert notes == [
        f"1 of the 2 {split} cases could not be read and got the Dice 0 (data.broken=skip): {data.split(split)[-1].id}."
        for split in ("validation", "test")
    ]
    assert results["training"]["skipped"] == []
    masks = {path.name.partition("__")[0] for path in (run / "predictions" / "masks").iterdir()}
    assert masks == {whole}, "the worst case that can be read"
    scored = preceptor.evaluate(tmp_path / "run", output=tmp_path / "scores")
    assert scored["protocols"] == results["protocols"]
    (note,) = [note for note in scored["notes"] if "could not be read" in note]
    assert f"test cases could not be read and got the Dice 0 (data.broken=skip): {broken}." in note
    with pytest.raises(VolumeError, match=r"_flair\.nii\.gz: truncated"):
        preceptor.evaluate(tmp_path / "run", ["data.broken=raise"], output=tmp_path / "raised")


def test_validation_counts_them_and_elections_do_not(tmp_path: Path, skipping: Any, cases: list[str]) -> None:
    data = read_cases(skipping.data, tmp_path / "data")
    network = SegmentationExperiment(skipping, data).new_network(0).eval()
    held_out = examples(skipping, data, "validation", 0)
    whole, broken = dice_by_case(network, held_out, skipping)
    assert whole.keys() == broken.keys()
    assert len(whole) == 15
    assert not any(scores.any() for scores in broken.values())
    assert list(held_out.unreadable) == [data.split("validation")[-1].id]

    both = votes(network, held_out, skipping)
    data.samples = [case for case in data.samples if case.id not in held_out.unreadable]
    alone = votes(network, examples(skipping, data, "validation", 0), skipping)
    assert torch.equal(both, alone)

    raising = recipe(tmp_path, *cases)
    for function in (dice_by_case, votes):
        with pytest.raises(VolumeError, match=r"_flair\.nii\.gz: truncated"):
            function(network, examples(raising, read_cases(raising.data, tmp_path / "data"), "validation", 0), raising)


def test_the_first_cases_that_can_be_read_vote(tmp_path: Path, skipping: Any) -> None:
    """With `election.cases: 1` and the first case broken, the second votes."""
    data = read_cases(skipping.data, tmp_path / "data")
    network = SegmentationExperiment(skipping, data).new_network(0).eval()
    skipping.method.election.cases = 1
    first = votes(network, examples(skipping, data, "validation", 0), skipping)
    data.samples.reverse()
    assert torch.equal(votes(network, examples(skipping, data, "validation", 0), skipping), first)


def test_an_election_without_any_case_is_refused(tmp_path: Path, skipping: Any) -> None:
    data = read_cases(skipping.data, tmp_path / "data")
    network = SegmentationExperiment(skipping, data).new_network(0).eval()
    broken = data.split("validation")[-1]
    data.samples = [case for case in data.samples if case.split != "validation"] + [broken]
    with pytest.raises(UserError, match=f"none of the 1 validation cases can be read.*: {broken.id}; repair"):
        votes(network, examples(skipping, data, "validation", 0), skipping)


def test_a_run_without_any_readable_test_case_scores_0(tmp_path: Path, skipping: Any) -> None:
    for case in read_cases(skipping.data, tmp_path / "data").split("test"):
        path = case.images["t2"].path
        path.write_bytes(path.read_bytes()[:-300])
    skipping.stages = ("baseline",)
    results = run_recipe(skipping)
    assert [scores["dice"] for scores in results["protocols"].values()] == [0.0, 0.0]
