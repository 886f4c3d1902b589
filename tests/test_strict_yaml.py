"""What two YAML readers would read differently is a text, and a key that needs a number refuses it."""

from __future__ import annotations

import logging

import pytest

from preceptor.errors import UserError
from preceptor.recipe import dump_recipe
from preceptor.strict_yaml import read_yaml, write_yaml
from preceptor.tasks import load_recipe, recipe_from


@pytest.mark.parametrize("text", ["010", "08", "1_000", "0x10", "0o17", "1:30", "true", "yes", "'5'", "2024-01-01"])
def test_an_ambiguous_number_is_refused_by_its_key(text):
    for key in ("seed", "student.train.epochs"):
        with pytest.raises(UserError, match=rf"key {key}: Input should be a valid"):
            load_recipe("mhkd-demo", [f"{key}={text}"])


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "0.001", ".001", "1.0e-3", "+1e-3"])
def test_every_usual_form_of_a_number_is_one(text):
    assert load_recipe("mhkd-demo", [f"student.train.learning_rate={text}"]).student.train.learning_rate == 0.001


@pytest.mark.parametrize("text", ["no", "on", "010", "1.10", "1e5", "2024-01-01", "1_000", "é中", "a=b", "0x10", "+5"])
def test_the_name_of_a_folder_keeps_its_characters(text):
    recipe = load_recipe("mhkd-demo", [f"output={text}"])
    assert recipe.output == text
    assert recipe_from(read_yaml(dump_recipe(recipe), "x"), "x").output == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  c: 2\n", "x, line 4: the key 'c' is given twice"),
        ("a: &a [*a]", "x, line 1: an alias refers to the value that contains it"),
        ("[" * 5000, "x is nested too deeply"),
        ("a: 1\nb", r"x is not valid YAML: while scanning a simple key, could not find expected ':' \(line 2\)$"),
        ("9" * 5000, "x is not valid YAML: Exceeds the limit"),
        ("!!python/object:os.system x", "x is not valid YAML: could not determine a constructor"),
        ("a: 1\n---\nb: 2", "x is not valid YAML: expected a single document"),
        ("a: \udcff", "x is not valid YAML: unacceptable character"),
    ],
)
def test_a_document_that_cannot_be_trusted_is_refused_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as caught:
        read_yaml(text, "x")
    assert "\n" not in str(caught.value)


def test_a_billion_laughs_are_refused():
    bomb = "a0: &a0 [x,x,x,x,x,x,x,x,x,x]\n"
    bomb += "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    with pytest.raises(UserError, match="larger than 100,000 values"):
        read_yaml(bomb, "x")


def test_merged_keys_are_no_repetition():
    assert read_yaml("a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}", "x")["b"] == {"x": 1, "y": 3}


def test_texts_that_look_like_numbers_come_back():
    for value in ("1e5", "010", "no", "1:30", "1.10", "null", "~", ""):
        assert read_yaml(write_yaml({"a": value}), "x") == {"a": value}


@pytest.mark.parametrize("override", ["output=", "data.root= ", "output==x", "=x", "output"])
def test_an_override_without_a_value_is_refused(override):
    with pytest.raises(UserError, match=r"has no value|must look like"):
        load_recipe("mhkd-demo", [override])


def test_an_override_does_not_undo_another_one():
    with pytest.raises(UserError, match=r"would overwrite the earlier override of data\.root"):
        load_recipe("mhkd-demo", ["data.root=x", "data={name: table}"])


def test_settings_of_the_recipes_data_set_do_not_apply_to_another_one(caplog):
    caplog.set_level(logging.INFO, "preceptor")
    recipe = load_recipe("mhkd-vqa-rad", ["data.name=slake"])
    assert "variant" not in recipe.data.model_fields_set
    assert "data.variant=clean of recipe mhkd-vqa-rad belongs to vqa-rad" in caplog.text
    assert load_recipe("mhkd-vqa-rad", ["data.name=slake", "data.variant=clean"]).data.variant == "clean"


def test_a_mistyped_key_directly_below_method_is_named():
    with pytest.raises(UserError, match=r"unknown key 'method.teachingg'; did you mean 'method.teaching'"):
        load_recipe("mhkd-demo", ["method.teachingg=1"])
