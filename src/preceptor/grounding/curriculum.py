"""Which pseudo-labels to learn from, and how much: easy ones first (ClinKD, the adaptive confidence-margin curriculum).

A teacher's answer is as sure as its tokens: `confidence` is their mean highest probability, `margin` the mean distance
to the second highest. The paper's exact rule is not published; this is ours: a sample enters when its score reaches a
threshold that falls over the training, and weighs by its score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curriculum:
    """The threshold falls from `begin` to `end` over the share `over` of the training, linearly.

    `margin_weight` is the part of the margin in the score, the rest is the confidence's. With `weigh` a sample that has
    entered weighs its score, else 1.
    """

    begin: float = 0.8
    end: float = 0.0
    over: float = 0.7
    margin_weight: float = 0.5
    weigh: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.begin <= 1:
            raise ValueError(f"thresholds must fall within [0, 1], not from {self.begin} to {self.end}")
        if not 0 < self.over <= 1 or not 0 <= self.margin_weight <= 1:
            raise ValueError(f"over {self.over} must be in (0, 1], margin_weight {self.margin_weight} in [0, 1]")

    def threshold(self, progress: float) -> float:
        """Return the score that a sample needs at a share of the training done."""
        fallen = min(1.0, max(0.0, progress) / self.over)
        return self.begin + (self.end - self.begin) * fallen

    def score(self, confidence: Tensor, margin: Tensor) -> Tensor:
        """Return (B,) scores in [0, 1]."""
        return (1 - self.margin_weight) * confidence + self.margin_weight * margin

    def weights(self, confidence: Tensor, margin: Tensor, progress: float) -> Tensor:
        """Return (B,): 0 for a sample that has not entered yet, else its weight."""
        score = self.score(confidence, margin)
        entered = score >= self.threshold(progress)
        return torch.where(entered, score if self.weigh else torch.ones_like(score), torch.zeros_like(score))


def confidence_and_margin(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return (confidence, margin), each (B,): means over answer tokens of p1 and of p1 - p2.

    `logits` (B, L, V) predict the tokens where `mask` (B, L) is true. A sample without answer tokens gives 0 and 0.
    """
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    count = mask.sum(dim=1).clamp(min=1)
    keep = mask.to(top.dtype)
    return (top[..., 0] * keep).sum(1) / count, ((top[..., 0] - top[..., 1]) * keep).sum(1) / count
