"""The command `preceptor cache` on a ClinKD recipe: write the teacher's pseudo-labels and tokens, or verify them."""

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
from preceptor.grounding.teachers import (
    CACHE,
    label_folder,
    load_teacher,
    pseudo_labelled_examples,
    read_pseudo_labels,
    token_cache_key,
    token_teacher,
)
from preceptor.grounding.topk_cache import TopKCache, TopKCacheKey, answers_key, verify
from preceptor.teachers.array_store import MANIFEST
from preceptor.teachers.label_store import check_cache_key, damaged_rows, read_labels, read_store


def cache_teacher(recipe: GroundingRecipe, share: float) -> dict[str, Any]:
    """Write a recipe's pseudo-labels and, with `logits: cached`, its cache of tokens, if they are missing or stale.

    With `share` above 0, nothing is written: every row and file is read, and that fraction of the dialogues is
    recomputed. Returns a dictionary with

    - `folder`; `teacher`, the fingerprint of its weights or its name in the store;
    - `labels`: `folder`, `rows` (stored answers), usable `dialogues`, `coverage` (their fraction), `left_out`;
    - `tokens`, None without a cache of tokens: `folder`, `rows`, `tokens`, `k`;
    - `rows`, `checked`, `worst`, `mismatches`, `damage` as for a VQA recipe.

    Raises UserError if the teacher is not trained yet.
    """
    method = recipe.method.pseudo_labels
    folder = recipe.output_folder / "data"
    context = RunContext(recipe, read_recipe_dialogues(recipe.data, folder, needed=("train",), unanswered=True))
    teacher = _teacher(context) if method.store is None or method.logits != "none" else None
    damage: list[str] = []
    if share > 0:
        examples = _verify_labels(context, teacher, damage)
    else:
        examples = pseudo_labelled_examples(context, teacher)
    labels = _labels(context, damage, complete=share > 0 and method.store is None)
    report: dict[str, Any] = {
        "folder": str(recipe.output_folder),
        "teacher": vlm_fingerprint(teacher) if teacher else labels.get("teacher"),
        "labels": labels,
        "tokens": None,
        "rows": labels.get("dialogues", 0),
        "checked": 0,
        "worst": 0.0,
        "mismatches": [],
    }
    if method.logits == "cached" and teacher is not None and examples:
        student = context.load(context.source(recipe.student.model, "student"), recipe.student.model, None, recipe.seed)
        if share == 0:
            _remove_damaged(recipe.output_folder / CACHE, token_cache_key(context, teacher, student))
            token_teacher(context, teacher, student, examples)
        report["tokens"] = _tokens(context, teacher, student, examples, share, report, damage)
    return report | {"damage": "; ".join(damage)}


def _teacher(context: RunContext) -> GroundedVlm:
    recipe = context.recipe
    config = recipe.output_folder / "teacher" / "model" / "config.json"
    if recipe.method.teaching_run is None and not config.is_file():
        raise UserError(
            f"there is no trained teacher in {config.parent}: train it first (`preceptor train` on the same recipe) "
            "or set method.teaching_run=RUN"
        )
    return load_teacher(context)


def _verify_labels(context: RunContext, teacher: GroundedVlm | None, damage: list[str]) -> list[TrainingExample]:
    """Return the examples of a store as it is. If it is damaged, add the damage to `damage` and return none."""
    recipe, folder = context.recipe, label_folder(context)
    method = recipe.method.pseudo_labels
    try:
        read_store(folder)
        if damaged := damaged_rows(folder):
            listed = ", ".join(damaged[:5]) + (", ..." if len(damaged) > 5 else "")
            raise UserError(f"{len(damaged)} rows of {folder} are damaged: {listed}")
        if teacher is not None and method.store is None:
            local = LocalTeacher(teacher, max_tokens=method.max_new_tokens, batch_size=recipe.answers.batch_size)
            check_cache_key(folder, local.cache_key)
        return read_pseudo_labels(context)
    except UserError as error:
        damage.append(str(error))
        return []


def _labels(context: RunContext, damage: list[str], *, complete: bool) -> dict[str, Any]:
    folder = label_folder(context)
    if damage:
        return {"folder": str(folder)}
    labels = PseudoLabels.open(folder, context.data)
    if complete and (missing := labels.left_out.get("not asked", 0)):
        damage.append(f"{missing} dialogues were not asked: {folder} is incomplete; `preceptor cache` completes it")
    return {
        "folder": str(folder),
        "rows": len(read_labels(folder)),
        "dialogues": len(labels.labelled),
        "coverage": labels.coverage,
        "teacher": labels.teacher,
        "left_out": labels.left_out,
    }


def _remove_damaged(folder: Path, cache_key: TopKCacheKey) -> None:
    """Remove a cache if any of its files is damaged; a training compares the checksums of the small files only."""
    if (folder / MANIFEST).is_file():
        try:
            TopKCache.open(folder, cache_key).store.verify_files()
        except UserError:
            shutil.rmtree(folder)


def _tokens(
    context: RunContext,
    teacher: GroundedVlm,
    student: GroundedVlm,
    examples: list[TrainingExample],
    share: float,
    report: dict[str, Any],
    damage: list[str],
) -> dict[str, Any]:
    folder, hashes = context.recipe.output_folder / CACHE, ContentHashes()
    summary: dict[str, Any] = {"folder": str(folder)}
    try:
        cache = TopKCache.open(folder, token_cache_key(context, teacher, student))
        summary |= {"rows": len(cache), "tokens": cache.tokens, "k": cache.cache_key.k}
        if share > 0:
            cache.store.verify_files()
            dialogues = [example.dialogue for example in examples]
            for dialogue in dialogues:
                cache.row(answers_key(dialogue, hashes))  # raises UserError if it is not cached
            result = verify(cache, teacher, dialogues, hashes, fraction=share, seed=context.recipe.seed)
            report |= {"checked": result.checked, "worst": result.worst, "mismatches": result.mismatched}
            if result.absent:
                damage.append(f"{result.absent} of the drawn rows of {folder} belong to no dialogue of these data")
    except UserError as error:
        damage.append(str(error))
    return summary
