"""What the benchmarks over seeds share: variants of a recipe in OUTPUT/VARIANT/seed-N, and their comparison."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import preceptor
from preceptor.cli.results import show_comparison


def make_parser(description: str | None, seeds: Sequence[int] = (0, 1, 2, 3, 4)) -> argparse.ArgumentParser:
    """Return a parser with the arguments of every benchmark over seeds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=list(seeds), action=_Seeds, help="their number, or at least two seeds"
    )
    parser.add_argument("--table", action="store_true", help="compare what is there, and train nothing")
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="settings of the recipe to change")
    return parser


class _Seeds(argparse.Action):
    """`5` is the seeds 0 to 4, as for `preceptor train`; `5 7` are the seeds 5 and 7."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if values == [0]:
            parser.error("--seeds 0 would train nothing; give their number, or at least two seeds")
        setattr(namespace, self.dest, list(range(values[0])) if len(values) == 1 else values)


def train_arms(
    recipe: str, arms: Mapping[str, Sequence[str]], settings: Sequence[str], seeds: Sequence[int], output: Path
) -> None:
    """Train the arms, one seed after the other, into OUTPUT/ARM/seed-N. What is finished is read back.

    The changes of an arm name its stage, `distilled` if they do not. An arm with `method.full` learns from the teacher
    of its seed, in OUTPUT/teacher.
    """

    def run(name: str, seed: int, *changes: str) -> Path:
        folder = output / name / f"seed-{seed}"
        own = [f"name={name}", "stages=[distilled]", *settings, *changes, f"seed={seed}", f"output={folder}"]
        preceptor.train(recipe, own)
        return folder

    for seed in seeds:
        for name, changes in arms.items():
            if any(change.startswith("method.full.weight") for change in changes):
                changes = [*changes, f"method.teaching_run={run('teacher', seed, 'stages=[teacher]')}"]
            run(name, seed, *changes)


def finished(output: Path) -> dict[str, list[Path]]:
    """Return the finished runs by name of the variant, the baseline first."""
    runs: dict[str, list[Path]] = {}
    for path in sorted(output.glob("*/seed-*/results.json")):
        runs.setdefault(path.parent.parent.name, []).append(path.parent)
    return dict(sorted(runs.items(), key=lambda item: item[0] != "baseline"))


def compare(runs: Sequence[Path], output: Path, **options: Any) -> Any:
    """Write the comparison of runs into a folder, print it and return it."""
    comparison = preceptor.compare(runs, output=output, **options)
    show_comparison(json.loads((output / "compare.json").read_text("utf-8")))
    print(f"\n{output / 'compare.html'}\n")
    return comparison


def results(run: Path) -> dict[str, Any]:
    """Return results.json of a run."""
    return json.loads((run / "results.json").read_text("utf-8"))


def validation_score(run: Path) -> float:
    """Return the validation score of the weights that a run kept."""
    training = results(run)["training"]
    return next(v["score"] for v in training["validations"] if v["step"] == training["kept_step"])


def show_validation(runs: dict[str, list[Path]]) -> None:
    """Print the mean validation score of each variant: it chooses among variants, the test split does not."""
    print("| variant | seeds | validation score, % |\n|---|---|---|")
    for name, folders in runs.items():
        mean = sum(validation_score(folder) for folder in folders) / len(folders)
        print(f"| {name} | {len(folders)} | {100 * mean:.1f} |")
