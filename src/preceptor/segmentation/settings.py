"""Sections of a method's settings in a segmentation recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from preceptor.config import Fraction, Positive, PositiveNumber, Section, TermConfig

FULL = "full"
"""Key of the full-modality network among `method.runs` of the method `specialists`."""


class SegmentationLoss(Section):
    dice: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the soft Dice loss."""
    bce: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the binary cross-entropy."""
    bce_reduction: Literal["mean", "sum"] = "mean"
    """Mean or sum over the regions."""


class ModalityDropoutConfig(Section):
    """How modalities are dropped from training samples."""

    kind: Literal["subsets", "sizes", "published", "none"] = "subsets"
    """subsets: each sample keeps a random subset, all subsets equally likely. sizes: the number of modalities is drawn
    first, so that a sample keeps one or all of them more often. published: one subset of one to three
    modalities per batch, so that no sample keeps all four. none: nothing is dropped."""
    start: Fraction = 0.0
    """Fraction of the training before which nothing is dropped."""
    ramp: Fraction = 0.0
    """Further fraction of the training over which the probability of dropping rises to 1."""


class ElectionConfig(Section):
    every: Annotated[float, Field(gt=0)] = 5.0
    """Epochs between elections. The first one is before the first step, unless `initial` or `first` is set."""
    cases: Positive | None = None
    """Largest number of validation cases that vote; default: all. The first cases vote, and before them those with a
    modality or a region that the others lack."""
    initial: str | None = None
    """Modality that is the teacher until the first election, which then takes place after `first` steps or else after
    `every` epochs (the published code: flair)."""
    first: Positive | None = None
    """Number of steps after which the first election takes place (the published code: 1). `initial` teaches before."""
    blend: Literal["probabilities", "logits"] = "probabilities"
    """Whether probabilities or logits (the published code) are averaged where windows overlap."""

    @model_validator(mode="after")
    def _validate_first_election(self) -> ElectionConfig:
        if self.first is not None and self.initial is None:
            raise ValueError("method.election.first needs method.election.initial, the teacher before that step")
        return self


class CrossModalTerm(TermConfig):
    """Distance between the features of an elected teacher modality, detached, and those of the other modalities."""

    weight: Annotated[float, Field(ge=0)] = 0.1
    distance: Literal["l1", "mse", "cosine"] = "l1"
    """l1 and mse: mean over channels and voxels. cosine: mean over voxels of 1 - cos across channels."""
    levels: Literal["bottleneck", "all"] = "bottleneck"
    """Which features are compared: the deepest (published), or those of every level."""
    students: Literal["others", "all"] = "others"
    """Which modalities learn: those that are not elected, or all available ones, including other teachers
    (published)."""
    pairs: Literal["mean", "sum"] = "mean"
    """Mean or sum (published) over the pairs of teacher and student."""
    normalise: bool = False
    """Normalise the features to zero mean and unit variance over channels first, so that their scale has no effect."""
    projector: bool = False
    """Project the features of each student modality with a learned linear layer first (FitNets). The projector is not
    exported."""


class FullTeacherTerm(TermConfig):
    """Distillation from a network that sees all modalities to the one that sees a subset."""

    weight: Annotated[float, Field(ge=0)] = 0.0
    temperature: Annotated[float, Field(gt=0)] = 2.0
    """Temperature T of both probabilities; the term is scaled by T squared."""
    features: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the distance between the two networks' fused bottleneck features, relative to that of the output."""


class WeightedPairsTerm(TermConfig):
    """L1 distances between the features of all pairs of visible modalities, weighted by their importance."""

    weight: Annotated[float, Field(ge=0)] = 0.1
    levels: Literal["bottleneck", "all"] = "bottleneck"
    """Which features are compared: the deepest, or those of every level (their mean)."""


class ImportanceConfig(Section):
    """How the importance of the modalities is learned."""

    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the training cases, by patient, that train the importance alone, and not the network."""
    every: Positive = 4
    """Optimiser steps of the network between two steps of the importance."""
    learning_rate: PositiveNumber = 0.01
    """Learning rate of Adam for the numbers whose softmax is the importance."""
