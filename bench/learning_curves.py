"""Learning curves: a recipe trained on shares of the training data, over seeds, and the comparison of what came out.

    python bench/learning_curves.py mhkd-vqa-rad --output runs/curves --shares 0.1 0.25 0.5 1 --seeds 0 1 2
    python bench/learning_curves.py mhkd-vqa-rad data.root=VQA_RAD --output runs/curves --stages alone
    python bench/learning_curves.py mhkd-vqa-rad --output runs/curves --table       # compare what is there, and no more

Each share and seed is a run of its own, `10-percent/seed-0` in the output folder; a finished one is not touched again,
an interrupted one goes on where it stopped. The shares are nested: the rows of a smaller one are among those of every
larger one, chosen by `data.split_seed` and so the same for all seeds. The teacher, too, learns from the share alone,
and anew for each seed. Settings of the recipe follow its name.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

STAGES = ("teacher", "baseline", "distilled")


def run_folder(output: Path, share: float, seed: int) -> Path:
    return output / f"{100 * share:g}-percent" / f"seed-{seed}"


def train(
    recipe: str, output: Path, shares: Sequence[float], seeds: Sequence[int], stages: Sequence[str], settings: list[str]
) -> list[Path]:
    """Train what is not finished yet; return the run folders."""
    import preceptor
    from preceptor.errors import UserError
    from preceptor.recipe import differences
    from preceptor.tasks import load_recipe

    recipes = []
    # Every share once before the next seed, so that a curve exists early. All recipes are validated before the first
    # training, so that a mistake is reported now and not after hours.
    for seed in seeds:
        for share in shares:
            own = [f"data.train_share={share}", f"seed={seed}", f"stages=[{','.join(stages)}]"]
            own.append(f"output={run_folder(output, share, seed)}")
            recipes.append(load_recipe(recipe, [*settings, *own]))
    for loaded in recipes:
        if not (loaded.output_folder / "results.json").is_file():
            preceptor.train(loaded)
        elif changed := differences(
            load_recipe(str(loaded.output_folder)).model_dump(mode="json"), loaded.model_dump(mode="json")
        ):
            raise UserError(
                f"{loaded.output_folder} is finished, but not by this recipe ({changed[0]}); change --output"
            )
        print(f"{loaded.output_folder}: finished", flush=True)
    return [loaded.output_folder for loaded in recipes]


def finished(output: Path) -> list[Path]:
    """Return the finished runs in the output folder."""
    return sorted(path.parent for path in output.glob("*-percent/seed-*/results.json"))


def compare(runs: Sequence[Path], output: Path, baseline: str | None) -> None:
    """Write the comparison of the runs and print its learning curves."""
    from preceptor.compare.run import compare_runs, write_comparison

    document = write_comparison(compare_runs(runs, baseline=baseline), output / "compare")
    print(f"\n{document['protocol']}, n = {document['n']}\n")
    print("| method | share | training rows | seeds | score (95 % interval) |\n|---|---|---|---|---|")
    for curve in document["curves"]:
        for p in curve["points"]:
            interval = "" if p["low"] is None else f" ({100 * p['low']:.1f} to {100 * p['high']:.1f})"
            cells = [
                curve["method"],
                f"{p['train_share']:.0%}",
                p["train"],
                p["seeds"],
                f"{100 * p['mean']:.1f}{interval}",
            ]
            print(f"| {' | '.join(map(str, cells))} |")
    print(f"\n{output / 'compare' / 'compare.html'}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="name of a shipped recipe, or the path of a YAML file")
    parser.add_argument("settings", nargs="*", metavar="KEY.SUB=VALUE", help="settings of the recipe to change")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--stages", nargs="+", default=list(STAGES))
    parser.add_argument("--baseline", help="group to compare with; default: the stage baseline")
    parser.add_argument("--table", action="store_true", help="compare the finished runs and train nothing")
    args = parser.parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if args.table:
        runs = finished(args.output)
    else:
        runs = train(args.recipe, args.output, args.shares, args.seeds, args.stages, args.settings)
    compare(runs, args.output, args.baseline)


if __name__ == "__main__":
    main()
