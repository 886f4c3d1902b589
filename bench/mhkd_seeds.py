"""Does MHKD help? Students with and without distillation at equal budget, over several seeds.

    python bench/mhkd_seeds.py --output runs/bench-mhkd                         # VQA-RAD, variant clean, five seeds
    python bench/mhkd_seeds.py --output runs/bench-slake --recipe mhkd-slake-en
    python bench/mhkd_seeds.py --output runs/bench-med --recipe mhkd-vqa-med-2019 \\
        student.train.epochs=4 student.train.evaluate_every=4
    python bench/mhkd_seeds.py --output runs/bench-mhkd --variant output_only
    python bench/mhkd_seeds.py --output runs/bench-mhkd --table                 # compare what is there

The teachers are trained once (`--teachers N`; several teach as an ensemble), and so are the baselines; all variants use
them. A variant is chosen by its validation accuracy, never by its test accuracy. The data are those of the recipe: give
`--data`, or set PRECEPTOR_DATA. Settings of the recipe come before `--seeds`, which would take them for seeds.
"""

from __future__ import annotations

import json

import preceptor
from seeds import compare, finished, make_parser, results, show_validation

VARIANTS: dict[str, list[str]] = {
    "recipe": [],
    "output_only": [f"method.{term}.weight=0" for term in ("embedding", "hidden", "attention")],
    "output_embedding": [f"method.{term}.weight=0" for term in ("hidden", "attention")],
    "output_hidden": [f"method.{term}.weight=0" for term in ("embedding", "attention")],
    "intermediate_only": ["method.output.weight=0"],
    "temperature_1": ["method.output.temperature=1"],
    "temperature_4": ["method.output.temperature=4"],
    "output_5": ["method.output.weight=5"],
    "last_layer": ["method.hidden.layers=last", "method.attention.layers=last"],
    "relation": ["method.relation.weight=1"],
    "cross": ["method.teaching.cross_questions=2"],
    "cross_output_only": ["method.teaching.cross_questions=2"]
    + [f"method.{term}.weight=0" for term in ("embedding", "hidden", "attention")],
    "inherit": ["method.inherit_token_embeddings=true"],
    "cross_inherit": ["method.teaching.cross_questions=1", "method.inherit_token_embeddings=true"],
    "cross3_inherit": ["method.teaching.cross_questions=3", "method.inherit_token_embeddings=true"],
    "rest_inherit": [
        "data.unlabelled=[rest]",
        "method.teaching.cross_questions=1",
        "method.inherit_token_embeddings=true",
    ],
    "rest_only_inherit": ["data.unlabelled=[rest]", "method.inherit_token_embeddings=true"],
    # With data.unlabelled=[...] among the settings.
    "unlabelled_inherit": ["method.teaching.cross_questions=1", "method.inherit_token_embeddings=true"],
    "ema": ["method.teaching.kind=ema", "method.teaching.ema_decay=0.99"],
}


def train(args) -> None:
    """Train the teachers, the baselines and the students of a variant. What is finished is read back."""
    settings = [*([f"data.root={args.data}"] if args.data else []), *args.overrides]
    teachers = []
    for number in range(args.teachers):
        folder = args.output / f"teacher-{number}"
        preceptor.train(args.recipe, [*settings, f"output={folder}", f"seed={1000 + number}", "stages=[teacher]"])
        teachers.append(str(folder))
    teaching = [
        f"method.teaching.runs={json.dumps(teachers)}",
        "method.teaching.kind=cached",
        f"method.teaching.cache={args.output / 'cache' / args.variant}",
        *VARIANTS[args.variant],
    ]
    for name, stage, changes in (("baseline", "baseline", []), (args.variant, "distilled", teaching)):
        own = [*settings, *changes, f"stages=[{stage}]", f"output={args.output / name}"]
        preceptor.train(args.recipe, own, seeds=args.seeds)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--recipe", default="mhkd-vqa-rad")
    parser.add_argument("--teachers", type=int, default=1)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="recipe")
    args = parser.parse_args()
    if not args.table:
        train(args)
    runs = finished(args.output)
    teachers = sorted(path.parent for path in args.output.glob("teacher-*/results.json"))
    show_validation({folder.name: [folder] for folder in teachers} | runs)
    every = [*teachers, *(run for folders in runs.values() for run in folders)]
    for protocol, blind in results(teachers[0])["baselines"].items():
        print(f"\n{protocol} without the image, accuracy in %:")
        for name, scores in blind.items():
            print(f"  {name}: {100 * scores['accuracy']:.1f}")
        compare(every, args.output / "compare" / protocol.replace("/", "-"), baseline="baseline", protocol=protocol)


if __name__ == "__main__":
    main()
