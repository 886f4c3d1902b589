from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st
from nltk.stem import SnowballStemmer
from nltk.translate import bleu_score

from preceptor.evaluate.metrics import imageclef_bleu, sentence_bleu, stems, token_f1, tokens, vqa_soft

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
    assert vqa_soft("c", ["a", "b"]) == 0.0
