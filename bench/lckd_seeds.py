"""Does LCKD help? The same network and budget without distillation and with each kind of it, over several seeds.

    python bench/lckd_seeds.py --output runs/bench-lckd                         # all variants, five seeds
    python bench/lckd_seeds.py --output runs/bench-lckd --variants baseline multi --seeds 0 1
    python bench/lckd_seeds.py --output runs/bench-lckd --table                 # compare what is there
    python bench/lckd_seeds.py --output runs/bench-lckd-scarce --scarce         # masks for 12 of the 60 cases

60 generated cases train, 20 validate and elect, 40 test. A variant is chosen by its validation Dice, never by its test
Dice. Variants with `method.full` learn from the teacher of their seed. Settings of the recipe come before
`--seeds`, which would take them for seeds.
"""

from __future__ import annotations

from seeds import compare, finished, make_parser, show_validation, train_arms

COMMON = [
    "data.phantom.train=60",
    "data.phantom.validation=20",
    "data.phantom.test=40",
    "data.phantom.size=32",
    "evaluation.overlap=0",
    "evaluation.validation_overlap=0",
    "train.epochs=40",
    "train.evaluate_every=20",
    "method.election.every=5",
    "method.full.weight=0",
    "data.train_share=1",
    "data.unlabelled=none",
]
SCARCE = ["data.train_share=0.2", "train.epochs=200", "train.evaluate_every=100", "method.election.every=25"]
ALL_LABELLED = ["baseline", "single", "multi", "per_task", "full"]
FEW_LABELLED = ["baseline", "full", "full_unlabelled", "multi_and_full_unlabelled"]
VARIANTS: dict[str, list[str]] = {
    "baseline": ["stages=[baseline]"],
    "single": ["method.teachers=single"],
    "multi": ["method.teachers=multi"],
    "per_task": ["method.teachers=per_task"],
    "published": ["method.teachers=multi", "method.cross_modal.students=all", "method.cross_modal.pairs=sum"],
    "strong": ["method.teachers=multi", "method.cross_modal.weight=1"],
    "normalised": ["method.teachers=multi", "method.cross_modal.weight=1", "method.cross_modal.normalise=true"],
    "normalised_all": [
        "method.teachers=multi",
        "method.cross_modal.weight=1",
        "method.cross_modal.normalise=true",
        "method.cross_modal.levels=all",
    ],
    "per_task_normalised_all": [
        "method.teachers=per_task",
        "method.cross_modal.weight=1",
        "method.cross_modal.normalise=true",
        "method.cross_modal.levels=all",
    ],
    "projected": ["method.teachers=multi", "method.cross_modal.weight=1", "method.cross_modal.projector=true"],
    "projected_all": [
        "method.teachers=multi",
        "method.cross_modal.weight=1",
        "method.cross_modal.projector=true",
        "method.cross_modal.levels=all",
    ],
    "late": ["method.teachers=multi", "method.cross_modal.start=0.3", "method.cross_modal.ramp=0.2"],
    "full": ["method.cross_modal.weight=0", "method.full.weight=1"],
    "full_features": ["method.cross_modal.weight=0", "method.full.weight=1", "method.full.features=0.1"],
    "full_unlabelled": ["method.cross_modal.weight=0", "method.full.weight=1", "data.unlabelled=rest"],
    "multi_and_full": ["method.teachers=multi", "method.full.weight=1"],
    "multi_and_full_unlabelled": ["method.teachers=multi", "method.full.weight=1", "data.unlabelled=rest"],
}


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS))
    parser.add_argument("--scarce", action="store_true", help="masks for 12 of the 60 training cases")
    args = parser.parse_args()
    if not args.table:
        settings = [*COMMON, *(SCARCE if args.scarce else []), *args.overrides, f"data.root={args.output / 'cases'}"]
        names = args.variants or (FEW_LABELLED if args.scarce else ALL_LABELLED)
        train_arms("lckd-demo", {name: VARIANTS[name] for name in names}, settings, args.seeds, args.output)
    runs = finished(args.output)
    show_validation(runs)
    compare([run for folders in runs.values() for run in folders], args.output / "compare", baseline="baseline")


if __name__ == "__main__":
    main()
