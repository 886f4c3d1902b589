"""A recipe from start to report: teacher, student baseline, distilled student, and how they compare."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.distributed import processes
from preceptor.environment import QUESTIONS, versions
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.pipeline.run_dir import logged_to
from preceptor.recipe import dump_recipe
from preceptor.statistics import mcnemar, paired_bootstrap
from preceptor.task import Teacher
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.data import read_data
from preceptor.vqa.evaluate import read_predictions
from preceptor.vqa.stage import Classroom, cache_folder, teacher_folders, train_stage
from preceptor.vqa.teachers import cached_teacher, online_teacher

log = logging.getLogger("preceptor")


def open_classroom(recipe: VqaRecipe) -> Classroom:
    """Read the data of a recipe; on several processes the first one goes ahead, in case data are generated."""
    with processes().main_process_first():
        return Classroom(recipe, read_data(recipe.data, recipe.output_folder / "data"))


def make_teacher(recipe: VqaRecipe, room: Classroom) -> tuple[Teacher | None, Any]:
    """Return (teacher, its model configuration) of the distilled stage; (None, None) for a moving average."""
    teaching = recipe.method.teaching
    if teaching.kind == "ema":
        return None, None
    layers = recipe.student.model.layers
    source, config = online_teacher(teacher_folders(recipe), recipe.method, layers, repeats=recipe.data.augment.repeats)
    if teaching.kind == "online":
        return source, config
    paths = recipe.method.teacher_features(layers, config.layers)
    return cached_teacher(cache_folder(recipe), room, source, paths), config


def run_recipe(recipe: VqaRecipe) -> dict[str, Any]:
    """Run the stages of a recipe, each resumable, and write results and report; return the results.

    A recipe of one stage writes straight into its output folder, one of several a folder per stage.
    """
    root = recipe.output_folder
    state = processes()
    root.mkdir(parents=True, exist_ok=True)
    with logged_to(root / "log.txt", state.is_main_process):
        room = open_classroom(recipe)
        with state.main_process_first():
            room.refuse_known_tests()
        for note in room.data.notes:
            log.info(note)
        several = len(recipe.stages) > 1 or (recipe.teacher.members > 1 and "teacher" in recipe.stages)
        stages = {}
        for name, train in _stages(recipe, room).items():
            log.info("stage %s", name)
            stages[name] = train(root / name if several else root)
        if not several:
            results = next(iter(stages.values()))
        else:
            last = stages[list(stages)[-1]]
            results = {"protocols": last["protocols"], "stages": stages, "comparison": compare_stages(root, stages)}
            results |= {
                "seed": recipe.seed,
                "versions": versions(*QUESTIONS),
                "data": last["data"],
                "notes": last["notes"],
            }
            results |= {key: last[key] for key in ("parameters", "latency_ms")}
        if state.is_main_process:
            from preceptor.vqa.report import write_report

            write_text(root / "recipe.yaml", dump_recipe(recipe))
            write_text(root / "results.json", json.dumps(results, indent=1))
            write_report(root, data=room.data, recipe=recipe)
        state.wait_for_everyone()
        return results


def _stages(recipe: VqaRecipe, room: Classroom) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Return the trainings of a recipe in their order, by the name of their folder."""
    found: dict[str, Callable[[Path], dict[str, Any]]] = {}
    for stage in recipe.stages:
        if stage == "teacher":
            for number in range(recipe.teacher.members):
                name = "teacher" if number == 0 else f"teacher-{number + 1}"
                seed = recipe.seed + 1000 * number
                found[name] = partial(train_stage, stage, room=room, config=recipe.teacher, seed=seed, title=name)
        elif stage == "baseline":
            found[stage] = partial(train_stage, stage, room=room, config=recipe.student, seed=recipe.seed)
        else:
            found[stage] = partial(_distil, recipe, room)
    return found


def _distil(recipe: VqaRecipe, room: Classroom, folder: Path) -> dict[str, Any]:
    teacher, config = make_teacher(recipe, room)
    words = None
    if recipe.method.inherit_token_embeddings:
        if teacher is None:
            raise UserError(
                "method.inherit_token_embeddings needs a trained teacher; with method.teaching.kind=ema there is none"
            )
        words = VqaBundle.load(teacher_folders(recipe)[0]).model.text.get_input_embeddings().weight.detach()
    if teacher is not None:
        teacher = teacher.to(processes().device)
    return train_stage(
        "distilled",
        folder,
        room,
        recipe.student,
        seed=recipe.seed,
        method=recipe.method,
        teacher=teacher,
        teacher_config=config,
        ema=recipe.method.teaching.kind == "ema",
        words=words,
    )


def compare_stages(root: Path, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return per protocol the paired difference of distilled and undistilled student, and the share of the teacher's
    accuracy that the distilled student keeps."""
    found: dict[str, dict[str, Any]] = {}
    if "distilled" not in stages:
        return found
    for protocol, scores in stages["distilled"]["protocols"].items():
        entry: dict[str, Any] = {}
        if "baseline" in stages:
            distilled, alone = (
                np.array(
                    [row["score"] for row in sorted(read_predictions(root / name, protocol), key=lambda r: r["id"])]
                )
                for name in ("distilled", "baseline")
            )
            interval = paired_bootstrap(distilled, alone)
            entry["distilled - baseline"] = {
                "difference": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "p": mcnemar(distilled, alone) if scores["metric"] == "accuracy" else None,
                "n": len(alone),
                "interval": "95 %, paired bootstrap over questions, one seed",
            }
        if "teacher" in stages and stages["teacher"]["protocols"][protocol]["accuracy"]:
            entry["distilled / teacher"] = scores["accuracy"] / stages["teacher"]["protocols"][protocol]["accuracy"]
        found[protocol] = entry
    return found
