"""Does distillation help? Several seeds of the student alone and taught, at equal budget, with an interval.

    python bench/mhkd_seeds.py --output runs/bench-mhkd --seeds 0 1 2 3 4                       # VQA-RAD, clean split
    python bench/mhkd_seeds.py --output runs/bench-slake --recipe mhkd-slake-en
    python bench/mhkd_seeds.py --output runs/bench-med --recipe mhkd-vqa-med-2019 \\
        student.train.epochs=4 student.train.evaluate_every=4
    python bench/mhkd_seeds.py --output runs/bench-mhkd --variant output_only
    python bench/mhkd_seeds.py --output runs/bench-mhkd --table                                # print what was measured

Teachers are trained once per folder (`--teachers N`; several teach as an ensemble) and shared by all variants and
seeds; the undistilled students are shared by all variants. A variant is chosen by its validation accuracy, which is
printed beside the test accuracy; the test questions choose nothing. The data are those of the recipe: give `--data`, or
set PRECEPTOR_DATA. Settings of the recipe follow, but not straight after `--seeds` or `--only`, which would take them.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

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
    "words": ["method.inherit_token_embeddings=true"],
    "cross_words": ["method.teaching.cross_questions=1", "method.inherit_token_embeddings=true"],
    "cross3_words": ["method.teaching.cross_questions=3", "method.inherit_token_embeddings=true"],
    "rest_words": [
        "data.unlabelled=[rest]",
        "method.teaching.cross_questions=1",
        "method.inherit_token_embeddings=true",
    ],
    "rest_only_words": ["data.unlabelled=[rest]", "method.inherit_token_embeddings=true"],
    # With data.unlabelled=[...] among the settings.
    "unlabelled_words": ["method.teaching.cross_questions=1", "method.inherit_token_embeddings=true"],
    "ema": ["method.teaching.kind=ema", "method.teaching.ema_decay=0.99"],
}


def stage_folder(output: Path, name: str, seed: int) -> Path:
    return output / f"{name}-seed{seed}"


def run(output: Path, args: argparse.Namespace) -> None:
    from preceptor.vqa.run import run_recipe

    from preceptor.tasks import load_recipe

    common = [f"data.root={args.data}"] if args.data else []
    common += args.overrides
    teachers = []
    for number in range(args.teachers):
        folder = output / f"teacher-{number}"
        teachers.append(str(folder))
        if not (folder / "results.json").exists():
            run_recipe(
                load_recipe(args.recipe, [*common, f"output={folder}", f"seed={1000 + number}", "stages=[teacher]"])
            )
    taught = [f"method.teaching.runs={json.dumps(teachers)}", "method.teaching.kind=cached"]
    taught += [f"method.teaching.cache={output / f'cache-{args.variant}'}"]
    variant = VARIANTS[args.variant]
    if any(setting.startswith("method.teaching.kind=ema") for setting in variant):
        taught = [f"method.teaching.runs={json.dumps(teachers)}"]
    for seed in args.seeds:
        for name, stage, settings in (("baseline", "baseline", []), (args.variant, "distilled", variant)):
            folder = stage_folder(output, name, seed)
            if stage in args.only and not (folder / "results.json").exists():
                overrides = [*common, *taught, *settings, f"output={folder}", f"seed={seed}", f"stages=[{stage}]"]
                run_recipe(load_recipe(args.recipe, overrides))


def table(output: Path) -> None:
    """Print every variant measured in `output` against the undistilled students of the same seeds."""
    import numpy as np

    from preceptor.statistics import mean_interval, paired_bootstrap_runs
    from preceptor.vqa.evaluate import read_predictions

    def hits(folder: Path, protocol: str) -> np.ndarray:
        return np.array([row["score"] for row in sorted(read_predictions(folder, protocol), key=lambda row: row["id"])])

    def results(folder: Path) -> dict:
        return json.loads((folder / "results.json").read_text())

    def validated(result: dict) -> float:
        training = result["training"]
        return next(v["score"] for v in training["validations"] if v["step"] == training["kept_step"])

    names = sorted({p.parent.name.rsplit("-seed", 1)[0] for p in output.glob("*-seed*/results.json")} - {"baseline"})
    first = results(next(iter(sorted(output.glob("teacher-*")))))
    for protocol in first["protocols"]:
        print(f"\n### {protocol}\n")
        print(
            "| model | seeds | validation | accuracy (95 % interval over seeds) | open | closed | minus alone (95 %) |"
        )
        print("|---|---|---|---|---|---|---|")
        blind = first["baselines"][protocol]
        for name in ("majority", "question_only", "look_up"):
            cells = (f"{100 * blind[name][key]:.1f}" for key in ("accuracy", "open", "closed"))
            print(f"| without the image: {name} | | | {' | '.join(cells)} | |")
        print(f"| ceiling of the training answers | | | {100 * first['protocols'][protocol]['ceiling']:.1f} | | | |")
        for folder in sorted(output.glob("teacher-*")):
            r = results(folder)
            s = r["protocols"][protocol]
            kept = validated(r)
            print(
                f"| {folder.name} ({r['parameters'] / 1e6:.1f} M) | 1 | {100 * kept:.1f} | {100 * s['accuracy']:.1f} "
                f"| {100 * s['open']:.1f} | {100 * s['closed']:.1f} | |"
            )
        for name in ["baseline", *names]:
            seeds = sorted(int(p.parent.name.rsplit("-seed", 1)[1]) for p in output.glob(f"{name}-seed*/results.json"))
            if not seeds:
                continue
            rs = [results(stage_folder(output, name, seed)) for seed in seeds]
            scores = [r["protocols"][protocol] for r in rs]
            mean = {key: float(np.mean([s[key] for s in scores])) for key in ("accuracy", "open", "closed")}
            kept = float(np.mean([validated(r) for r in rs]))
            over = mean_interval([s["accuracy"] for s in scores]) if len(seeds) > 1 else None
            accuracy = f"{100 * mean['accuracy']:.1f}"
            accuracy += f" ({100 * over.low:.1f} to {100 * over.high:.1f})" if over else ""
            delta = ""
            both = [seed for seed in seeds if (stage_folder(output, "baseline", seed) / "results.json").exists()]
            if name != "baseline" and both:
                a, b = (
                    np.stack([hits(stage_folder(output, n, s), protocol) for s in both]) for n in (name, "baseline")
                )
                d = paired_bootstrap_runs(a, b)
                delta = f"{100 * d.mean:+.1f} ({100 * d.low:+.1f} to {100 * d.high:+.1f})"
            print(
                f"| {name} ({rs[0]['parameters'] / 1e6:.1f} M) | {len(seeds)} | {100 * kept:.1f} | {accuracy} | "
                f"{100 * mean['open']:.1f} | {100 * mean['closed']:.1f} | {delta} |"
            )
        by_question_type(output, protocol, names)
    print(f"\n{first['versions']}\n{first['machine']}")


def by_question_type(output: Path, protocol: str, names: list[str]) -> None:
    """Print the mean accuracy of each model, over teachers or seeds, by type of question: the dozen most asked."""
    patterns = {"teacher": "teacher-*", "baseline": "alone-seed*"} | {name: f"{name}-seed*" for name in names}
    types = {
        name: [json.loads(path.read_text())["protocols"][protocol]["question_types"] for path in found]
        for name, pattern in patterns.items()
        if (found := sorted(output.glob(f"{pattern}/results.json")))
    }
    counts = {kind: scores["n"] for kind, scores in next(iter(types.values()))[0].items()}
    print("\n| question type | n | " + " | ".join(types) + " |\n|---|---|" + "---|" * len(types))
    for kind in sorted(counts, key=lambda kind: -counts[kind])[:12]:
        means = (100 * sum(run[kind]["accuracy"] for run in runs) / len(runs) for runs in types.values())
        print(f"| {kind} | {counts[kind]} | " + " | ".join(f"{mean:.1f}" for mean in means) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--data", help="folder of the data set")
    parser.add_argument("--recipe", default="mhkd-vqa-rad")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--teachers", type=int, default=1)
    parser.add_argument("--variant", choices=sorted(VARIANTS), default="recipe")
    parser.add_argument(
        "--only",
        choices=["baseline", "distilled"],
        nargs="+",
        default=["baseline", "distilled"],
        help="train these alone: two processes can share the work",
    )
    parser.add_argument("--table", action="store_true", help="print what has been measured, and train nothing")
    parser.add_argument("overrides", nargs="*", help="key.sub=value for the recipe")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if not args.table:
        run(args.output, args)
    table(args.output)


if __name__ == "__main__":
    main()
