"""Fuzz all readers from random seeds, count the inputs, and save those whose outcome is neither right nor a sentence.

python bench/fuzz.py --minutes 60
python bench/fuzz.py --minutes 5 --targets nifti dicom --seed 7 --output runs/fuzz

The time is shared among the targets. Each runs in a process of its own with a limit of memory; a process that crashes
or hangs is a failure, and its input is saved too. The exit code is 1 if there are failures.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import re
import resource
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ROUND = 400
"""Inputs that hypothesis draws from one seed."""
MOST_MEMORY = 6 * 2**30
"""Bytes of address space that a process may add to those of its imports."""
HANG = 300
"""Seconds after which a process that does not react to the limit of processor time is ended."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--targets", nargs="+", help="default: all")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(2**31))
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--output", type=Path, default=Path("runs/fuzz"), help="folder of the failing inputs")
    parser.add_argument("--worker", type=float, help=argparse.SUPPRESS)  # seconds of the single target
    args = parser.parse_args()
    os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    sys.path[:0] = [str(ROOT), str(ROOT / "src")]
    if args.worker is not None:
        fuzz(args.targets[0], args.worker, args.seed, args.output)
        return

    from tests.fuzz.targets import TARGETS

    names = args.targets or list(TARGETS)
    if unknown := set(names) - set(TARGETS):
        parser.error(f"unknown targets {', '.join(sorted(unknown))}; known: {', '.join(TARGETS)}")
    shutil.rmtree(args.output, ignore_errors=True)
    seconds = 60 * args.minutes * args.jobs / len(names)
    print(f"seed {args.seed}, {seconds:.0f} s for each of {len(names)} targets", flush=True)
    waiting = [Worker(name, seconds, args.seed, args.output / name) for name in names]
    running: list[Worker] = []
    done: list[Worker] = []
    while waiting or running:
        while waiting and len(running) < args.jobs:
            running.append(waiting.pop(0).start())
        time.sleep(0.2)
        for worker in [worker for worker in running if worker.is_done()]:
            running.remove(worker)
            done.append(worker)
            print(worker.line(), flush=True)
    done.sort(key=lambda worker: names.index(worker.name))
    report(done, args.output)
    sys.exit(any(worker.failures() for worker in done))


class Worker:
    """The process of a target. It is started again after a crash, until its time is over."""

    def __init__(self, name: str, seconds: float, seed: int, folder: Path) -> None:
        self.name, self.seconds, self.seed, self.folder = name, seconds, seed, folder
        self.crashes = 0

    def start(self) -> Worker:
        self.end = time.monotonic() + self.seconds
        self._launch()
        return self

    def _launch(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        left = str(max(1.0, self.end - time.monotonic()))
        command = [sys.executable, __file__, "--worker", left, "--targets", self.name]
        command += ["--seed", str(self.seed + 1000 * self.crashes), "--output", str(self.folder)]
        with (self.folder / "log.txt").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)

    def is_done(self) -> bool:
        if self.process.poll() is None:
            return False
        if self.process.returncode != 0:
            self.crashes += 1
            kept = self.folder / f"crash-{self.crashes}"
            if (self.folder / "current").is_dir():
                shutil.copytree(self.folder / "current", kept, dirs_exist_ok=True)
            kept.mkdir(exist_ok=True)
            log = (self.folder / "log.txt").read_text(errors="replace")[-4000:]
            (kept / "error.txt").write_text(f"exit code {self.process.returncode}\n{log}")
            if time.monotonic() < self.end - 5:
                self._launch()
                return False
        return True

    def counts(self) -> Counter[str]:
        """Return the counts of all processes of the target."""
        counts: Counter[str] = Counter()
        for path in self.folder.glob("counts-*.json"):
            counts.update(json.loads(path.read_text()))
        return counts

    def failures(self) -> dict[str, int]:
        """Return how often each failure was found."""
        found = {key.removeprefix("failure: "): n for key, n in self.counts().items() if key.startswith("failure: ")}
        return found | ({"the process crashed or hung": self.crashes} if self.crashes else {})

    def line(self) -> str:
        counts = self.counts()
        return (
            f"{self.name:18}{counts['tried']:>10}{counts['accepted']:>10}{counts['refused']:>10}"
            f"{len(self.failures()):>10}"
        )


def report(workers: list[Worker], folder: Path) -> None:
    """Print a table of the targets and the failures of each."""
    print(f"\n{'target':18}{'tried':>10}{'accepted':>10}{'refused':>10}{'failures':>10}")
    for worker in workers:
        print(worker.line())
    totals = sum((worker.counts() for worker in workers), Counter[str]())
    number = sum(len(worker.failures()) for worker in workers)
    print(f"{'all':18}{totals['tried']:>10}{totals['accepted']:>10}{totals['refused']:>10}{number:>10}")
    for worker in workers:
        for failure, count in sorted(worker.failures().items()):
            print(f"{worker.name}: {failure} ({count} inputs)")
    if number:
        print(f"the inputs are in {folder}")


def fuzz(name: str, seconds: float, seed: int, folder: Path) -> None:
    """Check inputs of a target until the time is over. The first input of every failure is minimised and saved."""
    from hypothesis import HealthCheck, Phase, Verbosity, given, settings
    from hypothesis import seed as seeded
    from tests.fuzz.outcome import describe_failure
    from tests.fuzz.targets import TARGETS

    target = TARGETS[name]
    begun = time.monotonic()
    address_space = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (address_space + MOST_MEMORY,) * 2)
    counts: Counter[str] = Counter()
    known: set[str] = set()
    current = folder / "current"
    minimal: dict[str, Any] = {}

    def save_counts() -> None:
        (folder / f"counts-{seed}.json").write_text(json.dumps(counts))

    for round_seed in range(seed, seed + 10**6):
        minimal.clear()

        @seeded(round_seed)
        @settings(
            max_examples=ROUND,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate, Phase.shrink],
            report_multiple_bugs=False,
            verbosity=Verbosity.quiet,
        )
        @given(target.inputs)
        def check(value: Any) -> None:
            if time.monotonic() - begun > seconds:
                return
            faulthandler.dump_traceback_later(HANG, exit=True)
            counts["tried"] += 1
            try:
                counts["accepted" if run(value) else "refused"] += 1
            except Exception as error:
                kind = describe_failure(error)
                counts[f"failure: {kind}"] += 1
                # Hypothesis minimises one failure at a time; the others wait for the next round.
                if kind in known or (minimal and minimal["kind"] != kind):
                    return
                minimal.update(kind=kind, value=repr(value), error=traceback.format_exc())
                shutil.rmtree(folder / "minimal", ignore_errors=True)
                shutil.copytree(current, folder / "minimal")
                raise
            if counts["tried"] % 100 == 0:
                save_counts()

        def run(value: Any) -> bool:
            current.parent.mkdir(parents=True, exist_ok=True)
            (folder / "input.txt").write_text(repr(value), errors="backslashreplace")
            return target.run(value, current)

        try:
            check()
        except Exception:
            if not minimal:
                raise
            known.add(minimal["kind"])
            place = folder / re.sub(r"[^\w.-]+", "-", minimal["kind"])[:80]
            shutil.rmtree(place, ignore_errors=True)
            (folder / "minimal").rename(place)
            for key in ("value", "error"):
                (place / f"{key}.txt").write_text(minimal[key], errors="backslashreplace")
        save_counts()
        if time.monotonic() - begun > seconds:
            break
    faulthandler.cancel_dump_traceback_later()
    shutil.rmtree(current, ignore_errors=True)


if __name__ == "__main__":
    main()
