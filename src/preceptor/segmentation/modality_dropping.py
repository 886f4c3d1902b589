"""Which modalities a training sample shows of those it has."""

from __future__ import annotations

import torch
from torch import Tensor

from preceptor.segmentation.config import DroppingConfig


def drop_modalities(available: Tensor, config: DroppingConfig, progress: float) -> Tensor:
    """Return (B, N) bool: the modalities that each sample shows, at least one, of those `available` (B, N).

    Drawn from torch's global generator of the CPU, which the loop seeds for every micro-batch, so that a resumed run
    draws the same. `progress` is the share of the training done: nothing is dropped before `start`, and over `ramp` the
    probability that a sample drops anything rises to 1.
    """
    has = available.cpu()
    if not bool(has.any(dim=1).all()):
        raise ValueError("a sample has no modality at all")
    drawn = _published(has) if config.kind == "published" else _subsets(has)
    risen = 1.0 if config.ramp == 0 else min(1.0, (progress - config.start) / config.ramp)
    dropping = torch.rand(len(has) if config.kind == "subsets" else 1) < risen
    if config.kind == "none" or progress < config.start:
        return available
    return torch.where(dropping[:, None], drawn, has).to(available.device)


def _subsets(has: Tensor) -> Tensor:
    """Return a non-empty subset of each row, all of them equally likely."""
    # Uniform over the 2^n subsets, less the empty one by drawing again.
    drawn = has & (torch.rand(has.shape) < 0.5)
    while not bool((full := drawn.any(dim=1)).all()):
        drawn[~full] = has[~full] & (torch.rand(int((~full).sum()), has.shape[1]) < 0.5)
    return drawn


def _published(has: Tensor) -> Tensor:
    """Return one subset of 1 to N - 1 modalities for the whole batch, its size drawn first.

    A case that has none of them shows one of its own.
    """
    count = has.shape[1]
    size = int(torch.randint(1, max(2, count), ()))
    chosen = torch.zeros(count, dtype=torch.bool)
    chosen[torch.randperm(count)[:size]] = True
    drawn = has & chosen
    alone = torch.nn.functional.one_hot((has * torch.rand(has.shape)).argmax(dim=1), count).bool()
    return torch.where(drawn.any(dim=1, keepdim=True), drawn, alone & has)
