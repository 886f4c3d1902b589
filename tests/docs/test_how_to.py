"""The Python code of the how-to pages and of the README runs as written, on tiny generated data."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from PIL import Image

import preceptor
from tests.fault.tiny import LCKD, RECIPE, write_recipe

ROOT = Path(__file__).parents[2]
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run_page(page: str) -> None:
    """Run the Python blocks of a page one after the other, as one program in the current directory."""
    blocks = PYTHON.findall((ROOT / page).read_text("utf-8"))
    assert blocks, f"{page} has no Python code"
    exec(compile("\n".join(blocks), page, "exec"), {"__name__": "__main__"})


def train(folder: Path, recipe: str, output: str, *settings: str) -> preceptor.Run:
    """Train a tiny recipe into `output`."""
    return preceptor.train(write_recipe(folder, recipe), [f"output={output}", "train.epochs=1", *settings])


@pytest.mark.slow
def test_segment_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = LCKD.replace("[baseline, distilled]", "[baseline]").replace("missing: 0.2", "missing: 0")
    train(tmp_path, text, "runs/lckd-brats")
    cases = sorted((tmp_path / "runs/lckd-brats/data").rglob("*flair.nii.gz"))
    (tmp_path / "cases").mkdir()
    for modality in ("flair", "t1"):
        source = cases[0].with_name(cases[0].name.replace("flair", modality)).read_bytes()
        for target in (f"case-17_{modality}.nii.gz", f"cases/case-18_{modality}.nii.gz"):
            (tmp_path / target).write_bytes(source)
    run_page("docs/how-to/segment-from-python.md")
    assert (tmp_path / "case-17_seg.nii.gz").is_file()
    assert (tmp_path / "out" / "predictions.csv").is_file()


@pytest.mark.slow
def test_own_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    page = (ROOT / "docs/how-to/own-data-set.md").read_text("utf-8")
    match = re.search(r'^```python title="my_data.py"\n(.*?)^```', page, re.MULTILINE | re.DOTALL)
    assert match
    (tmp_path / "my_data.py").write_text(match[1])
    (tmp_path / "reports").mkdir()
    patients = []
    for number in range(12):
        Image.new("L", (32, 32), 20 * number).save(tmp_path / "reports" / f"{number}.png")
        question = {"image": f"{number}.png", "question": {"en": "Is it bright?"}, "answer": ("no", "yes")[number // 6]}
        split = ("train", "train", "validation", "test")[number % 4]
        patients.append({"pseudonym": f"p{number}", "split": split, "questions": [question]})
    (tmp_path / "reports" / "questions.json").write_text(json.dumps(patients))
    original = preceptor.train
    recipe = write_recipe(tmp_path, RECIPE.replace("epochs: 4", "epochs: 1"))
    monkeypatch.setattr(preceptor, "train", lambda name, settings: original(recipe, settings))
    run_page("docs/how-to/own-data-set.md")
    results = json.loads((tmp_path / "runs" / "reports" / "results.json").read_text())
    assert list(results["protocols"]) == ["reports/given"]
    again = preceptor.evaluate(tmp_path / "runs" / "reports")  # reads the function from the recipe of the run
    assert again["protocols"] == results["protocols"]


@pytest.mark.slow
def test_compare_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, seed in (("a", 0), ("b", 1)):
        text = RECIPE.replace("[teacher]", "[baseline]")
        settings = [f"output=runs/{name}", f"seed={seed}", "data.root=data", "student.train.epochs=1"]
        preceptor.train(write_recipe(tmp_path, text), settings)
    run_page("docs/how-to/compare-systems.md")
    listed = re.findall(r"`(compare\.\w+)`", (ROOT / "docs/how-to/compare-systems.md").read_text("utf-8"))
    assert all((tmp_path / "runs" / "compared" / name).is_file() for name in listed)


@pytest.mark.slow
def test_several_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = RECIPE.replace("[teacher]", "[baseline]").replace("epochs: 4", "epochs: 0.5")
    write_recipe(tmp_path, text)
    original = preceptor.train
    monkeypatch.setattr(preceptor, "train", lambda recipe, *args, **kwargs: original("tiny.yaml", *args, **kwargs))
    run_page("docs/how-to/several-seeds.md")
    folder = tmp_path / "runs" / "five-seeds"
    assert all((folder / f"seed-{seed}" / "results.json").is_file() for seed in range(5))
    assert (folder / "compare" / "compare.html").is_file()


@pytest.mark.slow
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    Image.new("L", (32, 32), 100).save("chest.png")
    recipe = write_recipe(tmp_path, RECIPE.replace("[teacher]", "[teacher, baseline, distilled]"))
    tiny = {"output": "runs/tiny", "teacher.train.epochs": 1, "student.train.epochs": 1}
    original = preceptor.train
    monkeypatch.setattr(preceptor, "train", lambda name, settings: original(recipe, tiny))
    run_page("README.md")
    assert "report.html" in capsys.readouterr().out
    assert (tmp_path / "compared" / "compare.html").is_file()
