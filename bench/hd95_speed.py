"""The 95th percentile Hausdorff distance by a search among surface voxels, against MONAI's. Prints ratios.

    python bench/hd95_speed.py
    python bench/hd95_speed.py --shape 155 240 240 --repeats 3

Two lesions of several balls with noise at their surface are compared. Both sides take turns. Ratios are of processor
time; MONAI computes with torch, which takes longer on several threads.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=[48, 96, 96])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    import numpy as np
    import torch
    from monai.metrics import compute_hausdorff_distance

    from preceptor.environment import machine, versions
    from preceptor.segmentation.metrics import hd95

    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore", FutureWarning)  # MONAI warns about one of its own calls
    spacing = [1.0, 1.0, 1.0]
    rng = np.random.default_rng(0)
    grid = np.indices(args.shape).reshape(3, -1).T
    ratios, ours, theirs, worst = [], [], [], 0.0
    for _ in range(args.repeats):
        masks = []
        for _ in range(2):
            centres = np.array(args.shape) * rng.uniform(0.35, 0.65, (3, 3))
            away = np.min([np.linalg.norm(grid - centre, axis=1) for centre in centres], axis=0)
            masks.append((away + rng.normal(0, 1, len(away)) < min(args.shape) / 6).reshape(args.shape))
        begun = time.process_time()
        tensors = [torch.from_numpy(mask)[None, None] for mask in masks]
        want = compute_hausdorff_distance(*tensors, include_background=True, percentile=95, spacing=spacing)
        middle = time.process_time()
        got = hd95(*masks, spacing)
        theirs.append(middle - begun)
        ours.append(time.process_time() - middle)
        ratios.append(theirs[-1] / ours[-1])
        worst = max(worst, abs(got - float(want)))
    assert worst < 1e-4, f"the two differ by {worst} mm"
    print(
        f"{'x'.join(map(str, args.shape))}: MONAI {1000 * statistics.median(theirs):.0f} ms   KDTree "
        f"{1000 * statistics.median(ours):.0f} ms   ratio {statistics.median(ratios):.1f} ({min(ratios):.1f} to "
        f"{max(ratios):.1f})   largest difference {worst:.1e} mm"
    )
    print(json.dumps({"repeats": args.repeats, "threads": args.threads, **machine(), **versions("monai", "scipy")}))


if __name__ == "__main__":
    main()
