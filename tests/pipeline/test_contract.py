"""The contract of a run, the same for every task: train, resume, read back, evaluate, predict, score, compare, report.

The kill tests are in `tests/fault/test_kill.py` and those with two processes in `tests/distributed`; both run over the
same three tasks.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch

import preceptor
from preceptor import api
from preceptor.comparison.summary import headline
from preceptor.errors import UserError
from preceptor.grounding import metrics as grounding_metrics
from preceptor.pipeline.run_dir import read_predictions, seed_folders, weights_sha256
from preceptor.segmentation.prediction_files import STARTED
from preceptor.tasks import load_recipe
from tests.fault.tiny import CLINKD, LCKD, RECIPE, write_recipe

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Contract:
    """What the contract needs to know of a task: a tiny recipe, a change that is refused, and the user's inputs."""

    task: str
    text: str
    settings: tuple[str, ...]
    stages: tuple[str, ...]
    refused: str
    message: str
    protocol: str
    inputs: Callable[[Path], dict[str, dict[str, Any]]]


def questions(data: Path) -> dict[str, dict[str, Any]]:
    """Inputs of a model that answers questions: one image, a folder of images and a table."""
    images = sorted(data.rglob("*.png"))
    folder, table = data.parent / "some-images", data.parent / "some-images" / "questions.csv"
    if not folder.exists():
        folder.mkdir()
        for image in images[:3]:
            shutil.copy(image, folder)
        table.write_text(f"image,question\n{images[0].name},what is this?\n{images[1].name},is there a lesion?\n")
    asked = {"question": "what is shown?", "modality": "ct"}
    return {
        "one": {"image": images[0], **asked},
        "folder": {"image": folder, **asked},
        "table": {"table": table, "modality": "ct"},
    }


def volumes(data: Path) -> dict[str, dict[str, Any]]:
    """Inputs of a segmentation model: files by modality, a folder of cases and a table."""
    case = sorted(path for path in data.iterdir() if path.is_dir())[0]
    files = {name: path for name in ("flair", "t1", "t1ce", "t2") for path in case.glob(f"*_{name}.nii.gz")}
    table = data.parent / "some-cases.csv"
    cells = [path.relative_to(table.parent).as_posix() for path in files.values()]
    table.write_text(f"case,{','.join(files)}\none,{','.join(cells)}\n")
    return {"one": {"files": files}, "folder": {"case": [data]}, "table": {"table": table}}


TASKS = [
    Contract(
        "vqa",
        RECIPE,
        ("stages=[teacher,baseline,distilled]", "teacher.train.epochs=2", "student.train.epochs=2"),
        ("teacher", "baseline", "distilled"),
        "student.model.dropout=0.4",
        r"another recipe .*model\.dropout: 0\.2 -> 0\.4",
        "phantom/given",
        questions,
    ),
    Contract(
        "segmentation",
        LCKD,
        ("train.epochs=2", "data.phantom.test=2"),
        ("baseline", "distilled"),
        "method.cross_modal.weight=0.2",
        r"another recipe .*method\.cross_modal\.weight: 0\.1 -> 0\.2",
        "phantom/made/A",
        volumes,
    ),
    Contract(
        "grounding",
        CLINKD,
        ("stages=[teacher,baseline,guided,distilled,clinkd]",),
        ("teacher", "baseline", "guided", "distilled", "clinkd"),
        "method.guidance.gap=3",
        r"another recipe .*method\.guidance\.gap: 1\.5 -> 3",
        "phantom-grounding/given/strict",
        questions,
    ),
]


@dataclass(frozen=True)
class Trained:
    contract: Contract
    root: Path
    recipe: Path

    @property
    def run(self) -> Path:
        return self.root / "run"

    def overrides(self, *more: str, output: str = "run") -> list[str]:
        return [*self.contract.settings, f"output={self.root / output}", f"data.root={self.root / 'data'}", *more]

    def train(self, *more: str, output: str = "run") -> preceptor.Run:
        return preceptor.train(self.recipe, self.overrides(*more, output=output))

    @property
    def last(self) -> Path:
        return self.run / self.contract.stages[-1]


@pytest.fixture(scope="module", autouse=True)
def without_java():
    """Captions are scored by Java programs that take seconds to start; `tests/grounding/test_metrics.py` runs them."""

    def missing() -> None:
        raise UserError("caption scores need Java")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grounding_metrics, "require_captions", missing)
        yield


@pytest.fixture(scope="module", params=TASKS, ids=lambda contract: contract.task)
def trained(request, tmp_path_factory, without_java) -> Trained:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp(request.param.task)
    made = Trained(request.param, root, write_recipe(root, request.param.text))
    made.train()
    return made


def results(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text())


def weights(root: Path) -> dict[str, str]:
    files = sorted(path for path in root.rglob("model.safetensors") if "new-" not in str(path))
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_run_folder(trained: Trained) -> None:
    run = trained.run
    for name in ("recipe.yaml", "results.json", "report.html", "log.txt"):
        assert (run / name).is_file(), name
    document = results(run)
    assert document["task"] == trained.contract.task
    assert list(document["stages"]) == list(trained.contract.stages)
    assert trained.contract.protocol in document["protocols"]
    for stage in trained.contract.stages:
        files = (
            "recipe.yaml",
            "metrics.jsonl",
            "results.json",
            "model/config.json",
            "model/model.safetensors",
            "model/README.md",
            "model/images.json",
        )
        for name in files:
            assert (run / stage / name).is_file(), f"{stage}/{name}"
        entry = results(run / stage)
        assert entry["weights_sha256"] == weights_sha256(run / stage / "model")
        assert entry == document["stages"][stage]
        assert {
            "protocols",
            "describes",
            "notes",
            "data",
            "parameters",
            "latency_ms",
            "speed",
            "seed",
            "versions",
            "machine",
            "training",
        } <= entry.keys()
        assert read_predictions(run / stage, trained.contract.protocol)
    assert str(trained.root) not in (run / "report.html").read_text()


def test_speeds_are_measured_side_by_side(trained: Trained) -> None:
    stages = results(trained.run)["stages"]
    measured = [stage["speed"]["measured_with"] for stage in stages.values()]
    assert all(with_ == measured[0] for with_ in measured)
    assert sorted(stage["weights_sha256"] for stage in stages.values()) == measured[0]
    for stage in stages.values():
        assert stage["speed"]["latency_ms"] > 0
        assert stage["speed"]["units_per_second"] > 0


def test_a_finished_run_is_read_back(trained: Trained) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.run.rglob("results.json") if path.parent != trained.run}
    again = trained.train()
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert again.results == results(trained.run)


def test_a_changed_recipe_is_refused(trained: Trained) -> None:
    with pytest.raises(UserError, match=trained.contract.message):
        trained.train(trained.contract.refused)


def test_a_stage_runs_again_by_its_own_recipe(trained: Trained) -> None:
    for stage in trained.contract.stages:
        recipe = load_recipe(str(trained.run / stage))
        assert (recipe.stages, Path(recipe.output)) == ((stage,), trained.run / stage)
    before = weights(trained.run)
    preceptor.train(trained.run / "baseline" / "recipe.yaml")
    assert weights(trained.run) == before


def test_stopped_and_resumed_ends_with_the_same_bytes(trained: Trained, monkeypatch) -> None:
    from preceptor.training import loop

    stop_after = {"steps": 3}

    def interrupted(accelerator: Any, stop: Any) -> bool:
        stop_after["steps"] -= 1
        return stop_after["steps"] == 0

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_any", interrupted)
        with pytest.raises(loop.Interrupted):
            trained.train(output="resumed")
    trained.train(output="resumed")
    assert weights(trained.root / "resumed") == weights(trained.run)


def test_evaluated_again_the_scores_are_the_same(trained: Trained, tmp_path: Path) -> None:
    protocol = trained.contract.protocol
    stored = results(trained.last)["protocols"][protocol]
    again = preceptor.evaluate(trained.run, protocol=protocol, output=tmp_path / "again")
    assert json.loads(json.dumps(again["protocols"][protocol])) == stored
    assert read_predictions(tmp_path / "again", protocol) == read_predictions(trained.last, protocol)
    assert results(tmp_path / "again")["protocols"][protocol] == stored
    with pytest.raises(UserError, match="did you mean"):
        preceptor.evaluate(trained.run, protocol=f"{protocol[:-1]}x")


@pytest.mark.parametrize("kind", ["one", "folder", "table"])
def test_predictions_are_streamed_and_resumed(trained: Trained, tmp_path: Path, kind: str) -> None:
    inputs = trained.contract.inputs(trained.root / "data")[kind]
    segments = trained.contract.task == "segmentation"
    output = tmp_path / "out" if segments else tmp_path / "out.jsonl"
    rows = preceptor.predict(trained.run, output=output, **inputs)
    assert rows
    file = output / "predictions.csv" if segments else output
    written = file.read_bytes()
    assert preceptor.predict(trained.run, output=output, **inputs)[0]["id"] == rows[0]["id"]
    assert file.read_bytes() == written
    # Killed within the last line: what is complete stays, the rest is predicted again.
    file.write_bytes(written[:-5])
    if segments:
        (output / STARTED).write_text(json.dumps({"case": rows[-1]["id"], "files": None}))
    resumed = preceptor.predict(trained.run, output=output, **inputs)
    assert [row["id"] for row in resumed] == [row["id"] for row in rows]
    # The row that is predicted again is alone in its batch, which changes the last bits of its probabilities.
    assert file.read_bytes()[: len(written) // 2] == written[: len(written) // 2]
    assert file.read_bytes().count(b"\n") == written.count(b"\n")
    if segments:
        with file.open() as lines:
            (first, *_) = csv.DictReader(lines)
        assert {"id", "modalities", "missing", "wt_ml", "wt_expected_dice", "warnings"} <= first.keys()
        assert Path(first["mask"]).is_file()


def test_a_model_is_written_and_loaded_again(trained: Trained, tmp_path: Path) -> None:
    model = preceptor.load(trained.run, device="cpu")
    assert model.device.type == "cpu"
    model.save_pretrained(tmp_path / "model")
    assert weights_sha256(tmp_path / "model") == weights_sha256(trained.last / "model")
    assert type(preceptor.load(tmp_path / "model")) is type(model)


def test_models_return_dataclasses(trained: Trained) -> None:
    model = preceptor.load(trained.run, device="cpu")
    inputs = trained.contract.inputs(trained.root / "data")["one"]
    if trained.contract.task == "segmentation":
        result = model.segment(inputs["files"])
        many = list(model.segment_many([inputs["files"]]))
        image = nibabel.load(next(iter(inputs["files"].values())))
        millilitres = np.prod(image.header.get_zooms()[:3]) / 1000
        counts = {name: np.isin(result.mask, labels).sum() for name, labels in result.regions.items()}
        expected = {name: count * millilitres for name, count in counts.items()}
        assert result.volumes_ml == pytest.approx(expected, abs=0.005)
    elif trained.contract.task == "vqa":
        result = model.answer(inputs["image"], inputs["question"])
        many = list(model.answer_many([(inputs["image"], inputs["question"])] * 3, batch_size=2))
        heatmap = result.heatmap()
        assert heatmap.ndim == 2
        assert 0 <= heatmap.min() <= heatmap.max() <= 1
        assert result.text == result.alternatives[0][0]
    else:
        result = model.ask(inputs["image"], inputs["question"], modality="ct")
        many = list(model.ask_many([(inputs["image"], inputs["question"])] * 3, modality="ct", batch_size=2))
    assert json.dumps(result.to_dict())
    for one in many:
        assert one.to_dict().keys() == result.to_dict().keys()
        if trained.contract.task != "segmentation":
            assert one.text == result.text
            assert one.probability == pytest.approx(result.probability, abs=1e-5)


def test_scoring_the_predictions_gives_the_same_numbers(trained: Trained) -> None:
    protocol = trained.contract.protocol
    stored = results(trained.last)["protocols"][protocol]
    if trained.contract.task == "segmentation":
        pytest.skip(
            "a run keeps the masks of its worst cases only; tests/segmentation/test_score.py scores whole folders"
        )
    file = trained.last / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
    options = {"references": "file"} if trained.contract.task == "vqa" else {}
    scored = preceptor.score(file, protocol, **options)
    found = json.loads(json.dumps(scored.results["protocols"][protocol]))
    for evaluated_only in ("ceiling", "interval"):
        stored.pop(evaluated_only, None)
        found.pop(evaluated_only, None)
    assert found == stored


def test_two_seeds_are_trained_and_compared(trained: Trained) -> None:
    run = preceptor.train(trained.recipe, trained.overrides(output="seeds"), seeds=2)
    document = json.loads((trained.root / "seeds" / "compare" / "compare.json").read_text())
    assert run.results["protocol"] == document["protocol"]
    for seed in (0, 1):
        assert (trained.root / "seeds" / f"seed-{seed}" / "results.json").is_file()
    assert all(group["seeds"] == [0, 1] for group in document["groups"])
    for name in ("compare.html", "compare.csv", "compare.tex"):
        assert (trained.root / "seeds" / "compare" / name).is_file(), name
    assert (run.report, run.report.is_file()) == (trained.root / "seeds" / "compare" / "compare.html", True)
    again = preceptor.compare([run.folder], output=trained.root / "compared")
    assert again.to_dict()["differences"] == document["differences"]
    assert repr(again) == "\n".join(headline(document))
    for call in (preceptor.load, preceptor.evaluate, api.report):
        with pytest.raises(UserError, match="contains one run per seed"):
            call(run.folder)


def test_a_finished_run_next_to_runs_of_seeds_stands_for_itself(tmp_path: Path) -> None:
    for folder in ("seed-0", "seed-10", "seed-2", "seed-x"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "recipe.yaml").touch()
    assert [run.name for run in seed_folders(tmp_path)] == ["seed-0", "seed-2", "seed-10"]
    (tmp_path / "results.json").touch()
    assert seed_folders(tmp_path) == []


def test_the_report_is_written_again(trained: Trained) -> None:
    page = trained.run / "report.html"
    before = page.read_text()
    page.unlink()
    assert api.report(trained.run) == page
    assert page.read_text() == before
    # The report is a view of the folder: it needs neither the data nor the models.
    copy = trained.root / "copy"
    shutil.copytree(trained.run, copy, ignore=shutil.ignore_patterns("data", "*.safetensors", "checkpoints"))
    assert api.report(copy).is_file()


def test_doctor_finds_nothing_in_generated_data(trained: Trained) -> None:
    found = preceptor.check(trained.recipe, trained.overrides())
    assert [finding for finding in found["findings"] if finding["severity"] == "error"] == []
    assert set(found["rows"]) == {"train", "validation", "test"}


def test_weights_that_saw_the_test_images_are_refused(trained: Trained, tmp_path: Path) -> None:
    """A teacher that was trained on this test split under another name is refused for every task."""
    key = {
        "vqa": "method.teaching.runs=[{}]",
        "segmentation": "method.teaching_run={}",
        "grounding": "method.teaching_run={}",
    }[trained.contract.task]
    stage = "distilled"
    teacher = tmp_path / "teacher"
    shutil.copytree(trained.run / ("teacher" if "teacher" in trained.contract.stages else "baseline"), teacher)
    experiment_class = preceptor.tasks.module(trained.contract.task, "experiment").EXPERIMENT
    experiment = experiment_class.read(load_recipe(str(trained.recipe), trained.overrides()))
    paths = [path for files in experiment.images("test").values() for path in files]
    record = {
        "data": "another",
        "variant": "",
        "test_sha256": "0" * 64,
        "images": dict(experiment.hash_images(paths).values()),
    }
    (teacher / "model" / "images.json").write_text(json.dumps({"format": 1, "sources": [record]}))
    more = [key.format(teacher), f"stages=[{stage}]"]
    if trained.contract.task == "segmentation":
        more.append("method.full.weight=1")
    with pytest.raises(UserError, match=r"was trained on \d+ of the \d+ test images"):
        trained.train(*more, output="refused")
    if trained.contract.task != "grounding":
        start = "student.model.init" if trained.contract.task == "vqa" else "model.init"
        with pytest.raises(UserError, match=rf"{start}=.* was trained on \d+ of the \d+ test images"):
            trained.train(f"{start}={teacher}", "stages=[baseline]", output="refused")
