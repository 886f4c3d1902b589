"""What is special about a segmentation run; `tests/pipeline/test_contract.py` tests what all tasks share."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import preceptor
from preceptor.api import run_recipe
from preceptor.errors import UserError
from preceptor.pipeline.run_dir import read_predictions
from preceptor.segmentation.data import examples, read_cases
from preceptor.segmentation.evaluate import dice_by_case, mean_by_subset, mean_of, predict_case, votes
from preceptor.segmentation.metrics import dice
from preceptor.segmentation.model import MultimodalUNet
from tests.segmentation.conftest import recipe

pytestmark = pytest.mark.slow
PROTOCOL = "phantom/made/A"


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def log_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_only_the_distilled_stage_elects_teachers(trained: Path) -> None:
    run = trained / "run"
    assert [election["step"] for election in results(run / "distilled")["elections"]] == [0, 3, 6, 9, 12, 15]
    assert results(run / "baseline")["elections"] == []
    assert any("cross_modal" in line for line in log_lines(run / "distilled"))
    assert not any("cross_modal" in line for line in log_lines(run / "baseline"))
    assert results(run)["comparison"][PROTOCOL]["distilled - baseline"]["n"] == 1


def test_the_scores_are_the_means_of_the_written_rows(trained: Path) -> None:
    run = trained / "run" / "distilled"
    rows = read_predictions(run, PROTOCOL)
    scores = results(run)["protocols"][PROTOCOL]
    assert len(scores["subsets"]) == len({row["subset"] for row in rows}) > 1
    for region in scores["regions"]:
        mean = np.mean([row["dice"] for row in rows if row["region"] == region])
        assert scores["regions"][region] == pytest.approx(mean)  # one test case: no subset weighs more than another
        for subset, by in scores["subsets"].items():
            values = [row["dice"] for row in rows if (row["subset"], row["region"]) == (subset, region)]
            assert by["dice"][region] == pytest.approx(np.mean(values))


def test_the_dice_of_a_saved_label_map_is_the_written_one(trained: Path) -> None:
    run = trained / "run" / "distilled"
    data = read_cases(recipe(trained).data, trained / "run" / "data")
    (case,) = data.split("test")
    assert case.mask is not None
    reference = np.asarray(nibabel.load(case.mask.path).dataobj)
    saved = sorted((run / "predictions" / "masks").glob("*.nii.gz"))
    assert saved
    for path in saved:
        label = np.asarray(nibabel.load(path).dataobj)
        subset = path.name.removesuffix(".nii.gz").rpartition("__")[2]
        written = {row["region"]: row["dice"] for row in read_predictions(run, PROTOCOL) if row["subset"] == subset}
        for region, labels in data.regions.items():
            assert dice(np.isin(label, labels), np.isin(reference, labels)) == pytest.approx(written[region])


def test_the_validation_dice_of_the_model_folder_is_that_of_its_weights(trained: Path) -> None:
    run = trained / "run" / "distilled"
    config = recipe(trained)
    data = read_cases(config.data, trained / "run" / "data")
    network = MultimodalUNet.load(run / "model").eval()
    cases = examples(config, data, "validation", 0)
    found = mean_by_subset(dice_by_case(network, cases, config), cases)
    stored = json.loads((run / "model" / "segmentation.json").read_text())["validation"]
    assert set(found) == set(stored)
    for subset, by_region in found.items():
        assert by_region == pytest.approx(stored[subset], abs=1e-6)
    best = max(validation["score"] for validation in results(run)["training"]["validations"])
    assert mean_of(stored) == pytest.approx(best)


def test_a_vote_is_the_soft_dice_of_a_modality_on_its_own(trained: Path) -> None:
    config = recipe(trained)
    data = read_cases(config.data, trained / "run" / "data")
    held_out = examples(config, data, "validation", 0)
    network = MultimodalUNet.load(trained / "run" / "distilled" / "model").eval()
    expected = torch.full((4, 3), torch.nan, dtype=torch.float64)
    for m in range(4):
        only = tuple(i == m for i in range(4))
        scores = []
        for index in range(len(held_out)):
            case = held_out.whole(index)
            if case.available[m]:
                p = predict_case(network, case, config.evaluation, config.data.patch_size, overlap=0.0, only=[only])
                y, p = case.masks[(slice(None), *case.box)].double(), p[only].double()
                scores.append((2 * (p * y).sum((1, 2, 3))) / (p.sum((1, 2, 3)) + y.sum((1, 2, 3)) + 1))
        if scores:
            expected[m] = torch.stack(scores).mean(0)
    assert torch.allclose(votes(network, held_out, config), expected, atol=1e-5, equal_nan=True)


def test_a_teacher_that_sees_all_modalities(tmp_path: Path) -> None:
    settings = ["stages=[teacher, distilled]", "method.full.weight=1", "method.full.features=0.1", "train.epochs=2"]
    document = run_recipe(recipe(tmp_path, *settings))
    assert set(document["stages"]) == {"teacher", "distilled"}
    lines = log_lines(tmp_path / "run" / "distilled")
    assert any(line.get("full/output", 0) > 0 and "full/features" in line for line in lines)


def test_a_run_draws_the_parameters_of_its_terms_from_its_seed(tmp_path: Path) -> None:
    """With a rate of almost 0, the checkpoint holds the initial weights."""
    settings = ["stages=[distilled]", "train.epochs=0.3", "train.learning_rate=1e-12", "method.cross_modal.levels=all"]
    for seed in (0, 7):
        output = tmp_path / str(seed)
        projecting = [*settings, "method.cross_modal.projector=true", f"seed={seed}", f"output={output}"]
        run_recipe(recipe(tmp_path, *projecting))
        (file,) = output.rglob("checkpoints/step-1/task.safetensors")
        drawn = load_file(file)["losses.2.projectors.0 flair.weight"]
        first = torch.empty(4, 4).normal_(0, 0.5, generator=torch.Generator().manual_seed(seed))
        torch.testing.assert_close(drawn, first, rtol=0, atol=1e-7)


def test_the_model_folder_lists_the_training_volumes(trained: Path) -> None:
    data = read_cases(recipe(trained).data, trained / "run" / "data")
    files = {path for split in ("train", "validation") for case in data.split(split) for path in case_files(case)}
    (source,) = json.loads((trained / "run" / "baseline" / "model" / "images.json").read_text())["sources"]
    assert (source["data"], source["variant"]) == ("phantom", "made")
    assert len(source["images"]) == len(files)
    assert set(source["images"].values()) == {""}, "a volume has no perceptual hash"


def test_a_teacher_that_was_trained_on_test_volumes_is_refused_or_noted(trained: Path, tmp_path: Path) -> None:
    """The same volumes as another data set: the cases of the folder, split anew."""
    settings = ["data.name=brats", f"data.root={trained / 'run' / 'data'}", "data.test_fraction=0.3"]
    settings += ["data.validation_fraction=0.3", "train.epochs=1"]
    teaching = ["stages=[distilled]", "method.full.weight=1", f"method.teaching_run={trained / 'run' / 'baseline'}"]
    with pytest.raises(UserError, match=r"method\.teaching_run=.* was trained on \d+ of the \d+ test images of brats"):
        run_recipe(recipe(tmp_path, *settings, *teaching))
    assert not (tmp_path / "run" / "model").exists()
    scored = preceptor.evaluate(trained / "run" / "baseline", settings[:-1], output=tmp_path / "scores")
    assert any("was trained on" in note and "too high" in note for note in scored["notes"])


def case_files(case: Any) -> set[Path]:
    return {file.path for file in case.images.values()}


def test_doctor_names_a_damaged_label_map(trained: Path, tmp_path: Path) -> None:
    copy = tmp_path / "cases"
    shutil.copytree(trained / "run" / "data", copy)
    broken = sorted(copy.rglob("*_seg.nii.gz"))[0]
    broken.write_bytes(broken.read_bytes()[:200])
    found = preceptor.check(recipe(tmp_path, "data.name=brats", f"data.root={copy}"))["findings"]
    assert [finding["file"] for finding in found if finding["severity"] == "error"] == [broken.name]


def test_contrasts_that_occur_without_masks_alone_are_taught_by_the_elected_ones(tmp_path: Path) -> None:
    made = recipe(tmp_path, "data.phantom.missing=0")
    root = tmp_path / "cases"
    for number, case in enumerate(read_cases(made.data, root).split("train")):
        if number < 3:
            for modality in ("t1", "t2"):
                case.images[modality].path.unlink()
        else:
            assert case.mask is not None
            case.mask.path.unlink()
    settings = recipe(
        tmp_path,
        "data.name=brats",
        f"data.root={root}",
        f"data.split_file={root / 'splits.json'}",
        "data.unlabelled=rest",
        "model.encoder=separate",
        "train.weight_decay=0",
        "train.select=last",
        "train.ema_decay=0",
        "train.learning_rate=1.0e-2",
        "train.epochs=20",
        "train.evaluate_every=10",
        "method.teachers=multi",
        "method.election={initial: flair, every: 1000, cases: 2}",
        "method.cross_modal.weight=10",
        "method.cross_modal.levels=all",
    )
    run_recipe(settings)
    data = read_cases(settings.data, root)
    case = examples(settings, data, "validation", 0).whole(0)
    images = case.images[None, :, :16, :16, :16]
    initial = MultimodalUNet(MultimodalUNet.load(tmp_path / "run" / "baseline" / "model").config, seed=settings.seed)
    distances = {}
    for stage in ("baseline", "distilled"):
        network = MultimodalUNet.load(tmp_path / "run" / stage / "model")
        moved = [
            any(not torch.equal(a, b) for a, b in zip(new.parameters(), old.parameters(), strict=True))
            for new, old in zip(network.encoders, initial.encoders, strict=True)
        ]
        assert moved == ([True, False, True, False] if stage == "baseline" else [True] * 4)  # flair, t1, t1ce, t2
        with torch.no_grad():
            levels = network.encode_available(images, torch.ones(1, 4, dtype=torch.bool))
        distances[stage] = sum(float((f[:, 0] - f[:, 3]).abs().mean()) for f in levels)
    assert distances["distilled"] < 0.95 * distances["baseline"]


def test_masks_that_post_processing_leaves_as_they_are_are_scored_once(trained: Path, monkeypatch) -> None:
    from preceptor.segmentation import evaluate

    scored: list[str] = []
    score_masks = evaluate.score_masks

    def counting(id: str, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        scored.append(id)
        return score_masks(id, *arguments, **options)

    monkeypatch.setattr(evaluate, "score_masks", counting)
    network = MultimodalUNet.load(trained / "run" / "distilled" / "model").eval()
    rows = {}
    for share, least in ((0.0, 0), (1.0, 10**9)):
        settings = recipe(
            trained, f"evaluation.minimum_component={share}", f"evaluation.et_minimum={least}", "data.phantom.test=1"
        )
        data = read_cases(settings.data, trained / "run" / "data")
        scored.clear()
        rows[least] = evaluate.score_cases(network, examples(settings, data, "test", 0), settings)
        count = len({row["subset"] for row in rows[least]["A"]})
        assert len(scored) == count if least == 0 else count <= len(scored) <= 2 * count
    assert rows[0]["A-post"] == rows[0]["A"] == rows[10**9]["A"]
    assert rows[0]["A-post"][0] is not rows[0]["A"][0]
