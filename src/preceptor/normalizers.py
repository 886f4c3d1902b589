"""Answer normalisers, which define the answers that count as equal. Every protocol names one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
# Only contractions that are not words without the apostrophe: "its", "well", "were" and "ill" do not change.
_CONTRACTED = """
    aren't can't couldn't didn't doesn't don't hadn't hasn't haven't isn't mightn't mustn't needn't shan't
    shouldn't wasn't weren't won't wouldn't could've might've must've should've would've i'm i've you'd you'll
    you're you've he's she's it'd it'll we've they'd they'll they're they've that's there's what's where's who's
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _CONTRACTED.split()}
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_FULL_STOP = re.compile(r"\.(?!\d)")


# The complete table of the VQA evaluation. Each word is recognised if any one of its apostrophes is missing. The
# entries for the first person start with a capital letter and never match, because texts are in lower case.
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
} | {"somebody'd": "somebodyd"}  # as in the original table
_MOST_FULL_STOPS = 32  # the original code passes the flag re.UNICODE (32) as the number of replacements


# Signs that look like an ASCII sign and that NFKC does not map to it.
_DASHES = "\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212\ufe58"
_QUOTES = "\u00b4\u2018\u2019\u201a\u201b\u2032\u2035"
_DOUBLE_QUOTES = "\u00ab\u00bb\u201c\u201d\u201e\u201f\u2033"
_LOOKALIKES = str.maketrans(
    dict.fromkeys(_DASHES, "-")
    | dict.fromkeys(_QUOTES, "'")
    | dict.fromkeys(_DOUBLE_QUOTES, '"')
    | {"\u3002": ".", "\u2044": "/", "\u2215": "/"}
)


def compatible(text: str) -> str:
    """Return a text in the Unicode form NFKC without invisible signs, such as the zero-width space.

    Accents, full-width signs and non-breaking spaces then have one encoding. ASCII texts do not change.
    """
    if text.isascii():
        return text
    return unicodedata.normalize("NFKC", "".join(sign for sign in text if unicodedata.category(sign) != "Cf"))


def plain(text: str) -> str:
    """Return a text in which signs that a reader cannot tell apart are the same.

    In addition to `compatible`, dashes (also U+2212, the minus), typographic quotes and the ideographic full stop
    become ASCII. Every normaliser starts with this step, which the published ones lack: it only makes answers equal
    that look alike.
    """
    # NFKC turns the acute accent U+00B4 into a space and a combining accent, so quotes come first.
    return text if text.isascii() else compatible(text.translate(_LOOKALIKES)).translate(_LOOKALIKES)


def vqa_v2(text: str) -> str:
    """Normalise a text as the VQA evaluation does (Antol et al. 2015, as revised for VQA v2).

    1. A punctuation mark becomes a space. It is deleted if it is next to a space anywhere in the text, or if the text
       contains a comma between two digits. Apostrophes and colons are kept.
    2. A full stop is deleted unless a digit follows (only the first 32).
    3. Convert to lower case, replace number words up to ten by digits and "none" by "0", drop articles (so that the
       choice "A" becomes empty), restore missing apostrophes of contractions, and collapse white space.

    The original code normalises only if the annotators disagree. This function always does, like the evaluator of
    ImageCLEF VQA-Med 2020, whose accuracy is based on the same code.
    """
    flat = plain(text).replace("\n", " ").replace("\t", " ").strip()
    words = [word for word in _words(flat, _MOST_FULL_STOPS) if word not in _ARTICLES]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words)


def mevf(text: str) -> str:
    """Normalise a text as MEVF (Nguyen et al. 2019) and later works do: MMQ, conditional reasoning, PubMedCLIP.

    The steps are those of `vqa_v2`, except that only contractions are restored that are not words without the
    apostrophe; then "x ray" becomes "xray". MEVF also removes commas, but none are left at that point.

    In contrast to MEVF, a text that consists only of articles and punctuation is kept in lower case, so that the choice
    "A" remains an answer.
    """
    words = [_CONTRACTIONS.get(word, word) for word in _words(plain(text)) if word not in _ARTICLES]
    return (" ".join(words) or lower(text)).replace("x ray", "xray")


def _words(text: str, most_full_stops: int = 0) -> list[str]:
    """Return the lower-case words after the punctuation rules of the VQA evaluation, with digits for number words."""
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
    return plain(text).lower().strip()


NORMALISERS: dict[str, Callable[[str], str]] = {"mevf": mevf, "lower": lower, "vqa-v2": vqa_v2}
