"""How long an audit of VQA-RAD, VQA-Med 2019 and SLAKE takes, one by one and all images against all.

    python bench/audit_speed.py

Prints wall and processor seconds; on a busy machine only the latter mean something. Needs PRECEPTOR_DATA.
"""

from __future__ import annotations

import time
from pathlib import Path
from tempfile import TemporaryDirectory

from preceptor.auditing.duplicates import find_pairs
from preceptor.auditing.images import summarize_files
from preceptor.auditing.run import audit, write_audit
from preceptor.vqa.config import DataConfig
from preceptor.vqa.data import read_data

SETS = ("vqa-rad", "vqa-med-2019", "slake")


def main() -> None:
    wall, cpu = time.perf_counter(), time.process_time()

    def lap(what: str) -> None:
        nonlocal wall, cpu
        now, used = time.perf_counter(), time.process_time()
        print(f"{what:<42} {now - wall:6.1f} s wall {used - cpu:6.1f} s processor")
        wall, cpu = now, used

    with TemporaryDirectory() as folder:
        data = {name: read_data(DataConfig.model_validate({"name": name}), Path(folder), needed=()) for name in SETS}
        lap("reading the questions")
        images = list(dict.fromkeys(sample.image for one in data.values() for sample in one.samples))
        summaries = summarize_files(images)
        lap(f"decoding and hashing {len(images)} images")
        pairs = find_pairs(summaries)
        lap(f"comparing all with all: {len(pairs)} pairs")
        for name, one in data.items():
            write_audit(audit(one), Path(folder) / name)
            lap(f"whole audit of {name}, with its page")


if __name__ == "__main__":
    main()
