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


# The whole table of the VQA evaluation: each word is found where any one of its apostrophes is missing. Its entries for
# the first person begin with a capital, and so meet no text: it is lower case by then.
_VQA_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
_VQA_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _VQA_CONTRACTED.split()
    for place, sign in enumerate(word)
    if sign == "'"
} | {"somebody'd": "somebodyd"}  # so it stands in the table
_MOST_FULL_STOPS = 32  # their call hands the flag re.UNICODE, which is 32, where the number of replacements belongs


def vqa_v2(text: str) -> str:
    """Normalise `text` as the VQA evaluation does (Antol et al. 2015, as revised for VQA v2).

    1. A punctuation mark becomes a space; it is deleted instead if it stands beside a space anywhere in the text, and
       all marks are deleted if the text holds a comma between two digits. Apostrophes and colons stay.
    2. A full stop stays only in front of a digit (of the first 32).
    3. Lower case; number words up to ten become digits and "none" becomes "0"; articles are dropped, so that nothing is
       left of the choice "A"; a missing apostrophe is put back into contractions; white space becomes single spaces.

    Their code does this only where the annotators differ. The evaluator of ImageCLEF's VQA-Med 2020, whose accuracy
    rests on the same code, always does, and so does this.
    """
    flat = text.replace("\n", " ").replace("\t", " ").strip()
    kept = [word for word in _words(flat, _MOST_FULL_STOPS) if word not in _ARTICLES]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in kept)


def mevf(text: str) -> str:
    """Normalise `text` as MEVF (Nguyen et al. 2019) and the works after it do: MMQ, conditional reasoning, PubMedCLIP.

    The steps of `vqa_v2`, of their contractions those that are no words of their own without the apostrophe; then
    "x ray" becomes "xray". (MEVF's removal of commas has nothing left to do by then.)

    Unlike theirs, a text of nothing but articles and punctuation is kept in lower case: the choice "A" stays an answer.
    """
    kept = [_CONTRACTIONS.get(word, word) for word in _words(text) if word not in _ARTICLES]
    return (" ".join(kept) or lower(text)).replace("x ray", "xray")


def _words(text: str, most_full_stops: int = 0) -> list[str]:
    """Return the words of a text after the punctuation of the VQA evaluation, lower case, digits for number words."""
    marks = [mark for mark in _PUNCTUATION if mark in text]
    number = _COMMA_IN_NUMBER.search(text) is not None
    cleaned = text
    for mark in marks:
        beside_space = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if number or beside_space else " ")
    stopped = _FULL_STOP.sub("", cleaned, count=most_full_stops)
    return [_DIGITS.get(word, word) for word in stopped.lower().split()]


def lower(text: str) -> str:
    """Lower-case `text` and strip it, as MMBERT does."""
    return text.lower().strip()


NORMALISERS: dict[str, Callable[[str], str]] = {"mevf": mevf, "lower": lower, "vqa-v2": vqa_v2}
