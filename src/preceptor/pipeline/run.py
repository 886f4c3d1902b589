"""A recipe from start to report: read the data, run the stages, compare them, write the report."""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

from preceptor.config import BaseRecipe
from preceptor.data import provenance
from preceptor.distributed import broadcast_from_main, processes
from preceptor.environment import versions
from preceptor.errors import UserError
from preceptor.files import LockedError, lock, make_folder, write_text
from preceptor.pipeline import run_dir
from preceptor.pipeline.before_training import check_before_training
from preceptor.pipeline.comparison import compare_stages
from preceptor.pipeline.experiment import Experiment
from preceptor.pipeline.speed import measure_speed
from preceptor.pipeline.stage import run_stage
from preceptor.pipeline.teacher_check import nothing_to_teach
from preceptor.recipe import dump_recipe

log = logging.getLogger("preceptor")


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Create a run folder and let no other command write to it. The processes of one run share the lock.

    Raises:
        UserError: another command writes to the folder; it is raised by every process of this one.
    """
    refusal: Exception | None = None
    with contextlib.ExitStack() as stack:
        if processes().is_main_process:
            try:
                make_folder(folder)
                stack.enter_context(lock(folder / ".lock"))
            except LockedError as error:
                refusal = UserError(
                    f"{folder} is in use by {error.owner}: wait until it has finished, stop it, or choose another "
                    "output=FOLDER"
                )
            except (OSError, UserError) as error:
                refusal = error
        refusal = broadcast_from_main(refusal)
        if refusal is not None:
            raise refusal
        yield


def run(experiment_class: type[Experiment], recipe: BaseRecipe) -> dict[str, Any]:
    """Run the stages of a recipe, each of which resumes; write results and report; return the results.

    A recipe with one stage writes directly into its output folder, a recipe with several into one folder per stage.

    Raises:
        UserError: the recipe, its data or an earlier run that it needs cannot be used, or the output folder contains a
            training with another layout.
    """
    root, state = recipe.output_folder, processes()
    with exclusive(root), run_dir.log_to(root / "log.txt", state.is_main_process):
        with state.main_process_first():
            experiment = experiment_class.read(recipe)
        stages = experiment.stages()
        require_layout(recipe, "a run of several stages" if len(stages) > 1 else "a run of one stage")
        check_before_training(experiment)
        with state.main_process_first():
            refuse_contaminated(experiment)
        for note in experiment.data.notes:
            log.info(note)
        if recipe.resume == "never" and state.is_main_process:
            for name in experiment.shared_folders:
                shutil.rmtree(root / name, ignore_errors=True)
        state.wait_for_everyone()
        folders = {stage.name: root / stage.name if len(stages) > 1 else root for stage in stages}
        results: dict[str, dict[str, Any]] = {}
        for stage in stages:
            log.info("stage %s", stage.name)
            if doubt := nothing_to_teach(experiment, stage, results):
                experiment.warn(doubt)
            results[stage.name] = run_stage(experiment, stage, folders[stage.name])
        add_speed(experiment, folders, results)
        document: dict[str, Any] = {}
        if state.is_main_process:
            document = summarize(experiment, folders, results)
            write_text(root / "recipe.yaml", dump_recipe(recipe))
            run_dir.write_results(root, document)
            experiment.write_report(root)
        return broadcast_from_main(document)


def require_layout(recipe: BaseRecipe, layout: run_dir.Layout) -> None:
    """Raise UserError if the output folder of a recipe contains a training with another layout than this."""
    kinds = get_args(get_args(type(recipe).model_fields["stages"].annotation)[0])
    key = "method.teaching.runs=[{}]" if hasattr(recipe.method, "teaching") else "method.teaching_run={}"
    hint = f"; a finished teacher there can teach with {key.format(recipe.output_folder)} and stages without teacher"
    run_dir.require_layout(recipe.output_folder, layout, kinds, hint)


def summarize(experiment: Experiment, folders: dict[str, Path], results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return results.json of a run: that of its only stage, or that of the last with all stages and a comparison."""
    last = list(results.values())[-1]
    if len(results) == 1:
        return last
    shared = ("task", "protocols", "describes", "data", "notes", "parameters", "latency_ms", "modalities", "regions")
    return {
        **{key: last[key] for key in shared if key in last},
        "stages": results,
        "comparison": compare_stages(folders, last["protocols"], experiment.metrics),
        "seed": experiment.recipe.seed,
        "versions": versions(*experiment.packages),
    }


def add_speed(experiment: Experiment, folders: dict[str, Path], results: dict[str, dict[str, Any]]) -> None:
    """Measure the speed of all models of a run in turn, unless just these weights were measured together before."""
    measured_with = sorted(stage["weights_sha256"] for stage in results.values())
    before = [set(stage.get("speed", {}).get("measured_with", [])) for stage in results.values()]
    if all(together == before[0] and together >= set(measured_with) for together in before):
        return
    if processes().is_main_process:
        speeds = measure_speed(
            lambda folder: experiment.speed_test(experiment.load(folder)),
            {name: folder / "model" for name, folder in folders.items()},
        )
        for name, stage in results.items():
            stage["speed"] = speeds[name] | {"measured_with": measured_with}
            stage |= {"latency_ms": speeds[name]["latency_ms"], "latency": speeds[name]["describes"]}
            run_dir.write_results(folders[name], stage)
            write_text(folders[name] / "model" / "README.md", experiment.model_card(stage))
    for name in results:
        results[name] = broadcast_from_main(results[name])


def refuse_contaminated(experiment: Experiment) -> None:
    """Raise UserError if weights that the recipe starts from or learns from were trained on its test images.

    A note is added for a run that does not record its training images.
    """
    data = experiment.data
    for key, earlier in experiment.starting_points(experiment.recipe.stages).items():
        sources = provenance.read_provenance(run_dir.model_folder(earlier))
        if sources is None:
            data.notes.append(f"Not checked: {key} does not record its training images, so they may be test images.")
            continue
        ids, images = contaminated(experiment, sources)
        total = len({path for files in experiment.images("test").values() for path in files})
        if ids:
            listed = ", ".join(ids[:5]) + (", ..." if len(ids) > 5 else "")
            raise UserError(
                f"{key}={earlier} was trained on {images} of the {total} test images of {data.name} {data.variant} "
                f"(samples {listed}); train it again without them{experiment.exclusion_hint()}, or on this very "
                "data set and variant"
            )


def contaminated(experiment: Experiment, sources: list[provenance.Source]) -> tuple[list[str], int]:
    """Return the first sample of each test image that a training on `sources` has seen, and the number of these images.

    A source of the same data set, variant and test split is not asked: what its splits share belongs to its protocol.
    """
    own = (experiment.data.name, experiment.data.variant, experiment.data.fingerprint("test"))
    seen = {digest: phash for source in sources if source.key != own for digest, phash in source.images.items()}
    if not seen:
        return [], 0
    images = experiment.images("test")
    hashes = experiment.hash_images([path for files in images.values() for path in files])
    matched = provenance.match_images(hashes, seen)
    first: dict[Path, str] = {}
    for id, files in images.items():
        for path in matched.intersection(files):
            first.setdefault(path, id)
    return list(dict.fromkeys(first.values())), len(matched)
