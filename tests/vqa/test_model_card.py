from __future__ import annotations

import copy
import json

import pytest
import yaml

from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.model_card import model_card


@pytest.fixture
def results(made_run) -> dict:
    return json.loads((made_run.folder / "distilled" / "results.json").read_text("utf-8"))


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


def test_front_matter_is_that_of_the_hub(results, made_run):
    front = front_matter(model_card(results, made_run.recipe))
    assert front["license"] == "other"
    assert front["library_name"] == "preceptor"
    assert "knowledge-distillation" in front["tags"]
    (entry,) = front["model-index"][0]["results"]
    assert entry["dataset"] == {"type": "toy", "name": "toy", "split": "test", "config": "published"}
    accuracy = results["protocols"]["toy/published"]["accuracy"]
    assert entry["metrics"] == [{"type": "accuracy", "name": "accuracy, toy/published", "value": round(accuracy, 4)}]


def test_a_second_run_of_the_recipe_writes_the_same_bytes(results, made_run):
    again = copy.deepcopy(results)
    again["latency_ms"] = 99.9
    again["machine"] = {"processor": "Other", "threads": 64}
    again["training"] |= {"seconds": 1.0, "samples_per_second": 9999.0}
    elsewhere = made_run.recipe.model_copy(update={"output": "/somewhere/else"})
    card = model_card(results, made_run.recipe)
    assert card == model_card(again, elsewhere)
    assert str(made_run.folder.parent) not in card


def test_the_card_says_what_it_is_and_is_not_for(results, made_run):
    card = model_card(results, made_run.recipe)
    for text in (
        "Not a medical device",
        "toy/published (n\u00a0=\u00a024)",
        "Most frequent answer",
        "Answer ceiling",
        "from scratch",
        "preceptor predict",
        "torch 2.13.0",
        results["data"]["sha256"],
        "teacher online",
        "40 steps; the weights are those of step 36",
    ):
        assert text in card


def test_a_model_that_learnt_from_labels_alone_does_not_claim_a_teacher(results, made_run):
    card = model_card(results | {"stage": "baseline"}, made_run.recipe)
    assert "teacher online" not in card
    assert "knowledge-distillation" not in front_matter(card)["tags"]


def test_text_of_users_cannot_break_the_card(results, made_run):
    hostile = results | {"notes": ["<script>alert(1)</script> a|b\n# Heading"]}
    recipe = VqaRecipe.model_validate({"name": "x: [<b>]\n---"})
    card = model_card(hostile, recipe)
    assert "<script>" not in card
    assert "\n# Heading" not in card
    assert front_matter(card)["model-index"][0]["name"] == "x: [<b>]\n---: distilled"


def test_any_part_may_be_missing(results, made_run):
    for key in results:
        for changed in ({k: v for k, v in results.items() if k != key}, results | {key: None}):
            assert "Not a medical device" in model_card(changed, made_run.recipe)
    assert "Not a medical device" in model_card({}, made_run.recipe)
