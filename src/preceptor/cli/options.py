"""Arguments and options that several verbs share, and the class of a verb, which lists examples in its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from preceptor.config import BaseRecipe
from preceptor.errors import UserError

Recipe = Annotated[
    str,
    typer.Argument(metavar="RECIPE", help="Name of a shipped recipe, path of a YAML file, or a run folder."),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY.SUB=VALUE", help="Settings of the recipe to change, such as seed=3."),
]
Run = Annotated[
    Path,
    typer.Argument(metavar="RUN", exists=True, file_okay=False, help="Run folder, stage folder or model folder."),
]
Protocol = Annotated[str | None, typer.Option(metavar="ID", help="Use only this protocol.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on standard output.")]


class Verb(TyperCommand):
    """A command whose help ends with examples, one per line of `epilog`, which are not wrapped."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


def output_folder(help: str) -> Any:
    """Return the option `--output` for a folder."""
    return typer.Option("--output", metavar="DIR", file_okay=False, help=help)


def output_file(help: str) -> Any:
    """Return the option `--output` for a file."""
    return typer.Option("--output", metavar="FILE", dir_okay=False, help=help)


def existing(metavar: str, help: str, *, file: bool = True, folder: bool = True) -> Any:
    """Return an option for a path that must exist."""
    return typer.Option(metavar=metavar, exists=True, file_okay=file, dir_okay=folder, help=help)


def load_recipe(name: str, overrides: list[str] | None) -> BaseRecipe:
    """Load a recipe and check its paths, before any slow package is imported.

    Raises:
        UserError: a key or a value is wrong, or a path does not exist.
    """
    from preceptor.tasks import load_recipe

    recipe = load_recipe(name, overrides or [])
    check_paths(recipe)
    return recipe


def check_paths(recipe: BaseRecipe) -> None:
    """Raise UserError if the output folder is a file, or the data or an earlier run do not exist."""
    if recipe.output_folder.exists() and not recipe.output_folder.is_dir():
        raise UserError(f"output={recipe.output_folder} is a file; choose another folder")
    generated = recipe.data.name.startswith("phantom")
    paths = {f"data.{key}": getattr(recipe.data, key, None) for key in ("images", "split_file")}
    paths["data.root"] = None if generated else recipe.data.root
    paths["method.teaching_run"] = getattr(recipe.method, "teaching_run", None)
    for key, path in paths.items():
        if path is not None and not Path(path).exists():
            raise UserError(f"{key}={path} does not exist")
    if paths["data.root"] is None and not generated:
        from preceptor.data.locations import FOLDERS, data_folder

        if recipe.data.name in FOLDERS and not (folder := data_folder(recipe.data.name)).exists():
            raise UserError(f"{folder}, the folder of {recipe.data.name} under PRECEPTOR_DATA, does not exist")
