"""Time `preceptor score` on 50,000 predictions, the whole command, start and reading included.

python bench/score_speed.py --rows 50000
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ANSWERS = ["yes", "no", "axial", "left lower lobe", "ct - noncontrast", "mr - t2 weighted", "skull and contents"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--distinct", type=int, default=2_000, help="different answers, as VQA-Med 2019 has")
    args = parser.parse_args()
    rng = random.Random(0)
    text = "mass lesion of the left right upper lower lobe lung liver kidney fracture cyst acute chronic with"
    words = text.split()
    texts = ANSWERS + [" ".join(rng.choices(words, k=rng.randint(1, 6))) for _ in range(args.distinct)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "said.jsonl"
        with path.open("w") as file:
            for number in range(args.rows):
                row = {
                    "id": str(number),
                    "answer": rng.choice(texts),
                    "answers": [rng.choice(texts)],
                    "question_type": rng.choice("abcd"),
                }
                file.write(json.dumps(row) + "\n")
        command = [
            sys.executable,
            "-m",
            "preceptor",
            "score",
            str(path),
            "--protocol",
            "bench/test",
            "--references",
            "file",
        ]
        times = []
        for _ in range(3):
            begun = time.perf_counter()
            subprocess.run(command, check=True, capture_output=True)
            times.append(time.perf_counter() - begun)
    print(f"{args.rows} predictions: {min(times):.2f} s, the whole command, best of {len(times)}")


if __name__ == "__main__":
    main()
