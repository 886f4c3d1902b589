"""Would an ensemble be a better teacher? The validation accuracy of trained VQA runs and of all their ensembles.

    python bench/ensemble_accuracy.py mhkd-slake-en --data SLAKE --runs runs/lengths-slake/teacher-0 \
        runs/lengths-slake/baseline-x4/seed-0 runs/lengths-slake/baseline-x4/seed-1

An ensemble averages the probabilities of its members, as the teacher of several `method.teaching.runs` does. The test
questions are not read, because a teacher must not be chosen by them.
"""

from __future__ import annotations

import argparse
import tempfile
from itertools import combinations
from pathlib import Path

import torch

from preceptor.normalizers import NORMALISERS
from preceptor.pipeline.run_dir import model_folder
from preceptor.tasks import load_recipe
from preceptor.vqa.bundle import VqaBundle
from preceptor.vqa.data import read_data
from preceptor.vqa.evaluate import BATCH_SIZE


def probabilities(bundle: VqaBundle, samples, config) -> torch.Tensor:
    """Return the probabilities of a model as (samples, answers)."""
    batches = [list(range(i, min(i + BATCH_SIZE, len(samples)))) for i in range(0, len(samples), BATCH_SIZE)]
    model = bundle.model.eval()
    with torch.inference_mode():
        return torch.cat(
            [
                model(batch["pixels"], batch["input_ids"], batch["attention_mask"]).logits.softmax(-1)
                for batch in bundle.examples(samples, config).loader(batches, 0)
            ]
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", help="the recipe that all runs were trained with (data and answers)")
    parser.add_argument("--data", type=Path, required=True, help="folder of the data set")
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="two or more finished runs of one stage")
    args = parser.parse_args()
    config = load_recipe(args.recipe, [f"data.root={args.data}"]).data
    normalise = NORMALISERS[config.normaliser]
    with tempfile.TemporaryDirectory() as scratch:
        samples = read_data(config, Path(scratch) / "data").split("validation")
    accepted = [{normalise(answer) for answer in sample.answers} for sample in samples]
    answers: list[str] = []
    members = []
    for run in args.runs:
        bundle = VqaBundle.load(model_folder(run))
        if answers and bundle.model.config.answers != answers:
            raise SystemExit(f"{run} has other answers than {args.runs[0]}; give runs of one recipe")
        answers = bundle.model.config.answers
        members.append(probabilities(bundle, samples, config))
    print(f"validation accuracy on {len(samples)} questions, in %")
    for size in range(1, len(members) + 1):
        for chosen in combinations(range(len(members)), size):
            best = sum(members[i] for i in chosen).argmax(-1).tolist()
            right = sum(normalise(answers[c]) in good for c, good in zip(best, accepted, strict=True))
            print(f"{100 * right / len(samples):5.1f}  " + " + ".join(str(args.runs[i]) for i in chosen))


if __name__ == "__main__":
    main()
