"""The recipe `lckd-brats-code` has the settings of the authors' repository (billhhh/LCKD, commit 5ba51b5)."""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from preceptor.data.segmentation.splits import cut_fold
from preceptor.data.types import Case
from preceptor.segmentation import augment
from preceptor.segmentation.lckd import LckdConfig
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.tasks import load_recipe
from preceptor.training.lr_schedule import factor
from tests.segmentation.made_run import MODALITIES, REGIONS

STEPS, FIRST_PHASE = 115_000, 80_000
OURS = "not a setting of the published code"

# key: (value, the fact about the published code)
SETTINGS: dict[str, tuple[Any, str]] = {
    "task": ("segmentation", OURS),
    "name": ("lckd-brats-code", OURS),
    "description": ("LCKD on BraTS, as its published code; one GPU", OURS),
    "output": ("runs/lckd-brats-code", OURS),
    "seed": (0, OURS),
    "stages": (("distilled",), OURS),
    "data.name": ("brats", OURS),
    "data.modalities": (("flair", "t1", "t1ce", "t2"), "Network: modalities in the order flair, t1, t1ce, t2"),
    "data.fold": (0, "Declared: the published lists elect on 57 cases that are also in the training list"),
    "data.validation_fraction": (0.1, "Declared, as data.fold"),
    "data.patch_size": ((80, 160, 160), "Network: a crop of 80x160x160"),
    "data.intensity": ("histogram", "Intensity: clip at the last bin that holds at least 50 voxels, then z-score"),
    "data.augment": ("full", "Crop: scale, flips; then elastic, rotation, scale, noise, blur, ..., gamma"),
    "data.foreground_probability": (0.5, "Crop: with p 0.5 centre on a random voxel of a random class"),
    "data.workers": (4, "run.sh: num_workers=4"),
    "model.net": ("reference", "Network: 3-D ResNet-50, ASPP, 43.66 M parameters"),
    "model.encoder": ("shared", "Network: through ONE shared encoder; no modality-specific encoders"),
    "model.fill": ("bottleneck", "Missing: the mean at the bottleneck; skips stay those of the zero image"),
    "train.epochs": (1155.78, "Optimisation: 115,000 iterations of batch 2"),
    "train.batch_size": (2, "Optimisation: batch 2"),
    "train.optimizer": ("sgd", "Optimisation: SGD, Nesterov momentum 0.99"),
    "train.learning_rate": (1e-2, "Optimisation: lr 1e-2"),
    "train.weight_decay": (0.0, "Optimisation: no weight decay"),
    "train.schedule": ("poly", "Optimisation: poly 0.9"),
    "train.poly_power": (0.9, "Optimisation: poly 0.9"),
    "train.poly_restart": (0.69565, "Optimisation: stage 1 of 80,000; the schedule restarts at 3.43e-3 of 115,000"),
    "train.warmup": (0.0, "Optimisation: the rate is lr_poly from iteration 0"),
    "train.clip_norm": (None, "Optimisation: backward, then step; no clipping"),
    "train.precision": ("fp32", "train.py: no mixed precision"),
    "train.evaluate_every": (50, OURS),
    "train.checkpoint_every": (5, OURS),
    "train.select": ("last", "Optimisation: last iterate kept"),
    "method.name": ("lckd", OURS),
    "method.teachers": ("multi", "Election: arg-max per ET, WT, TC; teachers = set of the three"),
    "method.cross_modal.weight": (0.1, "Distillation: weight 0.1"),
    "method.cross_modal.distance": ("l1", "Distillation: L1 (mean over all elements)"),
    "method.cross_modal.levels": ("bottleneck", "Distillation: between 256-channel ASPP outputs before fill-in"),
    "method.cross_modal.students": ("all", "Distillation: each available s (also t itself, and other teachers)"),
    "method.cross_modal.pairs": ("sum", "Distillation: sum of L1(stop_gradient(f_t), f_s)"),
    "method.modality_dropout.kind": ("published", "Missing: k = randint(1,3) per batch, a uniform subset of size k"),
    "method.modality_dropout.start": (
        0.69565,
        "Optimisation: stage 1 with all modalities, 80,000 of 115,000 iterations",
    ),
    "method.election.every": (50.251, "Election: every 5,000 iterations"),
    "method.election.initial": ("flair", "Election: until the first election the teacher is flair"),
    "method.election.first": (1, "Election: also after the first iteration"),
    "method.election.blend": ("logits", "Election: the sigmoid of mean logits"),
    "method.loss.dice": (1.0, "Loss: Dice + BCE + 0.1 distillation"),
    "method.loss.bce": (1.0, "Loss: Dice + BCE + 0.1 distillation"),
    "method.loss.bce_reduction": ("sum", "Loss: BCE-with-logits SUMMED over the three classes"),
    "evaluation.overlap": (0.333, "Inference: overlap 1/3"),
    "evaluation.validation_overlap": (0.333, "train.py, predict_sliding: overlap 1/3 in elections, too"),
    "evaluation.mode": ("constant", "Inference: mean of sigmoids"),
    "evaluation.minimum_component": (0.1, "Post-processing: components under min(2000, 10 % of the largest)"),
    "evaluation.minimum_component_voxels": (2000, "Post-processing: under min(2000, 10 % of the largest)"),
    "evaluation.lowest_slices": (26, "Post-processing: whose highest slice index is <= 25"),
    "evaluation.et_minimum": (500, "Post-processing: ET under 500 voxels becomes label 1"),
}
# Keys that the recipe leaves at their defaults, which the published code has, too.
DEFAULTS: dict[str, tuple[Any, str]] = {
    "data.train_share": (1.0, "Data: all training cases have masks"),
    "data.spacing": (None, "Data: the grid of the files"),
    "train.gradient_accumulation_steps": (1, "train.py: a step for every batch"),
    "train.ema_decay": (0.0, "train.py: no average of weights"),
    "method.losses": ([], "Loss: Dice + BCE + 0.1 distillation"),
    "method.cross_modal.start": (0.0, "Distillation: from step 0"),
    "method.cross_modal.ramp": (0.0, "Distillation: from step 0"),
    "method.cross_modal.end": (1.0, "Distillation: to the last step"),
    "method.cross_modal.normalise": (False, "Distillation: L1 of the ASPP outputs themselves"),
    "method.cross_modal.projector": (False, "Distillation: L1 of the ASPP outputs themselves"),
    "method.full.weight": (0.0, "no teacher beside the elected modalities"),
    "method.modality_dropout.ramp": (0.0, "Missing: every batch of stage 2 is drawn anew"),
    "method.election.cases": (None, "Election: all cases of the list vote"),
}


def recipe():
    return load_recipe("lckd-brats-code", ["data.root=/tmp"])


def leaves(tree: dict[str, Any], prefix: str = "") -> set[str]:
    nested = [leaves(v, f"{prefix}{k}.") if isinstance(v, dict) else {prefix + k} for k, v in tree.items()]
    return set().union(*nested)


def test_every_key_of_the_recipe_has_its_source():
    text = files("preceptor").joinpath("recipes/lckd-brats-code.yaml").read_text("utf-8")
    assert leaves(yaml.safe_load(text)) == set(SETTINGS)


@pytest.mark.parametrize("key", [*SETTINGS, *DEFAULTS])
def test_a_setting_is_that_of_the_published_code(key):
    value: Any = recipe()
    for name in key.split("."):
        value = getattr(value, name)
    assert value == {**SETTINGS, **DEFAULTS}[key][0]


def test_steps_and_elections_are_those_of_the_published_code():
    cases = [Case(f"case{i}", {}, None, f"patient{i}", "train") for i in range(285)]  # BraTS2018
    settings = recipe()
    cut = cut_fold(cases, settings.data.fold, settings.data.folds, settings.data.validation_fraction, 0)
    per_epoch = sum(case.split == "train" for case in cut) / settings.train.batch_size
    assert round(settings.train.epochs * per_epoch) == STEPS
    student = MultimodalUNet(MultimodalUNetConfig(MODALITIES, tuple(REGIONS), channels=(4, 4, 8)), seed=0)
    voted = []
    scores = torch.tensor([[0.1, 0.2, 0.9], [0.0, 0.0, 0.1], [0.8, 0.7, 0.3], [0.1, 0.3, 0.8]])

    def votes(network):
        voted.append(step)
        return scores

    term = settings.method.loss_terms(student, votes, per_epoch)[0]
    for step in [1, 2, 4999, 5000, 5001, 5002, 10_001]:
        term.on_interval((step - 1) / STEPS)
        if step == 1:
            assert term.election.teachers("multi") == [MODALITIES.index("flair")]
        term.after_step(step)
    assert voted == [1, 5001, 10_001]  # after iterations 0, 5,000 and 10,000
    assert isinstance(settings.method, LckdConfig)


def test_the_learning_rate_has_the_two_phases_of_the_published_code():
    train = recipe().train

    def rate(step: int) -> float:
        shape = {"kind": train.schedule, "warmup": train.warmup, "power": train.poly_power}
        return train.learning_rate * factor(step, STEPS, **shape, restart=train.poly_restart)

    def published(iteration: int, steps: int) -> float:
        return 1e-2 * (1 - iteration / steps) ** 0.9

    for step in (0, 40_000, 79_000):
        assert rate(step) == pytest.approx(published(step, FIRST_PHASE), rel=1e-3)
    assert rate(79_999) < 1e-6
    assert rate(80_000) == pytest.approx(3.43e-3, rel=1e-3)
    for step in (80_000, 100_000, 114_999):
        assert rate(step) == pytest.approx(published(step, STEPS))


def test_augmentations_have_the_published_probabilities_and_ranges():
    assert (augment.CROP_SCALE_P, augment.CROP_SCALE) == (0.5, (0.9, 1.1))
    assert (augment.ROTATION_P, augment.ROTATION) == (0.2, 15)
    assert (augment.SCALE_P, augment.SCALE) == (0.2, (0.85, 1.25))
    assert augment.NOISE_P == 0.1
    assert augment.BLUR_P == 0.2
    assert augment.BRIGHTNESS_P == augment.CONTRAST_P == augment.GAMMA_P == 0.15
    assert augment.LOW_RESOLUTION_P == 0.25
    assert augment.GAMMA == (0.7, 1.5)


def test_an_election_may_average_logits_where_windows_overlap(tmp_path):
    from preceptor.segmentation.data import examples, read_cases
    from preceptor.segmentation.evaluate import votes
    from tests.segmentation.conftest import recipe as tiny

    found = []
    for blend in ("probabilities", "logits"):
        settings = tiny(tmp_path, f"method.election.blend={blend}", "evaluation.validation_overlap=0.5")
        data = read_cases(settings.data, tmp_path / "data")
        config = MultimodalUNetConfig(tuple(data.modalities), tuple(data.regions), channels=(4, 4, 8))
        network = MultimodalUNet(config, seed=0).eval()
        found.append(votes(network, examples(settings, data, "validation", 0), settings).numpy())
    assert not np.allclose(*found, atol=1e-4, equal_nan=True)
    assert np.allclose(*found, atol=0.1, equal_nan=True)
