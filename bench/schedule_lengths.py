"""Is the distilled student better, or only faster? Train both students with one, two and four times the schedule.

    python bench/schedule_lengths.py --output runs/lengths                            # mhkd-demo, three seeds
    python bench/schedule_lengths.py --output runs/lengths --recipe mhkd-slake-en --data SLAKE
    python bench/schedule_lengths.py --output runs/lengths --lengths 1 --matched      # the same seconds of compute
    python bench/schedule_lengths.py --output runs/lengths --lengths 1 3 --table      # compare what is there

One teacher is trained for all. For each length, the baseline and the distilled student are trained with the recipe's
number of epochs times the length. The first tables compare them at equal length. The last one compares each at the
length with the highest mean validation score, and gives the training seconds, in which the teacher and its cache are
not contained.

With `--matched`, the arm `matched` is the baseline with more epochs: as many as fit into the seconds of teacher, cache
and one distilled student, from the measured seconds of an epoch. Measure on a machine with nothing else to do.

The variant `inherited` is the baseline with the teacher's token embeddings as initial weights (a distilled student
whose other terms have weight 0), if the recipe lets students inherit them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

import preceptor
from preceptor.tasks import load_recipe
from seeds import compare, finished, make_parser, results, show_validation, validation_score

TERMS = ("output", "embedding", "hidden", "attention", "relation")


def train(args) -> None:
    """Train the teacher and the students of all lengths. What is finished is read back."""
    settings = [*([f"data.root={args.data}"] if args.data else []), *args.overrides]
    recipe = load_recipe(args.recipe, settings)
    teacher = args.output / "teacher-0"
    preceptor.train(args.recipe, [*settings, f"output={teacher}", "seed=1000", "stages=[teacher]"])
    teaching = [f"method.teaching.runs={json.dumps([str(teacher)])}", "stages=[distilled]"]
    arms = {
        "baseline": ["stages=[baseline]"],
        "distilled": [*teaching, "method.teaching.kind=cached", f"method.teaching.cache={args.output / 'cache'}"],
    }
    if recipe.method.inherit_token_embeddings:
        arms["inherited"] = [*teaching, "method.teaching.kind=online", *(f"method.{term}.weight=0" for term in TERMS)]

    def students(arm: str, changes: Sequence[str], length: float, epochs: float) -> None:
        output = f"output={args.output / f'{arm}-x{length:g}'}"
        preceptor.train(
            args.recipe, [*settings, *changes, f"student.train.epochs={epochs:g}", output], seeds=args.seeds
        )

    write_cache(args, [*settings, *arms["distilled"]])
    for length in args.lengths:
        epochs = recipe.student.train.epochs * length
        for arm, changes in arms.items():
            students(arm, changes, length, epochs)
        if args.matched:
            students("matched", arms["baseline"], length, round(epochs * matched_factor(args, length), 2))


def write_cache(args, settings: Sequence[str]) -> None:
    """Write the teacher's cache, and the seconds that it took into OUTPUT/cache-seconds.json."""
    record = args.output / "cache-seconds.json"
    if not record.exists():
        begun = time.monotonic()
        preceptor.cache(args.recipe, settings)
        record.write_text(json.dumps(time.monotonic() - begun))


def matched_factor(args, length: float) -> float:
    """Return the epochs that the baseline gets for the compute of teacher, cache and distillation, over its own."""

    def seconds(name: str) -> float:
        folders = [args.output / name / f"seed-{seed}" for seed in args.seeds]
        return sum(results(folder)["training"]["seconds"] for folder in folders) / len(folders)

    teacher = results(args.output / "teacher-0")["training"]["seconds"]
    cache = json.loads((args.output / "cache-seconds.json").read_text("utf-8"))
    return (teacher + cache + seconds(f"distilled-x{length:g}")) / seconds(f"baseline-x{length:g}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--recipe", default="mhkd-demo")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1, 2, 4])
    parser.add_argument("--matched", action="store_true", help="also train the baseline for the same seconds")
    args = parser.parse_args(arguments)
    if not args.table:
        train(args)
    runs = finished(args.output)
    show_validation(runs)
    for length in args.lengths:
        print(f"\n{length:g} times the recipe's schedule:")
        same = {name: folders for name, folders in runs.items() if name.endswith(f"-x{length:g}")}
        every = [folder for folders in same.values() for folder in folders]
        # Its folder, because `matched` is the stage `baseline`, too.
        compare(every, args.output / "compare" / f"x{length:g}", baseline=str(same[f"baseline-x{length:g}"][0]))
    chosen = {}
    for arm in ("baseline", "distilled"):
        mine = {name: folders for name, folders in runs.items() if name.startswith(f"{arm}-x")}
        chosen[arm] = max(mine, key=lambda name: sum(map(validation_score, mine[name])) / len(mine[name]))
        seconds = [results(folder)["training"]["seconds"] for folder in mine[chosen[arm]]]
        print(f"{arm}: validation chooses {chosen[arm]}, {sum(seconds) / len(seconds):.0f} s a seed")
    every = [folder for name in chosen.values() for folder in runs[name]]
    compare(every, args.output / "compare" / "chosen", baseline="baseline")


if __name__ == "__main__":
    main()
