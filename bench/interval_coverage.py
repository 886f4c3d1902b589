"""How often a 95 % interval holds the true difference of two recipes, by simulation: the table in statistics.md.

    python bench/interval_coverage.py

A question has a chance of being answered, between 0.25 and 0.75, which differs by a little between the recipes
(deviation 0.1); a seed shifts all chances of a model by its own amount. The true difference is 0.
"""

from __future__ import annotations

import argparse

import numpy as np

from preceptor.statistics import crossed_test, paired_bootstrap_runs

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
        drawn = paired_bootstrap_runs(a, b, resamples=resamples, seed=repeat)
        crossed = crossed_test(a, b, paired=True)
        low, high = min(drawn.low, crossed.low), max(drawn.high, crossed.high)
        held += [drawn.low <= 0 <= drawn.high, crossed.low <= 0 <= crossed.high, low <= 0 <= high]
    return tuple(held / repeats)


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


if __name__ == "__main__":
    main()
