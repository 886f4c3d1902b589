"""What the stages of a VQA run share: data, answer classes, tokenizer and preprocessing."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from preceptor.data.splits import cross_questions
from preceptor.data.types import Dataset, Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.vqa.bundle import VqaBundle, build_bundle, choose_preprocessing, choose_tokenizer
from preceptor.vqa.config import RunModelConfig, VqaRecipe
from preceptor.vqa.dataset import Preprocessing, VqaExamples


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
        """The tokenizer of the teacher. The student uses it too, because hidden layers are compared token by token."""
        questions = [sample.question for sample in self.data.split("train")]
        runs = self.recipe.method.teaching.runs
        if runs:
            return VqaBundle.load(Path(runs[0])).tokenizer
        config = self.recipe.teacher.model
        return choose_tokenizer(config, questions, allow_downloads=self.recipe.allow_downloads)

    @cached_property
    def preprocessing(self) -> Preprocessing:
        """The size and normalisation of images, the same for all models of the run."""
        config = self.recipe.teacher.model
        return choose_preprocessing(config, self.recipe.data, allow_downloads=self.recipe.allow_downloads)

    def new_bundle(self, config: RunModelConfig, seed: int) -> VqaBundle:
        """Return a new model with these answer classes and this tokenizer."""
        return build_bundle(
            config.model,
            self.tokenizer,
            self.preprocessing,
            self.vocabulary,
            seed=seed,
            allow_downloads=self.recipe.allow_downloads,
            trust_remote_code=self.recipe.trust_remote_code,
        )

    def training_examples(self, seed: int, *, with_teacher: bool = False) -> VqaExamples:
        """Return the augmented training samples.

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
            samples, self.tokenizer, self.vocabulary, self.preprocessing, self.recipe.data, augmented=True, seed=seed
        )
