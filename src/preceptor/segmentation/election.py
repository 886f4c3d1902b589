"""LCKD's election: which modality, alone, segments each region best (Wang et al., MICCAI 2023, section 2.2)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from preceptor.data.segmentation.modalities import find_modality


@dataclass
class Election:
    """The elected modalities and the history of votes.

    `winners` (R,) holds the index of a modality per region, -1 before the first vote. `steps` and `scores` are the
    history: at each step the soft Dice (N, R) of each modality alone on validation cases, NaN if no case that has the
    modality contains the region. `appointed` is the index of the teacher before the first vote, or -1.
    """

    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    winners: Tensor = field(init=False)
    overall: int = field(init=False, default=-1)
    appointed: int = field(init=False, default=-1)
    steps: list[int] = field(init=False, default_factory=list)
    scores: list[Tensor] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        self.winners = torch.full((len(self.regions),), -1, dtype=torch.int64)

    def appoint(self, modality: str) -> None:
        """Make `modality` the teacher of every region until the first vote, as the published code does."""
        name = find_modality(modality, self.modalities)
        assert name is not None, f"{modality} is not among {self.modalities}"
        self.overall = self.appointed = self.modalities.index(name)
        self.winners[:] = self.overall

    def vote(self, step: int, scores: Tensor) -> None:
        """Elect the modality with the highest score, per region and over all regions. The first one wins a tie.

        `scores` (N, R): soft Dice of each modality alone. A modality without a score (NaN) is not elected. A region
        without any keeps its teacher. Over all regions, modalities are compared by the mean over those regions in which
        all of them have a score; if there is none, each by its own regions. Raises ValueError if there is no score.
        """
        scores = scores.detach().cpu().double()
        if scores.shape != (len(self.modalities), len(self.regions)):
            raise ValueError(f"scores of shape {tuple(scores.shape)} for {self.modalities} and {self.regions}")
        if bool(scores.isnan().all()):
            raise ValueError("no validation case has any of the modalities and contains any of the regions")
        self.winners, self.overall = _elected(scores, self.winners)
        self.steps.append(step)
        self.scores.append(scores)

    def teachers(self, kind: Literal["single", "multi", "per_task"]) -> list[int]:
        """Return the indices of the teacher modalities.

        For `per_task` there is one per region, in the order of the regions, or -1 if no vote has elected one.
        """
        if self.overall < 0:
            return []
        if kind == "single":
            return [self.overall]
        winners = self.winners.tolist()
        return winners if kind == "per_task" else sorted(set(winners) - {-1})

    def history(self) -> list[dict[str, Any]]:
        """Return one dictionary per vote: step, score by region and modality, winners (None for a region without)."""
        votes = []
        winners = torch.full((len(self.regions),), self.appointed)
        for step, scores in zip(self.steps, self.scores, strict=True):
            by_region = {
                region: {m: _finite(scores[i, j]) for i, m in enumerate(self.modalities)}
                for j, region in enumerate(self.regions)
            }
            winners, overall = _elected(scores, winners)
            names = [self.modalities[w] if w >= 0 else None for w in winners.tolist()]
            votes.append(
                {
                    "step": step,
                    "soft_dice": by_region,
                    "elected": dict(zip(self.regions, names, strict=True)),
                    "overall": self.modalities[overall],
                }
            )
        return votes

    def state(self) -> dict[str, Tensor]:
        """Return the tensors that a checkpoint keeps."""
        shape = (0, len(self.modalities), len(self.regions))
        return {
            "winners": self.winners.clone(),
            "overall": torch.tensor(self.overall),
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "scores": torch.stack(self.scores) if self.scores else torch.zeros(shape, dtype=torch.float64),
        }

    def load(self, state: dict[str, Tensor]) -> None:
        """Restore the result of `state`."""
        self.winners, self.overall = state["winners"].clone(), int(state["overall"])
        self.steps, self.scores = state["steps"].tolist(), list(state["scores"].unbind(0))


def _elected(scores: Tensor, before: Tensor) -> tuple[Tensor, int]:
    """Return the winner (R,) of each region, which is that of `before` in regions without a score, and the best one."""
    finite = scores.nan_to_num(nan=-math.inf)
    winners = torch.where(scores.isnan().all(dim=0), before, finite.argmax(dim=0))
    known = ~scores.isnan().all(dim=1)
    common = ~scores[known].isnan().any(dim=0)
    means = scores[:, common].mean(dim=1) if bool(common.any()) else scores.nanmean(dim=1)
    return winners, int(means.nan_to_num(nan=-math.inf).argmax())


def _finite(value: Tensor) -> float | None:
    return None if bool(torch.isnan(value)) else float(value)


def mean_scores(rows: Sequence[Tensor]) -> Tensor:
    """Return the mean (N, R) over cases of scores (N, R), ignoring NaN; NaN if all are NaN."""
    return torch.stack(list(rows)).nanmean(dim=0)
