"""The recipe lckd-brats-cubes and its study, on real lesion cubes and on generated ones."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import preceptor
from preceptor.data.segmentation.named_splits import named_splits
from preceptor.data.segmentation.split_files import read_split
from preceptor.data.synthetic.cases import SPLIT, write_phantom_cases
from preceptor.errors import UserError
from preceptor.segmentation.data import read_cases
from preceptor.segmentation.task import SegmentationTask
from preceptor.tasks import load_recipe
from tests.segmentation.test_lckd import MODALITIES

BENCH = Path(__file__).parents[2] / "bench" / "lckd_cubes.py"
TINY = ["model.channels=[4,8,16]", "train.epochs=1", "train.batch_size=2", "report.cases=0"]
TINY += ["train.evaluate_every=1", "train.checkpoint_every=1", "method.election.every=1"]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH.parent))
    spec = importlib.util.spec_from_file_location("lckd_cubes", BENCH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


@pytest.mark.parametrize(
    ("rates", "published"),
    [("2468", {"t1": 184, "t1ce": 135, "flair": 90, "t2": 43}), ("8852", {"t1": 46, "t1ce": 44, "flair": 116})],
)
def test_contrasts_are_absent_at_the_rates_of_passion(script, rates, published):
    """Numbers of the 219 training cases that have a contrast, from the comment in PASSION's generate_imb_mr.py."""
    rows = [(f"case-{i}", "train", "") for i in range(219)] + [("other", "test", "")]
    got = script.with_absent(rows, rates)
    assert got[-1] == rows[-1]
    assert all(names for _, split, names in got if split == "train")
    for contrast, number in published.items():
        found = sum(contrast in names.split("+") for _, split, names in got if split == "train")
        assert found == pytest.approx(number, abs=4)
    # A case keeps its contrasts, whatever the order of the rows, and the combinations are mixed over the cases.
    assert sorted(script.with_absent(rows[::-1], rates)) == sorted(got)
    assert len({names for _, _, names in got[:40]}) > 6


def test_the_split_of_the_study_without_a_regime_lists_no_contrasts(script, tmp_path):
    rows = script.study_rows(named_splits()["brats20-cubes-210-45-45"])
    assert Counter(split for _, split, _ in rows) == {"train": 180, "validation": 30, "test": 45}
    script.write_split(rows, tmp_path / "split.csv")
    assert (tmp_path / "split.csv").read_text().startswith("case,split\n")
    with pytest.raises(UserError, match=r"split\.csv is the split of another regime; give another --output"):
        script.write_split(script.with_absent(rows, "2468"), tmp_path / "split.csv")


def test_pseudo_masks_are_those_of_the_baseline_of_the_same_seed(script, tmp_path):
    assert list(script.chosen_arms(["pseudo_masks"], 0.3, [])) == ["baseline"]
    arm = script.method_arms(["pseudo_masks"], tmp_path, 3)["pseudo_masks"]
    assert arm[0] == f"method={{name: kd, teaching_run: '{tmp_path / 'baseline' / 'seed-3'}', output: {{weight: 0}}}}"
    assert arm[1:] == ["data.unlabelled=rest"]
    warm = load_recipe("lckd-brats-cubes", script.method_arms(["pseudo_masks_warm"], tmp_path, 3)["pseudo_masks_warm"])
    assert warm.method.initialise_from_teacher
    assert warm.method.teaching_run == str(tmp_path / "baseline" / "seed-3")
    assert warm.data.unlabelled == "rest"
    # The weights have had as many steps as those of the longer baseline.
    longer = script.chosen_arms(["baseline_2x"], 0.1, ["train.epochs=30"])["baseline_2x"]
    assert longer[0] == "train.epochs=600"


@pytest.mark.slow
def test_the_regimes_train_on_what_they_say(script, tmp_path, monkeypatch):
    write_phantom_cases(tmp_path / "cases", train=5, validation=2, test=1, seed=0, size=32)
    seen = {}
    prepare = SegmentationTask.prepare

    def record(self, batch, teacher):
        for row in zip(batch.ids, batch["available"].tolist(), batch["labelled"].tolist(), strict=True):
            seen[row[0]] = (tuple(row[1]), row[2])
        return prepare(self, batch, teacher)

    monkeypatch.setattr(SegmentationTask, "prepare", record)
    common = ["--data", str(tmp_path / "cases"), "--split", str(tmp_path / "cases" / SPLIT), *TINY]

    output = ["--output", str(tmp_path / "absent"), "--absent", "2468"]
    script.main([*common, *output, "--arms", "baseline", "self_prototypes", "--seeds", "1"])
    entries = read_split(tmp_path / "absent" / "split.csv")
    listed = {name: entry.modalities for name, entry in entries.items() if entry.split == "train"}
    assert {name: tuple(m in listed[name] for m in MODALITIES) for name in listed} == {n: v[0] for n, v in seen.items()}
    assert {entry.modalities for entry in entries.values() if entry.split != "train"} == {None}
    assert "| self_prototypes | 1 |" in (tmp_path / "absent" / "study.md").read_text("utf-8")

    seen.clear()
    output = ["--output", str(tmp_path / "paired"), "--share", "0.5", "--paired"]
    arms = ["baseline", "multi_all_unlabelled", "pseudo_masks"]
    script.main([*common, *output, "--arms", *arms, "--seeds", "1"])
    assert Counter(seen.values()) == {((True, False, True, False), True): 2, ((True,) * 4, False): 2}
    entries = read_split(tmp_path / "paired" / "split.csv")
    assert {e.modalities for e in entries.values() if e.split == "validation"} == {frozenset(("flair", "t1ce"))}
    study = (tmp_path / "paired" / "study.md").read_text("utf-8")
    assert all(f"| {arm} | 1 |" in study for arm in arms)
    assert "| t2 |" in study
