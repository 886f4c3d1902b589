"""LCKD on real patients: arms of the recipe lckd-brats-cubes over several seeds, scored on the validation patients.

    python bench/lckd_cubes.py --data CUBES --output runs/cubes --arms baseline multi --seeds 5
    python bench/lckd_cubes.py --data CUBES --output runs/cubes --arms baseline baseline_3x baseline_9x dedicated
    python bench/lckd_cubes.py --data CUBES --output runs/cubes --arms baseline self ema metakd specialists
    python bench/lckd_cubes.py --data CUBES --output runs/cubes --arms baseline self self_prototypes
    python bench/lckd_cubes.py --data CUBES --output runs/cubes-30 --share 0.3 --arms baseline full_unlabelled \
        pseudo_masks
    python bench/lckd_cubes.py --data CUBES --output runs/cubes-2468 --absent 2468 --arms baseline multi self_prototypes
    python bench/lckd_cubes.py --data CUBES --output runs/cubes-paired --share 0.3 --paired --arms baseline \
        multi_all_unlabelled pseudo_masks
    python bench/lckd_cubes.py --output runs/cubes --table                        # compare what is there

Runs that are finished are read back, and an interrupted one is continued. The test patients of the recipe's split take
no part: its 45 validation patients are scored here, and 30 of its training patients validate (they elect teachers and
select the weights). `--final` uses the recipe's own split, for one last run of what the study has chosen.

`--absent 2468`: contrasts are truly absent in training, at the rates 0.2, 0.4, 0.6 and 0.8 of t1, t1ce, flair and t2
(PASSION, Shi et al. 2024, `generate_imb_mr.py`). Every combination gets its expected number of training patients, and
which patients it gets is fixed; networks dedicated to a contrast take as many steps as the others. Patients that select
or are scored have all contrasts. `--paired`: patients with masks,
those that select included, have flair and t1ce alone; the others (`--share`) have no masks and all four contrasts, so
that no mask of t1 or t2 is ever seen. Each regime needs an OUTPUT of its own.

OUTPUT/study.md has the tables: scores and differences from `baseline` with intervals over seeds and patients, and p
after Holm's correction for all arms in OUTPUT, those that were dropped included; Dice by combination of contrasts; and
what share of the lead of networks dedicated to one contrast each arm recovers. Settings of the recipe come before
`--arms` and `--seeds`.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lckd_seeds import VARIANTS
from preceptor.data.segmentation.named_splits import named_splits
from preceptor.data.segmentation.split_files import read_split
from preceptor.data.splits import ordered
from preceptor.errors import UserError
from preceptor.pipeline.run_dir import read_predictions
from preceptor.report.format import interval, p_value, percent, points
from preceptor.segmentation.data import read_cases
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
RATES_OF = ("t1", "t1ce", "flair", "t2")
"""Order of the contrasts in the names of PASSION's rates."""
WITH_MASKS = ("flair", "t1ce")
"""Contrasts of the patients with masks in the regime `--paired`."""
PAIRED_TEACHER = f"{TEACHER}_flair_t1ce"

LENGTHS = {"baseline_2x": 2, "baseline_3x": 3, "baseline_9x": 9, "multi_3x": 3, "multi_9x": 9}
"""Arms with more steps than the recipe."""
ARMS: dict[str, list[str]] = {
    **VARIANTS,
    "baseline_2x": [BASELINE],
    "baseline_3x": [BASELINE],
    "baseline_9x": [BASELINE],
    "multi_3x": ["method.teachers=multi"],
    "multi_9x": ["method.teachers=multi"],
    "baseline_sizes": [BASELINE, "method.modality_dropout.kind=sizes"],
    "baseline_published_dropping": [BASELINE, "method.modality_dropout.kind=published"],
    "baseline_rate_1e-3": [BASELINE, "train.learning_rate=1.0e-3"],
    "baseline_rate_4e-3": [BASELINE, "train.learning_rate=4.0e-3"],
    "baseline_shared": [BASELINE, "model.encoder=shared"],
    "early": [BASELINE, "model.net=early"],
    "baseline_shared_norms": [BASELINE, "model.encoder=shared", "model.norm_per_modality=true"],
    TEACHER: ["stages=[teacher]"],
    PAIRED_TEACHER: [BASELINE, f"data.modalities=[{','.join(WITH_MASKS)}]"],
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
    "self_prototypes": "{name: kd, teacher: self, output: {ramp: 0.3}, prototypes: {weight: 0.1, ramp: 0.3}}",
    "self_prototypes_weight_1": "{name: kd, teacher: self, output: {ramp: 0.3}, prototypes: {weight: 1, ramp: 0.3}}",
    "ema": "{name: kd, teacher: ema, output: {ramp: 0.3}}",
    "ema_unlabelled": "{name: kd, teacher: ema, output: {ramp: 0.3}}",
    "ema_prototypes": "{name: kd, teacher: ema, output: {ramp: 0.3}, prototypes: {weight: 0.1, ramp: 0.3}}",
    "born_again": "{name: kd, teaching_run: PSEUDO}",
    "pseudo_masks": "{name: kd, teaching_run: PSEUDO, output: {weight: 0}}",
    "pseudo_masks_warm": "{name: kd, teaching_run: PSEUDO, initialise_from_teacher: true, output: {weight: 0}}",
    "pseudo_masks_soft": "{name: kd, teaching_run: PSEUDO}",
    "metakd": "{name: metakd}",
    "metakd_weight_1": "{name: metakd, pairs: {weight: 1}}",
    "metakd_all": "{name: metakd, pairs: {weight: 1, levels: all}}",
    SPECIALISTS: "{name: specialists, runs: {RUNS}}",
    "specialists_mean": "{name: specialists, runs: {SINGLE}}",
}
"""Arms with another method than the recipe. RUNS are the runs of the dedicated networks and of the full one, PSEUDO is
the run that draws the masks of the unlabelled cases: the baseline, or, `--paired`, that of the contrasts with masks.
`pseudo_masks_warm` starts from the weights of that run, so that its weights have had as many steps as `baseline_2x`.
`born_again`: the trained baseline's prediction from all contrasts teaches the same network anew (Furlanello et al.
2018)."""


def pseudo_teacher(paired: bool) -> str:
    """Return the arm whose networks draw pseudo-masks."""
    return PAIRED_TEACHER if paired else "baseline"


def method_arms(names: Sequence[str], output: Path, seed: int, paired: bool = False) -> dict[str, list[str]]:
    """Return the changes of those arms that have another method. Their teachers are the networks of the same seed."""
    single = [f"{contrast}: '{output / (DEDICATED + contrast) / f'seed-{seed}'}'" for contrast in CONTRASTS]
    full = f"full: '{output / TEACHER / f'seed-{seed}'}'"
    arms = {}
    for name in names:
        method = METHODS[name].replace("RUNS", ", ".join([*single, full])).replace("SINGLE", ", ".join(single))
        method = method.replace("PSEUDO", f"'{output / pseudo_teacher(paired) / f'seed-{seed}'}'")
        unlabelled = name.endswith("_unlabelled") or name.startswith("pseudo_masks")
        arms[name] = [f"method={method}", *(["data.unlabelled=rest"] if unlabelled else [])]
    return arms


Row = tuple[str, str, str]
"""Case, split, and the contrasts that it has, joined by +; empty: all of its own."""


def study_rows(split: Path, final: bool = False) -> list[Row]:
    """Return the split of the study: validation patients are scored, some training patients select.

    `final`: the split as it is.
    """
    entries = read_split(split)
    training = ordered((name for name, entry in entries.items() if entry.split == "train"), "study:0")
    selecting = set() if final else set(training[::SELECTING])
    part = {p: p for p in ("train", "validation", "test")} if final else {"validation": "test", "train": "train"}
    return [
        (name, "validation" if name in selecting else part[entry.split], "+".join(sorted(entry.modalities or ())))
        for name, entry in entries.items()
        if entry.split in part
    ]


def with_absent(rows: Sequence[Row], rates: str) -> list[Row]:
    """Return the rows, with contrasts absent from the training cases at `rates`, tenths in the order of `RATES_OF`.

    The contrasts of a case are independent, given that it has one. Of each combination there are as many cases as
    expected, by the largest remainders, in a fixed order of the cases.
    """
    missing = [int(digit) / 10 for digit in rates]
    combinations = [c for c in itertools.product((True, False), repeat=len(missing)) if any(c)]
    chances = [math.prod(1 - p if there else p for p, there in zip(missing, c, strict=True)) for c in combinations]
    training = ordered((name for name, split, _ in rows if split == "train"), "absent:0")
    expected = [len(training) * chance / sum(chances) for chance in chances]
    numbers = [int(number) for number in expected]
    by_remainder = sorted(range(len(numbers)), key=lambda i: numbers[i] - expected[i])
    for i in by_remainder[: len(training) - sum(numbers)]:
        numbers[i] += 1
    shown = ("+".join(m for m, there in zip(RATES_OF, c, strict=True) if there) for c in combinations)
    each = itertools.chain.from_iterable(itertools.repeat(names, n) for names, n in zip(shown, numbers, strict=True))
    of = dict(zip(training, each, strict=True))
    return [(name, split, of.get(name, names)) for name, split, names in rows]


def dedicated_shares(rows: Sequence[Row]) -> dict[str, float]:
    """Return the share of the training cases that have the contrast of each dedicated network."""
    training = [names.split("+") if names else CONTRASTS for _, split, names in rows if split == "train"]
    return {f"{DEDICATED}{c}": sum(c in names for names in training) / len(training) for c in CONTRASTS}


def paired_rows(settings: Sequence[str], scratch: Path) -> list[Row]:
    """Return the rows of the regime `--paired`, for the cases whose masks the settings use."""
    data = read_cases(load_recipe(RECIPE, [*settings, "data.unlabelled=rest", BASELINE]).data, scratch)
    masked = ("train", "validation")
    return [
        (
            case.id,
            "train" if case.split == "unlabelled" else case.split,
            "+".join(WITH_MASKS) if case.split in masked else "",
        )
        for case in data.samples
    ]


def write_split(rows: Iterable[Row], file: Path) -> None:
    """Write a split file. Raises UserError if the study in its folder has another one."""
    head, kept = ("case", "split", "modalities"), list(rows)
    columns = 3 if any(names for _, _, names in kept) else 2
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(row[:columns] for row in [head, *kept])
    if file.exists() and file.read_text("utf-8") != text.getvalue():
        raise UserError(f"{file} is the split of another regime; give another --output")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text.getvalue(), "utf-8")


def lengths(factor: float, overrides: Sequence[str]) -> list[str]:
    """Return the overrides for `factor` times the epochs, with as many validations and elections."""
    recipe = load_recipe(RECIPE, list(overrides))
    epochs = {f"train.{key}": getattr(recipe.train, key) for key in ("epochs", "evaluate_every", "checkpoint_every")}
    epochs["method.election.every"] = recipe.method.election.every
    return [f"{key}={value * factor:.12g}" for key, value in epochs.items()] if factor != 1 else []


def chosen_arms(
    names: Sequence[str],
    share: float,
    overrides: Sequence[str],
    paired: bool = False,
    shares: Mapping[str, float] | None = None,
) -> dict[str, list[str]]:
    """Return the changes of the named arms that have the recipe's method.

    `dedicated` stands for four of them. Specialists need them and the full teacher, and pseudo-masks their teacher.
    `shares`: arms with a share of the training cases, which take as many steps as the others.
    """
    every = [f"{DEDICATED}{contrast}" for contrast in CONTRASTS]
    needed = {"dedicated": every, SPECIALISTS: [*every, TEACHER], "specialists_mean": every}
    needed |= {name: [pseudo_teacher(paired)] for name, method in METHODS.items() if "PSEUDO" in method}
    arms = [arm for name in names for arm in needed.get(name, [name] if name in ARMS else [])]
    factors = {name: LENGTHS.get(name, 1) / (shares or {}).get(name, 1) for name in arms}
    longer = {name: lengths(factor / share, overrides) if factor != 1 else [] for name, factor in factors.items()}
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
            if arm == "baseline" or arm.startswith(DEDICATED) or contrast not in dice[arm]:
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
    regime = parser.add_mutually_exclusive_group()
    regime.add_argument("--absent", metavar="RATES", help="missing rates in training, as 2468: t1, t1ce, flair, t2")
    regime.add_argument("--paired", action="store_true", help="masks for flair and t1ce alone, the rest unlabelled")
    args = parser.parse_args(arguments)
    if not args.table:
        if args.data is None:
            parser.error("--data is needed to train")
        if args.absent and not (len(args.absent) == len(RATES_OF) and args.absent.isdecimal()):
            parser.error(f"--absent {args.absent}: give four digits, as 2468 for 0.2, 0.4, 0.6 and 0.8")
        if args.paired and args.share == 1:
            parser.error("--paired needs patients without masks: give --share below 1")
        settings = [*COMMON, f"data.root={args.data}", "data.split=null", f"data.train_share={args.share}"]
        rows, split = study_rows(args.split, args.final), args.output / "split.csv"
        if args.paired:
            patients = args.output / "patients.csv"
            write_split(rows, patients)
            rows = paired_rows([*settings, f"data.split_file={patients}", *args.overrides], args.output / "data")
        elif args.absent:
            rows = with_absent(rows, args.absent)
        elif args.final:
            split = args.split
        if split != args.split:
            write_split(rows, split)
        settings.append(f"data.split_file={split}")
        # As many steps where fewer patients have masks.
        settings += [*args.overrides, *lengths(1 / args.share, args.overrides)]
        shares = dedicated_shares(rows) if args.absent else {}
        arms = chosen_arms(args.arms, args.share, args.overrides, args.paired, shares)
        # Of the settings of a method, other methods have the loss of the masks and modality dropout.
        general = [setting for setting in settings if not setting.startswith("method.")]
        shared = [setting for setting in settings if setting.startswith(("method.loss.", "method.modality_dropout."))]
        others = [name for name in args.arms if name in METHODS]
        for seed in args.seeds:
            train_arms(RECIPE, arms, settings, [seed], args.output)
            changes = method_arms(others, args.output, seed, args.paired)
            train_arms(RECIPE, {n: [*c, *shared] for n, c in changes.items()}, general, [seed], args.output)
    write_tables(args.output)


if __name__ == "__main__":
    main()
