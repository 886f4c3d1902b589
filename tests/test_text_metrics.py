from __future__ import annotations

import os
import random
import string
import warnings
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem import SnowballStemmer
from nltk.tokenize import NLTKWordTokenizer
from nltk.translate import bleu_score

from preceptor.text_metrics import (
    _STOP_WORDS,
    corpus_bleu,
    imageclef_bleu,
    sentence_bleu,
    stems,
    token_f1,
    tokens,
    vqa_soft,
)

WORDS = st.lists(st.sampled_from(["lung", "left", "right", "mass", "of", "the", "ct"]), max_size=9)


@given(WORDS, WORDS)
def test_bleu_is_that_of_nltk_where_every_order_matches(candidate, reference):
    weights = [
        bleu_score.modified_precision([reference], candidate, n).numerator if candidate else 0 for n in range(1, 5)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = bleu_score.sentence_bleu([reference], candidate) if candidate and reference else 0.0
    if all(weights):
        assert sentence_bleu(candidate, reference) == pytest.approx(theirs)
    else:
        # Theirs is 0 as soon as one order has no match; ours leaves that order out.
        assert theirs == pytest.approx(0.0, abs=1e-70) or candidate == reference
        assert sentence_bleu(candidate, reference) >= theirs


@given(WORDS, WORDS)
def test_bleu_is_a_share_and_one_for_the_reference_itself(candidate, reference):
    assert 0.0 <= sentence_bleu(candidate, reference) <= 1.0
    assert sentence_bleu(candidate, candidate) == pytest.approx(1.0)


def test_bleu_by_hand():
    # Two of three words match and one of two pairs; the orders without a match are left out; no brevity penalty.
    expected = (2 / 3) ** 0.25 * (1 / 2) ** 0.25
    assert sentence_bleu(["skull", "and", "contents"], ["skull", "and", "bones"]) == pytest.approx(expected)
    # One word of a reference of two: precision 1, brevity exp(1 - 2/1).
    assert sentence_bleu(["lung"], ["left", "lung"]) == pytest.approx(2.718281828459045**-1)
    assert sentence_bleu([], []) == 1.0
    assert sentence_bleu(["a"], []) == 0.0


def test_imageclef_takes_off_case_punctuation_stop_words_and_endings_and_the_best_alternative():
    assert imageclef_bleu("CT - Non-contrast.", ("ct noncontrast",)) == 1.0
    assert imageclef_bleu("fractures of the skull", ("yes", "skull fracture", "Fractured skull")) == 1.0
    assert imageclef_bleu("the", ("a",)) == 1.0  # nothing is left of either
    assert imageclef_bleu("xr", ("mr",)) == 0.0


def official_words(text: str) -> list[str]:
    """What the evaluator of VQA-Med 2020 counts, by NLTK: its own lines with its stop words."""
    plain = text.lower().translate(str.maketrans("", "", string.punctuation))
    english = SnowballStemmer("english")
    return [english.stem(word) for word in NLTKWordTokenizer().tokenize(plain) if word not in _STOP_WORDS]


def official_bleu(text: str, reference: str) -> float:
    """Its sentence BLEU with the `method0` of NLTK 3.2.5, which stops at the first order without a match."""
    said, wanted = official_words(text), official_words(reference)
    if not said and not wanted:
        return 1.0
    precisions = []
    for n in range(1, 5):
        precision = bleu_score.modified_precision([wanted], said, n)
        if not precision.numerator:
            break
        precisions.append(float(precision))
    if not precisions:
        return 0.0
    product = 1.0
    for precision in precisions:
        product *= precision**0.25
    return bleu_score.brevity_penalty(len(wanted), len(said)) * product


def test_the_stop_words_are_those_of_nltk_without_an_apostrophe():
    """Its list had 179 words in 2019, 26 of them with an apostrophe."""
    assert len(_STOP_WORDS) == 179 - 26
    assert {"no", "not", "s", "between", "wouldn"} <= _STOP_WORDS
    assert _STOP_WORDS.isdisjoint({"dont", "left", "right", "one", "none", "yes"})


def test_official_bleu_gives_what_nltk_3_2_5_gave():
    """Numbers of that release, run once: `sentence_bleu([reference], candidate, smoothing_function=method0)`."""
    for said, wanted, expected in [
        ("lung", "lung", 1.0),
        ("left lung", "lung", 0.8408964152537145),
        ("lung", "left lung", 0.36787944117144233),
        ("b1 b2 b3 b4 b5", "b1 b2 b3 b4 b6", 0.668740304976422),
    ]:
        assert official_bleu(said, wanted) == pytest.approx(expected)
        assert imageclef_bleu(said, (wanted,)) == pytest.approx(expected)


PIECES = [
    *("Crohn\u2019s", "disease", "don't", "cannot", "the", "no", "\u201cmass\u201d", "T2-weighted", "5.6cm"),
    *("isn\u2019t", "fractures", "mri", "(ct)", "gonna", "vs.", "shouldn't", "of"),
]
TEXTS = st.lists(st.sampled_from(PIECES), max_size=7).map(" ".join)


@given(TEXTS, TEXTS)
def test_imageclef_bleu_is_the_evaluators(text, reference):
    assert list(stems(text)) == official_words(text)
    assert imageclef_bleu(text, (reference,)) == pytest.approx(official_bleu(text, reference))


@pytest.mark.real_data
def test_imageclef_bleu_is_the_evaluators_on_real_answers():
    answers = set()
    for part in ("train", "val"):
        table = Path(os.environ["PRECEPTOR_DATA"]) / "vqa_med_2019" / part / f"All_QA_Pairs_{part}.txt"
        answers |= {line.split("|")[2].strip() for line in table.read_text("utf-8").splitlines()}
    ordered, rng = sorted(answers), random.Random(0)
    assert len(ordered) > 1500
    for _ in range(4000):
        text, reference = rng.choice(ordered), rng.choice(ordered)
        assert imageclef_bleu(text, (reference,)) == pytest.approx(official_bleu(text, reference)), (text, reference)


LONG = st.lists(st.sampled_from(["a", "b", "c"]), min_size=4, max_size=9).map(tuple)


@given(st.lists(st.tuples(LONG, st.lists(LONG, min_size=1, max_size=3)), min_size=1, max_size=5))
def test_corpus_bleu_is_that_of_nltk(pairs):
    said, accepted = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        weights = [tuple([1 / n] * n) for n in range(1, 5)]
        theirs = bleu_score.corpus_bleu(accepted, said, weights)
    assert corpus_bleu(said, accepted) == pytest.approx(theirs, rel=1e-9, abs=1e-70)


def test_corpus_bleu_of_short_answers_by_hand():
    # NLTK counts one bigram for an answer of one word; there is none. 2 of 3 words, the one pair there is.
    assert corpus_bleu([("left", "lung"), ("ct",)], [[("left", "lung")], [("mr",)]]) == pytest.approx(
        [2 / 3, (2 / 3) ** 0.5, 0.0, 0.0]
    )
    assert corpus_bleu([()], [[("a",)]]) == [0.0] * 4


ENDINGS = ["fractures", "multiple", "lesions", "generalized", "running", "masses", "easily"]


@given(st.lists(st.sampled_from(ENDINGS), min_size=1))
def test_stems_are_those_of_snowball(words):
    english = SnowballStemmer("english")
    assert stems(" ".join(words)) == tuple(english.stem(word) for word in words)


def test_chinese_is_cut_by_character():
    assert tokens("左肺。CT") == ("左", "肺", "ct")
    assert token_f1("左肺", ("右肺",)) == pytest.approx(0.5)


def test_f1_by_hand():
    assert token_f1("left lower lobe", ("right lower lobe", "x")) == pytest.approx(2 / 3)
    assert token_f1("", ("lung",)) == 0.0
    assert token_f1("lung lung", ("lung",)) == pytest.approx(2 / 3)


@given(WORDS, WORDS)
def test_f1_is_symmetric(a, b):
    assert token_f1(" ".join(a), (" ".join(b),)) == token_f1(" ".join(b), (" ".join(a),))


@pytest.mark.parametrize(("agreeing", "expected"), [(0, 0.0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1.0), (10, 1.0)])
def test_soft_score_of_ten_annotators(agreeing, expected):
    # The published table of VQA: 0.3, 0.6, 0.9, 1 for one, two, three, four of ten annotators.
    assert vqa_soft("yes", ["yes"] * agreeing + ["no"] * (10 - agreeing)) == pytest.approx(expected)


def test_soft_score_of_few_votes_is_sameness():
    assert vqa_soft("a", ["a", "b"]) == 1.0
    assert vqa_soft("a", ["a", "b", "c"]) == 1.0
    assert vqa_soft("c", ["a", "b"]) == 0.0
