"""The recipe lckd-brats-cubes and its study, on real lesion cubes and on generated ones."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import preceptor
from preceptor.data.segmentation.named_splits import named_splits
from preceptor.data.segmentation.split_files import read_split
from preceptor.data.synthetic.cases import SPLIT, write_phantom_cases
from preceptor.segmentation.data import read_cases
from preceptor.tasks import load_recipe

BENCH = Path(__file__).parents[2] / "bench" / "lckd_cubes.py"
TINY = ["model.channels=[4,8,16]", "train.epochs=1", "train.batch_size=2", "report.cases=0"]
TINY += ["train.evaluate_every=1", "train.checkpoint_every=1", "method.election.every=1"]


@pytest.fixture
def cubes() -> Path:
    return Path(os.environ["PRECEPTOR_DATA"]) / "brats20_cubes"


@pytest.mark.real_data
def test_recipe_applies_its_split_to_the_cubes(cubes, tmp_path):
    recipe = load_recipe("lckd-brats-cubes", [f"data.root={cubes}"])
    assert recipe.stages == ("baseline", "distilled")
    data = read_cases(recipe.data, tmp_path)
    assert Counter(case.split for case in data.samples) == {"train": 210, "validation": 45, "test": 45}
    assert data.variant == "brats20-cubes-210-45-45"
    assert not [finding for finding in data.findings if finding.severity == "error"]


@pytest.mark.slow
@pytest.mark.real_data
def test_a_model_of_the_recipe_is_evaluated_on_other_cubes(cubes, tmp_path):
    split = {part: [] for part in ("train", "validation", "test")}
    for name, entry in read_split(named_splits()["brats20-cubes-210-45-45"]).items():
        if len(split[entry.split]) < 4:
            split[entry.split].append(name)
    (tmp_path / "split.json").write_text(json.dumps(split))
    own = ["data.split=null", f"data.split_file={tmp_path / 'split.json'}", f"output={tmp_path / 'run'}"]
    preceptor.train("lckd-brats-cubes", [f"data.root={cubes}", *own, *TINY])
    for name in split["test"][:2]:
        for file in (cubes / name).iterdir():
            target = tmp_path / "other" / f"brats20_9{name[-3:]}" / file.name.replace("brats20_", "brats20_9")
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
    back = ["data.split=brats20-cubes-210-45-45", "data.split_file=null", f"data.root={tmp_path / 'other'}"]
    results = preceptor.evaluate(tmp_path / "run" / "distilled", back, output=tmp_path / "scores")
    scores = results["protocols"]["brats/brats20-cubes-210-45-45/A"]
    assert (scores["n"], len(scores["subsets"])) == (2, 15)
    assert any("so all of them are test cases" in note for note in results["notes"])


@pytest.mark.slow
def test_the_study_trains_continues_and_writes_its_tables(tmp_path):
    write_phantom_cases(tmp_path / "cases", train=4, validation=2, test=2, seed=0, size=32)
    split = read_split(tmp_path / "cases" / SPLIT)
    command = [sys.executable, str(BENCH), "--data", str(tmp_path / "cases"), "--output", str(tmp_path / "study")]
    command += ["--split", str(tmp_path / "cases" / SPLIT), *TINY]
    command += ["--arms", "baseline", "multi", "self", "dedicated_t1", "--seeds", "2"]
    for _ in range(2):
        subprocess.run(command, check=True, capture_output=True, timeout=600)
    tested = {name for name, entry in split.items() if entry.split == "validation"}
    rows = (tmp_path / "study" / "multi" / "seed-1" / "predictions").glob("*-A.jsonl")
    assert {json.loads(line)["id"] for file in rows for line in file.read_text().splitlines()} == tested
    study = (tmp_path / "study" / "study.md").read_text("utf-8")
    assert "| baseline | 2 |" in study
    assert "| multi | 2 |" in study
    assert "| self | 2 |" in study
    assert "| flair+t1+t1ce+t2 |" in study
    assert "| t1 | multi |" in study
