"""Select and weight pseudo-labels during training, easy ones first (ClinKD, adaptive confidence-margin curriculum).

The `confidence` of an answer is the mean highest probability of its tokens, its `margin` the mean difference to the
second highest. The paper does not publish its exact rule. Here a sample enters if its score reaches a threshold that
decreases during training, and its weight is its score.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Curriculum:
    """The threshold decreases linearly from `begin` to `end` over the fraction `over` of the training.

    `margin_weight` is the weight of the margin in the score; the rest is that of the confidence. With `weigh` the
    weight of a sample that has entered is its score, otherwise 1.
    """

    begin: float = 0.8
    end: float = 0.0
    over: float = 0.7
    margin_weight: float = 0.5
    weigh: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.end <= self.begin <= 1:
            raise ValueError(f"thresholds must decrease within [0, 1], not go from {self.begin} to {self.end}")
        if not 0 < self.over <= 1 or not 0 <= self.margin_weight <= 1:
            raise ValueError(f"over {self.over} must be in (0, 1], margin_weight {self.margin_weight} in [0, 1]")

    def threshold(self, progress: float) -> float:
        """Return the score that a sample needs after the fraction `progress` of the training."""
        done = min(1.0, max(0.0, progress) / self.over)
        return self.begin + (self.end - self.begin) * done

    def score(self, confidence: Tensor, margin: Tensor) -> Tensor:
        """Return the scores (B,) in [0, 1]."""
        return (1 - self.margin_weight) * confidence + self.margin_weight * margin

    def weights(self, confidence: Tensor, margin: Tensor, progress: float) -> Tensor:
        """Return the weights (B,), 0 for samples that have not entered."""
        score = self.score(confidence, margin)
        entered = score >= self.threshold(progress)
        return torch.where(entered, score if self.weigh else torch.ones_like(score), torch.zeros_like(score))


def confidence_and_margin(logits: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return confidence and margin, each (B,): the means over answer tokens of p1 and of p1 - p2.

    `logits` (B, L, V) predict the tokens where `mask` (B, L) is true. Both are 0 for a sample without answer tokens.
    """
    top = logits.float().softmax(-1).topk(2, dim=-1).values
    count = mask.sum(dim=1).clamp(min=1)
    answer = mask.to(top.dtype)
    return (top[..., 0] * answer).sum(1) / count, ((top[..., 0] - top[..., 1]) * answer).sum(1) / count
