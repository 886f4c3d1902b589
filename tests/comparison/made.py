"""Run folders with answers as a test wants them: no model, but every file that a comparison reads."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.recipe import dump_recipe
from preceptor.tasks import recipe_from

PROTOCOL = "toy/test"
TYPES = ("modality", "organ", "plane", "presence")


def write_stage(
    folder: Path,
    hits: Sequence[bool] | np.ndarray,
    *,
    stage: str = "distilled",
    seed: int = 0,
    settings: dict[str, Any] | None = None,
    per_group: int = 1,
    **results: Any,
) -> Path:
    """Write a finished stage whose answers to questions 0, 1, ... are right as `hits` says; return its folder.

    `settings` are recipe keys by section, `results` go into results.json. `per_group` questions share an image.
    """
    recipe = {"name": "toy", "task": "vqa", "stages": [stage], "seed": seed, "output": str(folder), **(settings or {})}
    if stage == "distilled":
        method = recipe.setdefault("method", {})
        recipe["method"] = {**method, "teaching": {"runs": [f"runs/teacher-{seed}"], **method.get("teaching", {})}}
    share = recipe.get("data", {}).get("train_share", 1.0)
    rows = [
        {
            "id": f"q{i}",
            "group": f"{i // per_group}",
            "prediction": "yes" if hit else "no",
            "probability": 0.5,
            "target": "yes",
            "correct": bool(hit),
            "score": float(hit),
            "answer_type": "closed" if i % 2 else "open",
            "question_type": TYPES[i % 4],
        }
        for i, hit in enumerate(hits)
    ]
    kinds = {kind: [row["correct"] for row in rows if row["answer_type"] == kind] for kind in ("open", "closed")}
    scores = {
        "accuracy": float(np.mean([row["correct"] for row in rows])),
        "n": len(rows),
        **{kind: float(np.mean(found)) if found else None for kind, found in kinds.items()},
    }
    document = {
        "stage": stage,
        "seed": seed,
        "protocols": {PROTOCOL: scores},
        "notes": ["A toy."],
        "parameters": 4_700_000,
        "describes": {PROTOCOL: "all test questions"},
        "weights_sha256": hashlib.sha256(str(folder).encode()).hexdigest(),
        "data": {
            "name": "toy",
            "variant": "",
            "sha256": f"rows at {share}",
            "test_sha256": "t" * 64,
            "train": round(1000 * share),
        },
    } | results
    (folder / "predictions").mkdir(parents=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe_from(recipe, "toy")), "utf-8")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "predictions" / "toy-test.jsonl").write_text(lines, "utf-8")
    (folder / "results.json").write_text(json.dumps(document), "utf-8")
    return folder


def write_run(folder: Path, stages: dict[str, Sequence[bool] | np.ndarray], seed: int = 0, **given: Any) -> Path:
    """Write a run of several stages."""
    found = {}
    for stage, hits in stages.items():
        write_stage(folder / stage, hits, stage=stage, seed=seed, **given)
        found[stage] = json.loads((folder / stage / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps({"stages": found, "protocols": found[stage]["protocols"]}))
    return folder


def hits(n: int, accuracy: float, seed: int = 0) -> np.ndarray:
    """(n,) booleans of which exactly round(n * accuracy) are true, at places that depend on the seed."""
    found = np.arange(n) < round(n * accuracy)
    return np.random.default_rng(seed).permutation(found)
