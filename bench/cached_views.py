"""What does a training step cost if the augmented views of images are kept in memory, and if they are computed anew?

    python bench/cached_views.py --recipe mhkd-demo
    python bench/cached_views.py --recipe mhkd-vqa-rad data.name=phantom data.variant=null

Both kinds of step, of the student without a teacher, take turns, so that other work of the machine slows them alike.
Measured after the first pass over all views, when the decoded images are in memory either way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time

from cached_step import train_step
from preceptor.environment import machine, versions
from preceptor.tasks import load_recipe
from preceptor.training.sampler import StepBatches
from preceptor.training.setup import make_optimizer, native_bf16
from preceptor.vqa import dataset
from preceptor.vqa.experiment import VqaExperiment


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mhkd-demo")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("overrides", nargs="*", metavar="KEY.SUB=VALUE", help="settings of the recipe to change")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(args.recipe, [f"output={scratch}", *args.overrides])
        context = VqaExperiment.read(recipe).context
        views, config = recipe.data.augment.views, recipe.student.train
        steps, held = {}, 0
        for name, limit in (("kept", dataset.VIEW_BYTES), ("anew", 0)):
            dataset.VIEW_BYTES = limit  # all views are computed here, so none is added later
            train = context.training_examples(0)
            for index in range(len(train)):
                for view in range(views if limit else 1):
                    train.augmented(index, view)
            held = max(held, sum(image.nbytes for image in train._views.values()))
            bundle = context.new_bundle(recipe.student, 0)
            task = recipe.method.build_task(bundle.model)
            optimizer, _ = make_optimizer(task, config)
            batches = StepBatches(len(train), batch_size=config.batch_size, steps=args.steps + 5, seed=0)
            steps[name] = (task, optimizer, iter(train.loader(batches)))
        loading: dict[str, list[float]] = {name: [] for name in steps}
        whole: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(args.steps + 5):
            for name, (task, optimizer, loader) in steps.items():
                start = time.perf_counter()
                batch = next(loader)
                loaded = time.perf_counter()
                train_step(task, optimizer, batch)
                if number >= 5:
                    loading[name].append(loaded - start)
                    whole[name].append(time.perf_counter() - start)
    for name in steps:
        load, step = statistics.median(loading[name]), statistics.median(whole[name])
        print(f"{name}  batch {1000 * load:6.1f} ms  step {1000 * step:7.1f} ms  batch / step {load / step:.2f}")
    ratio = statistics.median(a / b for a, b in zip(whole["kept"], whole["anew"], strict=True))
    print(f"step, kept / anew: {ratio:.3f}; views in memory {held / 2**20:.0f} MiB")
    setting = {"recipe": args.recipe, "batch": config.batch_size, "views": views, "bf16": native_bf16()}
    print(json.dumps(setting | machine() | versions(*VqaExperiment.packages)))


if __name__ == "__main__":
    main()
