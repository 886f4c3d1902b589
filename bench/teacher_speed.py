"""How long the teacher of mhkd-vqa-rad trains until it is as good as MEVF with bilinear attention was published to be.

    python bench/teacher_speed.py --output runs/bench-speed --seeds 0 1 2

MEVF (Nguyen et al. 2019): 62.6 % on the 308 free-form questions of the published (leaking) split; its code takes about
155 s an epoch, 20 epochs, on two idle cores of the kind this was measured on. Printed: our training seconds and our
accuracy, per seed and in the mean. The length of the training is the recipe's, chosen on validation images; the last
step is kept. With `--validation question`, what is held out are questions about training images, cut as the release
cuts its test, so that every test image is trained on, as in MEVF.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path

MEVF_ACCURACY, MEVF_SECONDS = 0.626, 155 * 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--validation", choices=["image", "question"], default="image")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from preceptor.tasks import load_recipe
    from preceptor.vqa.run import run_recipe

    rows = []
    for seed in args.seeds:
        folder = args.output / f"seed{seed}"
        if not (folder / "results.json").exists():
            run_recipe(
                load_recipe(
                    "mhkd-vqa-rad",
                    [
                        *args.overrides,
                        f"output={folder}",
                        f"seed={seed}",
                        "stages=[teacher]",
                        "data.variant=published",
                        f"data.validation_by={args.validation}",
                    ],
                )
            )
        rows.append(json.loads((folder / "results.json").read_text()))
    print("| seed | free-form 308 | all 451 | seconds, whole training | share of MEVF's time |\n|---|---|---|---|---|")
    for row in rows:
        p, seconds = row["protocols"], row["training"]["seconds"]
        free, full = p["vqa-rad/published/freeform308"]["accuracy"], p["vqa-rad/published/451"]["accuracy"]
        print(f"| {row['seed']} | {100 * free:.1f} | {100 * full:.1f} | {seconds:.0f} | {seconds / MEVF_SECONDS:.2f} |")
    free = statistics.mean(r["protocols"]["vqa-rad/published/freeform308"]["accuracy"] for r in rows)
    seconds = statistics.mean(r["training"]["seconds"] for r in rows)
    verdict = "reaches" if free >= MEVF_ACCURACY else "does not reach"
    print(f"\nmean {100 * free:.1f} % {verdict} {100 * MEVF_ACCURACY} %; mean {seconds:.0f} of {MEVF_SECONDS} s")
    print(f"{rows[0]['versions']}\n{rows[0]['machine']}")


if __name__ == "__main__":
    main()
