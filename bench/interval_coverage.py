"""How often a 95 % interval holds the true difference, by simulation: the tables in statistics.md.

    python bench/interval_coverage.py

First two recipes over seeds: a question has a chance of being answered, between 0.25 and 0.75, which differs by a
little between the recipes (deviation 0.1); a seed shifts all chances of a model by its own amount. Then two single
models on questions in groups: all questions about an image have one chance, between 0.25 and 0.75, which the other
model shifts by an amount of the image (deviation 0.25). The true difference is 0.
"""

from __future__ import annotations

import argparse

import numpy as np

from preceptor.statistics import (
    adjust_holm,
    compare_scores,
    crossed_test,
    mcnemar,
    paired_bootstrap,
    score_interval,
    wilson,
)

CASES = [
    (450, 2, 0.05),
    (450, 3, 0.0),
    (450, 3, 0.05),
    (450, 5, 0.02),
    (3000, 2, 0.03),
    (3000, 3, 0.03),
    (3000, 5, 0.03),
]


def coverage(questions: int, seeds: int, of_seed: float, repeats: int, resamples: int) -> tuple[float, float, float]:
    """Return the shares of intervals that hold 0: of the bootstrap, the analysis of variance and their hull."""
    rng = np.random.default_rng(questions + seeds)
    held = np.zeros(3)
    for repeat in range(repeats):
        skill = rng.uniform(0.25, 0.75, questions)
        mine = skill + 0.1 * rng.standard_normal(questions) + of_seed * rng.standard_normal((seeds, 1))
        a, b = (np.clip(mine, 0, 1) > rng.random((seeds, questions)), skill > rng.random((seeds, questions)))
        drawn = paired_bootstrap(a, b, resamples=resamples, seed=repeat)
        crossed = crossed_test(a, b, paired=True)
        low, high = min(drawn.low, crossed.low), max(drawn.high, crossed.high)
        held += [drawn.low <= 0 <= drawn.high, crossed.low <= 0 <= crossed.high, low <= 0 <= high]
    return tuple(held / repeats)


def coverage_of_groups(images: int, equal: bool, repeats: int, resamples: int) -> np.ndarray:
    """Return shares of repeats, first as if questions were independent and then as they are compared.

    The intervals of the difference that hold 0; the tests with p below 0.05; the intervals of the accuracy that hold
    it. An image has 5 questions or, unless `equal`, 2 to 20.
    """
    rng = np.random.default_rng(images + equal)
    held = np.zeros(6)
    for repeat in range(repeats):
        sizes = np.full(images, 5) if equal else np.minimum(1 + rng.geometric(0.2, images), 20)
        groups = np.repeat(np.arange(images), sizes)
        skill = rng.uniform(0.25, 0.75, images)
        shifted = np.clip(skill + 0.25 * rng.standard_normal(images), 0, 1)
        a, b = (chance[groups] > rng.random(len(groups)) for chance in (shifted, skill))
        naive = paired_bootstrap(a, b, resamples=resamples, seed=repeat)
        found = compare_scores([a], [b], paired=True, groups=groups.tolist(), resamples=resamples)
        share, alone = score_interval([b], groups=groups.tolist()), wilson(int(b.sum()), len(b))
        held += [
            naive.low <= 0 <= naive.high,
            found.low <= 0 <= found.high,
            mcnemar(a, b) < 0.05,
            adjust_holm([found])[0].significant,
            alone.low <= 0.5 <= alone.high,
            share.low <= 0.5 <= share.high,
        ]
    return held / repeats


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--resamples", type=int, default=500)
    args = parser.parse_args()
    print("| questions | seeds | deviation of a seed, points | bootstrap | analysis of variance | hull |")
    print("|---|---|---|---|---|---|")
    for questions, seeds, of_seed in CASES:
        found = coverage(questions, seeds, of_seed, args.repeats, args.resamples)
        shown = " | ".join(f"{100 * share:.1f} %" for share in found)
        print(f"| {questions:,} | {seeds} | {100 * of_seed:g} | {shown} |", flush=True)
    print("\n| images | questions each | difference | grouped | alarms | grouped | accuracy | grouped |")
    print("|---|---|---|---|---|---|---|---|")
    for images in (10, 20, 50, 200):
        for equal in (True, False):
            found = coverage_of_groups(images, equal, args.repeats, args.resamples)
            shown = " | ".join(f"{100 * share:.1f} %" for share in found)
            print(f"| {images} | {'5' if equal else '2 to 20'} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
