"""Scores in [0, 1] of an answer that allow partial matches: BLEU, token F1 and the VQA accuracy."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

from preceptor.normalizers import compatible, plain

Words = tuple[str, ...]
ORDERS = 4
"""BLEU uses n-grams of 1 to 4 words."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "，。？！、；：（）“”‘’")  # noqa: RUF001
# Every Chinese character is a token; other text is split at white space.
_TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3400-\u4dbf\u4e00-\u9fff]+")
# The evaluator of ImageCLEF deletes `string.punctuation` and then applies the word tokenizer of NLTK. Without ASCII
# punctuation that tokenizer only splits typographic quotes and these words.
_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_QUOTES = re.compile("[\u00ab\u00bb\u2018\u2019\u201c\u201d]")
_TWO_WORDS = re.compile(r"\b(?:(can)(not)|(gim)(me)|(gon)(na)|(got)(ta)|(lem)(me)|(wan)(na)(?=\s))\b")
# The English stop words of NLTK, which the evaluator uses, without those that contain an apostrophe. Punctuation is
# removed before the look-up, so that "don't" is "dont" and never matches.
_WORDS = """
i me my myself we our ours ourselves you your yours yourself yourselves he him his himself she her hers herself it its
itself they them their theirs themselves what which who whom this that these those am is are was were be been being have
has had having do does did doing a an the and but if or because as until while of at by for with about against between
into through during before after above below to from up down in out on off over under again further then once here there
when where why how all any both each few more most other some such no nor not only own same so than too very s t can
will just don should now d ll m o re ve y ain aren couldn didn doesn hadn hasn haven isn ma mightn mustn needn shan
shouldn wasn weren won wouldn
"""
_STOP_WORDS = frozenset(_WORDS.split())


@lru_cache(maxsize=100_000)
def tokens(text: str) -> tuple[str, ...]:
    """Return the words of a text in lower case without punctuation. Every Chinese character is a word."""
    return tuple(_TOKEN.findall(plain(text).lower().translate(_NO_PUNCTUATION)))


@cache
def _stemmer():
    import snowballstemmer

    return snowballstemmer.stemmer("english")


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _stemmer().stemWord(word)


@lru_cache(maxsize=100_000)
def stems(text: str) -> tuple[str, ...]:
    """Return the words that the ImageCLEF evaluator counts: Snowball stems without English stop words.

    Every Chinese character is a word. Release 3 of the stemmer leaves "lateral" and "internal" unchanged, whereas NLTK
    gives "later" and "intern". This changes a score only if one of these words is confused with another.
    """
    letters = _QUOTES.sub(r" \g<0> ", compatible(text).lower().translate(_NO_ASCII_PUNCTUATION))
    words = _TOKEN.findall(_TWO_WORDS.sub(lambda found: " ".join(filter(None, found.groups())), letters))
    return tuple(_stem(word) for word in words if word not in _STOP_WORDS)


def sentence_bleu(candidate: Sequence[str], reference: Sequence[str], order: int = 4) -> float:
    """Return BLEU of a candidate and one reference (Papineni et al. 2002, section 2.3).

    Weights are uniform (1 / `order`), with a brevity penalty and without smoothing. Orders of n-grams without a match
    are left out of the sum, like `method0` of NLTK at the time of the task. (Today NLTK gives a text of fewer than four
    words 0, even if it equals the reference.) The result is 0 if no word matches and 1 if both texts are empty.
    """
    if not candidate or not reference:
        return float(not candidate and not reference)
    if candidate == reference:
        return 1.0
    matches = _overlap(tuple(candidate), tuple(reference))[:order]
    if not matches[0]:
        return 0.0
    logarithms = sum(math.log(m / (len(candidate) - n)) / order for n, m in enumerate(matches) if m)
    return math.exp(min(0.0, 1 - len(reference) / len(candidate)) + logarithms)


def corpus_bleu(answers: Sequence[Words], accepted: Sequence[Sequence[Words]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 over all answers (Papineni et al. 2002), as image captioning papers report them.

    `accepted[i]` are the references of answer `i`. Counts are pooled over the answers. An n-gram counts at most as
    often as in the reference that contains it most often. The reference closest in length defines the brevity penalty.
    There is no smoothing: from the first order without a match all scores are 0.
    """
    matches, totals, length, nearest = [0] * ORDERS, [0] * ORDERS, 0, 0
    for candidate, references in zip(answers, accepted, strict=True):
        size = len(candidate)
        length += size
        if len(references) == 1:
            nearest += len(references[0])
            counted = _overlap(candidate, references[0])
        else:
            nearest += min((abs(len(other) - size), len(other)) for other in references)[1]
            counted = _pooled(candidate, references)
        for n in range(min(ORDERS, size)):
            totals[n] += size - n
            matches[n] += counted[n]
    scores, logarithms = [0.0] * ORDERS, 0.0
    for n in range(ORDERS):
        if not matches[n]:
            break
        logarithms += math.log(matches[n] / totals[n])
        scores[n] = math.exp(min(0.0, 1 - nearest / length) + logarithms / (n + 1))
    return scores


def _pooled(candidate: Words, references: Sequence[Words]) -> tuple[int, ...]:
    matches = []
    for n in range(1, ORDERS + 1):
        reference_counts: Counter[Any] = Counter()
        for reference in references:
            reference_counts |= Counter(_ngrams(reference, n))
        matches.append((Counter(_ngrams(candidate, n)) & reference_counts).total())
    return tuple(matches)


@lru_cache(maxsize=100_000)
def _overlap(candidate: Words, reference: Words) -> tuple[int, ...]:
    """Return the numbers of 1- to 4-grams of the candidate that match the reference, with clipped counts.

    Plain dicts are three times as fast as Counter for the few words of an answer.
    """
    matches = [0] * ORDERS
    for n in range(1, min(ORDERS, len(candidate), len(reference)) + 1):
        remaining: dict[Any, int] = {}
        for gram in _ngrams(reference, n):
            remaining[gram] = remaining.get(gram, 0) + 1
        for gram in _ngrams(candidate, n):
            if remaining.get(gram):
                remaining[gram] -= 1
                matches[n - 1] += 1
        if matches[0] <= n:
            break  # a match of n + 1 words implies matches of n words
    return tuple(matches)


def _ngrams(words: Sequence[str], n: int) -> Iterable[Any]:
    return words if n == 1 else zip(*(words[i:] for i in range(n)), strict=False)


def imageclef_bleu(answer: str, accepted: tuple[str, ...]) -> float:
    """Return BLEU as the ImageCLEF VQA-Med evaluator does: over `stems`, the best of the accepted answers."""
    candidate = stems(answer)
    return max([sentence_bleu(candidate, stems(other)) for other in accepted])


def token_f1(answer: str, accepted: tuple[str, ...]) -> float:
    """Return the F1 of the bags of `tokens` (Rajpurkar et al. 2016, 6.1), the best of the accepted answers."""
    candidate = tokens(answer)
    return max([_f1(candidate, tokens(other)) for other in accepted])


def _f1(candidate: tuple[str, ...], reference: tuple[str, ...]) -> float:
    if not candidate or not reference or candidate == reference:
        return float(candidate == reference)
    return 2 * _overlap(candidate, reference)[0] / (len(candidate) + len(reference))


def vqa_soft(answer: str, votes: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer given the votes of several annotators (Antol et al. 2015, section 4.2).

    It is the mean of min(1, agreeing others / 3) over all ways to leave out one annotator. Texts are compared as they
    are, so normalise them first. With fewer than four votes, one agreeing vote is enough.
    """
    agreeing = sum(vote == answer for vote in votes)
    if len(votes) < 4:
        return float(agreeing > 0)
    agreeing_others = [agreeing - (vote == answer) for vote in votes]
    return sum(min(1.0, count / 3) for count in agreeing_others) / len(votes)
