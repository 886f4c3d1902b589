"""The verb `cache` on a ClinKD recipe: what the teacher says is written before a training, or verified."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from preceptor.errors import UserError
from preceptor.grounding.config import GroundingRecipe
from preceptor.grounding.context import RunContext
from preceptor.grounding.data import read_recipe_dialogues
from preceptor.grounding.dataset import TrainingExample
from preceptor.grounding.local_teacher import LocalTeacher, vlm_fingerprint
from preceptor.grounding.model import GroundedVlm
from preceptor.grounding.pseudo_labels import ContentHashes, PseudoLabels
from preceptor.grounding.teachers import CACHE, STORE, load_teacher, pseudo_lessons, token_cache_key, token_teacher
from preceptor.grounding.topk_cache import TopKCache, TopKCacheKey, answers_key, verify
from preceptor.teachers.array_store import MANIFEST
from preceptor.teachers.label_store import check_cache_key, damaged_rows, read_labels, read_store


def cache_words(recipe: GroundingRecipe, share: float) -> dict[str, Any]:
    """Write a recipe's pseudo-labels, and with `logits: cached` its cache of words, where they are not there.

    With a `share` above 0 nothing is written: every line and file is read, and that share of the dialogues' words is
    computed again. Returns ``folder``; ``teacher``, the fingerprint of its weights or the store's name of it;
    ``labels``: ``folder``, ``rows`` (answers that are stored), ``dialogues`` that can be learnt from, ``coverage``, the
    share of all that they are, and ``left_out`` by reason; ``words``, None without a cache of them: ``folder``,
    ``rows``, ``tokens``, ``k``; then ``rows``, ``checked``, ``worst``, ``mismatches`` and ``damage`` as
    `serving.cache_run`.

    Raises UserError where the recipe learns nothing from a teacher, or the teacher is not trained yet.
    """
    method = recipe.method.pseudo_labels
    if method.share == 0 or not {"distilled", "clinkd"} & set(recipe.stages):
        raise UserError(
            "this recipe has no pseudo-labels to cache: it needs the stage distilled or clinkd, and "
            "method.pseudo_labels.share above 0"
        )
    context = RunContext(recipe, read_recipe_dialogues(recipe.data, recipe.output_folder / "data", needed=("train",)))
    asked = method.store is None or method.logits != "none"
    teacher = _teacher(context) if asked else None
    lessons = pseudo_lessons(context, teacher) if share == 0 else []
    report: dict[str, Any] = {
        "folder": str(recipe.output_folder),
        "teacher": vlm_fingerprint(teacher) if teacher else None,
        "words": None,
        "rows": 0,
        "checked": 0,
        "worst": 0.0,
        "mismatches": [],
        "damage": "",
    }
    damage: list[str] = []
    if share > 0:
        lessons = _verify_labels(context, teacher, damage)
    report["labels"] = _labels(context, damage, complete=share > 0 and method.store is None)
    report["teacher"] = report["teacher"] or report["labels"].get("teacher")
    report["rows"] = report["labels"].get("dialogues", 0)
    if method.logits == "cached" and teacher is not None and lessons:
        student = context.load(context.source(recipe.student.model, "student"), recipe.student.model, None, recipe.seed)
        if share == 0:
            _remove_damaged(recipe.output_folder / CACHE, token_cache_key(context, teacher, student))
            token_teacher(context, teacher, student, lessons)
        report["words"] = _words(context, teacher, student, lessons, share, report, damage)
    return report | {"damage": "; ".join(damage)}


def _teacher(context: RunContext) -> GroundedVlm:
    recipe = context.recipe
    own = recipe.output_folder / "teacher" / "model" / "config.json"
    if recipe.method.teaching_run is None and not own.is_file():
        raise UserError(
            f"there is no trained teacher in {own.parent}: train it first (`preceptor train` on the same recipe), or "
            "give method.teaching_run=RUN"
        )
    return load_teacher(context)


def _store(context: RunContext) -> Path:
    store = context.recipe.method.pseudo_labels.store
    return Path(store) if store else context.recipe.output_folder / STORE


def _verify_labels(context: RunContext, teacher: GroundedVlm | None, damage: list[str]) -> list[TrainingExample]:
    """Return the lessons of a store as it is; what is wrong with it is added to `damage`, and none are returned."""
    recipe, folder = context.recipe, _store(context)
    method = recipe.method.pseudo_labels
    try:
        read_store(folder)
        if damaged := damaged_rows(folder):
            listed = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
            raise UserError(f"{len(damaged)} rows of {folder} are damaged: {listed}")
        if teacher is not None and method.store is None:
            local = LocalTeacher(teacher, max_tokens=method.max_new_tokens, batch_size=recipe.answers.batch_size)
            check_cache_key(folder, local.cache_key)
        # What is verified is not asked: the lessons are those of a recipe whose store this is.
        own = recipe.model_copy(
            update={
                "method": recipe.method.model_copy(
                    update={"pseudo_labels": method.model_copy(update={"store": str(folder)})}
                )
            }
        )
        return pseudo_lessons(RunContext(own, context.data), None)
    except UserError as error:
        damage.append(str(error))
        return []


def _labels(context: RunContext, damage: list[str], *, complete: bool) -> dict[str, Any]:
    folder, data = _store(context), context.data
    found: dict[str, Any] = {"folder": str(folder)}
    if damage:
        return found
    labels, stored = PseudoLabels.open(folder, data), {label.key for label in read_labels(folder)}
    if complete and (never := labels.left_out.get("not asked", 0)):
        damage.append(f"{never} dialogues were not asked: {folder} is not finished; `preceptor cache` goes on with it")
    return found | {
        "rows": len(stored),
        "dialogues": len(labels.labelled),
        "coverage": labels.coverage,
        "teacher": labels.teacher,
        "left_out": labels.left_out,
    }


def _remove_damaged(folder: Path, cache_key: TopKCacheKey) -> None:
    """Remove a cache one of whose files is not as it was written; a training hashes the small ones alone."""
    if (folder / MANIFEST).is_file():
        try:
            TopKCache.open(folder, cache_key).store.verify_files()
        except UserError:
            shutil.rmtree(folder)


def _words(
    context: RunContext,
    teacher: GroundedVlm,
    student: GroundedVlm,
    lessons: list[TrainingExample],
    share: float,
    report: dict[str, Any],
    damage: list[str],
) -> dict[str, Any]:
    folder, hashes = context.recipe.output_folder / CACHE, ContentHashes()
    found: dict[str, Any] = {"folder": str(folder)}
    try:
        cache = TopKCache.open(folder, token_cache_key(context, teacher, student))
        found |= {"rows": len(cache), "tokens": cache.tokens, "k": cache.cache_key.k}
        if share > 0:
            cache.store.verify_files()
            dialogues = [lesson.dialogue for lesson in lessons]
            for dialogue in dialogues:  # raises UserError if one is not cached
                cache.row(answers_key(dialogue, hashes))
            checked = verify(cache, teacher, dialogues, hashes, fraction=share, seed=context.recipe.seed)
            report |= {"checked": checked.checked, "worst": checked.worst, "mismatches": checked.mismatched}
    except UserError as error:
        damage.append(str(error))
    return found
