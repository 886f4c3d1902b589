"""Teachers of a VQA student: trained runs, a cache of their outputs, or a moving average of the student."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from preceptor.distributed import processes
from preceptor.errors import UserError
from preceptor.task import Batch, Teacher
from preceptor.teachers.array_store import MANIFEST, ArrayStore
from preceptor.teachers.cache import CachedTeacher, CacheKey, write_cache
from preceptor.teachers.online import EmaTeacher, EnsembleTeacher, OnlineTeacher
from preceptor.teachers.tokenizer_json import tokenizer_json
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.context import RunContext
from preceptor.vqa.dataset import Preprocessing, VqaExamples
from preceptor.vqa.method import VqaMethod
from preceptor.vqa.model import VqaTransformer
from preceptor.vqa.task import token_axes
from preceptor.vqa.vision import remember_images, renormalise_pixels


def ema_teacher(student: VqaTransformer, method: VqaMethod) -> EmaTeacher:
    """Return a moving average of the student as its teacher (mean teacher)."""
    layers = student.config.layers
    return EmaTeacher(copy.deepcopy(student), method.teacher_forward(layers, layers), method.teaching.ema_decay)


def online_teacher(folders: list[Path], context: RunContext) -> tuple[Teacher, Any]:
    """Return (teacher, its model configuration) from trained runs. Several form an ensemble.

    The batches are the student's. A teacher whose pixels are normalised differently converts them. Raises UserError if
    a teacher has other answers, other tokens or another size of inputs.
    """
    recipe = context.recipe
    student_layers, student_pixels = recipe.student.model.layers, context.preprocessing(recipe.student.model)
    members: list[Teacher] = []
    config = None
    for folder in folders:
        bundle = VqaBundle.load(folder)
        require_same_inputs(folder, bundle, context)
        config = config or bundle.model.config
        # Features of different networks have no common coordinates, so only the first member's are used.
        forward = recipe.method.teacher_forward(student_layers, bundle.model.config.layers, features=not members)
        convert_pixels(bundle, student_pixels)
        members.append(OnlineTeacher(bundle.model, forward))
        if recipe.data.augment.repeats:
            remember_images(bundle.model)
    return (members[0] if len(members) == 1 else EnsembleTeacher(members)), config


def require_same_inputs(folder: Path, teacher: VqaBundle, context: RunContext) -> None:
    """Raise UserError unless a teacher has the answers, the tokens and the size of inputs of the run."""
    if teacher.vocabulary.answers != context.vocabulary.answers:
        raise UserError(
            f"the teacher {folder} has {len(teacher.vocabulary)} answers and the training data "
            f"{len(context.vocabulary)}, or they differ in order; give a teacher that was trained on the same data and "
            "split (data.name, data.variant, ...)"
        )
    for key in ("image_size", "max_question_tokens"):
        own, its = getattr(context.recipe.data, key), getattr(teacher.preprocessing, key)
        if own != its:
            raise UserError(
                f"the teacher {folder} was trained with data.{key}={its}, and the recipe has data.{key}={own}, so that "
                f"its inputs would be preprocessed differently; set data.{key}={its}, or give another teacher"
            )
    if not context.have_same_tokens(teacher.tokenizer, context.tokenizer):
        first = next(iter(context.recipe.method.teaching.runs), "the recipe's teacher.model")
        raise UserError(
            f"the teacher {folder} was trained with other tokens than {first}, and all models of a run use the same "
            "tokens; give teachers with the same tokenizer, and from-scratch ones that were trained on the same data"
        )


def convert_pixels(bundle: VqaBundle, given: Preprocessing) -> None:
    """Let a model convert pixels that are normalised as `given` to its own normalisation."""
    own_mean, own_std, mean, std = (
        torch.tensor(values).view(3, 1, 1)
        for values in (bundle.preprocessing.mean, bundle.preprocessing.std, given.mean, given.std)
    )
    if not (torch.equal(mean, own_mean) and torch.equal(std, own_std)):
        renormalise_pixels(bundle.model.vision, std / own_std, (mean - own_mean) / own_std)


def signal_cache_key(context: RunContext, source: Teacher, fields: list[str]) -> CacheKey:
    """Return everything that a recipe's cache of teacher signals depends on."""
    tokens = hashlib.sha256(tokenizer_json(context.tokenizer.backend_tokenizer).encode()).hexdigest()
    data, crossed = context.recipe.data, context.recipe.method.teaching.cross_questions
    pixels = context.preprocessing(context.recipe.student.model)
    rows = f"{context.data.name} {context.data.fingerprint('train')}"
    if context.data.split("unlabelled"):
        rows += f" and unlabelled {context.data.fingerprint('unlabelled')}"
    return CacheKey(
        teacher=source.fingerprint,
        vocabulary=context.vocabulary.fingerprint(),
        data=rows + f" and {crossed} cross questions" * bool(crossed),
        variant=context.data.variant,
        preprocessing={**pixels.as_dict(), "tokenizer": tokens, "fields": sorted(fields)},
        augmentation=data.augment.model_dump(mode="json") if data.augment.enabled else {"enabled": False},
    )


def _training_views(context: RunContext) -> tuple[VqaExamples, range]:
    """Return the examples of the training split, and epochs in which each augmentation view occurs once."""
    recipe = context.recipe
    examples = context.training_examples(recipe.seed, with_teacher=True)
    return examples, range(max(1, recipe.data.augment.views if examples.augment is not None else 1))


def every_view(context: RunContext) -> tuple[int, Iterator[Batch]]:
    """Return (rows, batches) of the training split in every augmentation view."""
    examples, epochs = _training_views(context)
    items = [(index, epoch) for epoch in epochs for index in range(len(examples))]
    lists = [items[i : i + 64] for i in range(0, len(items), 64)]
    return len(items), iter(examples.loader(lists, context.recipe.data.workers))


def compare_rows(store: ArrayStore, context: RunContext) -> tuple[list[str], int]:
    """Compare the content keys of a cache with those of the training split in every augmentation view.

    Returns:
        The sample id of every row that is missing, and the number of rows that belong to no sample. Samples whose image
        is broken and skipped (`data.broken`) need no rows.
    """
    examples, epochs = _training_views(context)
    ids = {
        examples.key(index, examples.view(epoch)): sample.id
        for index, sample in enumerate(examples.samples)
        if examples.is_used(index)
        for epoch in epochs
    }
    cached = store.find(list(ids)) >= 0
    missing = [id for id, present in zip(ids.values(), cached, strict=True) if not present]
    return missing, len(store) - int(cached.sum())


def cached_teacher(
    folder: Path, context: RunContext, source: Teacher, paths: list[str], *, renew: bool = False
) -> CachedTeacher:
    """Open the cache in `folder`; write it first if there is none.

    Raises UserError if the cache belongs to another teacher, split, vocabulary or preprocessing, or is damaged; with
    `renew` it is written again instead, also if its rows are not those of the training data.
    """
    cache_key = signal_cache_key(context, source, ["logits", *paths])
    state = processes()
    write = not (folder / MANIFEST).exists()
    if renew and not write:
        try:
            store = CachedTeacher.open(folder, cache_key).store
            store.verify_files()
        except UserError:
            write = True
        else:
            missing, unknown = compare_rows(store, context)
            write = bool(missing or unknown)
    state.wait_for_everyone()
    if write and state.is_main_process:
        _, batches = every_view(context)
        on_device = (batch.to(state.device) for batch in batches)
        axes = {path: token_axes(path) for path in paths}
        write_cache(folder, source.to(state.device), on_device, cache_key, token_axes=axes)
    state.wait_for_everyone()
    return CachedTeacher.open(folder, cache_key)
