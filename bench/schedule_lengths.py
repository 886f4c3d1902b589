"""Is the distilled student better, or only sooner? Both students with schedules of one, two and four times the length.

    python bench/schedule_lengths.py --output runs/lengths                            # mhkd-demo, three seeds
    python bench/schedule_lengths.py --output runs/lengths --recipe mhkd-slake-en --data SLAKE
    python bench/schedule_lengths.py --output runs/lengths --lengths 1 3 --table      # compare what is there

One teacher is trained for all. For each length, the baseline and the distilled student are trained with the recipe's
number of epochs times the length. The first tables compare them at equal length. The last one compares each at the
length with the highest mean validation score, and gives the training seconds, in which the teacher and its cache are
not contained. The variant `inherited` is the baseline with the teacher's token embeddings as initial weights (a
distilled student whose other terms have weight 0), if the recipe lets students inherit them.
"""

from __future__ import annotations

import json

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
    for length in args.lengths:
        epochs = f"student.train.epochs={recipe.student.train.epochs * length}"
        for arm, changes in arms.items():
            output = f"output={args.output / f'{arm}-x{length:g}'}"
            preceptor.train(args.recipe, [*settings, *changes, epochs, output], seeds=args.seeds)


def main() -> None:
    parser = make_parser(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--recipe", default="mhkd-demo")
    parser.add_argument("--lengths", type=float, nargs="+", default=[1, 2, 4])
    args = parser.parse_args()
    if not args.table:
        train(args)
    runs = finished(args.output)
    show_validation(runs)
    for length in args.lengths:
        print(f"\n{length:g} times the recipe's schedule:")
        same = {name: folders for name, folders in runs.items() if name.endswith(f"-x{length:g}")}
        every = [folder for folders in same.values() for folder in folders]
        compare(every, args.output / "compare" / f"x{length:g}", baseline="baseline")
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
