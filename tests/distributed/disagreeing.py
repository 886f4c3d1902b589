"""A training in which each process sees other scores: the first improves, the second does not."""

import sys
from pathlib import Path

from preceptor.distributed import processes
from preceptor.training.loop import fit
from tests.training.test_loop_faults import Mean, Numbers, config

if __name__ == "__main__":
    scores = iter(range(100))
    sign = 1 if processes().is_main_process else -1
    job = Numbers().job(Path(sys.argv[1]), validate=lambda task: {"score": float(sign * next(scores))})
    step = fit(Mean(), job, config(patience=2, evaluate_every=0.5)).step
    (Path(sys.argv[1]) / f"steps-{processes().process_index}.txt").write_text(str(step))
