"""A linear model of the words of the question and of frozen image features: the simplest baseline that looks.

It shows how far a pretrained backbone goes without a fusion network, a text encoder or a teacher. It learns from the
training split; its regularisation is chosen on the validation split. The image features are those of the recipe's
pretrained vision backbone, so there is no such baseline if the recipe names none or if none is available.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from preceptor.data.images import ImageError, load_image
from preceptor.data.types import Dataset, Prediction, Sample
from preceptor.data.vqa.answers import AnswerVocabulary
from preceptor.errors import UserError
from preceptor.vqa.baselines import question_words
from preceptor.vqa.bundle import choose_preprocessing, choose_vision, load_vision, vision_name
from preceptor.vqa.config import ModelConfig, VqaRecipe
from preceptor.vqa.dataset import pixels, resize
from preceptor.vqa.vision import TransformersVision

SCALES = (0.1, 0.3, 1.0)
"""Candidate norms of the image features, relative to the words."""
PENALTIES = (3e-4, 1e-4, 3e-5, 1e-5)
"""Candidate weights of half the squared norm in the mean loss, strongest first."""
DEFAULTS = (0.3, 3e-5)
"""The scale and the penalty without validation samples."""
WORDS, CLASSES = 1000, 1000
"""Most frequent words and answers of the training split that are used. They bound the time on large data sets."""
COMPONENTS = 64
"""Principal components of the image features that are used, at most."""
ITERATIONS = 50


def linear_baseline(recipe: VqaRecipe, data: Dataset[Sample], normaliser: str) -> tuple[str, list[Prediction]] | None:
    """Return (name of the backbone, test predictions), or None without training samples or a pretrained backbone."""
    models = [recipe.teacher.model, recipe.student.model]
    found = next(((model, source) for model in models if (source := _available(model))), None)
    if found is None or not data.split("train"):
        return None
    model, source = found
    features = image_features(recipe, data, model, source)
    if all(features[sample.image] is None for sample in data.split("train")):
        return None
    return vision_name(source), linear(data, features, normaliser)


def _available(model: ModelConfig) -> str | None:
    try:
        return choose_vision(model, allow_downloads=False)
    except UserError:  # training needs it, a report does not
        return None


def image_features(
    recipe: VqaRecipe, data: Dataset[Sample], model: ModelConfig, source: str
) -> dict[Path, Tensor | None]:
    """Return the features (W,) of every image: the global token of each depth and the mean of the cells of the last.

    An image that cannot be read has None: the models, which come first, report it if it is needed.
    """
    config, weights = load_vision(source, {"local_files_only": True, "trust_remote_code": recipe.trust_remote_code})
    preprocessing = choose_preprocessing(model, recipe.data, allow_downloads=False)
    size = preprocessing.image_size
    vision = TransformersVision({"config": config, "depths": model.vision.depths, "grid": 1, "image_size": size})
    vision.model.load_state_dict(weights, strict=False)
    vision.eval()
    features: dict[Path, Tensor | None] = {}
    samples = [sample for split in ("train", "validation", "test") for sample in data.split(split)]
    for path in dict.fromkeys(sample.image for sample in samples):
        try:
            image = load_image(path, max_bytes=recipe.data.max_image_bytes, max_pixels=recipe.data.max_image_pixels)
        except ImageError:
            features[path] = None
            continue
        with torch.no_grad():
            found = vision._features(pixels(np.stack([resize(image, size)]), preprocessing))
        features[path] = torch.cat([feature.flatten() for feature in found])
    return features


def linear(data: Dataset[Sample], features: Mapping[Path, Tensor | None], normaliser: str = "mevf") -> list[Prediction]:
    """Return the test predictions of a multinomial logistic regression, trained with L-BFGS.

    Args:
        data: The samples. Training and validation rows with an unreadable image are left out.
        features: Features (W,) of every image, or None if it cannot be read; such a test row gets the empty answer.
        normaliser: Normaliser of answers.
    """
    train, validation, test = (
        [sample for sample in data.split(split) if features[sample.image] is not None]
        for split in ("train", "validation", "test")
    )
    every = AnswerVocabulary.build(train, normaliser)
    vocabulary = AnswerVocabulary(every.answers[:CLASSES], normaliser)
    labels = torch.tensor([vocabulary.encode(sample.answers) for sample in train])
    encode = _encoder(train, features)
    x_NW, labels = encode(train)[labels >= 0], labels[labels >= 0]
    x_validation = encode(validation)
    accepted = [{vocabulary.normalise(answer) for answer in sample.answers} for sample in validation]
    scales, penalties = (SCALES, PENALTIES) if validation else (DEFAULTS[:1], DEFAULTS[1:])
    best, chosen = -1, torch.empty(0)
    for scale in scales:
        factors = torch.ones(x_NW.shape[1])
        factors[:COMPONENTS] = scale
        weight = torch.zeros(x_NW.shape[1], len(vocabulary.answers))
        for penalty in penalties:
            weight = _fit(x_NW * factors, labels, weight, penalty)
            scaled = factors[:, None] * weight
            classes = (x_validation @ scaled).argmax(1).tolist()
            correct = sum(vocabulary.answers[c] in texts for c, texts in zip(classes, accepted, strict=True))
            if correct > best:
                best, chosen = correct, scaled
    probabilities, best_class = (encode(test) @ chosen).softmax(1).max(1)
    found = {
        sample.id: Prediction(sample.id, vocabulary.answers[c], p)
        for sample, c, p in zip(test, best_class.tolist(), probabilities.tolist(), strict=True)
    }
    return [found.get(sample.id, Prediction(sample.id, "", 0.0)) for sample in data.split("test")]


def _encoder(train: Sequence[Sample], features: Mapping[Path, Tensor | None]) -> Callable[[Sequence[Sample]], Tensor]:
    """Return the function that gives the inputs (N, W) of samples, fitted to the training rows.

    The first COMPONENTS columns are principal components of the standardised image features, with a root mean square
    norm of 1 over the training images, padded with zeros. Then comes the bag of words, with norm 1, and a constant.
    """

    def stacked(paths: Sequence[Path]) -> Tensor:
        return torch.stack([feature for path in paths if (feature := features[path]) is not None])

    counts = Counter(word for sample in train for word in set(question_words(sample.question)))
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    columns = {word: number for number, word in enumerate(ranked[:WORDS])}
    images = stacked(list(dict.fromkeys(sample.image for sample in train)))
    center, spread = images.mean(0), images.std(0, correction=0).clamp_min(1e-6)
    directions = torch.linalg.svd((images - center) / spread, full_matrices=False).Vh[:COMPONENTS]
    scale = ((images - center) / spread @ directions.T).square().sum(1).mean().sqrt().clamp_min(1e-6)

    def encode(samples: Sequence[Sample]) -> Tensor:
        bags = torch.zeros(len(samples), len(columns))
        for row, sample in enumerate(samples):
            for word in set(question_words(sample.question)) & columns.keys():
                bags[row, columns[word]] = 1
        seen = stacked([sample.image for sample in samples]) if samples else images[:0]
        reduced = (seen - center) / spread @ directions.T / scale
        padded = F.pad(reduced, (0, COMPONENTS - reduced.shape[1]))
        return torch.cat([padded, F.normalize(bags), torch.ones(len(samples), 1)], dim=1)

    return encode


def _fit(x_NW: Tensor, labels_N: Tensor, start_WC: Tensor, penalty: float) -> Tensor:
    """Return the weights (W, C) that minimise the mean cross-entropy plus half the penalty times their squared norm."""
    weight = start_WC.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([weight], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        # The constant is not penalised.
        value = F.cross_entropy(x_NW @ weight, labels_N) + penalty / 2 * weight[:-1].square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return weight.detach()
