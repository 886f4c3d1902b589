"""What a step costs: supervised, with a cached teacher, with an online teacher. Prints ratios of one run.

    python bench/cached_step.py            # the models of mhkd-vqa-rad on generated data, batch 32
    python bench/cached_step.py --recipe mhkd-demo

The three kinds of step are interleaved, so that whatever else the machine does falls on all of them alike.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="mhkd-vqa-rad")
    parser.add_argument("--steps", type=int, default=60)
    args = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")

    import torch
    from preceptor.vqa.run import open_classroom

    from preceptor.environment import QUESTIONS, machine, versions
    from preceptor.tasks import load_recipe
    from preceptor.teachers.online import OnlineTeacher
    from preceptor.training.sampler import StepBatches
    from preceptor.training.setup import make_optimizer, native_bf16
    from preceptor.vqa.teachers import cached_teacher

    with tempfile.TemporaryDirectory() as scratch:
        recipe = load_recipe(
            args.recipe,
            [
                f"output={scratch}",
                "data.name=phantom",
                "data.root=null",
                "data.variant=null",
                "data.augment.views=1",
                "data.phantom.cases=60",
                "data.phantom.images_per_case=3",
                "data.phantom.questions_per_image=5",
            ],
        )
        room = open_classroom(recipe)
        teacher = room.bundle(recipe.teacher, 1)
        layers = recipe.student.model.layers, teacher.model.config.layers
        paths = recipe.method.teacher_features(*layers)
        online = OnlineTeacher(teacher.model, recipe.method.teacher_forward(*layers))
        cached = cached_teacher(Path(scratch) / "cache", room, online, paths)
        train = room.training_examples(0)
        config = recipe.student.train
        steps = {}
        for name, source in (("baseline", None), ("cached", cached), ("online", online)):
            bundle = room.bundle(recipe.student, 0)
            task = recipe.method.build_task(bundle.model, teacher=source, teacher_config=teacher.model.config)
            optimizer, _ = make_optimizer(task, config)
            batches = StepBatches(len(train), batch_size=config.batch_size, steps=args.steps + 5, seed=0)
            steps[name] = (task, optimizer, iter(train.loader(batches)))
        times: dict[str, list[float]] = {name: [] for name in steps}
        for number in range(args.steps + 5):
            for name, (task, optimizer, loader) in steps.items():
                begun = time.perf_counter()
                batch = next(loader)
                with torch.autocast("cpu", dtype=torch.bfloat16, enabled=native_bf16()):
                    terms = task(batch)
                terms.total({unit: float(count) for unit, count in task.units(batch).items()}).backward()
                torch.nn.utils.clip_grad_norm_(task.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                if number >= 5:
                    times[name].append(time.perf_counter() - begun)
    plain = statistics.median(times["baseline"])
    for name, values in times.items():
        middle = statistics.median(values)
        print(f"{name:11s} {1000 * middle:7.1f} ms a step   ratio {middle / plain:.3f}")
    print(
        json.dumps(
            {
                "recipe": args.recipe,
                "batch": config.batch_size,
                "bf16": native_bf16(),
                **machine(),
                **versions(*QUESTIONS),
            }
        )
    )


if __name__ == "__main__":
    main()
