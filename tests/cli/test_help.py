"""The help of every verb: width, examples, version, completion."""

from __future__ import annotations

import re
import shlex

import pytest
import typer
from typer import BadParameter
from typer.testing import CliRunner

import preceptor
from preceptor.cli.app import app
from preceptor.recipe import recipe_names
from preceptor.tasks import load_recipe

GROUP = typer.main.get_command(app)
VERBS = GROUP.commands  # type: ignore[attr-defined]
CALLS = [[], *([verb] for verb in VERBS), ["recipes", "show"], ["recipes", "accelerate"]]


def help_of(*arguments: str, flag: str = "--help") -> str:
    result = CliRunner().invoke(app, [*arguments, flag])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("arguments", CALLS, ids=" ".join)
def test_lines_end_before_column_80(arguments, columns, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", str(columns))
    app([*arguments, "--help"], standalone_mode=False)  # CliRunner would force another width
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 5
    for line in lines:
        assert len(line) < 80, line


@pytest.mark.parametrize("arguments", CALLS, ids=" ".join)
def test_short_and_long_flag_print_the_same(arguments):
    assert help_of(*arguments, flag="-h") == help_of(*arguments)


def test_every_verb_is_described_in_one_line_that_is_not_cut():
    listed = help_of().split("Commands:")[1].split("Examples:")[0]
    assert "..." not in listed
    assert re.findall(r"^  ([\w-]+)", listed, re.MULTILINE) == list(VERBS)


@pytest.mark.parametrize("verb", list(VERBS))
def test_every_option_and_argument_is_explained_in_sentences(verb):
    for parameter in VERBS[verb].params:
        text = parameter.help
        assert text, f"{verb} {parameter.name}"
        assert text[0].isupper() or text.split()[0].rstrip(",") in ("fsdp2", "slake-grounding"), text
        assert text.endswith("."), text


def examples() -> list[str]:
    texts = [GROUP.epilog, *(command.epilog for command in VERBS.values())]
    return [line for text in texts for line in text.replace("\\\n", "").splitlines()]


@pytest.mark.parametrize("line", examples())
def test_examples_can_be_parsed(line):
    line = line.replace("$(preceptor recipes accelerate fsdp2)", "FILE").split(" > ")[0]
    words = shlex.split(line[line.index("preceptor ") :])[1:]
    try:
        params = VERBS[words[0]].make_context(words[0], words[1:]).params
    except BadParameter as error:  # The paths do not exist here; everything else must be right.
        if "does not exist" not in str(error):
            raise
        params = {}
    if params.get("recipe") in recipe_names():
        load_recipe(params["recipe"], params["overrides"] or [])


def test_every_verb_has_examples_of_its_own():
    for verb, command in VERBS.items():
        section = help_of(verb).split("Examples:")[1]
        assert f"preceptor {verb}" in section
        assert command.epilog.splitlines()[0] in section


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"preceptor {preceptor.__version__}\n")


def test_completion_can_be_installed_and_shown():
    assert "--install-completion" in help_of()
    assert "--show-completion" in help_of()


def test_verbs_and_choices_are_completed():
    environment = {"_PRECEPTOR_COMPLETE": "complete_bash", "COMP_WORDS": "preceptor do", "COMP_CWORD": "1"}
    result = CliRunner().invoke(app, [], prog_name="preceptor", env=environment)
    assert result.stdout.split() == ["doctor"]
