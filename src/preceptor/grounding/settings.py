"""Sections of a method's settings in a recipe of grounded dialogue."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from preceptor.config import Folder, Fraction, Positive, PositiveNumber, Section
from preceptor.errors import UserError, nearest

Modality = Literal["ct", "mr", "x", "pet", "endoscopy", "dermoscopy", "fundus", "ultrasound"]
MODALITIES: tuple[Modality, ...] = get_args(Modality)
"""Modalities of Med-GRIT-270k (image names up to ``_``), in the order of the rows of a guidance table."""


def as_modality(modality: Any) -> str:
    """Return a modality that a user has named. Raises UserError if it is neither empty nor one of `MODALITIES`."""
    if modality == "" or modality in MODALITIES:
        return modality
    raise UserError(f"modality {modality!r} is not known{nearest(str(modality), MODALITIES)}")


class GuidanceConfig(Section):
    """Rotary positions (Med-CLIP guided RoPE): distances between text and image, and between neighbours in an image."""

    kind: Literal["none", "fixed", "clip"] = "fixed"
    """none: the positions of the base model. fixed: the same for all images (the published code). clip: depends on each
    image's modality; needs a `table` or `learnable`."""
    gap: PositiveNumber = 2.0
    """Lambda: distance from the last text token to the first image token, and back."""
    row_step: PositiveNumber = 1.0
    """Alpha: distance between neighbouring rows of an image."""
    column_step: PositiveNumber = 1.0
    """Alpha: distance between neighbouring columns of an image."""
    table: dict[Modality, tuple[PositiveNumber, PositiveNumber, PositiveNumber]] = Field(default_factory=dict)
    """For `clip`: (gap, row_step, column_step) by modality (ct, mr, x, pet, endoscopy, dermoscopy, fundus,
    ultrasound); other modalities use the three values above."""
    learnable: bool = False
    """For `clip`: whether the table is trained. Its logarithms are the parameters, so that it stays above 0."""
    learning_rate: PositiveNumber = 0.01
    """For `learnable`: learning rate of the table, with the schedule of `student.train`."""
    scorer: str | None = None
    """For `clip`: a CLIP-like model (folder or hub name) that predicts the modality of an image. Default: the modality
    field of the data set."""

    @property
    def rows(self) -> list[tuple[float, float, float]]:
        """The eight rows of the table."""
        return [self.table.get(name, (self.gap, self.row_step, self.column_step)) for name in MODALITIES]

    @model_validator(mode="after")
    def _validate_kind(self) -> GuidanceConfig:
        # A kind that is given may switch off the table of a recipe, as in an ablation.
        for key in ("table", "learnable", "scorer"):
            if "kind" not in self.model_fields_set and (value := getattr(self, key)):
                raise ValueError(f"{key}={value} is not used with kind={self.kind}; set kind=clip, or remove {key}")
        if self.kind == "clip" and not self.learnable and len(set(self.rows)) == 1:
            raise ValueError(
                "kind=clip has the same three intervals for all modalities, which is kind=fixed: give other ones for "
                "some modalities, such as table={ct: [3, 1, 1]}, set learnable=true, or choose fixed"
            )
        return self


class CurriculumConfig(Section):
    begin: Fraction = 0.8
    """Score that a pseudo-label needs at the beginning. The score is a mean of confidence and margin."""
    end: Fraction = 0.0
    """Score that it needs at the end."""
    over: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Fraction of the training with pseudo-labels over which the threshold falls."""
    margin_weight: Fraction = 0.5
    """Weight of the margin (top 1 minus top 2) in the score; the rest is the weight of the confidence (top 1)."""
    weigh: bool = True
    """Weight a pseudo-label by its score instead of 1."""


class PseudoLabelConfig(Section):
    """Training on a teacher's answers before the training on the data set's."""

    share: Fraction = 0.3
    """Fraction of the steps, the first ones, that train on pseudo-labels; 0: no teacher."""
    store: Folder | None = None
    """Folder of answers written by `preceptor teach`; default: the teacher answers when they are first needed."""
    min_usable: Fraction = 0.1
    """Smallest fraction of the teacher's answers that must be usable (no refusal, no loop, not cut off, boxes inside
    the image); with fewer the run stops. `preceptor teach` has a floor of its own, `--min-usable`."""
    alpha: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the divergence from the teacher's token distributions: (alpha KL + cross-entropy) / (1 + alpha)."""
    logits: Literal["none", "online", "cached"] = "cached"
    """Source of the teacher's token distributions. none: only its answers are used. online: the teacher runs on every
    batch. cached: they are read from a cache."""
    top_k: Positive = 64
    """For `cached`: vocabulary entries stored per token; the others are stored as one sum."""
    temperature: PositiveNumber = 0.5
    """Temperature of both distributions. The default is that of the published code."""
    t_squared: bool = False
    """Scale the divergence by the squared temperature. The published code does not."""
    curriculum: CurriculumConfig = CurriculumConfig()
    max_new_tokens: Positive = 64
    """Largest length of an answer. Longer answers are left out."""


class ReflectionConfig(Section):
    """Reflection: wrong answers of the student are corrected during the training and added to it."""

    rounds: Annotated[int, Field(ge=0)] = 4
    """Number of rounds, evenly spaced over the training on the data set's answers; 0: none."""
    rows: Positive = 64
    """Training dialogues that the student answers in a round."""
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Fraction of the training that is replaced by corrections, once there are any. A batch repeats none of them."""
    buffer: Positive = 512
    """Largest number of corrections that are kept."""
    uses: Positive = 3
    """Number of times that a correction is trained on before it is forgotten. All others come first."""
    samples: Literal["none", "free_text"] = "none"
    """none: a correction is the true answer. free_text: where the true answer is a text without boxes, the best sample
    of the `corrector` that contains all of it. Boxes and names are always the true ones."""
    corrector: Literal["teacher", "student"] = "teacher"
    """For `samples`: the model that writes corrections, given the wrong and the true answer."""
    candidates: Positive = 4
    """For `samples`: number of corrections that are sampled; the best one is kept."""
    temperature: PositiveNumber = 0.7
    """For `samples`: their temperature."""
    tau: Fraction = 0.5
    """An answer fails if its similarity to the truth is below this value."""
    overlap: Fraction = 0.5
    """An answer fails if the mean IoU of its boxes is below this value."""
    form: Literal["two_turns", "plain"] = "plain"
    """plain: the correction is the answer. two_turns: it follows the wrong answer and a request to look again, a
    context that does not occur in tests."""
    max_new_tokens: Positive = 64
    """Largest length of an answer and of a correction."""

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher writes corrections."""
        return self.rounds > 0 and self.samples != "none" and self.corrector == "teacher"


class SelectionConfig(Section):
    """Selective generation: sample several answers and choose the one that is most similar to the others."""

    candidates: Positive = 5
    """Sampled answers; 1: greedy decoding."""
    temperature: PositiveNumber = 0.7
    """Temperature of the sampled answers."""
    box_weight: Fraction = 0.5
    """Weight of the boxes' overlap in the similarity of two answers; the rest is the weight of the text."""
