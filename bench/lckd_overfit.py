"""Can the pipeline overfit a real case? Train on one glioma and on one MS case, and segment it again.

    python bench/lckd_overfit.py --data MRI --output runs/bench-overfit            # both cases, one network each
    python bench/lckd_overfit.py --data MRI --output runs/bench-overfit --case ms_patient19

MRI contains a folder of `{case}_{modality}.nii.gz` for each case. This checks reading, training, windowed inference and
writing: the scores are those of the training case itself, for every subset of its modalities. Settings of the recipe
follow.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import preceptor
from preceptor.data.segmentation.case_files import find_case
from preceptor.data.types import SegmentationDataset, Split
from preceptor.pipeline.experiment import Stage
from preceptor.pipeline.stage import run_stage
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.experiment import SegmentationExperiment
from preceptor.tasks import load_recipe

CASES = {
    "glioma_tcga_fg_6692": {"et": (4,), "tc": (1, 4), "wt": (1, 2, 4)},
    "ms_patient19": {"lesion": (1,)},
}
SETTINGS = [
    "data.name=brats",
    "data.train_share=1",
    "data.unlabelled=none",
    "data.intensity=percentile",
    "data.patch_size=[32, 32, 32]",
    "data.augment=none",
    "data.foreground_probability=0.5",
    "model.channels=[16, 32, 64]",
    "train.batch_size=2",
    "train.learning_rate=2e-3",
    "train.select=last",
    "method.modality_dropout.start=0.6",
    "method.modality_dropout.ramp=0.8",
    "train.epochs=5000",
    "train.evaluate_every=5000",
    "train.checkpoint_every=500",
    "evaluation.overlap=0.25",
    "evaluation.validation_overlap=0",
    "report.cases=1",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--case", nargs="+", choices=sorted(CASES), default=list(CASES))
    parser.add_argument("overrides", nargs="*", help="key.sub=value for the recipe")
    args = parser.parse_args()

    for name in args.case:
        folder = args.output / name
        recipe = load_recipe("lckd-demo", [*SETTINGS, f"data.root={args.data}", f"output={folder}", *args.overrides])
        assert isinstance(recipe, SegmentationRecipe)
        case = find_case(args.data / name, recipe.data.modalities)
        # The readers refuse a case that is in several splits, so the data set is made here.
        splits: tuple[Split, ...] = ("train", "validation", "test")
        cases = [replace(case, split=split) for split in splits]
        data = SegmentationDataset(
            "overfit", name, args.data, cases, modalities=recipe.data.modalities, regions=CASES[name]
        )
        data.notes.append("Scored on the case that it was trained on: a check of the software.")
        results = run_stage(SegmentationExperiment(recipe, data), Stage("baseline", "baseline", recipe.seed), folder)
        scores = next(iter(results["protocols"].values()))
        print(f"\n{name}: {results['training']['steps']} steps, {results['training']['seconds']:.0f} s")
        for subset, by in scores["subsets"].items():
            cells = (f"{region} {100 * value:5.1f}" for region, value in by["dice"].items())
            print(f"  {subset:20s} {'  '.join(cells)}")
        result = preceptor.load(folder).segment(args.data / name)
        print(json.dumps(result.volumes_ml), result.save(folder / f"{name}_seg.nii.gz"))


if __name__ == "__main__":
    main()
