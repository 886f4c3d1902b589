"""Learning curves: train a recipe on shares of its training data, over several seeds, and compare.

    python bench/learning_curves.py mhkd-vqa-rad --output runs/curves --shares 0.1 0.25 0.5 1 --seeds 0 1 2
    python bench/learning_curves.py mhkd-vqa-rad data.root=VQA_RAD --output runs/curves --stages baseline
    python bench/learning_curves.py mhkd-vqa-rad --output runs/curves --table       # compare what is there

Each share and seed has its own run, `10-percent/seed-0` in the output folder; training resumes. The shares are nested:
the samples of a smaller one are among those of every larger one. They depend on `data.split_seed`, so they are the same
for all seeds. The teacher is trained on the share, too. Settings of the recipe follow its name.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import preceptor
from preceptor.cli.results import show_comparison
from preceptor.report.format import interval, percent
from preceptor.tasks import load_recipe


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a shipped recipe, or path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="KEY.SUB=VALUE", help="settings of the recipe to change")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument("--stages", nargs="+", default=["teacher", "baseline", "distilled"])
    parser.add_argument("--baseline", help="group to compare with; default: the stage baseline")
    parser.add_argument("--table", action="store_true", help="compare what is there, and train nothing")
    args = parser.parse_args(arguments)
    if not args.table:
        stages = f"stages=[{','.join(args.stages)}]"
        # All recipes are read first: one that is invalid is refused now, not after hours of training.
        recipes = [
            load_recipe(
                args.recipe,
                [
                    *args.settings,
                    stages,
                    f"data.train_share={share}",
                    f"output={args.output / f'{100 * share:g}-percent'}",
                ],
            )
            for share in args.shares
        ]
        for recipe in recipes:
            preceptor.train(recipe, seeds=args.seeds)
    runs = sorted(path.parent for path in args.output.glob("*-percent/seed-*/results.json"))
    preceptor.compare(runs, baseline=args.baseline, output=args.output / "compare")
    document = json.loads((args.output / "compare" / "compare.json").read_text("utf-8"))
    show_comparison(document)
    print("| method | share | training samples | seeds | score (95 % interval) |\n|---|---|---|---|---|")
    for curve in document["curves"]:
        for point in curve["points"]:
            score = f"{percent(point['mean'])} ({interval(point['low'], point['high'])})"
            print(f"| {curve['method']} | {point['train_share']:.0%} | {point['train']} | {point['seeds']} | {score} |")
    print(f"\n{args.output / 'compare' / 'compare.html'}")


if __name__ == "__main__":
    main()
