"""The card of a grounded model says what its positions mean for other programs."""

from __future__ import annotations

import pytest

from preceptor.grounding.model_card import model_card
from preceptor.tasks import load_recipe


@pytest.mark.parametrize(("kind", "other_model"), [("none", False), ("fixed", True), ("clip", True)])
def test_scores_of_guided_positions_hold_in_preceptor_alone(kind: str, other_model: bool) -> None:
    results = {"stage": "guided", "protocols": {}, "provenance": {"guidance": {"kind": kind}}}
    card = model_card(results, load_recipe("clinkd-demo"))
    assert ("they compute another model, for which the scores\nbelow do not hold" in card) == other_model
    assert ("counted: as in plain transformers." in card) == (not other_model)
