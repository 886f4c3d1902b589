"""Does each part of ClinKD add? The stages of a recipe at several seeds, with intervals over seeds and dialogues.

    python bench/clinkd_seeds.py --output runs/bench-clinkd                        # clinkd-slake, 3 seeds
    python bench/clinkd_seeds.py --output runs/bench-clinkd --seeds 0
    python bench/clinkd_seeds.py --output runs/bench-clinkd --table                # print what was measured

A folder per seed; started again, the script goes on. All students take the same number of steps. The data are those of
the recipe: give `--data`, or set PRECEPTOR_DATA. Settings of the recipe follow.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

SHOWN = {"vg": "recall", "roc": "accuracy", "rc": "mbmr", "mia": "mbmr"}


def run(output: Path, args: argparse.Namespace) -> None:
    from preceptor.grounding.config import GroundingRecipe
    from preceptor.grounding.run import run_vlm
    from preceptor.tasks import load_recipe

    for seed in args.seeds:
        settings = [
            f"seed={seed}",
            f"output={output / f'seed{seed}'}",
            *([f"data.root={args.data}"] if args.data else []),
        ]
        recipe = load_recipe(args.recipe, [*settings, *args.overrides])
        assert isinstance(recipe, GroundingRecipe)
        run_vlm(recipe)


def table(output: Path, protocol: str) -> None:
    """Print by stage the four tasks' scores, and per-dialogue differences to `supervised` and to the stage before."""
    import numpy as np

    from preceptor.grounding.metrics import row_score
    from preceptor.grounding.run import read_rows
    from preceptor.statistics import mean_interval, paired_bootstrap_runs

    folders = [path.parent for path in sorted(output.glob("seed*/results.json"))]
    runs = [json.loads((folder / "results.json").read_text("utf-8")) for folder in folders]
    id = next(key for key in runs[0]["protocols"] if key.endswith(f"/{protocol}"))
    print(f"{id}, {len(runs)} seeds, in percent: mean (95 % interval over seeds)\n")
    print(
        "| stage | boxes: recall@0.5 | naming: accuracy | description: mBMR | questions: mBMR |\n|---|---|---|---|---|"
    )
    tables: dict[str, list[dict[str, Any]]] = {
        name: [r["stages"][name]["protocols"][id] for r in runs] for name in runs[0]["stages"]
    }
    last = list(tables)[-1]
    if all("selection" in r["stages"][last] for r in runs):
        tables[f"{last} selected"] = [r["stages"][last]["selection"]["protocols"][id] for r in runs]
    for name, found in tables.items():
        cells = []
        for task, metric in SHOWN.items():
            values = [100 * t["tasks"][task][metric] for t in found]
            over = mean_interval(values) if len(values) > 1 else None
            cells.append(f"{np.mean(values):.1f}" + (f" ({over.low:.1f} to {over.high:.1f})" if over else ""))
        print(f"| {name} | {' | '.join(cells)} |")
    students = [name for name in tables if name != "teacher"]

    def scores(name: str, task: str) -> Any:
        stage, _, selected = name.partition(" ")
        rows = [read_rows(folder / stage, f"{id}/selected" if selected else id) for folder in folders]
        found = [[row_score(row, protocol) for row in own if row["task"] == task] for own in rows]
        return np.array([[value for value in own if value is not None] for own in found])

    print(
        "\nDifferences of the dialogues' own scores (recall, right or wrong, F1 of the words), with 95 % intervals over"
    )
    print("seeds and dialogues\n\n| | boxes | naming | description | questions |\n|---|---|---|---|---|")
    pairs = [(name, "baseline") for name in students[1:]]
    pairs += [pair for pair in zip(students[2:], students[1:], strict=False) if pair not in pairs]
    for name, other in pairs:
        cells = []
        for task in SHOWN:
            d = paired_bootstrap_runs(scores(name, task), scores(other, task))
            cells.append(f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})")
        print(f"| {name} - {other} | {' | '.join(cells)} |")
    first = runs[0]["stages"][last]
    print(f"\n{first['parameters']:,} parameters\n{first['versions']}\n{first['machine']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="clinkd-slake")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--protocol", choices=["birdeval", "strict"], default="birdeval")
    parser.add_argument("--table", action="store_true", help="print what has been measured, and train nothing")
    parser.add_argument("overrides", nargs="*", help="key.sub=value for the recipe")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not args.table:
        run(args.output, args)
    table(args.output, args.protocol)


if __name__ == "__main__":
    main()
