"""The verb `cache` on a ClinKD recipe, with faults put in."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from preceptor.cli import app as cli
from preceptor.grounding.teachers import CACHE, STORE
from preceptor.teachers.label_store import Label, LabelStore, read_labels, read_store
from tests.command_line import call
from tests.grounding.asked_data import image
from tests.grounding.speaking_vlm import speaking_vlm


def cache(*arguments: str) -> tuple[int, dict, str]:
    code, out, err = call("cache", *arguments, "--json")
    return code, json.loads(out) if out else {}, err


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for seed in (0, 1):
        speaking_vlm(root / f"vlm-{seed}", seed=seed)
    return root


@pytest.fixture
def recipe(tmp_path, models) -> Path:
    rows = [
        {
            "id": f"{n}",
            "image": image(tmp_path / "images", n).name,
            "task": "mia",
            "split": part,
            "conversations": [
                {"from": "human", "value": f"Question {n} about image?"},
                {"from": "gpt", "value": "the liver"},
            ],
        }
        for n, part in enumerate(["train"] * 5 + ["validation", "test"])
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"model": {"source": str(models / "vlm-0"), "max_pixels": 3136}}
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(
            {
                "name": "cached",
                "task": "grounding",
                "stages": ["distilled"],
                "output": str(tmp_path / "run"),
                "teacher": model,
                "student": model,
                "data": {"name": "sharegpt", "root": str(tmp_path / "rows.jsonl"), "images": str(tmp_path / "images")},
                "method": {
                    "name": "clinkd",
                    "teaching_run": str(models / "vlm-0"),
                    "guidance": {"kind": "none"},
                    "reflection": {"rounds": 0},
                    "selection": {"candidates": 1},
                    "pseudo_labels": {"share": 0.5, "logits": "cached", "top_k": 8, "max_new_tokens": 6},
                },
                "answers": {"batch_size": 4},
            }
        )
    )
    return tmp_path / "r.yaml"


def ended(run: Path) -> None:
    """The made model never ends an answer, and what is cut off is not learnt from."""
    rewrite(run / STORE, [replace(label, ended=True) for label in read_labels(run / STORE)])


def rewrite(folder: Path, labels: list[Label]) -> None:
    cache_key, data = read_store(folder)
    shutil.rmtree(folder)
    with LabelStore.open(folder, cache_key, data) as store:
        store.append(labels)


@pytest.fixture
def written(recipe) -> Path:
    cache(str(recipe))
    ended(recipe.parent / "run")
    code, found, err = cache(str(recipe))
    assert code == 0, err
    assert found["damage"] == ""
    return recipe.parent / "run"


def test_what_is_written_is_counted_and_verified(recipe, written, capsys):
    code, found, _ = cache(str(recipe), "--verify", "1")
    assert code == 0
    assert (found["labels"]["rows"], found["labels"]["dialogues"], found["labels"]["coverage"]) == (5, 5, 1)
    assert (found["tokens"]["rows"], found["tokens"]["k"]) == (5, 8)
    assert found["tokens"]["tokens"] > 5
    assert found["checked"] == 5
    assert found["worst"] < 1e-3
    assert found["teacher"] == read_store(written / STORE)[0].teacher
    old, sys.argv = sys.argv, ["preceptor", "cache", str(recipe), "--verify", "1"]
    with pytest.raises(SystemExit):
        cli.main()
    sys.argv = old
    said = capsys.readouterr().out
    assert f"teacher {found['teacher'][:12]}" in said
    assert "5 rows were computed again" in said


@pytest.mark.parametrize("last", [False, True])
def test_a_flipped_byte_of_a_label_is_found(recipe, written, last):
    file = written / STORE / "labels.sqlite"
    data, labels = bytearray(file.read_bytes()), read_labels(written / STORE)
    data[data.index(labels[-1 if last else 0].key.encode()) + 70] ^= 1  # within the answer, which follows the key
    file.write_bytes(bytes(data))
    code, found, _ = cache(str(recipe), "--verify", "0.5")
    assert code == 1
    assert f"rows of {written / STORE} are damaged: row {5 if last else 1}" in found["damage"]


@pytest.mark.parametrize("name", ["ids.npy", "log_probabilities.npy", "log_tail.npy", "targets.npy", "keys.npy"])
def test_a_flipped_byte_of_the_cached_words_is_found_and_mended(recipe, written, name):
    file = written / CACHE / name
    good = file.read_bytes()
    data = bytearray(good)
    data[-3] ^= 64
    file.write_bytes(bytes(data))
    code, found, _ = cache(str(recipe), "--verify", "0.5")
    assert code == 1
    assert name in found["damage"]
    assert file.read_bytes() == bytes(data), "what is verified is not written"
    assert cache(str(recipe))[0] == 0
    assert file.read_bytes() == good


def test_words_that_are_not_the_teachers_differ(recipe, written):
    """A file that was changed together with its SHA-256."""
    import hashlib

    import numpy as np

    file = written / CACHE / "log_probabilities.npy"
    logs = np.load(file)
    logs[:, 0] -= 0.5
    np.save(file, logs)
    manifest = json.loads((written / CACHE / "manifest.json").read_text())
    manifest["files"]["log_probabilities.npy"]["sha256"] = hashlib.sha256(file.read_bytes()).hexdigest()
    (written / CACHE / "manifest.json").write_text(json.dumps(manifest))
    code, found, _ = cache(str(recipe), "--verify", "1")
    assert code == 1
    assert sorted(found["mismatches"]) == list("01234")


def test_another_teacher_and_a_store_that_is_not_finished(recipe, written, models):
    code, found, _ = cache(str(recipe), f"method.teaching_run={models / 'vlm-1'}", "--verify", "1")
    assert code == 1
    assert "of another teacher or other settings" in found["damage"]
    rewrite(written / STORE, read_labels(written / STORE)[:3])
    code, found, _ = cache(str(recipe), "--verify", "1")
    assert code == 1
    assert "2 dialogues were not asked" in found["damage"]
    shutil.rmtree(written / STORE)
    code, found, _ = cache(str(recipe), "--verify", "1")
    assert code == 1
    assert "there are no pseudo-labels" in found["damage"]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("method.pseudo_labels.share=0", "has no pseudo-labels to cache"),
        ("method.teaching_run=nowhere", "nowhere"),
        ("stages=[teacher,distilled]", "there is no trained teacher in"),
    ],
)
def test_recipes_without_a_teacher(recipe, override, words):
    more = ["method.teaching_run=null"] if override.startswith("stages") else []
    code, _, err = cache(str(recipe), override, *more)
    assert code == 2
    assert words in err
    assert "Traceback" not in err


def test_lckd_has_none():
    code, _, err = cache("lckd-demo")
    assert (code, "has no teacher cache" in err) == (2, True)
