"""How long does the teacher of mhkd-vqa-rad train until it is as good as the published MEVF with bilinear attention?

    python bench/teacher_speed.py --output runs/bench-speed --seeds 0 1 2

MEVF (Nguyen et al. 2019): 62.6 % on the 308 free-form questions of the leaking variant; its code takes about
155 s per epoch on two idle cores, for 20 epochs. The number of epochs is the recipe's and was chosen on validation
images. With `--validation question`, questions about training images are held out instead, as the release does for its
test split, so that every test image is trained on, as in MEVF.
"""

from __future__ import annotations

import statistics

import preceptor
from seeds import make_parser, results

MEVF_ACCURACY, MEVF_SECONDS = 0.626, 155 * 20
FREE_FORM, ALL = "vqa-rad/published/freeform308", "vqa-rad/published/451"


def main() -> None:
    parser = make_parser(__doc__, seeds=(0, 1, 2))
    parser.add_argument("--validation", choices=["image", "question"], default="image")
    args = parser.parse_args()
    if not args.table:
        settings = ["stages=[teacher]", "data.variant=published", f"data.validation_by={args.validation}"]
        preceptor.train("mhkd-vqa-rad", [*args.overrides, *settings, f"output={args.output}"], seeds=args.seeds)
    rows = [results(path.parent) for path in sorted(args.output.glob("seed-*/results.json"))]
    print("| seed | free-form 308 | all 451 | training in s | share of MEVF's time |\n|---|---|---|---|---|")
    for row in rows:
        free, full = (100 * row["protocols"][protocol]["accuracy"] for protocol in (FREE_FORM, ALL))
        seconds = row["training"]["seconds"]
        print(f"| {row['seed']} | {free:.1f} | {full:.1f} | {seconds:.0f} | {seconds / MEVF_SECONDS:.2f} |")
    free = statistics.mean(row["protocols"][FREE_FORM]["accuracy"] for row in rows)
    seconds = statistics.mean(row["training"]["seconds"] for row in rows)
    verdict = "reaches" if free >= MEVF_ACCURACY else "does not reach"
    print(f"\nmean {100 * free:.1f} % {verdict} {100 * MEVF_ACCURACY} %; mean {seconds:.0f} of {MEVF_SECONDS} s")
    print(f"{rows[0]['versions']}\n{rows[0]['machine']}")


if __name__ == "__main__":
    main()
