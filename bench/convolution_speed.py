"""The 3-D convolution of the segmentation networks on a CPU, against what torch chooses by itself. Prints ratios.

    python bench/convolution_speed.py
    python bench/convolution_speed.py --channels 8 32 64 --threads 2

Two choices are changed. A single small volume is convolved as a batch of two: a network with one encoder per modality
sees every volume of a case alone. And training in float32 convolves in the memory format channels_last_3d. Both sides
use the same weights and take turns; the ratio is that of the seconds of processor time, with more than one thread of
the seconds that pass. Results agree to 1e-5 of the largest value.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=32, help="side of the volume in voxels")
    parser.add_argument("--channels", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    from torch import nn

    from preceptor.environment import machine, versions
    from preceptor.segmentation.evaluate import alone
    from preceptor.segmentation.layers import Conv
    from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
    from preceptor.segmentation.sliding_window import predict_subsets
    from preceptor.segmentation.subsets import all_subsets

    torch.set_num_threads(args.threads)
    clock = time.process_time if args.threads == 1 else time.perf_counter
    modalities, everything = ("flair", "t1", "t1ce", "t2"), (True,) * 4
    config = MultimodalUNetConfig(modalities, ("et", "tc", "wt"), encoder="separate", channels=tuple(args.channels))
    model = MultimodalUNet(config, seed=0)
    window = (args.side,) * 3
    images = torch.randn(4, *window, generator=torch.Generator().manual_seed(0))

    def predict(chosen: list[tuple[bool, ...]]) -> torch.Tensor:
        return torch.stack(list(predict_subsets(model, images, everything, window, subsets=chosen).values()))

    def encode() -> torch.Tensor:
        with torch.no_grad():
            return model.encode(images[None, :1], 0)[-1]

    def step(crops: int) -> torch.Tensor:
        model.zero_grad()
        logits = model(images.expand(crops, *images.shape), torch.ones(crops, 4, dtype=torch.bool)).logits
        logits.sigmoid().mean().backward()
        return model.encoders[0].levels[0].second.weight.grad.clone()  # type: ignore[union-attr]

    work: dict[str, Callable[[], torch.Tensor]] = {
        "encoder, one volume": encode,
        "votes of four modalities": lambda: predict(alone(4)),
        "one case, all modalities": lambda: predict([everything]),
        "one case, 15 combinations": lambda: predict(all_subsets(4)),
        "training step, one crop": lambda: step(1),
        "training step, four crops": lambda: step(4),
    }
    ours = Conv._conv_forward
    for name, run in work.items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        results = {}
        run()
        for _ in range(args.repeats):
            for fast in (False, True):
                Conv._conv_forward = ours if fast else nn.Conv3d._conv_forward  # type: ignore[method-assign]
                begun = clock()
                results[fast] = run()
                seconds[fast].append(clock() - begun)
        scale = max(1.0, float(results[False].abs().max()))
        difference = float((results[True] - results[False]).abs().max()) / scale
        assert difference < 1e-5, f"{name}: the two differ by {difference}"
        ratios = [slow / fast for slow, fast in zip(seconds[False], seconds[True], strict=True)]
        print(
            f"{name:27s} torch {1000 * statistics.median(seconds[False]):7.1f} ms   ours "
            f"{1000 * statistics.median(seconds[True]):7.1f} ms   ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})   largest difference {difference:.1e}",
            flush=True,
        )
    settings = {"side": args.side, "repeats": args.repeats, "threads": args.threads}
    print(json.dumps({**settings, **machine(), **versions("monai")}))


if __name__ == "__main__":
    main()
