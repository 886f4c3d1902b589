"""The command line: the verbs, and what happens if one fails.

Exit codes: 0 done, 1 a check failed, 2 a mistake of the user, 130 interrupted.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Annotated

import typer
from typer.core import TyperGroup

from preceptor.cli import (
    cache,
    data,
    exporting,
    inference,
    new_vlm,
    options,
    recipes,
    results,
    serving,
    teach,
    training,
)
from preceptor.cli.errors import exit_with, flush_stdout, print_any_character

EXAMPLES = """\
preceptor demo
preceptor train mhkd-vqa-rad data.root=VQA_RAD output=runs/rad
preceptor predict runs/rad --image a.png --question "Is there a lesion?"
preceptor compare runs/a runs/b"""

_SETTINGS = {"help_option_names": ["-h", "--help"]}


class Group(TyperGroup):
    """A group of verbs whose help ends with examples."""

    format_epilog = options.Verb.format_epilog


def print_version(requested: bool) -> None:
    """Print the version and exit."""
    if requested:
        print(f"preceptor {version('preceptor')}")
        raise typer.Exit


def preceptor(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Train small medical multimodal models with the help of stronger ones."""


app = typer.Typer(
    cls=Group,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings=_SETTINGS,
    epilog=EXAMPLES,
)
app.callback()(preceptor)
for verb, examples in (
    (training.demo, training.DEMO_EXAMPLES),
    (training.train, training.TRAIN_EXAMPLES),
    (inference.evaluate, inference.EVALUATE_EXAMPLES),
    (inference.predict, inference.PREDICT_EXAMPLES),
    (serving.serve, serving.SERVE_EXAMPLES),
    (exporting.export, exporting.EXAMPLES),
    (results.compare, results.COMPARE_EXAMPLES),
    (results.score, results.SCORE_EXAMPLES),
    (results.report, results.REPORT_EXAMPLES),
    (data.doctor, data.DOCTOR_EXAMPLES),
    (data.audit, data.AUDIT_EXAMPLES),
    (cache.cache, cache.CACHE_EXAMPLES),
    (teach.teach, teach.EXAMPLES),
    (new_vlm.new_vlm, new_vlm.NEW_VLM_EXAMPLES),
):
    app.command(cls=options.Verb, epilog=examples)(verb)

recipes_app = typer.Typer(cls=Group, rich_markup_mode=None, epilog=recipes.EXAMPLES)
recipes_app.callback(invoke_without_command=True)(recipes.recipes)
recipes_app.command()(recipes.show)
recipes_app.command()(recipes.accelerate)
app.add_typer(recipes_app, name="recipes")


def main() -> None:
    """Run the command line and exit with its code."""
    print_any_character()
    try:
        try:
            app()
        finally:
            flush_stdout()
    except (Exception, KeyboardInterrupt) as error:
        sys.exit(exit_with(error))


if __name__ == "__main__":
    main()
