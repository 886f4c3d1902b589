"""LCKD on real patients: arms of the recipe lckd-brats-cubes over several seeds, scored on the validation patients.

    python bench/lckd_cubes.py --data CUBES --output runs/cubes --arms baseline multi --seeds 5
    python bench/lckd_cubes.py --data CUBES --output runs/cubes --arms baseline baseline_3x baseline_9x dedicated
    python bench/lckd_cubes.py --data CUBES --output runs/cubes --arms baseline self ema metakd specialists
    python bench/lckd_cubes.py --data CUBES --output runs/cubes-30 --share 0.3 --arms baseline full_unlabelled
    python bench/lckd_cubes.py --output runs/cubes --table                        # compare what is there

Runs that are finished are read back, and an interrupted one is continued. The test patients of the recipe's split take
no part: its 45 validation patients are scored here, and 30 of its training patients validate (they elect teachers and
select the weights). `--final` uses the recipe's own split, for one last run of what the study has chosen.

OUTPUT/study.md has the tables: scores and differences from `baseline` with intervals over seeds and patients, and p
after Holm's correction for all arms in OUTPUT, those that were dropped included; Dice by combination of contrasts; and
what share of the lead of networks dedicated to one contrast each arm recovers. Settings of the recipe come before
`--arms` and `--seeds`.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lckd_seeds import VARIANTS
from preceptor.data.segmentation.named_splits import named_splits
from preceptor.data.segmentation.split_files import read_split
from preceptor.data.splits import ordered
from preceptor.pipeline.run_dir import read_predictions
from preceptor.report.format import interval, p_value, percent, points
from preceptor.statistics import Difference, compare_scores
from preceptor.tasks import load_recipe
from seeds import compare, finished, make_parser, results, show_validation, train_arms

RECIPE = "lckd-brats-cubes"
CONTRASTS = ("flair", "t1", "t1ce", "t2")
DEDICATED = "dedicated_"
BASELINE = "stages=[baseline]"
COMMON = ["report.cases=0"]
SELECTING = 7
"""One of so many training patients selects the weights."""
TEACHER = "teacher"
SPECIALISTS = "specialists"

LENGTHS = {"baseline_3x": 3, "baseline_9x": 9, "multi_3x": 3, "multi_9x": 9}
"""Arms with more steps than the recipe."""
ARMS: dict[str, list[str]] = {
    **VARIANTS,
    "baseline_3x": [BASELINE],
    "baseline_9x": [BASELINE],
    "multi_3x": ["method.teachers=multi"],
    "multi_9x": ["method.teachers=multi"],
    "baseline_sizes": [BASELINE, "method.dropping.kind=sizes"],
    "baseline_published_dropping": [BASELINE, "method.dropping.kind=published"],
    "baseline_rate_1e-3": [BASELINE, "train.learning_rate=1.0e-3"],
    "baseline_rate_4e-3": [BASELINE, "train.learning_rate=4.0e-3"],
    "baseline_shared": [BASELINE, "model.encoder=shared"],
    "early": [BASELINE, "model.net=early"],
    "baseline_shared_norms": [BASELINE, "model.encoder=shared", "model.norm_per_modality=true"],
    TEACHER: ["stages=[teacher]"],
    **{f"{DEDICATED}{contrast}": [BASELINE, f"data.modalities=[{contrast}]"] for contrast in CONTRASTS},
    "multi_weight_0.01": ["method.teachers=multi", "method.cross_modal.weight=0.01"],
    "multi_weight_1": ["method.teachers=multi", "method.cross_modal.weight=1"],
    "multi_weight_10": ["method.teachers=multi", "method.cross_modal.weight=10"],
    "multi_all": ["method.teachers=multi", "method.cross_modal.weight=1", "method.cross_modal.levels=all"],
    "multi_all_unlabelled": [
        "method.teachers=multi",
        "method.cross_modal.weight=1",
        "method.cross_modal.levels=all",
        "data.unlabelled=rest",
    ],
}

METHODS: dict[str, str] = {
    "self": "{name: kd, teacher: self, output: {ramp: 0.3}}",
    "self_unlabelled": "{name: kd, teacher: self, output: {ramp: 0.3}}",
    "ema": "{name: kd, teacher: ema, output: {ramp: 0.3}}",
    "ema_unlabelled": "{name: kd, teacher: ema, output: {ramp: 0.3}}",
    "metakd": "{name: metakd}",
    "metakd_weight_1": "{name: metakd, pairs: {weight: 1}}",
    "metakd_all": "{name: metakd, pairs: {weight: 1, levels: all}}",
    SPECIALISTS: "{name: specialists, runs: {RUNS}}",
    "specialists_mean": "{name: specialists, runs: {SINGLE}}",
}
"""Arms with another method than the recipe. RUNS are the runs of the dedicated networks and of the full one."""


def method_arms(names: Sequence[str], output: Path, seed: int) -> dict[str, list[str]]:
    """Return the changes of those arms that have another method. Specialists are the networks of the same seed."""
    single = [f"{contrast}: '{output / (DEDICATED + contrast) / f'seed-{seed}'}'" for contrast in CONTRASTS]
    full = f"full: '{output / TEACHER / f'seed-{seed}'}'"
    arms = {}
    for name in names:
        method = METHODS[name].replace("RUNS", ", ".join([*single, full])).replace("SINGLE", ", ".join(single))
        arms[name] = [f"method={method}", *(["data.unlabelled=rest"] if name.endswith("_unlabelled") else [])]
    return arms


def write_study_split(split: Path, file: Path) -> None:
    """Write the split of the study: validation patients are scored, some training patients select."""
    entries = read_split(split)
    training = ordered((name for name, entry in entries.items() if entry.split == "train"), "study:0")
    selecting = set(training[::SELECTING])
    part = {"validation": "test", "train": "train"}
    rows = [
        (name, "validation" if name in selecting else part[entry.split])
        for name, entry in entries.items()
        if entry.split in part
    ]
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as opened:
        csv.writer(opened, lineterminator="\n").writerows([("case", "split"), *rows])


def lengths(factor: float, overrides: Sequence[str]) -> list[str]:
    """Return the overrides for `factor` times the epochs, with as many validations and elections."""
    recipe = load_recipe(RECIPE, list(overrides))
    epochs = {f"train.{key}": getattr(recipe.train, key) for key in ("epochs", "evaluate_every", "checkpoint_every")}
    epochs["method.election.every"] = recipe.method.election.every
    return [f"{key}={value * factor:.12g}" for key, value in epochs.items()] if factor != 1 else []


def chosen_arms(names: Sequence[str], share: float, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the changes of the named arms that have the recipe's method.

    `dedicated` stands for four of them. Specialists need them and the full teacher.
    """
    every = [f"{DEDICATED}{contrast}" for contrast in CONTRASTS]
    needed = {"dedicated": every, SPECIALISTS: [*every, TEACHER], "specialists_mean": every}
    arms = [arm for name in names for arm in needed.get(name, [name] if name in ARMS else [])]
    longer = {name: lengths(LENGTHS[name] / share, overrides) if name in LENGTHS else [] for name in arms}
    return {name: [*longer[name], *ARMS[name]] for name in arms}


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def score_table(comparison: Any) -> str:
    """Return the arms with their Dice by region and number of contrasts, and the differences from the baseline."""
    contrasts = {contrast.group.name: contrast for contrast in comparison.contrasts}
    parts = [category.name for category in comparison.categories[1:]]
    rows = []
    for group in comparison.groups:
        score = comparison.score(group)
        by_part = [percent(score.mean) for score in comparison.scores[group.name][1:]]
        row = [group.models[0].source.parent.name, str(len(group.models)), percent(score.mean), *by_part]
        if contrast := contrasts.get(group.name):
            d = contrast.overall
            row += [f"{points(d.difference)} ({interval(d.low, d.high, points)})", p_value(d.p_holm)]
        rows.append([*row, *[""] * (len(parts) + 5 - len(row))])
    return markdown(["arm", "seeds", "Dice, %", *parts, "minus baseline (95 %)", "p, Holm"], rows)


def part_table(comparison: Any) -> str:
    """Return the differences from the baseline by region and by number of contrasts."""
    rows = [
        [
            contrast.group.models[0].source.parent.name,
            part.category.name,
            f"{points(part.difference)} ({interval(part.low, part.high, points)})",
            p_value(part.p_holm),
        ]
        for contrast in comparison.contrasts
        for part in contrast.parts
    ]
    return markdown(["arm", "part", "minus baseline (95 %)", "p, Holm"], rows)


def dice_by_subset(runs: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Return the Dice (seeds, cases) by arm, subset and region."""
    found: dict[str, dict[str, dict[str, np.ndarray]]] = {}
    for arm, folders in runs.items():
        values: dict[str, dict[str, list[list[float]]]] = {}
        for number, folder in enumerate(folders):
            protocol = next(iter(results(folder)["protocols"]))
            for row in sorted(read_predictions(folder, protocol), key=lambda row: row["id"]):
                seeds = values.setdefault(row["subset"], {}).setdefault(row["region"], [[] for _ in folders])
                seeds[number].append(row["dice"])
        found[arm] = {s: {region: np.array(v) for region, v in by.items()} for s, by in values.items()}
    return found


def subset_table(dice: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]]) -> str:
    names = list(dict.fromkeys(subset for by in dice.values() for subset in by))
    rows = [
        [
            subset,
            *(
                " ".join(f"{100 * v.mean():.1f}" for v in by[subset].values()) if subset in by else ""
                for by in dice.values()
            ),
        ]
        for subset in names
    ]
    regions = " ".join(next(iter(next(iter(dice.values())).values())))
    return markdown([f"Dice of {regions}, %", *dice], rows)


def headroom_table(
    dice: Mapping[str, Mapping[str, Mapping[str, np.ndarray]]], runs: Mapping[str, Sequence[Path]]
) -> str:
    """Return, for each contrast alone, the lead of the dedicated network and the share of it that an arm recovers."""
    rows = []
    for contrast in CONTRASTS:
        if f"{DEDICATED}{contrast}" not in dice or "baseline" not in dice:
            continue

        def gained(arm: str, subset: str = contrast) -> Difference:
            """Return the difference from the baseline in the mean over regions."""
            one, other = (np.mean(list(dice[name][subset].values()), axis=0) for name in (arm, "baseline"))
            same_seeds = [run.name for run in runs[arm]] == [run.name for run in runs["baseline"]]
            return compare_scores(one, other, paired=same_seeds)

        lead = gained(f"{DEDICATED}{contrast}")
        for arm in dice:
            if arm == "baseline" or arm.startswith(DEDICATED):
                continue
            gain = gained(arm)
            share = f"{100 * gain.difference / lead.difference:.0f} %" if lead.low is not None and lead.low > 0 else ""
            shown = [f"{points(d.difference)} ({interval(d.low, d.high, points)})" for d in (lead, gain)]
            rows.append([contrast, arm, *shown, share])
    return markdown(["contrast alone", "arm", "dedicated minus baseline", "arm minus baseline", "recovered"], rows)


def write_tables(output: Path) -> None:
    """Print the comparison of what is finished, and write study.md."""
    runs = finished(output)
    show_validation(runs)
    joint = [run for arm, folders in runs.items() if not arm.startswith((DEDICATED, TEACHER)) for run in folders]
    sections = [f"Arms: {', '.join(runs)}.\n"]
    if "baseline" in runs and joint != runs["baseline"]:
        comparison = compare(joint, output / "compare", baseline=str(runs["baseline"][0]))
        sections += [score_table(comparison), part_table(comparison)]
    dice = dice_by_subset({arm: folders for arm, folders in runs.items() if arm != TEACHER})
    sections += [subset_table(dice), headroom_table(dice, runs)]
    (output / "study.md").write_text("\n".join(sections), "utf-8")
    print(output / "study.md")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = make_parser(__doc__)
    choices = [*ARMS, *METHODS, "dedicated"]
    parser.add_argument("--arms", nargs="+", choices=choices, default=["baseline", "multi"], metavar="ARM")
    parser.add_argument("--data", type=Path, help="folder of the cubes")
    parser.add_argument("--split", type=Path, default=named_splits()["brats20-cubes-210-45-45"], help="split file")
    parser.add_argument("--share", type=float, default=1.0, help="share of the training patients that have masks")
    parser.add_argument(
        "--final", action="store_true", help="score the test patients of the split, not those to validate"
    )
    args = parser.parse_args(arguments)
    if not args.table:
        split = args.split if args.final else args.output / "split.csv"
        if not args.final:
            write_study_split(args.split, split)
        if args.data is None:
            parser.error("--data is needed to train")
        settings = [*COMMON, f"data.root={args.data}", "data.split=null", f"data.split_file={split}"]
        # As many steps where fewer patients have masks.
        settings += [f"data.train_share={args.share}", *args.overrides, *lengths(1 / args.share, args.overrides)]
        arms = chosen_arms(args.arms, args.share, args.overrides)
        # Of the settings of a method, other methods have the loss of the masks and the dropping of modalities.
        general = [setting for setting in settings if not setting.startswith("method.")]
        shared = [setting for setting in settings if setting.startswith(("method.loss.", "method.dropping."))]
        others = [name for name in args.arms if name in METHODS]
        for seed in args.seeds:
            train_arms(RECIPE, arms, settings, [seed], args.output)
            changes = method_arms(others, args.output, seed)
            train_arms(RECIPE, {n: [*c, *shared] for n, c in changes.items()}, general, [seed], args.output)
    write_tables(args.output)


if __name__ == "__main__":
    main()
