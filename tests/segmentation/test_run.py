"""A segmentation recipe from start to report, on tiny generated cases."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from preceptor.segmentation.run import by_case, run_segmentation
from preceptor.segmentation.serve import check_recipe, evaluate_network

from preceptor.errors import UserError
from preceptor.segmentation.data import examples, read_cases
from preceptor.segmentation.evaluate import mean_of, predict_case, validation_scores, votes
from preceptor.segmentation.model import MultimodalUNet
from preceptor.segmentation.subsets import name as subset_name
from tests.segmentation.conftest import recipe

pytestmark = pytest.mark.slow


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_the_run_folder(trained: Path) -> None:
    run = trained / "run"
    for stage in ("baseline", "distilled"):
        for file in (
            "recipe.yaml",
            "metrics.jsonl",
            "results.json",
            "model/config.json",
            "model/model.safetensors",
            "model/segmentation.json",
            "model/README.md",
        ):
            assert (run / stage / file).is_file(), f"{stage}/{file}"
    assert (run / "report.html").is_file()
    over = results(run)
    assert set(over["protocols"]) == {"phantom/made/A", "phantom/made/A-post"}
    distilled = results(run / "distilled")
    votes_at = [vote["step"] for vote in distilled["elections"]]
    assert votes_at == [0, 3, 6, 9, 12, 15]
    assert results(run / "baseline")["elections"] == []
    lines = [json.loads(line) for line in (run / "distilled" / "metrics.jsonl").read_text().splitlines()]
    assert any("cross_modal" in line for line in lines)
    assert not any("cross_modal" in line for line in map(json.loads, (run / "baseline" / "metrics.jsonl").open()))
    assert over["comparison"]["phantom/made/A"]["distilled - baseline"]["n"] == 1
    assert list((run / "distilled" / "predictions" / "masks").glob("*.nii.gz"))


def test_a_finished_run_is_read_back(trained: Path) -> None:
    before = (trained / "run" / "distilled" / "results.json").stat().st_mtime_ns
    again = run_segmentation(recipe(trained))
    assert (trained / "run" / "distilled" / "results.json").stat().st_mtime_ns == before
    assert again["protocols"] == results(trained / "run")["protocols"]


def test_a_changed_recipe_is_refused(trained: Path) -> None:
    with pytest.raises(UserError, match=r"another recipe .*method\.cross_modal\.weight: 0\.1 -> 0\.2"):
        run_segmentation(recipe(trained, "method.cross_modal.weight=0.2"))


def test_scores_are_those_of_the_written_rows(trained: Path) -> None:
    run = trained / "run" / "distilled"
    scores = results(run)["protocols"]["phantom/made/A"]
    assert np.allclose(by_case(run, "phantom/made/A").mean(axis=0), list(scores["regions"].values()))
    rows = [json.loads(line) for line in (run / "predictions" / "phantom-made-A.jsonl").read_text().splitlines()]
    for name, by in scores["subsets"].items():
        for region, value in by["dice"].items():
            mine = [row["dice"] for row in rows if (row["subset"], row["region"]) == (name, region)]
            assert value == pytest.approx(np.mean(mine))


def test_validation_promises_what_it_found(trained: Path) -> None:
    r = recipe(trained)
    data = read_cases(r.data, r.output_folder / "data")
    network = MultimodalUNet.load(trained / "run" / "distilled" / "model").eval()
    found = validation_scores(network, examples(r, data, "validation", 0), r)
    promised = json.loads((trained / "run" / "distilled" / "model" / "segmentation.json").read_text())["validation"]
    assert set(found) == set(promised)
    for name, by_region in found.items():
        assert by_region == pytest.approx(promised[name], abs=1e-6)
    best = max(v["score"] for v in results(trained / "run" / "distilled")["training"]["validations"])
    assert mean_of(promised) == pytest.approx(best)


def test_votes_are_of_each_modality_alone(trained: Path) -> None:
    r = recipe(trained)
    data = read_cases(r.data, r.output_folder / "data")
    held_out = examples(r, data, "validation", 0)
    network = MultimodalUNet.load(trained / "run" / "distilled" / "model").eval()
    got = votes(network, held_out, r)
    want = torch.full((4, 3), torch.nan, dtype=torch.float64)
    for m in range(4):
        only = tuple(i == m for i in range(4))
        scores = []
        for index in range(len(held_out)):
            case = held_out.whole(index)
            if case.available[m]:
                p = predict_case(network, case, r.evaluation, r.data.patch_size, overlap=0.0, only=[only])[only]
                y = case.masks[(slice(None), *case.box)].double()
                p = p.double()
                sums = (2 * (p * y).sum((1, 2, 3))) / (p.sum((1, 2, 3)) + y.sum((1, 2, 3)) + 1)
                scores.append(sums)
        if scores:
            want[m] = torch.stack(scores).mean(0)
    assert torch.allclose(got, want, atol=1e-5, equal_nan=True)
    assert any(not case.images for case in data.samples) is False
    assert subset_name((True, False, False, True), data.modalities) == "flair+t2"


def test_evaluated_again_the_scores_are_the_same(trained: Path, tmp_path: Path) -> None:
    found = evaluate_network(
        trained / "run" / "distilled" / "model", recipe(trained), "phantom/made/A", tmp_path / "out", whole=True
    )
    scores = results(trained / "run" / "distilled")["protocols"]["phantom/made/A"]
    assert found["protocols"]["phantom/made/A"]["dice"] == pytest.approx(scores["dice"])
    assert (tmp_path / "out" / "results.json").is_file()
    with pytest.raises(UserError, match="did you mean"):
        evaluate_network(
            trained / "run" / "distilled" / "model", recipe(trained), "phantom/made/B", tmp_path, whole=False
        )


def test_a_teacher_of_all_modalities(tmp_path: Path) -> None:
    over = run_segmentation(
        recipe(
            tmp_path,
            "stages=[teacher, distilled]",
            "method.full.weight=1",
            "train.epochs=2",
            "method.full.features=0.1",
        )
    )
    assert set(over["stages"]) == {"teacher", "distilled"}
    lines = [json.loads(line) for line in (tmp_path / "run" / "distilled" / "metrics.jsonl").open()]
    assert any(line.get("full/output", 0) > 0 and "full/features" in line for line in lines)


def test_doctor_finds_a_damaged_case(trained: Path, tmp_path: Path) -> None:
    assert not [f for f in check_recipe(recipe(trained))["findings"] if f["severity"] == "error"]
    copy = tmp_path / "cases"
    shutil.copytree(trained / "run" / "data", copy)
    broken = sorted(copy.rglob("*_seg.nii.gz"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    found = check_recipe(recipe(tmp_path, "data.name=brats", f"data.root={copy}"))["findings"]
    assert [f["file"] for f in found if f["severity"] == "error"] == [broken.name]
