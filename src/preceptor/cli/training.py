"""The verbs that train: demo and train."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from preceptor import api
from preceptor.cli import options
from preceptor.cli.results import show_comparison, show_results
from preceptor.cli.terminal import log_to_stderr, say, sentence

DEMO_EXAMPLES = """\
preceptor demo
preceptor demo lckd --output runs/my-demo"""

TRAIN_EXAMPLES = """\
preceptor train mhkd-demo
preceptor train mhkd-vqa-rad data.root=VQA_RAD output=runs/rad
preceptor train mhkd-vqa-rad data.root=VQA_RAD --seeds 5
preceptor train my-recipe.yaml student.train.epochs=5 'stages=[teacher]'"""


def demo(
    method: Annotated[Literal["mhkd", "lckd", "clinkd"], typer.Argument(help="Method to demonstrate.")] = "mhkd",
    output: Annotated[Path | None, options.output_folder("Run folder. Default: runs/METHOD-demo.")] = None,
    as_json: options.Json = False,
) -> None:
    """Train with and without distillation on generated data.

    The models are compared. On two CPU cores, mhkd and lckd take a few minutes and clinkd takes up to half an hour.
    mhkd answers questions about images, lckd segments volumes, clinkd answers questions with boxes.
    """
    overrides = [f"output={output}"] if output else []
    _train(f"{method}-demo", overrides, None, as_json)


def train(
    recipe: options.Recipe,
    overrides: options.Overrides = None,
    seeds: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Train N seeds, counted from the seed of the recipe, and compare them."),
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Train a recipe. If the output folder exists, training resumes.

    The stages of the recipe are trained one after the other, evaluated on the test split and compared. The run folder
    contains the models, their predictions and a report.
    """
    _train(recipe, overrides or [], seeds, as_json)


def _train(recipe: str, overrides: list[str], seeds: int | None, as_json: bool) -> None:
    log_to_stderr()
    run = api.train(recipe, overrides, seeds=seeds)

    def show(results: dict) -> None:
        if seeds is None:
            show_results(results)
        else:
            show_comparison(results)
        sentence(f"report: {run.report}")

    say(run.results, as_json, show)
