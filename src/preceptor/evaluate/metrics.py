"""Scores in [0, 1] of one answer where sameness is too strict: BLEU, token F1, VQA's votes."""

from __future__ import annotations

import math
import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cache, lru_cache

_NO_PUNCTUATION = str.maketrans("", "", string.punctuation + "，。？！、；：（）“”‘’")  # noqa: RUF001
# A Chinese character is a token of its own; everything else is parted by white space.
_TOKEN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\s\u3400-\u4dbf\u4e00-\u9fff]+")
# The English stop words of NLTK, by which the evaluator of ImageCLEF goes, without those that hold an apostrophe (no
# punctuation is left when they are looked up) and with their remains.
_WORDS = """
i me my myself we our ours ourselves you youre youve youll youd your yours yourself yourselves he him his himself she
shes her hers herself it its itself they them their theirs themselves what which who whom this that thatll these those
am is are was were be been being have has had having do does did doing a an the and but if or because as until while of
at by for with about against between into through during before after above below to from up down in out on off over
under again further then once here there when where why how all any both each few more most other some such no nor not
only own same so than too very s t can will just don dont should shouldve now d ll m o re ve y ain aren arent couldn
couldnt didn didnt doesn doesnt hadn hadnt hasn hasnt haven havent isn isnt ma mightn mightnt mustn mustnt needn neednt
shan shant shouldn shouldnt wasn wasnt weren werent won wont wouldn wouldnt
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
    """Return `tokens` without English stop words, as Snowball stems."""
    return tuple(_stem(word) for word in tokens(text) if word not in _STOP_WORDS)


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
    if set(candidate).isdisjoint(reference):
        return 0.0
    logarithms = 0.0
    for n in range(1, order + 1):
        said, wanted = _ngrams(tuple(candidate), n), _ngrams(tuple(reference), n)
        matches = sum(min(count, wanted[gram]) for gram, count in said.items())
        if not matches:
            break  # nor do longer ones
        logarithms += math.log(matches / (len(candidate) - n + 1)) / order
    brevity = min(0.0, 1 - len(reference) / len(candidate))
    return math.exp(brevity + logarithms)


@lru_cache(maxsize=100_000)
def _ngrams(words: tuple[str, ...], n: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[i:] for i in range(n)), strict=False))


def imageclef_bleu(answer: str, accepted: tuple[str, ...]) -> float:
    """Return BLEU as ImageCLEF's VQA-Med evaluator does: of `stems`, the best over the accepted answers."""
    said = stems(answer)
    return max(sentence_bleu(said, stems(other)) for other in accepted)


def token_f1(answer: str, accepted: tuple[str, ...]) -> float:
    """Return the F1 of the two bags of `tokens` (Rajpurkar et al. 2016, 6.1), best over the accepted answers."""
    return max(_f1(tokens(answer), tokens(other)) for other in accepted)


def _f1(said: tuple[str, ...], wanted: tuple[str, ...]) -> float:
    if not said or not wanted or said == wanted:
        return float(said == wanted)
    if set(said).isdisjoint(wanted):
        return 0.0
    shared = (Counter(said) & Counter(wanted)).total()
    return 2 * shared / (len(said) + len(wanted))


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
