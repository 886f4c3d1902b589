"""Golden runs: have the weights and scores of the tiny recipes changed?

    python bench/golden_runs.py                          # print them as JSON
    python bench/golden_runs.py --against ../before      # list what differs from another checkout; exit code 1 if any
    python bench/golden_runs.py --tasks vqa segmentation

The recipes of the three tasks (`tests/fault/tiny.py`) are trained with all stages. Each checkout trains in its own
process with its own sources. Both read the same generated data, which this checkout writes. On one machine and with the
same versions of torch and its companions, equal sources give equal bytes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
STAGES = {
    "vqa": ("RECIPE", "teacher,baseline,distilled"),
    "segmentation": ("LCKD", "baseline,distilled"),
    "grounding": ("CLINKD", "teacher,baseline,guided,distilled,clinkd"),
}
"""Name of the recipe in `tests.fault.tiny` and its stages, by task."""


def train(checkout: Path, task: str, recipe: Path, folder: Path) -> dict[str, Any]:
    """Train a recipe with the sources of a checkout; return the hash of the weights and the scores of each stage.

    Raises CalledProcessError, after printing its messages, if the training fails.
    """
    settings = [f"stages=[{STAGES[task][1]}]", f"output={folder}", f"data.root={recipe.parent / f'{task}-data'}"]
    environment = os.environ | {"PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "preceptor", "train", str(recipe), *settings, "--json"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    stages = json.loads(done.stdout)["stages"]
    keys = ("weights_sha256", "protocols")
    return {name: {key: stage[key] for key in keys} for name, stage in stages.items()}


def leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries with their dotted keys."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{prefix}{key} / ")
    else:
        yield prefix.removesuffix(" / "), tree


def differences(found: dict[str, Any], expected: dict[str, Any]) -> list[str]:
    """Return one line for each value that differs."""
    ours, theirs = dict(leaves(found)), dict(leaves(expected))
    keys = dict.fromkeys([*ours, *theirs])
    return [f"{key}: {theirs.get(key)} -> {ours.get(key)}" for key in keys if ours.get(key) != theirs.get(key)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, metavar="CHECKOUT", help="another checkout of the sources")
    parser.add_argument("--tasks", nargs="+", choices=sorted(STAGES), default=list(STAGES))
    args = parser.parse_args()
    sys.path.insert(0, str(HERE))
    from tests.fault import tiny

    checkouts = [HERE, *([args.against.resolve()] if args.against else [])]
    found: list[dict[str, Any]] = [{} for _ in checkouts]
    with tempfile.TemporaryDirectory() as scratch:
        for task in args.tasks:
            recipe = Path(scratch) / f"{task}.yaml"
            recipe.write_text(getattr(tiny, STAGES[task][0]), "utf-8")
            for number, checkout in enumerate(checkouts):
                found[number][task] = train(checkout, task, recipe, Path(scratch) / f"{task}-{number}")
    print(json.dumps(found[0], indent=1))
    if args.against:
        changed = differences(*found)
        print("\n".join(changed) or "weights and scores are equal", file=sys.stderr)
        sys.exit(1 if changed else 0)


if __name__ == "__main__":
    main()
