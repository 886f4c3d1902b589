from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from preceptor.errors import UserError
from preceptor.grounding.new_vlm import train_tokenizer
from preceptor.grounding.vocabulary import require_same_vocabulary, tokenizer_fingerprint

CORPUS = ("where is the liver? the liver is on the left. what is shown? a ct of the head.",) * 4


@cache
def made(corpus: tuple[str, ...] = CORPUS, more: tuple[str, ...] = ()) -> Any:
    tokenizer = train_tokenizer(corpus, 300)
    tokenizer.add_tokens(list(more))
    return tokenizer


def test_the_same_tokens_with_padding_on_either_side():
    length = len(made())
    require_same_vocabulary(made(), train_tokenizer(CORPUS, 300))
    # As Qwen2-VL's models of 2 and 7 billion weights: 151,936 and 152,064 columns over the same tokens.
    require_same_vocabulary(made(), made(), student_columns=length + 3, teacher_columns=length + 131)


def test_tokens_of_the_teacher_alone_are_behind_the_students():
    length = len(made())
    teacher = made(CORPUS, ("<new-1>", "<new-2>"))
    require_same_vocabulary(made(), teacher, student_columns=length, teacher_columns=length + 10)
    with pytest.raises(UserError, match=rf"id {length} is '<new-1>' for the student and 'no token' for the teacher"):
        require_same_vocabulary(teacher, made())


def test_other_tokens_leave_pseudo_labels_alone():
    other = made(("quite another text about a kidney and a spleen of a dog",) * 4)
    with pytest.raises(UserError, match=r"different vocabularies: id \d+ is .* ids differ.*`preceptor teach`"):
        require_same_vocabulary(made(), other)


class Ids:
    def __init__(self, ids: dict[str, int]) -> None:
        self.ids = ids

    def get_vocab(self) -> dict[str, int]:
        return self.ids


def test_one_swapped_pair_among_many_is_found():
    ids = {f"t{i}": i for i in range(1000)}
    swapped = {**ids, "t500": 700, "t700": 500}
    with pytest.raises(UserError, match=r"id 500 is 't500' for the student and 't700' for the teacher \(2 ids"):
        require_same_vocabulary(Ids(ids), Ids(swapped))
    # A column that is padding for the student must not be a token of the teacher in the midst of others.
    gap = {token: id for token, id in ids.items() if id != 10}
    with pytest.raises(UserError, match=r"id 10 is 'no token' for the student and 't10' for the teacher \(1 ids"):
        require_same_vocabulary(Ids(gap), Ids(ids))
    require_same_vocabulary(Ids(gap), Ids(gap))


def test_a_model_narrower_than_its_tokenizer_is_wrong():
    with pytest.raises(UserError, match="the student's tokenizer has the id"):
        require_same_vocabulary(made(), made(), student_columns=10)


def test_a_fingerprint_is_of_all_that_turns_text_into_ids():
    again = train_tokenizer(CORPUS, 300)
    assert tokenizer_fingerprint(made()) == tokenizer_fingerprint(again)
    again.chat_template = again.chat_template + " "
    others = [made(CORPUS, ("<new-1>", "<new-2>")), again, made(("another text of a dog",) * 4)]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in [made(), *others]}) == 4
    with pytest.raises(UserError, match="Ids is not a fast tokenizer"):
        tokenizer_fingerprint(Ids({}))
