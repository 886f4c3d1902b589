"""The verb recipes and its own verbs."""

from __future__ import annotations

from typing import Annotated

import typer

from preceptor.cli import options
from preceptor.cli.terminal import say, table

EXAMPLES = """\
preceptor recipes
preceptor recipes show mhkd-vqa-rad > my-recipe.yaml
accelerate launch --config_file $(preceptor recipes accelerate fsdp2) \\
  -m preceptor train clinkd-demo"""


def recipes(context: typer.Context, as_json: options.Json = False) -> None:
    """List the shipped recipes, or print one."""
    if context.invoked_subcommand:
        return
    from preceptor.recipe import recipe_names
    from preceptor.tasks import load_recipe

    descriptions = {name: load_recipe(name).description for name in recipe_names()}
    say(descriptions, as_json, lambda found: table("recipes", ["name", "description"], list(map(list, found.items()))))


def show(name: Annotated[str, typer.Argument(metavar="NAME", help="Name of a shipped recipe.")]) -> None:
    """Print a recipe with its comments."""
    from preceptor.recipe import recipe_text

    print(recipe_text(name)[0], end="")


def accelerate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="fsdp2 or fsdp2-zero2.")],
) -> None:
    """Print the path of a shipped configuration for `accelerate launch`."""
    from preceptor.recipe import accelerate_file

    print(accelerate_file(name))
