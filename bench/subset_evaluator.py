"""Scoring all 15 subsets of four modalities: the naive loop against one encoding of each modality. Prints a ratio.

    python bench/subset_evaluator.py                                  # both networks, both ways of filling in
    python bench/subset_evaluator.py --net reference --window 80,160,160 --repeats 1

The naive loop is the published one: for every subset all four channels are encoded, those that are missing as zeros;
then what is missing is filled in and decoded. Both sides use the same layers and give the same probabilities, which is
asserted to 1e-5. They take turns; the ratio is that of the seconds of processor time, on one thread, which other work
on the machine disturbs less than it does the wall clock.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=["reference", "compact"])
    parser.add_argument("--fill", choices=["all_levels", "bottleneck"])
    parser.add_argument("--window", help="sides in voxels; by default 48,96,96 (reference) and 64,64,64 (compact)")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    from preceptor.environment import machine, versions
    from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig, Size, fill_with_mean
    from preceptor.segmentation.subset_decoder import SubsetDecoder
    from preceptor.segmentation.subsets import SubsetFlags, all_subsets

    torch.set_num_threads(1)
    everything = torch.ones(1, 4, dtype=torch.bool)

    def naive(model: MultimodalUNet, crop_NDHW: torch.Tensor, subset: SubsetFlags) -> torch.Tensor:
        flags = torch.tensor([subset])
        there = flags[:, :, None, None, None]
        features = model.encode_available(crop_NDHW[None] * there, everything)
        deepest = len(features) - 1
        filled = [
            fill_with_mean(f * there[..., None], flags) if level == deepest or model.config.fill == "all_levels" else f
            for level, f in enumerate(features)
        ]
        joined = [join(f) for join, f in zip(model.decoder.joins, filled, strict=True)]
        return model.decoder.finish(joined, tuple(crop_NDHW.shape[1:]))[0].sigmoid()

    order = all_subsets(4)
    for net in [args.net] if args.net else ["reference", "compact"]:
        text = args.window or ("48,96,96" if net == "reference" else "64,64,64")
        window: Size = tuple(map(int, text.split(",")))  # type: ignore[assignment]
        for fill in [args.fill] if args.fill else ["all_levels", "bottleneck"]:
            config = MultimodalUNetConfig(("flair", "t1", "t1ce", "t2"), ("et", "wt", "tc"), net=net, fill=fill)
            model = MultimodalUNet(config, seed=0)
            generator = torch.Generator().manual_seed(0)
            for name, parameter in model.named_parameters():
                if "norm" in name and name.endswith("bias"):  # as after training: the zero image's features are not 0
                    parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
            crop = torch.randn(4, *window, generator=generator)
            ratios, slow, fast, worst = [], [], [], 0.0
            with torch.no_grad():
                decoder = SubsetDecoder(model, (True,) * 4, order, window)
                for _ in range(args.repeats):
                    begun = time.process_time()
                    got = torch.cat([logits.sigmoid() for logits in decoder(crop)])
                    middle = time.process_time()
                    want = [naive(model, crop, subset) for subset in order]
                    slow.append(time.process_time() - middle)
                    fast.append(middle - begun)
                    ratios.append(slow[-1] / fast[-1])
                    worst = max(worst, float((got - torch.stack(want)).abs().max()))
            assert worst < 1e-5, f"the two differ by {worst}"
            print(
                f"{net:9s} {fill:10s} {text:10s} naive {statistics.median(slow):7.2f} s   one encoding each "
                f"{statistics.median(fast):6.2f} s   ratio {statistics.median(ratios):.2f} "
                f"({min(ratios):.2f} to {max(ratios):.2f})   largest difference {worst:.1e}",
                flush=True,
            )
    print(json.dumps({"repeats": args.repeats, "threads": 1, **machine(), **versions("monai")}))


if __name__ == "__main__":
    main()
