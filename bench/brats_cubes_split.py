"""Make the shipped split of the BraTS 2020 lesion cubes: 210 training, 45 validation and 45 test patients.

    python bench/brats_cubes_split.py CUBES/patients.csv > brats20-cubes-210-45-45.csv

Patients are sorted by grade, presence of enhancing tumour, tercile of the lesion's size and a hash of their case, and
validation and test patients are taken at equal distances: every stratum is divided in proportion, to within one
patient. Two patients are pinned to training, because they are also in a public data set of the TCIA under other names.
"""

from __future__ import annotations

import csv
import sys
from collections import Counter
from pathlib import Path

from preceptor.data.splits import ordered

PINNED = ("brats20_295", "brats20_320")  # TCGA-DU-7294 and TCGA-FG-6692
HELD_OUT = 45
SEED = 0


def main(table: Path) -> None:
    with table.open(encoding="utf-8", newline="") as file:
        rows = {row["case"]: row for row in csv.DictReader(file)}
    by_size = sorted(rows, key=lambda case: (int(rows[case]["lesion_voxels"]), case))
    tercile = {case: 3 * place // len(by_size) for place, case in enumerate(by_size)}

    def stratum(case: str) -> tuple[str, bool, int]:
        return rows[case]["grade"], int(rows[case]["et"]) > 0, tercile[case]

    free = sorted(ordered(set(rows) - set(PINNED), f"cubes:{SEED}"), key=stratum)
    step = len(free) / HELD_OUT
    split = dict.fromkeys(rows, "train")
    split |= {free[int((k + 0.25) * step)]: "validation" for k in range(HELD_OUT)}
    split |= {free[int((k + 0.75) * step)]: "test" for k in range(HELD_OUT)}
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(("case", "split"))
    writer.writerows((case, split[case]) for case in sorted(rows))
    for part in ("train", "validation", "test"):
        strata = Counter(stratum(case) for case in rows if split[case] == part)
        print(part, sum(strata.values()), sorted(strata.items()), file=sys.stderr)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
