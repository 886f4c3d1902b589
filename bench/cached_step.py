"""What does a training step cost without a teacher, with a cached teacher and with an online teacher?

It also measures the writing of the cache, once for each view, and prints what the distilled stage of the recipe costs
in all with either teacher, in epochs without a teacher.

    python bench/cached_step.py            # the models of mhkd-vqa-rad on generated data, batch 32
    python bench/cached_step.py --recipe mhkd-demo

The three kinds of step take turns, so that other work of the machine slows all of them alike.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from preceptor.environment import machine, versions
from preceptor.task import Batch, Task
from preceptor.tasks import load_recipe
from preceptor.teachers.online import OnlineTeacher
from preceptor.training.sampler import StepBatches
from preceptor.training.setup import make_optimizer, native_bf16
from preceptor.vqa.experiment import VqaExperiment
from preceptor.vqa.teachers import cached_teacher
from preceptor.vqa.vision import remember_images

PHANTOM = [
    "data.name=phantom",
    "data.root=null",
    "data.variant=null",
    "data.augment.views=1",
    "data.phantom.cases=60",
    "data.phantom.images_per_case=3",
    "data.phantom.questions_per_image=5",
]


def train_step(task: Task, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """Take one step of the training on a batch."""
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=native_bf16()):
        terms = task(batch)
    terms.total({unit: float(count) for unit, count in task.units(batch).items()}).backward()
    torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mhkd-vqa-rad")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        shipped = load_recipe(args.recipe)
        recipe = load_recipe(args.recipe, [f"output={scratch}", *PHANTOM])
        context = VqaExperiment.read(recipe).context
        teacher = context.new_bundle(recipe.teacher, 1)
        remember_images(teacher.model)  # as in training: images come again
        layers = recipe.student.model.layers, teacher.model.config.layers
        paths = recipe.method.teacher_features(*layers)
        online = OnlineTeacher(teacher.model, recipe.method.teacher_forward(*layers))
        start = time.perf_counter()
        cached = cached_teacher(Path(scratch) / "cache", context, online, paths)
        writing = time.perf_counter() - start
        size = sum(file.stat().st_size for file in (Path(scratch) / "cache").rglob("*"))
        train = context.training_examples(0)
        config = recipe.student.train
        steps = {}
        for name, source in (("baseline", None), ("cached", cached), ("online", online)):
            bundle = context.new_bundle(recipe.student, 0)
            task = recipe.method.build_task(bundle.model, teacher=source, teacher_config=teacher.model.config)
            optimizer, _ = make_optimizer(task, config)
            batches = StepBatches(len(train), batch_size=config.batch_size, steps=args.steps + 5, seed=0)
            steps[name] = (task, optimizer, iter(train.loader(batches)))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(args.steps + 5):
            for name, (task, optimizer, loader) in steps.items():
                start = time.perf_counter()
                train_step(task, optimizer, next(loader))
                if number >= 5:
                    times[name].append(time.perf_counter() - start)
    plain = statistics.median(times["baseline"])
    ratios = {name: statistics.median(values) / plain for name, values in times.items()}
    for name, ratio in ratios.items():
        print(f"{name:11s} {1000 * ratio * plain:7.1f} ms a step   ratio {ratio:.3f}")
    per_row = writing / len(train)
    written = per_row * config.batch_size / plain
    print(
        f"writing     {1000 * per_row * config.batch_size:7.1f} ms for the rows of a step   ratio {written:.3f}   "
        f"{size / len(train) / 1000:.0f} kB a row"
    )
    epochs, views = shipped.student.train.epochs, shipped.data.augment.views
    print(
        f"{args.recipe}, {epochs:g} epochs, {views} views: online {epochs * ratios['online']:.1f}, "
        f"cached {epochs * ratios['cached']:.1f} + writing {views * written:.1f} epochs without a teacher"
    )
    setting = {"recipe": args.recipe, "batch": config.batch_size, "bf16": native_bf16()}
    print(json.dumps(setting | machine() | versions(*VqaExperiment.packages)))


if __name__ == "__main__":
    main()
