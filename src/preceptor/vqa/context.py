"""What the stages of a VQA run share: data, answer classes, tokenizer and preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from preceptor.data.splits import cross_questions
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.vqa.bundle import (
    VqaBundle,
    build_bundle,
    choose_preprocessing,
    choose_text,
    choose_tokenizer,
    choose_vision,
    load_tokenizer,
)
from preceptor.vqa.config import ModelConfig, RunModelConfig, VqaRecipe
from preceptor.vqa.dataset import Preprocessing, VqaExamples, tokenize


@dataclass
class RunContext:
    """The recipe and the data of a run, and what is derived from them once for all stages."""

    recipe: VqaRecipe
    data: Dataset[Sample]

    @cached_property
    def vocabulary(self) -> AnswerVocabulary:
        """The answer classes, built from the training split alone."""
        config = self.recipe.data
        return AnswerVocabulary.build(self.data.split("train"), config.normaliser, config.minimum_answer_count)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the teacher. The student uses it too, because hidden layers are compared token by token.

        In a run without a teacher, it is that of the student's text encoder if that is pretrained. Raises UserError if
        a model that the recipe trains has a text encoder that was pretrained with other tokens.
        """
        recipe, downloads = self.recipe, self.recipe.allow_downloads
        sections = {"teacher" if stage == "teacher" else "student" for stage in recipe.stages}
        models = {section: getattr(recipe, section).model for section in sorted(sections)}
        texts = {section: choose_text(model, allow_downloads=downloads) for section, model in models.items()}
        section = "student" if "teacher" not in sections and texts["student"] else "teacher"
        if runs := recipe.method.teaching.runs:
            source, tokenizer = f"method.teaching.runs[0]={runs[0]}", VqaBundle.load(Path(runs[0])).tokenizer
        else:
            questions = [sample.question for sample in self.data.split("train")]
            config = getattr(recipe, section).model
            source, tokenizer = f"{section}.model", choose_tokenizer(config, questions, allow_downloads=downloads)
        for other, text in texts.items():
            if text and source != f"{other}.model":
                own = load_tokenizer(text, allow_downloads=downloads)
                if not self.have_same_tokens(own, tokenizer):
                    raise UserError(
                        f"the text encoder {text!r} of {other}.model was pretrained with other tokens than those of "
                        f"{source}, and all models of a run use the same tokens; set {other}.model.text.pretrained=[] "
                        "to train the encoder from scratch, or give both models encoders with the same tokenizer"
                    )
        return tokenizer

    def have_same_tokens(self, one: Any, other: Any) -> bool:
        """Return whether two tokenizers have the same vocabulary and give the training questions the same ids."""
        if one.get_vocab() != other.get_vocab():
            return False
        questions = [sample.question for sample in self.data.split("train")]
        ids = [tokenize(tokenizer, questions, self.recipe.data.max_question_tokens)[0] for tokenizer in (one, other)]
        return ids[0] == ids[1]

    def preprocessing(self, config: ModelConfig) -> Preprocessing:
        """Return the size and normalisation of a model's images.

        A pretrained backbone has its own normalisation. A backbone from scratch has that of the recipe's teacher.
        """
        recipe, downloads = self.recipe, self.recipe.allow_downloads
        own = choose_vision(config, allow_downloads=downloads)
        return choose_preprocessing(config if own else recipe.teacher.model, recipe.data, allow_downloads=downloads)

    def new_bundle(self, config: RunModelConfig, seed: int) -> VqaBundle:
        """Return a new model with these answer classes and this tokenizer."""
        return build_bundle(
            config.model,
            self.tokenizer,
            self.preprocessing(config.model),
            self.vocabulary,
            seed=seed,
            allow_downloads=self.recipe.allow_downloads,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    def training_examples(
        self, seed: int, *, model: ModelConfig | None = None, with_teacher: bool = False
    ) -> VqaExamples:
        """Return the augmented training samples for a model, by default the student.

        With `with_teacher`, the unlabelled samples and the cross questions of the recipe follow, which a teacher alone
        can answer.
        """
        samples: list[Sample] = self.data.split("train")
        if with_teacher:
            every = samples + self.data.split("unlabelled")
            number = self.recipe.method.teaching.cross_questions
            samples = [sample for sample in every if sample.question]
            samples += cross_questions(every, number, self.recipe.data.split_seed)
        return VqaExamples(
            samples,
            self.tokenizer,
            self.vocabulary,
            self.preprocessing(model or self.recipe.student.model),
            self.recipe.data,
            augmented=True,
            seed=seed,
        )
