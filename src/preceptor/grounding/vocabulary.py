"""Compare two tokenizers: one model's logits can teach another only if their token ids mean the same."""

from __future__ import annotations

import hashlib
from typing import Any

from preceptor.errors import UserError
from preceptor.teachers.tokenizer_json import tokenizer_json


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of a fast tokenizer and its chat template. Raises UserError if the tokenizer is not fast."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(
            f"{type(tokenizer).__name__} is not a fast tokenizer; use a checkpoint that has a tokenizer.json"
        )
    text = tokenizer_json(backend) + "\0" + str(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(text.encode()).hexdigest()


def require_same_vocabulary(
    student: Any, teacher: Any, student_columns: int | None = None, teacher_columns: int | None = None
) -> None:
    """Check that the teacher's logits refer to the student's tokens.

    The models may be of different families. Every token of the student must be a token of the teacher with the same
    id. The other logits of either must be padding, as in Qwen-VL models, or tokens of the teacher with larger ids than
    all of the student's: they are cut off, and the rest is renormalised.

    Args:
        student, teacher: tokenizers of transformers.
        student_columns, teacher_columns: the models' numbers of logits, by default the tokenizers' lengths.

    Raises:
        UserError: the vocabularies differ, so that only pseudo-labels are possible.
    """
    student_ids, teacher_ids = (
        {id: token for token, id in tokenizer.get_vocab().items()} for tokenizer in (student, teacher)
    )
    for name, ids, columns in (
        ("student", student_ids, student_columns),
        ("teacher", teacher_ids, teacher_columns),
    ):
        if columns is not None and max(ids) >= columns:
            raise UserError(
                f"the {name}'s tokenizer has the id {max(ids)} and its model only {columns} logits; use the tokenizer "
                "that belongs to the model"
            )
    wrong = [id for id, token in sorted(student_ids.items()) if teacher_ids.get(id) != token]
    between = [id for id in teacher_ids if id not in student_ids and id <= max(student_ids)]
    if wrong or between:
        id = wrong[0] if wrong else min(between)
        entries = [ids.get(id, "no token") for ids in (student_ids, teacher_ids)]
        raise UserError(
            f"student and teacher have different vocabularies: id {id} is {entries[0]!r} for the student and "
            f"{entries[1]!r} for the teacher ({len(wrong) + len(between)} ids differ), so the teacher's logits cannot "
            "be used; use its answers instead: write pseudo-labels with `preceptor teach` and train on them"
        )
