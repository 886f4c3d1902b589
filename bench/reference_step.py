"""A training step of the published network on random subsets: encoding what is there against encoding all, with zeros.

    python bench/reference_step.py                      # k = 1, 2, 3 modalities in turn, as the published code draws
    python bench/reference_step.py --crop 80,160,160 --modalities 1 2 3 4

Fill-in is the published one (`bottleneck`): the skips of a missing modality are those of a zero image. The published
code encodes that image anew for every sample and missing modality; here it is encoded once a step, without its stem
and without what no skip needs. Batch 2, one subset for the batch, forward and backward of Dice and cross-entropy. Both
sides use the same layers; the losses are asserted to agree to 1e-4. They take turns; ratios are of processor time on
one thread, and the printed mean is over the drawn subsets.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crop", default="48,96,96", help="sides in voxels")
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--modalities", type=int, nargs="+", default=[1, 2, 3], help="sizes of the subsets, in turn")
    parser.add_argument("--repeats", type=int, default=3, help="subsets of each size")
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch

    from preceptor.environment import machine, versions
    from preceptor.segmentation.losses import bce_loss, dice_loss
    from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig, fill_with_mean

    torch.set_num_threads(1)
    torch.manual_seed(0)
    draw = random.Random(0)
    config = MultimodalUNetConfig(("flair", "t1", "t1ce", "t2"), ("et", "wt", "tc"), net="reference", fill="bottleneck")
    model = MultimodalUNet(config, seed=0)
    for name, parameter in model.named_parameters():
        if "norm" in name and name.endswith("bias"):  # as after training: the zero image's features are not 0
            parameter.data = 0.1 * torch.randn(parameter.shape)
    depth, height, width = map(int, args.crop.split(","))
    images = torch.randn(args.batch, 4, depth, height, width)
    targets = (torch.rand(args.batch, 3, depth, height, width) > 0.9).float()

    def ours(available: torch.Tensor) -> torch.Tensor:
        return model(images, available).logits

    def published(available: torch.Tensor) -> torch.Tensor:
        there = available[:, :, None, None, None]
        features = model.encode_available(images * there, torch.ones_like(available))
        filled = [*features[:-1], fill_with_mean(features[-1] * there[..., None], available)]
        joined = [join(f) for join, f in zip(model.decoder.joins, filled, strict=True)]
        return model.decoder.finish(joined, (depth, height, width))

    def step(forward, available: torch.Tensor) -> tuple[float, float]:
        model.zero_grad(set_to_none=True)
        begun = time.process_time()
        logits = forward(available)
        loss = (dice_loss(logits, targets) + bce_loss(logits, targets, "sum")) / len(images)
        loss.backward()
        return time.process_time() - begun, loss.item()

    step(ours, torch.tensor([[True, False, False, False]] * args.batch))
    ratios: dict[int, list[float]] = {count: [] for count in args.modalities}
    slow, fast, worst = [], [], 0.0
    for _ in range(args.repeats):
        for count in args.modalities:
            chosen = draw.sample(range(4), count)
            available = torch.tensor([[m in chosen for m in range(4)]] * args.batch)
            ours_s, ours_loss = step(ours, available)
            published_s, published_loss = step(published, available)
            worst = max(worst, abs(ours_loss - published_loss))
            ratios[count].append(published_s / ours_s)
            slow.append(published_s)
            fast.append(ours_s)
    assert worst < 1e-4, f"the losses differ by {worst}"
    for count, values in ratios.items():
        print(
            f"{count} of 4 modalities   ratio {statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        )
    every = [value for values in ratios.values() for value in values]
    print(
        f"mean ratio {statistics.mean(every):.2f}, of the total time {sum(slow) / sum(fast):.2f}; "
        f"all encoded {statistics.mean(slow):.2f} s, what is there {statistics.mean(fast):.2f} s a step; "
        f"losses differ by at most {worst:.1e}"
    )
    print(json.dumps({"crop": args.crop, "batch": args.batch, "threads": 1, **machine(), **versions("monai")}))


if __name__ == "__main__":
    main()
