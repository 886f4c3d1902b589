"""A ClinKD recipe from start to report: teacher, its pseudo-labels, the student with each part of the method added."""

from __future__ import annotations

import json
import logging
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

from preceptor.distributed import processes
from preceptor.environment import QUESTIONS, versions
from preceptor.errors import UserError
from preceptor.files import write_text
from preceptor.grounding.config import GroundingRecipe, VlmStage
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.dataset import TrainingExample
from preceptor.grounding.metrics import compare
from preceptor.grounding.stage import Part, Seminar, finish_stage, stage_method, train_part
from preceptor.grounding.teachers import (
    CACHE,
    STORE,
    OnlineTokenTeacher,
    corrector,
    load_teacher,
    pseudo_labelled_examples,
    summary,
    token_teacher,
)
from preceptor.pipeline.run_dir import logged_to, start_afresh
from preceptor.recipe import dump_recipe

log = logging.getLogger("preceptor")
PRIOR = "prior"
"""Folder of the part of the training that learns what the teacher says."""


def run_vlm(recipe: GroundingRecipe) -> dict[str, Any]:
    """Run the stages of a recipe, each resumable, and write results and report; return the results.

    A recipe of one stage writes straight into its output folder, one of several a folder per stage. What a teacher
    says, and the part of the training that learns it, is done once for all stages that need it.
    """
    root, state = recipe.output_folder, processes()
    root.mkdir(parents=True, exist_ok=True)
    with logged_to(root / "log.txt", state.is_main_process):
        with state.main_process_first():
            data = read_recipe_dialogues(recipe.data, root / "data")
        for note in data.notes:
            log.info(note)
        require_checkpoints(recipe)
        room = Seminar(recipe, data)
        if recipe.resume == "never" and state.is_main_process:
            for name in (STORE, CACHE, PRIOR, "new-teacher", "new-student"):
                shutil.rmtree(root / name, ignore_errors=True)
        state.wait_for_everyone()
        several = len(recipe.stages) > 1
        stages: dict[str, dict[str, Any]] = {}
        for name in recipe.stages:
            log.info("stage %s", name)
            stages[name] = run_stage(name, root / name if several else root, room)
        results = stages[recipe.stages[-1]]
        if several:
            last = results
            results = {"protocols": last["protocols"], "stages": stages, "comparison": compare_stages(root, stages)}
            results |= {"seed": recipe.seed, "versions": versions(*QUESTIONS)}
            results |= {key: last[key] for key in ("data", "notes", "parameters", "latency_ms")}
        if state.is_main_process:
            from preceptor.grounding.report import write_grounding_report

            write_text(root / "recipe.yaml", dump_recipe(recipe))
            write_text(root / "results.json", json.dumps(results, indent=1))
            write_grounding_report(root, data=data, recipe=recipe)
        state.wait_for_everyone()
        return results


def require_checkpoints(recipe: GroundingRecipe) -> None:
    """Raise UserError where a checkpoint that a later stage begins with is not there: before hours of training."""
    from preceptor.vqa.bundle import find_pretrained

    named = {"student.model.source": recipe.student.model.source, "method.teaching_run": recipe.method.teaching_run}
    if "teacher" in recipe.stages:
        named["teacher.model.source"] = recipe.teacher.model.source
    for key, source in named.items():
        if source is None or (key == "method.teaching_run" and Path(source).is_dir()):
            continue
        if find_pretrained(source, allow_downloads=recipe.allow_downloads) is None:
            raise UserError(
                f"{key}: {source} is neither a folder with a config.json nor in the local hub cache; give the folder "
                "of a Qwen-VL checkpoint, or set allow_downloads=true"
            )


def run_stage(name: VlmStage, folder: Path, room: Seminar) -> dict[str, Any]:
    """Train and evaluate one stage: what it adds comes from `stage_method`."""
    recipe, state = room.recipe, processes()
    if recipe.resume == "never" and state.is_main_process:
        start_afresh(folder)
    state.wait_for_everyone()
    method = stage_method(recipe, name)
    config = recipe.teacher if name == "teacher" else recipe.student
    with state.main_process_first():
        source = room.source(config.model, "teacher" if name == "teacher" else "student")
    share, reflection = method.pseudo_labels.share, method.reflection
    corrects = reflection.rounds > 0 and reflection.corrector == "teacher"
    asked = share > 0 and (method.pseudo_labels.store is None or method.pseudo_labels.logits != "none")
    teacher = load_teacher(room) if corrects or asked else None
    taught = None
    epoch = len(room.data.split("train"))
    beside = teacher.config if teacher is not None and recipe.method.teacher_offload == "none" else None
    if share > 0:
        lessons = pseudo_labelled_examples(room, teacher)
        taught = summary(lessons, method.pseudo_labels, teacher)
        # Once for all stages: it does not depend on what they add to it.
        prior = stage_method(recipe, "distilled")
        words = None
        if teacher is not None:
            words = token_teacher(room, teacher, room.load(source, config.model, None, recipe.seed), lessons)
        part = Part(
            PRIOR,
            recipe.output_folder / PRIOR,
            source,
            lessons,
            share,
            epoch,
            prior=True,
            teacher=words,
            beside=words.teacher.config if isinstance(words, OnlineTokenTeacher) else beside,
        )
        train_part(part, room, config, prior)
        source = str(part.folder / "model")
    corrects_by = corrector(room, teacher) if teacher is not None else None
    apart = room.data.split("teacher") if name == "teacher" else []
    rows = [TrainingExample(row) for row in apart or room.data.split("train")]
    part = Part(name, folder, source, rows, 1 - share, len(apart) or epoch, corrector=corrects_by, beside=beside)
    vlm, task, progress = train_part(part, room, config, method)
    return finish_stage(name, folder, room, vlm, task, progress, selective=name == recipe.stages[-1], taught=taught)


def compare_stages(root: Path, stages: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return per protocol the paired differences of each student to `supervised` and to the one before."""
    students = [name for name in stages if name != "teacher"]
    pairs = [(name, "baseline") for name in students if "baseline" in students and name != "baseline"]
    pairs += [(later, earlier) for earlier, later in pairwise(students) if (later, earlier) not in pairs]
    found: dict[str, dict[str, Any]] = {}
    for protocol in stages[students[-1]]["protocols"] if students else []:
        rows = {name: read_rows(root / name, protocol) for name in students}
        found[protocol] = {f"{a} - {b}": compare(rows[a], rows[b], protocol.rpartition("/")[2]) for a, b in pairs}
        chosen = stages[students[-1]].get("selection")
        if chosen:
            last = students[-1]
            selected = read_rows(root / last, f"{protocol}/selected")
            kind = protocol.rpartition("/")[2]
            found[protocol][f"{last} selected - {last}"] = compare(selected, rows[last], kind)
    return found


def read_rows(folder: Path, protocol: str) -> list[dict[str, Any]]:
    """Return the answers that a stage wrote."""
    path = folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl"
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]
