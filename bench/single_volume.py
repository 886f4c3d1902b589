"""Convolving a single small volume on a CPU as a batch of two, against torch's choice for one. Prints ratios.

    python bench/single_volume.py
    python bench/single_volume.py --side 48 --repeats 5

A network with one encoder per modality sees every volume of a case alone. Both sides use the same weights and take
turns on one thread; the ratio is that of the seconds of processor time. Results agree to 1e-5.
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
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    from torch import nn

    from preceptor.environment import machine, versions
    from preceptor.segmentation.evaluate import alone
    from preceptor.segmentation.layers import Conv
    from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
    from preceptor.segmentation.sliding_window import predict_subsets
    from preceptor.segmentation.subsets import subsets

    torch.set_num_threads(1)
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

    def step() -> torch.Tensor:
        model.zero_grad()
        logits = model(images[None], torch.ones(1, 4, dtype=torch.bool)).logits
        logits.sigmoid().mean().backward()
        return model.encoders[0].levels[0].second.weight.grad.clone()  # type: ignore[union-attr]

    work: dict[str, Callable[[], torch.Tensor]] = {
        "encoder, one volume": encode,
        "votes of four modalities": lambda: predict(alone(4)),
        "one case, all modalities": lambda: predict([everything]),
        "one case, 15 combinations": lambda: predict(subsets(4)),
        "training step, one crop": step,
    }
    doubling = Conv._conv_forward
    for name, run in work.items():
        seconds: dict[bool, list[float]] = {True: [], False: []}
        results = {}
        run()
        for _ in range(args.repeats):
            for fast in (False, True):
                Conv._conv_forward = doubling if fast else nn.Conv3d._conv_forward  # type: ignore[method-assign]
                begun = time.process_time()
                results[fast] = run()
                seconds[fast].append(time.process_time() - begun)
        difference = float((results[True] - results[False]).abs().max())
        assert difference < 1e-5, f"{name}: the two differ by {difference}"
        ratios = [slow / fast for slow, fast in zip(seconds[False], seconds[True], strict=True)]
        print(
            f"{name:27s} alone {1000 * statistics.median(seconds[False]):7.1f} ms   as two "
            f"{1000 * statistics.median(seconds[True]):7.1f} ms   ratio {statistics.median(ratios):.2f} "
            f"({min(ratios):.2f} to {max(ratios):.2f})   largest difference {difference:.1e}",
            flush=True,
        )
    print(json.dumps({"side": args.side, "repeats": args.repeats, "threads": 1, **machine(), **versions("monai")}))


if __name__ == "__main__":
    main()
