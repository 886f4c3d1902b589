"""Answer normalisers: what counts as the same answer. A protocol names one of them."""

from __future__ import annotations

import re
from collections.abc import Callable

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# Only contractions that are no words of their own without the apostrophe: "its", "well", "were" and "ill" stay.
_CONTRACTED = """
    aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't
    shouldn't wasn't weren't won't wouldn't could've might've must've should've would've i'm i've you'd you'll
    you're you've he's she's it'd it'll we've they'd they'll they're they've that's there's what's where's who's
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


def vqa_v2(text: str) -> str:
    """Normalise `text` as the VQA evaluation does (Antol et al. 2015, as revised for VQA v2).

    1. A punctuation mark becomes a space; it is deleted instead if it stands beside a space anywhere in the text, and
       all marks are deleted if the text holds a comma between two digits. Apostrophes and colons stay.
    2. A full stop stays only in front of a digit.
    3. Lower case; number words up to ten become digits and "none" becomes "0"; articles are dropped; a missing
       apostrophe is put back into contractions (of theirs, those that are no words of their own without it); white
       space becomes single spaces.

    Unlike theirs, a text of nothing but articles and punctuation is kept in lower case: the choice "A" stays an answer.
    """
    marks = [mark for mark in _PUNCTUATION if mark in text]
    number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in marks:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if number or beside_space else " ")
    words = [_DIGITS.get(word, word) for word in _FULL_STOP.sub("", cleaned).lower().split()]
    kept = [_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES]
    return " ".join(kept) or lower(text)


def mevf(text: str) -> str:
    """Normalise `text` as MEVF (Nguyen et al. 2019) and the works after it do: MMQ, conditional reasoning, PubMedCLIP.

    The steps of `vqa_v2`, then "x ray" becomes "xray". (MEVF's removal of commas has nothing left to do by then.)
    """
    return vqa_v2(text).replace("x ray", "xray")


def lower(text: str) -> str:
    """Lower-case `text` and strip it, as MMBERT does."""
    return text.lower().strip()


NORMALISERS: dict[str, Callable[[str], str]] = {"mevf": mevf, "lower": lower, "vqa-v2": vqa_v2}
