"""Drop modalities from training samples at random."""

from __future__ import annotations

import torch
from torch import Tensor

from preceptor.segmentation.settings import ModalityDropoutConfig


def drop_modalities(available: Tensor, config: ModalityDropoutConfig, progress: float) -> Tensor:
    """Return (B, N) bool: the modalities that stay visible of those `available` (B, N), at least one per sample.

    The subsets are drawn from torch's global CPU generator. The loop seeds it for every micro-batch, so a resumed run
    draws the same ones. `progress` is the fraction of the training done: nothing is dropped before `start`, and over
    `ramp` the probability that a sample drops anything rises to 1.
    """
    present = available.cpu()
    if not bool(present.any(dim=1).all()):
        raise ValueError("a sample has no modality at all")
    draw = {"published": _published, "sizes": _sizes}.get(config.kind, _subsets)
    subset = draw(present)
    probability = 1.0 if config.ramp == 0 else min(1.0, (progress - config.start) / config.ramp)
    dropping = torch.rand(len(present) if config.kind in ("subsets", "sizes") else 1) < probability
    if config.kind == "none" or progress < config.start:
        return available
    return torch.where(dropping[:, None], subset, present).to(available.device)


def _subsets(present: Tensor) -> Tensor:
    """Return a non-empty subset of each row. All subsets are equally likely."""
    # Uniform over all 2^n subsets; the empty one is drawn again.
    subset = present & (torch.rand(present.shape) < 0.5)
    while not bool((filled := subset.any(dim=1)).all()):
        subset[~filled] = present[~filled] & (torch.rand(int((~filled).sum()), present.shape[1]) < 0.5)
    return subset


def _sizes(present: Tensor) -> Tensor:
    """Return a subset of each row. Its size is drawn first, uniformly from 1 to the number of its modalities."""
    sizes = 1 + (torch.rand(len(present)) * present.sum(dim=1)).long()
    order = (present * (1 + torch.rand(present.shape))).argsort(dim=1, descending=True)
    return torch.zeros_like(present).scatter(1, order, torch.arange(present.shape[1]) < sizes[:, None])


def _published(present: Tensor) -> Tensor:
    """Return one subset of 1 to N - 1 modalities for the whole batch; its size is drawn first.

    A case that has none of these modalities keeps one of its own.
    """
    count = present.shape[1]
    size = int(torch.randint(1, max(2, count), ()))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count)[:size]] = True
    subset = present & chosen
    single = torch.nn.functional.one_hot((present * torch.rand(present.shape)).argmax(dim=1), count).bool()
    return torch.where(subset.any(dim=1, keepdim=True), subset, single & present)
