"""The verbs at their surface: exit codes, JSON and messages. `tests/pipeline/test_contract.py` tests what they do."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from preceptor.cli import app as cli
from tests.command_line import call
from tests.fault.tiny import write_recipe

QUICK = [
    "stages=[teacher,baseline,distilled]",
    "teacher.train.epochs=2",
    "student.train.epochs=2",
    "data.augment.views=2",
    "method.teaching.kind=cached",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    recipe = write_recipe(folder)
    old = sys.argv
    sys.argv = ["preceptor", "train", str(recipe), f"output={folder / 'run'}", *QUICK]
    try:
        with pytest.raises(SystemExit) as ended:
            cli.main()
    finally:
        sys.argv = old
    assert not ended.value.code
    return folder / "run"


def test_the_accuracy_is_that_of_the_written_predictions(run: Path):
    for stage in ("teacher", "baseline", "distilled"):
        for name in ("model/tokenizer.json", "model/preprocessor_config.json"):
            assert (run / stage / name).is_file(), name
        results = json.loads((run / stage / "results.json").read_text())
        (protocol, scores), *_ = results["protocols"].items()
        predictions = run / stage / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
        rows = [json.loads(line) for line in predictions.read_text().splitlines()]
        assert len(rows) == scores["n"]
        assert sum(row["correct"] for row in rows) / len(rows) == pytest.approx(scores["accuracy"])
        assert {"id", "prediction", "probability", "target", "correct"} <= rows[0].keys()
    comparison = json.loads((run / "results.json").read_text())["comparison"]
    assert {"distilled - baseline", "distilled / teacher"} <= next(iter(comparison.values())).keys()


def test_the_weights_contain_neither_teacher_nor_projectors(run: Path):
    from safetensors import safe_open

    with safe_open(run / "distilled" / "model" / "model.safetensors", "pt") as file:
        assert not [name for name in file.keys() if "teacher" in name or "projectors" in name]  # noqa: SIM118


def test_a_finished_run_is_printed_again_and_not_trained_again(run: Path):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("task.safetensors")}
    recipe = str(run.parent / "tiny.yaml")
    code, out, _ = call("train", recipe, f"output={run}", *QUICK, "--json")
    assert code == 0
    assert set(json.loads(out)["stages"]) == {"teacher", "baseline", "distilled"}
    assert {path: path.stat().st_mtime_ns for path in run.rglob("task.safetensors")} == before


def test_a_changed_recipe_exits_2_and_lists_the_differences(run: Path):
    recipe = str(run.parent / "tiny.yaml")
    code, out, err = call("train", recipe, f"output={run}", *QUICK, "student.train.epochs=3")
    assert code == 2
    assert "train.epochs: 2.0 -> 3.0" in err
    assert "Traceback" not in err
    assert out == ""


def test_a_refused_recipe_does_not_overwrite_the_recipe_of_a_stage(run: Path):
    before = (run / "teacher" / "recipe.yaml").read_bytes()
    recipe = str(run.parent / "tiny.yaml")
    code, _, err = call("train", recipe, f"output={run}", *QUICK, "method.label.label_smoothing=0.3")
    assert code == 2
    assert "label.label_smoothing: 0.0 -> 0.3" in err
    assert (run / "teacher" / "recipe.yaml").read_bytes() == before


def test_evaluate_prints_the_stored_scores(run: Path):
    code, out, _ = call("evaluate", str(run), "--json")
    stored = json.loads((run / "distilled" / "results.json").read_text())
    assert code == 0
    assert json.loads(out)["protocols"] == stored["protocols"]
    code, _, err = call("evaluate", str(run), "--protocol", "phantom/givne")
    assert code == 2
    assert "did you mean" in err


def test_predict_prints_one_answer_and_writes_those_of_a_table(run: Path, tmp_path):
    image = next((run / "data" / "images").glob("*.png"))
    code, out, _ = call("predict", str(run), "--image", str(image), "--question", "is there a lesion?", "--json")
    assert code == 0
    answers = json.loads(out)[0]["answers"]
    assert [a["probability"] for a in answers] == sorted((a["probability"] for a in answers), reverse=True)
    shutil.copy(image, tmp_path / "a.png")
    (tmp_path / "asked.csv").write_text("image,question\na.png,is there a lesion?\n")
    code, _, err = call(
        "predict",
        str(run),
        "--table",
        str(tmp_path / "asked.csv"),
        "--output",
        str(tmp_path / "o.jsonl"),
    )
    assert code == 0, err
    row = json.loads((tmp_path / "o.jsonl").read_text())
    assert row["answers"][0]["answer"] == answers[0]["answer"]
    assert row["answers"][0]["probability"] == pytest.approx(answers[0]["probability"], rel=1e-4)
    assert "predictions:" not in err, "one row needs no progress"
    (tmp_path / "asked.csv").write_text("image,question\n" + "a.png,is there a lesion?\n" * 3)
    arguments = ["--table", str(tmp_path / "asked.csv"), "--output", str(tmp_path / "three.jsonl")]
    code, out, err = call("predict", str(run), *arguments)
    assert (code, out) == (0, f"3 predictions: {tmp_path / 'three.jsonl'}\n")
    assert "predictions: 3/3, 0:00:00 left" in err
    (tmp_path / "text.png").write_text("not an image")
    for bad in (["--image", str(image)], ["--image", str(tmp_path / "text.png"), "--question", "x"], []):
        code, _, err = call("predict", str(run), *bad)
        assert code == 2
        assert err.startswith("error: ")
    code, _, err = call("predict", str(tmp_path), "--image", str(image), "--question", "x")
    assert code == 2
    assert "contains no trained model" in err


def test_cache_verification_finds_a_wrong_byte(run: Path, tmp_path):
    recipe = str(run.parent / "tiny.yaml")
    settings = [*QUICK, f"output={run}", f"method.teaching.cache={tmp_path / 'cache'}"]
    code, _, err = call("cache", recipe, *settings, "--verify", "1")
    assert code == 2
    assert f"There is no teacher cache in {tmp_path / 'cache'}" in err, "a cache that is verified is not written first"
    assert not (tmp_path / "cache").exists()
    assert call("cache", recipe, *settings)[0] == 0
    code, out, err = call("cache", recipe, *settings, "--verify", "1", "--json")
    assert code == 0, err
    report = json.loads(out)
    assert report["checked"] == report["rows"] > 0
    logits = tmp_path / "cache" / "logits.npy"
    content = bytearray(logits.read_bytes())
    content[-1] ^= 0x40  # the exponent of the last number
    logits.write_bytes(bytes(content))
    code, out, _ = call("cache", recipe, *settings, "--verify", "1", "--json")
    assert code == 1
    report = json.loads(out)
    assert len(report["mismatches"]) == 1
    assert logits.name in report["damage"]
    code, out, _ = call("cache", recipe, *settings)  # without --verify it is written again
    assert code == 0
    code, out, _ = call("cache", recipe, *settings, "--verify", "1", "--json")
    assert (code, json.loads(out)["damage"]) == (0, "")


def test_a_cache_that_training_wrote_is_valid_and_kept(run: Path):
    """A run tokenizes questions before it writes the cache; the command `cache` reads the tokenizer in a new state."""
    recipe = str(run.parent / "tiny.yaml")
    manifest = run / "teacher-cache" / "manifest.json"
    before = manifest.stat().st_mtime_ns
    code, out, err = call("cache", recipe, *QUICK, f"output={run}", "--verify", "1", "--json")
    assert code == 0, err
    assert json.loads(out)["checked"] > 0
    code, _, err = call("cache", recipe, *QUICK, f"output={run}")
    assert code == 0, err
    assert manifest.stat().st_mtime_ns == before
    arguments = [f"method.teaching.runs=[{run / 'teacher'}]", f"method.teaching.cache={run / 'teacher-cache'}"]
    code, _, err = call(
        "cache", recipe, *QUICK[1:], "stages=[distilled]", f"output={run.parent / 'other'}", *arguments, "--verify", "1"
    )
    assert code == 0, f"the tokenizer of a saved model: {err}"


def test_report_prints_the_path_of_the_page(run: Path):
    code, out, _ = call("report", str(run))
    assert code == 0
    assert out.strip() == str(run / "report.html")


def test_recipes_are_listed_and_printed():
    code, out, _ = call("recipes", "--json")
    assert code == 0
    assert "mhkd-vqa-rad" in json.loads(out)
    code, out, _ = call("recipes", "show", "mhkd-vqa-rad")
    assert code == 0
    assert "# clean | published | no_frames" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "nonsense"],
        ["demo", "lckdd"],
        ["train", "mhkd-demo", "data.nmae=x"],
        ["report", "/nonexistent"],
        ["trian"],
        ["train", "mhkd-vqa-rad", "data.root=/nonexistent"],
        ["evaluate", "/nonexistent"],
    ],
)
def test_mistakes_exit_2_without_a_traceback(arguments, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(*arguments)
    assert code == 2
    assert "Traceback" not in err
    assert out == ""


def test_help_needs_no_torch():
    program = (
        "import sys, preceptor.cli.app\n"
        "try:\n    sys.argv = ['preceptor', '--help']; preceptor.cli.app.main()\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
    for verb in ("train", "demo", "evaluate", "predict", "cache", "doctor", "report", "recipes"):
        assert verb in done.stdout
