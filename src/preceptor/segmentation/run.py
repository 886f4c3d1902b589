"""A segmentation recipe from start to report: teacher, undistilled and distilled network, and how they compare."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.types import CaseData
from preceptor.distributed import processes
from preceptor.environment import VOLUMES, versions
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.pipeline.run_dir import logged_to, model_folder
from preceptor.recipe import dump_recipe
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.data import read_cases
from preceptor.segmentation.model import MultimodalUNet
from preceptor.segmentation.stage import train_stage
from preceptor.statistics import paired_bootstrap

log = logging.getLogger("preceptor")


def run_segmentation(recipe: SegmentationRecipe) -> dict[str, Any]:
    """Run the stages of a recipe, each resumable, and write results and report; return the results.

    A recipe of one stage writes straight into its output folder, one of several a folder per stage.
    """
    root, state = recipe.output_folder, processes()
    root.mkdir(parents=True, exist_ok=True)
    with logged_to(root / "log.txt", state.is_main_process):
        with state.main_process_first():
            data = read_cases(recipe.data, root / "data")
        for note in data.notes:
            log.info(note)
        several = len(recipe.stages) > 1
        stages: dict[str, dict[str, Any]] = {}
        for name in recipe.stages:
            log.info("stage %s", name)
            full = _full_teacher(recipe, data) if recipe.method.needs_teacher(name) else None
            stages[name] = train_stage(name, root / name if several else root, recipe, data, full)
        last = stages[recipe.stages[-1]]
        results = last
        if several:
            results = {"protocols": last["protocols"], "stages": stages, "comparison": compare_stages(root, stages)}
            results |= {"seed": recipe.seed, "versions": versions(*VOLUMES)}
            results |= {
                key: last[key] for key in ("data", "notes", "parameters", "latency_ms", "modalities", "regions")
            }
        if state.is_main_process:
            from preceptor.segmentation.report import write_segmentation_report

            write_text(root / "recipe.yaml", dump_recipe(recipe))
            write_text(root / "results.json", json.dumps(results, indent=1))
            write_segmentation_report(root, data=data, recipe=recipe)
        state.wait_for_everyone()
        return results


def _full_teacher(recipe: SegmentationRecipe, data: CaseData) -> MultimodalUNet:
    """Return the network that teaches from all modalities. Raises UserError where it does not fit the recipe's."""
    folder = model_folder(Path(recipe.method.teaching_run or recipe.output_folder / "teacher"))
    teacher = MultimodalUNet.load(folder)
    for what, theirs, ours in (
        ("modalities", teacher.config.modalities, data.modalities),
        ("regions", teacher.config.regions, data.regions),
    ):
        if tuple(theirs) != tuple(ours):
            raise UserError(f"the teacher {folder} has the {what} {list(theirs)}, this recipe {list(ours)}")
    own = recipe.model
    if recipe.method.compares_features and (teacher.config.net, tuple(teacher.config.channels)) != (
        own.net,
        tuple(own.channels),
    ):
        raise UserError(
            f"method.full.features compares bottlenecks, and the teacher {folder} is another network "
            f"({teacher.config.net} {list(teacher.config.channels)}); set it to 0"
        )
    return teacher


def compare_stages(root: Path, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return per protocol the paired difference of Dice, distilled less undistilled, over all subsets of each case."""
    found: dict[str, dict[str, Any]] = {}
    if not {"distilled", "baseline"} <= set(stages):
        return found
    for protocol, scores in stages["distilled"]["protocols"].items():
        mine, theirs = (by_case(root / name, protocol) for name in ("distilled", "baseline"))
        regions = list(scores["regions"])
        entry: dict[str, Any] = _difference(mine.mean(axis=1), theirs.mean(axis=1))
        entry |= {"n": len(mine), "interval": "95 %, paired bootstrap over cases, one seed"}
        entry["regions"] = {r: _difference(mine[:, i], theirs[:, i]) for i, r in enumerate(regions)}
        found[protocol] = {"distilled - baseline": entry}
    return found


def by_case(folder: Path, protocol: str) -> np.ndarray:
    """Return the Dice (cases, regions), the mean over a case's subsets; cases in the order of their ids."""
    path = folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    cases = sorted({row["id"] for row in rows})
    regions = list(dict.fromkeys(row["region"] for row in rows))
    sums, counts = np.zeros((2, len(cases), len(regions)))
    places = {case: number for number, case in enumerate(cases)}
    for row in rows:
        place = places[row["id"]], regions.index(row["region"])
        sums[place] += row["dice"]
        counts[place] += 1
    return sums / counts


def _difference(mine: np.ndarray, theirs: np.ndarray) -> dict[str, Any]:
    interval = paired_bootstrap(mine, theirs)
    return {"difference": interval.mean, "low": interval.low, "high": interval.high}
