"""The answer normalisers against cases worked out by hand from the published description."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.evaluate.normalise import NORMALISERS, lower, mevf

CASES = [
    ("Yes", "yes"),
    ("  Left   Lung ", "left lung"),
    ("the right lobe of the liver", "right lobe of liver"),
    ("a bit", "bit"),
    ("None", "0"),
    ("Two", "2"),
    ("ten", "10"),
    ("eleven", "eleven"),
    ("twofold", "twofold"),
    ("Chest X-ray", "chest xray"),
    ("X ray", "xray"),
    ("Xray - plain film", "xray plain film"),
    ("pulmonary/lymphatic", "pulmonary lymphatic"),
    ("RUQ pain, jaundice,weight loss?", "ruq pain jaundiceweight loss"),  # ", " somewhere: every comma is deleted
    ("jaundice,weight loss", "jaundice weight loss"),
    ("5.6cm focal, predominantly hypodense", "5.6cm focal predominantly hypodense"),
    ("On the right shoulder.", "on right shoulder"),
    ("3.4 cm", "3.4 cm"),
    ("Chronic sinusitis vs. hemorrhage", "chronic sinusitis vs hemorrhage"),
    ("100,978 cells/ml", "100978 cellsml"),  # a comma in a number: every mark is deleted
    ("10-20 minutes", "10 20 minutes"),
    ("MRI - T2 weighted", "mri t2 weighted"),
    ("On the patient's left", "on patient's left"),
    ("dont know", "don't know"),
    ("its edge is well defined", "its edge is well defined"),
    ("12:30", "12:30"),
    ("Heart \tlungs", "heart lungs"),
    ("5%", "5%"),
    ("Diffusion Weighted Imaging (DWI)", "diffusion weighted imaging dwi"),
    ("A", "a"),  # a choice, not an article: nothing else is left
    ("?", "?"),
    ("", ""),
]


@pytest.mark.parametrize(("text", "expected"), CASES)
def test_mevf_by_hand(text, expected):
    assert mevf(text) == expected


def test_lower():
    assert lower(" Chest X-ray. ") == "chest x-ray."


pieces = st.sampled_from(
    [
        *("a", "the", "none", "one", "x", "ray", "rayx", "x-ray", "dont", "its", "1", "2.5", "5,0"),
        *(".", ",", "-", "/", "?", " ", " ", "\t", "İ", "Σ", "٣"),
    ]
)
texts = st.one_of(st.lists(pieces, max_size=12).map("".join), st.text(max_size=30))


@given(texts)
def test_normalising_twice_changes_nothing(text):
    for normaliser in NORMALISERS.values():
        once = normaliser(text)
        assert normaliser(once) == once


@given(texts)
def test_case_does_not_matter(text):
    ascii_text = text.encode("ascii", "ignore").decode()
    assert mevf(ascii_text.upper()) == mevf(ascii_text.lower())
