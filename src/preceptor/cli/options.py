"""Arguments and options that several verbs share, and the class of a verb, which lists examples in its help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from preceptor import arguments

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
    typer.Argument(metavar="RUN", exists=True, file_okay=False, help="Run folder or stage folder."),
]
Model = Annotated[
    Path,
    typer.Argument(metavar="RUN", exists=True, help="Run, stage or model folder, or a packed model (.zip)."),
]
Protocol = Annotated[str | None, typer.Option(metavar="ID", help="Use only this protocol.")]
TrustRemoteCode = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code",
        help="Import the class (module:Class) that the model names. Use it only if you know its code.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON document on standard output.")]


class Verb(TyperCommand):
    """A command whose help ends with examples, one per line of `epilog`, which are not wrapped."""

    def format_epilog(self, ctx: Any, formatter: Any) -> None:
        if self.epilog:
            with formatter.section("Examples"):
                for line in self.epilog.splitlines():
                    formatter.write(f"  {line}\n")


def expand_home(path: Path | None) -> Path | None:
    """Replace ``~`` by the home folder: a shell does not do it in ``--output=~/folder``."""
    return None if path is None else arguments.expand_home(path)


def output_folder(help: str) -> Any:
    """Return the option `--output` for a folder."""
    return typer.Option("--output", metavar="DIR", file_okay=False, help=help, callback=expand_home)


def output_file(help: str) -> Any:
    """Return the option `--output` for a file."""
    return typer.Option("--output", metavar="FILE", dir_okay=False, help=help, callback=expand_home)


def existing(metavar: str, help: str, *, file: bool = True, folder: bool = True) -> Any:
    """Return an option for a path, or for several, that must exist. ``~`` is expanded before that is checked."""
    kind = "Path" if file and folder else "File" if file else "Directory"

    def check(value: Path | list[Path] | None) -> Path | list[Path] | None:
        if isinstance(value, list | tuple):
            return [require(path) for path in value]
        return None if value is None else require(value)

    def require(given: Path) -> Path:
        path = arguments.expand_home(given)
        if not path.exists():
            raise typer.BadParameter(f"{kind} '{path}' does not exist.")
        if not (folder if path.is_dir() else file):
            raise typer.BadParameter(f"{kind} '{path}' is a {'directory' if path.is_dir() else 'file'}.")
        return path

    return typer.Option(metavar=metavar, help=help, callback=check)
