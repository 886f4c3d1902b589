"""Does each part of ClinKD help? The stages of a recipe over several seeds.

    python bench/clinkd_seeds.py --output runs/bench-clinkd                     # clinkd-slake, three seeds
    python bench/clinkd_seeds.py --output runs/bench-clinkd --table             # compare what is there

All students take the same number of steps. Printed: every stage against the baseline, then each against the one before.
The data are those of the recipe: give `--data`, or set PRECEPTOR_DATA. Settings of the recipe come before `--seeds`,
which would take them for seeds.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import preceptor
from seeds import compare, make_parser, results


def main() -> None:
    parser = make_parser(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--recipe", default="clinkd-slake")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--protocol", choices=["birdeval", "strict"], default="birdeval")
    args = parser.parse_args()
    if not args.table:
        data = [f"data.root={args.data}"] if args.data else []
        preceptor.train(args.recipe, [*data, *args.overrides, f"output={args.output}"], seeds=args.seeds)
    runs = sorted(path.parent for path in args.output.glob("seed-*/results.json"))
    document = results(runs[0])
    protocol = next(id for id in document["protocols"] if id.endswith(f"/{args.protocol}"))
    compare(runs, args.output / "compare", protocol=protocol)
    students = [stage for stage in document["stages"] if stage != "teacher"]
    for earlier, later in list(pairwise(students))[1:]:
        pair = [run / stage for stage in (earlier, later) for run in runs]
        compare(pair, args.output / f"{later}-and-{earlier}", protocol=protocol, baseline=earlier)
    for run in runs:
        selection = results(run / students[-1]).get("selection")
        for task, scores in selection["protocols"][protocol]["tasks"].items() if selection else ():
            cells = (f"{key} {100 * value:.1f}" for key, value in scores.items() if isinstance(value, float))
            print(f"{run.name}, selected answers, {task} in %: {', '.join(cells)}")


if __name__ == "__main__":
    main()
