"""The recipe of a grounded vision-language model: dialogues with boxes, and ClinKD's switches."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from preceptor.config import (
    BaseRecipe,
    Folder,
    Fraction,
    PhantomConfig,
    Positive,
    PositiveNumber,
    Section,
    Seed,
    TrainConfig,
)

Family = Literal["qwen2_vl", "qwen2_5_vl", "qwen3_vl"]


class DialogueDataConfig(Section):
    name: Literal["phantom-grounding", "slake-grounding", "med-grit", "sharegpt"] = "phantom-grounding"
    """phantom-grounding: generated slices with boxes. slake-grounding: SLAKE's boxes and questions as the four tasks.
    med-grit: Med-GRIT-270k. sharegpt: dialogues of your own, in the form of ShareGPT, LLaMA-Factory or JSONL."""
    root: Folder | None = None
    """Folder of the data set (`med-grit`: with train.json and test.json); of `sharegpt` the JSON or JSONL file."""
    images: Folder | None = None
    """Folder that image names are relative to; default: that of `root`."""
    language: Literal["en", "zh", "both"] = "en"
    """Of `slake-grounding`."""
    boxes: Literal["refuse", "repair", "drop"] = "refuse"
    """What is done about a faulty box in a file: stop, mend it where it can be, or leave its record out."""
    tasks: tuple[Literal["vg", "roc", "rc", "mia"], ...] = ("vg", "roc", "rc", "mia")
    """Visual grounding, referring object classification, referring captioning, medical image analysis."""
    train_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the training groups whose answers are used."""
    unlabelled: Literal["none", "rest"] = "none"
    """rest: what `train_share` leaves out is there without its answers: a teacher's pseudo-labels alone teach it."""
    teacher_share: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the training groups that the stage `teacher` alone learns from, as a strong model has learnt elsewhere:
    the students have none of them, neither with answers nor without. 0: it learns from what the students do."""
    test_rows: Positive | None = None
    """At most so many dialogues of each task are tested, drawn by `split_seed`; default: all."""
    validation_rows: Positive | None = None
    """The same of validation."""
    validation_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """Share of the training rows, by image, that validates where a file names no validation part."""
    test_fraction: Annotated[float, Field(gt=0, lt=0.5)] = 0.1
    """The same of the test part."""
    split_seed: Seed = 0
    """Which groups and rows are drawn; apart from `seed`."""
    max_image_bytes: Positive = 64 * 2**20
    """A larger image file is refused before it is decoded."""
    max_image_pixels: Positive = 64_000_000
    """An image of more pixels is refused before it is decoded."""
    broken: Literal["raise", "skip"] = "raise"
    """raise: stop at an image that cannot be read. skip: replace its dialogue in training and count it; in tests its
    answer is empty."""
    skip_limit: Fraction = 0.01
    """With `broken: skip`, the largest share of the training dialogues that may be skipped."""
    workers: Annotated[int, Field(ge=0, le=64)] = 0
    """Processes that read ahead."""
    phantom: PhantomConfig = PhantomConfig()
    phantom_size: Annotated[int, Field(ge=28, le=1024)] = 112
    """Side of generated images in pixels."""

    @model_validator(mode="before")
    @classmethod
    def _dashes(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("name"), str):
            value = {**value, "name": value["name"].replace("_", "-")}
        return value


class NewVlmConfig(Section):
    """A small model with random weights; its tokenizer is learnt from the training texts."""

    family: Family = "qwen2_vl"
    """Of its layers."""
    size: Literal["tiny", "small"] = "tiny"
    """About 1.5 and 14 million parameters."""
    vocabulary_size: Annotated[int, Field(ge=256)] = 2000
    """Most byte pairs that are learnt, besides the special tokens."""
    language_model: Folder | None = None
    """A causal language model whose weights the text tower starts from, with its own tokenizer."""


class LoraConfig(Section):
    rank: Positive = 16
    """Rank of the adapters' product."""
    alpha: PositiveNumber = 32
    """The product is scaled by alpha over rank."""
    dropout: Fraction = 0.05
    """Before the adapters."""
    base: Literal["float32", "bfloat16"] = "float32"
    """Type in which the weights that the adapters stand beside are held, and saved; adapters learn in float32."""


class VlmConfig(Section):
    source: Folder | None = None
    """A Qwen2-VL, Qwen2.5-VL or Qwen3-VL checkpoint: a folder, or a hub name with `allow_downloads`. Without one a
    `new` model is made."""
    new: NewVlmConfig = NewVlmConfig()
    training: Literal["full", "lora", "frozen_vision"] = "full"
    """Which weights learn: all of them, adapters alone, or all but the vision tower's."""
    lora: LoraConfig = LoraConfig()
    max_pixels: Positive = 448 * 448
    """Larger images are made smaller."""
    cut_off: Positive = 2048
    """Most tokens of a dialogue, those of its images with them; a longer one is an error."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass rather than keep them."""


class VlmRunConfig(Section):
    model: VlmConfig = VlmConfig()
    train: TrainConfig = TrainConfig(learning_rate=5e-5, epochs=3, batch_size=32, select="last", pretrained_scale=1.0)


class GuidanceConfig(Section):
    """Rotary positions (Med-CLIP guided RoPE): how far apart text and image, and neighbours in an image, lie."""

    kind: Literal["none", "fixed", "clip"] = "fixed"
    """none: as upstream. fixed: the same for all images (the published code). clip: by each image's modality."""
    gap: PositiveNumber = 2.0
    """Lambda: from the last text token to the first visual one, and back."""
    row_step: PositiveNumber = 1.0
    """Alpha: from one row of an image to the next."""
    column_step: PositiveNumber = 1.0
    """Alpha: from one column to the next."""
    table: dict[str, tuple[PositiveNumber, PositiveNumber, PositiveNumber]] = Field(default_factory=dict)
    """Of `clip`: (gap, row_step, column_step) by modality (ct, mr, x, pet, endoscopy, dermoscopy, fundus, ultrasound);
    others take the three above."""
    learnable: bool = False
    """Of `clip`: whether the table is trained."""
    scorer: str | None = None
    """Of `clip`: a CLIP-like model (folder or hub name) that says which modality an image is. Default: the data set's
    own word for it."""


class CurriculumConfig(Section):
    begin: Fraction = 0.8
    """Score that a pseudo-label needs at first, to be learnt from; the score mixes confidence and margin."""
    end: Fraction = 0.0
    """Score that it needs at last."""
    over: Annotated[float, Field(gt=0, le=1)] = 0.7
    """Share of the time with pseudo-labels over which the threshold falls."""
    margin_weight: Fraction = 0.5
    """Part of the margin (top 1 less top 2) in the score; the rest is the confidence's (top 1)."""
    weigh: bool = True
    """Whether a pseudo-label weighs its score, rather than 1."""


class PseudoLabelConfig(Section):
    """What a teacher says, learnt before the full training."""

    share: Fraction = 0.3
    """Share of the steps that is spent on it, before the others; 0: no teacher."""
    store: Folder | None = None
    """Answers written by `preceptor teach`; default: the teacher answers when they are first needed."""
    alpha: Annotated[float, Field(ge=0)] = 0.5
    """Weight of the divergence from the teacher's words: (alpha KL + cross-entropy) / (1 + alpha)."""
    logits: Literal["none", "online", "cached"] = "cached"
    """Where the teacher's words come from: nowhere (its answers alone), the teacher with every batch, or a cache."""
    top_k: Positive = 64
    """Of `cached`: words per token; the rest is one sum."""
    temperature: PositiveNumber = 0.5
    """Of both distributions; the published code's."""
    t_squared: bool = False
    """Whether the divergence is scaled by the temperature squared; the published code does not."""
    curriculum: CurriculumConfig = CurriculumConfig()
    max_new_tokens: Positive = 64
    """Of an answer; one that has not ended by then is left out."""


class ReflectionConfig(Section):
    """Wrong answers, found during the training, corrected and learnt from again."""

    rounds: Annotated[int, Field(ge=0)] = 4
    """How often, evenly over the full training; 0: never."""
    rows: Positive = 64
    """Training dialogues that are asked in a round."""
    ratio: Annotated[float, Field(ge=0, lt=1)] = 0.2
    """Share of a batch that corrections take the place of, once there are any."""
    buffer: Positive = 512
    """Most corrections that are kept."""
    corrector: Literal["teacher", "student"] = "teacher"
    """Who is shown the wrong answer and the true one, and writes corrections."""
    candidates: Positive = 4
    """Corrections that are sampled; the best is kept."""
    temperature: PositiveNumber = 0.7
    """Of the sampled corrections."""
    tau: Fraction = 0.5
    """An answer whose similarity to the truth is less fails ..."""
    overlap: Fraction = 0.5
    """... and one whose boxes overlap the true ones by less."""
    form: Literal["two_turns", "plain"] = "two_turns"
    """How a correction is learnt: after the wrong answer and a request to look again, or as the answer."""
    max_new_tokens: Positive = 64
    """Of an answer and of a correction."""


class SelectionConfig(Section):
    """Selective generation: of several sampled answers the one most like the others."""

    candidates: Positive = 5
    """1: plain decoding."""
    temperature: PositiveNumber = 0.7
    """Of the sampled answers."""
    box_weight: Fraction = 0.5
    """Part of the boxes' overlap in the similarity of two answers; the rest is the text's."""


class ClinkdConfig(Section):
    """ClinKD (Ge et al. 2025): guided positions, pseudo-labels, reflection, selection."""

    name: Literal["clinkd"] = "clinkd"
    """The method; this word makes a recipe one of grounded vision-language models."""
    guidance: GuidanceConfig = GuidanceConfig()
    pseudo_labels: PseudoLabelConfig = PseudoLabelConfig()
    reflection: ReflectionConfig = ReflectionConfig()
    selection: SelectionConfig = SelectionConfig()
    similarity: Folder | None = None
    """A sentence embedder (folder, `package:NAME/FOLDER` or hub name) that compares answers; default: the words that
    they share."""
    teaching_run: Folder | None = None
    """A trained run, or a checkpoint, that teaches instead of this recipe's teacher stage."""
    teacher_offload: Literal["none", "cpu"] = "none"
    """cpu: the teacher's weights rest in the CPU's memory and are on the GPU only while it answers or is read from."""


class AnswerConfig(Section):
    batch_size: Positive = 32
    """Dialogues that are answered at a time."""
    max_new_tokens: Positive = 64
    """Of an answer."""


class GroundingReport(Section):
    pictures: Annotated[int, Field(ge=0, le=30)] = 6
    """Images that are drawn with true and predicted boxes."""


VlmStage = Literal["teacher", "baseline", "guided", "distilled", "clinkd"]
STAGE_KEYS = {
    "teacher": ("data.", "teacher.", "answers."),
    "baseline": ("data.", "student.", "answers."),
    "guided": ("data.", "student.", "answers.", "method.guidance."),
}
"""Keys of the recipe, by prefix, that the model of a stage depends on; other stages depend on all."""
STAGE_ADDS: dict[str, str] = {
    "teacher": "a larger model, answers alone",
    "baseline": "answers alone, positions as upstream",
    "guided": "guided positions",
    "distilled": "guided positions, pseudo-labels",
    "clinkd": "guided positions, pseudo-labels, reflection",
}


class GroundingRecipe(BaseRecipe):
    task: Literal["grounding"] = "grounding"
    stages: tuple[VlmStage, ...] = ("teacher", "baseline", "guided", "distilled", "clinkd")
    """teacher: the larger model. supervised: the student with answers alone. guided, distilled, clinkd: each adds one
    part of the method (positions, pseudo-labels, reflection). All students take the same number of steps."""
    data: DialogueDataConfig = DialogueDataConfig()
    method: ClinkdConfig = ClinkdConfig()
    teacher: VlmRunConfig = VlmRunConfig()
    student: VlmRunConfig = VlmRunConfig()
    answers: AnswerConfig = AnswerConfig()
    report: GroundingReport = GroundingReport()

    @model_validator(mode="after")
    def _agree(self) -> GroundingRecipe:
        taught = {"distilled", "clinkd"} & set(self.stages) and self.method.pseudo_labels.share > 0
        reflects = "clinkd" in self.stages and self.method.reflection.rounds > 0
        needs = taught or (reflects and self.method.reflection.corrector == "teacher")
        asked = self.method.pseudo_labels
        stored = (
            asked.store and asked.logits == "none" and not (reflects and self.method.reflection.corrector == "teacher")
        )
        if needs and "teacher" not in self.stages and not self.method.teaching_run and not stored:
            raise ValueError(
                "the stages 'distilled' and 'clinkd' need a teacher: the stage 'teacher' before them, "
                "method.teaching_run=RUN, or method.pseudo_labels.store=FOLDER with logits=none and corrector=student"
            )
        train, apart = self.data.train_share, self.data.teacher_share
        if train + apart > 1:
            raise ValueError(f"data.train_share {train} and data.teacher_share {apart} are together above 1: lower one")
        if self.data.unlabelled == "rest" and train + apart == 1:
            raise ValueError("data.unlabelled=rest needs data.train_share below 1: nothing is left out")
        return self
