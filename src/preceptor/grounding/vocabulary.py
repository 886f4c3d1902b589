"""Whether two tokenizers speak of the same tokens, so that one model's logits can teach another's."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from preceptor.errors import UserError


@dataclass(frozen=True)
class SharedVocabulary:
    """Of a student and a teacher with the same tokens: `tokens` that both have, columns of either's logits that no
    token of its own tokenizer stands for, and the teacher's tokens that the student lacks, all behind the student's."""

    tokens: int
    student_padding: int
    teacher_padding: int
    only_teacher: int


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return the SHA-256 of how a tokenizer turns text into ids: the whole of a fast one, the chat template with it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{type(tokenizer).__name__} is no fast tokenizer; take a checkpoint that has a tokenizer.json")
    text = backend.to_str() + "\0" + str(getattr(tokenizer, "chat_template", None))
    return hashlib.sha256(text.encode()).hexdigest()


def same_vocabulary(
    student: Any, teacher: Any, student_columns: int | None = None, teacher_columns: int | None = None
) -> SharedVocabulary:
    """Check that the teacher's logits mean the student's tokens.

    Families may differ. Every token of the student must be one of the teacher's, with the same id. Further columns of
    either must be padding (no token), as Qwen-VL models have them, or tokens of the teacher alone behind the student's
    last: those columns are cut, and the rest is renormalised.

    Args:
        student, teacher: tokenizers of transformers.
        student_columns, teacher_columns: widths of the models' logits, by default the tokenizers' own lengths.

    Raises:
        UserError: the vocabularies differ. Only pseudo-labels are then possible.
    """
    mine, theirs = ({id: token for token, id in tokenizer.get_vocab().items()} for tokenizer in (student, teacher))
    for name, ids, columns in (("student", mine, student_columns), ("teacher", theirs, teacher_columns)):
        if columns is not None and max(ids) >= columns:
            raise UserError(
                f"the {name}'s tokenizer has the id {max(ids)} and its model only {columns} logits; give the tokenizer "
                "that belongs to the model"
            )
    wrong = [id for id, token in sorted(mine.items()) if theirs.get(id) != token]
    between = [id for id in theirs if id not in mine and id <= max(mine)]
    if wrong or between:
        id = wrong[0] if wrong else min(between)
        raise UserError(
            f"student and teacher have different vocabularies: id {id} is {mine.get(id, 'no token')!r} for the "
            f"student and {theirs.get(id, 'no token')!r} for the teacher ({len(wrong) + len(between)} ids differ), so "
            "logits of the one mean nothing to the other; teach with the teacher's answers instead: write them with "
            "`preceptor teach` and train on these pseudo-labels"
        )
    only_teacher = len(theirs) - len(mine)
    student_width = max(mine) + 1 if student_columns is None else student_columns
    teacher_width = max(theirs) + 1 if teacher_columns is None else teacher_columns
    return SharedVocabulary(len(mine), student_width - len(mine), teacher_width - len(theirs), only_teacher)
