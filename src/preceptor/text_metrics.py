"""Scores in [0, 1] of one answer where sameness is too strict: BLEU, token F1, VQA's votes."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache, lru_cache
from typing import Any

Words = tuple[str, ...]
ORDERS = 4
"""BLEU counts n-grams of 1 to 4 words."""

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "，。？！、；：（）“”‘’")  # noqa: RUF001
# A Chinese character is a token of its own; everything else is parted by white space.
_TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3400-\u4dbf\u4e00-\u9fff]+")
# What the evaluator of ImageCLEF does to a text: `string.punctuation` deleted, then NLTK's words. NLTK still parts
# typographic quotes and these words, once there is no ASCII punctuation left.
_NO_ASCII_PUNCTUATION = str.maketrans("", "", string.punctuation)
_QUOTES = re.compile("[\u00ab\u00bb\u2018\u2019\u201c\u201d]")
_TWO_WORDS = re.compile(r"\b(?:(can)(not)|(gim)(me)|(gon)(na)|(got)(ta)|(lem)(me)|(wan)(na)(?=\s))\b")
# The English stop words of NLTK, by which the evaluator goes. Those with an apostrophe are left out: when they are
# looked up there is none left, so that "don't" has become "dont", which is none of them.
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
    """Return the words of a text, lower case and without punctuation; Chinese characters one by one."""
    return tuple(_TOKEN.findall(text.lower().translate(_NO_PUNCTUATION)))


@cache
def _stemmer():
    import snowballstemmer

    return snowballstemmer.stemmer("english")


@lru_cache(maxsize=100_000)
def _stem(word: str) -> str:
    return _stemmer().stemWord(word)


@lru_cache(maxsize=100_000)
def stems(text: str) -> tuple[str, ...]:
    """Return the words that ImageCLEF's evaluator counts: without English stop words, as Snowball stems.

    Chinese characters are words of their own. The stemmer's release 3 leaves "lateral" and "internal" as they are where
    NLTK's writes "later" and "intern"; that changes a score only where one such word is taken for another.
    """
    plain = _QUOTES.sub(r" \g<0> ", text.lower().translate(_NO_ASCII_PUNCTUATION))
    words = _TOKEN.findall(_TWO_WORDS.sub(lambda found: " ".join(filter(None, found.groups())), plain))
    return tuple(_stem(word) for word in words if word not in _STOP_WORDS)


def sentence_bleu(candidate: Sequence[str], reference: Sequence[str], order: int = 4) -> float:
    """Return BLEU of a candidate against one reference (Papineni et al. 2002, equation of section 2.3).

    Uniform weights 1 / `order`, brevity penalty, no smoothing: an order of n-grams without any match is left out of the
    sum, as NLTK did with `method0` when the task was run. (Today's NLTK gives a text of fewer than four words 0, even
    where it is the reference.) 0 where no single word matches; 1 where both are empty.
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


def corpus_bleu(said: Sequence[Words], accepted: Sequence[Sequence[Words]]) -> list[float]:
    """Return BLEU-1 to BLEU-4 over all answers together (Papineni et al. 2002), as captioning reports them.

    `accepted[i]` are the references of `said[i]`. Counts are pooled over the answers, each n-gram counts no oftener
    than in the reference that has it most often, the reference nearest in length counts for brevity. No smoothing: 0
    from the first order without a match.
    """
    matches, totals, length, nearest = [0] * ORDERS, [0] * ORDERS, 0, 0
    for candidate, references in zip(said, accepted, strict=True):
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
    counted = []
    for n in range(1, ORDERS + 1):
        known: Counter[Any] = Counter()
        for reference in references:
            known |= Counter(_ngrams(reference, n))
        counted.append((Counter(_ngrams(candidate, n)) & known).total())
    return tuple(counted)


@lru_cache(maxsize=100_000)
def _overlap(candidate: Words, reference: Words) -> tuple[int, ...]:
    """Return how many 1- to 4-grams of the candidate occur in the reference, each no oftener than there.

    Plain dictionaries: for the few words of an answer a Counter takes three times as long.
    """
    found = [0] * ORDERS
    for n in range(1, min(ORDERS, len(candidate), len(reference)) + 1):
        left: dict[Any, int] = {}
        for gram in _ngrams(reference, n):
            left[gram] = left.get(gram, 0) + 1
        for gram in _ngrams(candidate, n):
            if left.get(gram):
                left[gram] -= 1
                found[n - 1] += 1
        if found[0] <= n:
            break  # a match of n + 1 words needs as many matching words
    return tuple(found)


def _ngrams(words: Sequence[str], n: int) -> Iterable[Any]:
    return words if n == 1 else zip(*(words[i:] for i in range(n)), strict=False)


def imageclef_bleu(answer: str, accepted: tuple[str, ...]) -> float:
    """Return BLEU as ImageCLEF's VQA-Med evaluator does: of `stems`, the best over the accepted answers."""
    said = stems(answer)
    return max([sentence_bleu(said, stems(other)) for other in accepted])


def token_f1(answer: str, accepted: tuple[str, ...]) -> float:
    """Return the F1 of the two bags of `tokens` (Rajpurkar et al. 2016, 6.1), best over the accepted answers."""
    said = tokens(answer)
    return max([_f1(said, tokens(other)) for other in accepted])


def _f1(said: tuple[str, ...], wanted: tuple[str, ...]) -> float:
    if not said or not wanted or said == wanted:
        return float(said == wanted)
    return 2 * _overlap(said, wanted)[0] / (len(said) + len(wanted))


def vqa_soft(answer: str, votes: Sequence[str]) -> float:
    """Return the VQA accuracy of an answer (Antol et al. 2015, section 4.2): votes of several annotators.

    The mean, over leaving out each annotator in turn, of min(1, agreeing others / 3). Texts are compared as given:
    normalise them first. For fewer than four votes any one that agrees suffices.
    """
    agreeing = sum(vote == answer for vote in votes)
    if len(votes) < 4:
        return float(agreeing > 0)
    left_out = [agreeing - (vote == answer) for vote in votes]
    return sum(min(1.0, count / 3) for count in left_out) / len(votes)
