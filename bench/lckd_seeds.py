"""Does LCKD help? The same network and budget without distillation and with each kind of it, over seeds.

    python bench/lckd_seeds.py --output runs/bench-lckd                                 # all variants, five seeds
    python bench/lckd_seeds.py --output runs/bench-lckd --variants alone multi --seeds 0 1
    python bench/lckd_seeds.py --output runs/bench-lckd --table                         # print what was measured
    python bench/lckd_seeds.py --output runs/bench-lckd-scarce --scarce                 # masks for 12 of the 60 cases

Generated cases: 60 train, 20 validate and elect, 40 test. A variant is chosen by its validation Dice, which is printed
beside the test Dice; test cases choose nothing. Started again, the script goes on; two processes can share the seeds.
Settings of the recipe follow.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

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
WHERE_ALL = ["baseline", "single", "multi", "per_task", "full"]
WHERE_SCARCE = ["baseline", "full", "full_unlabelled", "multi_and_full_unlabelled"]
VARIANTS: dict[str, list[str]] = {
    "baseline": [],
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


def run(output: Path, variants: list[str], seeds: list[int], overrides: list[str]) -> None:
    from preceptor.segmentation.run import run_segmentation

    from preceptor.segmentation.config import SegmentationRecipe
    from preceptor.tasks import load_recipe

    def train(folder: Path, seed: int, stage: str, settings: list[str]) -> None:
        if (folder / "results.json").exists():
            return
        settings = [*COMMON, *settings, *overrides, f"seed={seed}", f"stages=[{stage}]", f"output={folder}"]
        recipe = load_recipe("lckd-demo", [*settings, f"data.root={output / 'cases'}"])
        assert isinstance(recipe, SegmentationRecipe)
        run_segmentation(recipe)

    for seed in seeds:
        for name in variants:
            settings = list(VARIANTS[name])
            if any(setting.startswith("method.full.weight") for setting in settings):
                train(output / f"teacher-seed{seed}", seed, "teacher", [])
                settings.append(f"method.teaching_run={output / f'teacher-seed{seed}'}")
            stage = "baseline" if name == "baseline" else "distilled"
            train(output / f"{name}-seed{seed}", seed, stage, settings)


def table(output: Path) -> None:
    """Print every variant against `alone` with the same seeds: Dice, the mean over a case's 15 subsets."""
    import numpy as np
    from preceptor.segmentation.run import by_case

    from preceptor.statistics import mean_interval, paired_bootstrap_runs

    found: dict[str, dict[int, Path]] = {}
    for path in sorted(output.glob("*-seed*/results.json")):
        name, _, seed = path.parent.name.rpartition("-seed")
        found.setdefault(name, {})[int(seed)] = path.parent
    first = json.loads((next(iter(found["baseline"].values())) / "results.json").read_text())
    protocol = next(iter(first["protocols"]))
    regions = first["regions"]

    def dice(folder: Path) -> np.ndarray:
        cases = by_case(folder, protocol)
        return np.column_stack([cases, cases.mean(axis=1)])

    print(f"{protocol}, mean Dice over {len(first['protocols'][protocol]['subsets'])} combinations, in percent\n")
    print(
        f"| variant | seeds | validation | {' | '.join([*regions, 'mean'])} | minus alone: {', '.join(regions)}, mean |"
    )
    print(f"|---|---|---|{'---|' * (len(regions) + 2)}")
    for name in sorted(
        found, key=lambda name: (name not in VARIANTS, list(VARIANTS).index(name) if name in VARIANTS else 0)
    ):
        folders = found[name]
        scores = np.stack([dice(folder) for folder in folders.values()])
        validation = []
        for folder in folders.values():
            training = json.loads((folder / "results.json").read_text())["training"]
            validation.append(max(v["score"] for v in training["validations"]))
        cells = []
        for i in range(len(regions) + 1):
            over = mean_interval([float(seed[:, i].mean()) for seed in scores]) if len(scores) > 1 else None
            cells.append(
                f"{100 * scores[..., i].mean():.1f}"
                + (f" ({100 * over.low:.1f} to {100 * over.high:.1f})" if over else "")
            )
        both = [seed for seed in folders if seed in found["baseline"]]
        deltas = ""
        if name not in ("baseline", "teacher") and both:
            parts = []
            for i in range(len(regions) + 1):
                mine, theirs = (np.stack([dice(found[n][s])[:, i] for s in both]) for n in (name, "baseline"))
                d = paired_bootstrap_runs(mine, theirs)
                parts.append(f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})")
            deltas = "; ".join(parts)
        print(f"| {name} | {len(folders)} | {100 * np.mean(validation):.1f} | {' | '.join(cells)} | {deltas} |")
    print(f"\n{first['versions']}\n{first['machine']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS))
    parser.add_argument(
        "--scarce", action="store_true", help="12 of the 60 training cases have masks; variants of that"
    )
    parser.add_argument("--table", action="store_true", help="print what has been measured, and train nothing")
    parser.add_argument("overrides", nargs="*", help="key.sub=value for the recipe")
    args = parser.parse_args()
    variants = args.variants or (WHERE_SCARCE if args.scarce else WHERE_ALL)
    overrides = [*(SCARCE if args.scarce else []), *args.overrides]
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not args.table:
        run(args.output, variants, args.seeds, overrides)
    table(args.output)


if __name__ == "__main__":
    main()
