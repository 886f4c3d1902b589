"""The public Python API. `import preceptor` gives these functions; the command line calls them too.

Importing this module is fast: torch and the networks are imported by the function that needs them.
"""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor import tasks
from preceptor.arguments import (
    as_integer,
    as_list,
    as_optional_text,
    as_output_folder,
    as_path,
    as_positive,
    as_share,
    as_text,
)
from preceptor.config import BaseRecipe
from preceptor.errors import UserError, nearest
from preceptor.hub import set_offline
from preceptor.model_arguments import model_name, require_device, trusted_model
from preceptor.pipeline.paths import check_data_paths, check_paths
from preceptor.prediction_inputs import NO_INPUTS, checked_inputs, require_inputs_of
from preceptor.recipe import apply_overrides
from preceptor.recipe_arguments import Overrides, override_texts, resolve
from preceptor.scores import Scored

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Run:
    """A finished run, or one run per seed.

    Attributes:
        folder: the run folder; with several seeds the folder of ``seed-N`` and ``compare``.
        report: the report page; with several seeds the page of the comparison over them.
        results: results.json as a dictionary; with several seeds compare.json.
    """

    folder: Path
    report: Path
    results: dict[str, Any] = field(repr=False)

    def model(self, stage: str | None = None, device: str | torch.device | None = None) -> Any:
        """Load the trained model of a stage; without `stage` the model that the run is about."""
        return load(self.folder / stage if stage else self.folder, device)

    def to_dict(self) -> dict[str, Any]:
        """Return folder, report and results, ready for JSON."""
        return {"folder": str(self.folder), "report": str(self.report), "results": self.results}


def train(
    recipe: str | Path | Mapping[str, Any] | BaseRecipe,
    overrides: Overrides = (),
    *,
    seeds: int | Sequence[int] | None = None,
) -> Run:
    """Train the stages of a recipe, evaluate and compare them. If the output folder exists, training resumes.

    Args:
        recipe: name of a shipped recipe, path of a YAML file, nested dictionary or recipe object.
        overrides: settings to change, such as ``{"data.root": "VQA_RAD", "student.train.epochs": 5}``.
        seeds: number of seeds, counted from the seed of the recipe, or the seeds themselves. Each is trained in its own
            folder ``OUTPUT/seed-N``; the comparison over seeds is written to ``OUTPUT/compare``.

    Returns:
        The run; with `seeds`, its report and results are the comparison over seeds.

    Raises:
        UserError: the recipe or the data cannot be used.
    """
    resolved = resolve(recipe, overrides)
    check_paths(resolved)
    keep_offline(resolved.allow_downloads)
    if seeds is not None:
        from preceptor.seeds import train_seeds

        folder, results = train_seeds(resolved, seeds)
        return Run(folder, folder / "compare" / "compare.html", results)
    folder = resolved.output_folder
    return Run(folder, folder / "report.html", run_recipe(resolved))


def run_recipe(recipe: BaseRecipe) -> dict[str, Any]:
    """Run a recipe object; return results.json."""
    from preceptor.pipeline.run import run

    return run(tasks.module(recipe.task, "experiment").EXPERIMENT, recipe)


def load(folder: str | Path, device: str | torch.device | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load a trained model from a run, a stage or a model folder.

    Args:
        folder: the folder; of a run with several stages the distilled model is loaded.
        device: where to compute, such as "cuda" or "cpu".
        trust_remote_code: allow a model whose config.json names a class of the user's, ``module:Class``, to import it.
            The module must be importable here; it is never read from the folder.

    Returns:
        A `VqaModel` (``.answer``), a `SegmentationModel` (``.segment``) or a `GroundingModel` (``.ask``).

    Raises:
        UserError: the folder holds no model, a file of it is damaged, or the device cannot be used.
    """
    keep_offline()
    place, task = trusted_model(folder, trust_remote_code)
    require_device(device)
    return tasks.module(task, "predict").MODEL.load(place, device)


def predict(
    run: str | Path,
    *,
    output: str | Path | None = None,
    trust_remote_code: bool = False,
    progress: Callable[[int, int], None] | None = None,
    **inputs: Any,
) -> list[dict[str, Any]]:
    """Predict on the user's data and return one row per question, dialogue or case.

    Args:
        run: a run, a stage or a model folder.
        output: JSON lines file of a VQA or grounding model, which writes nothing without it; folder of label maps and
            `predictions.csv` of a segmentation model, by default the current folder. Rows are written at once, and a
            second call continues where the first one stopped.
        trust_remote_code: as in `load`.
        progress: if rows are written, called as ``progress(done, total)`` before the first row is predicted and after
            each row is written.
        **inputs: for VQA and grounding `image` (a file or a folder) with `question`, or `table`, further `top` (VQA)
            and `modality` (used by grounding only); for segmentation `files` (by modality), `case` (files or folder) or
            `table`, further `post`, `probabilities`, `dicom_seg` and `copy_patient`.

    Raises:
        UserError: an input is unknown or not one of the model's task, the inputs do not belong together, or a file
            cannot be used.
    """
    for name in inputs:
        if name not in NO_INPUTS:
            raise UserError(f"predict has no input {name!r}{nearest(name, NO_INPUTS)}")
    from preceptor.pipeline.predictions import Origin, model_sha256, stream_predictions
    from preceptor.pipeline.run_dir import model_folder

    inputs |= checked_inputs(inputs)
    model = load(run, trust_remote_code=trust_remote_code)
    items = model.items(**inputs)
    require_inputs_of(model, inputs)
    place = model.default_output if output is None else as_path(output, "output")
    if place is None:
        return list(model.predict_rows(items, **inputs))
    predict_rows = partial(model.predict_rows, **inputs, output=place)
    changing = {name: inputs.get(name, default) for name, default in model.options.items()}
    origin = Origin(model_sha256(model_folder(Path(run))), changing)
    path = model.prediction_file(place)
    return list(stream_predictions(path, items, predict_rows, progress, batch_size=model.batch_size, origin=origin))


def serve(
    *folders: str | Path,
    host: str = "127.0.0.1",
    port: int = 8000,
    token: str | None = None,
    device: str | None = None,
    trust_remote_code: bool = False,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serve trained models on a local page and through a JSON API until the process is interrupted.

    A model that cannot be loaded is logged, and the others are served.

    Args:
        *folders: run, stage or model folders.
        host: address to listen on. Addresses that other machines can reach need a token.
        port: port to listen on; 0 chooses a free one.
        token: requests need the header ``Authorization: Bearer TOKEN``.
        device: where to compute, such as "cuda" or "cpu".
        trust_remote_code: as in `load`.
        ready: called with the address once the server listens. The models may still be loading.

    Raises:
        UserError: a folder holds no model, no model can be loaded, the device or the address cannot be used, or the
            token is missing. After an interruption also if a model could not be loaded.
    """
    keep_offline()
    try:
        from preceptor.serving.server import serve as run_server
    except ImportError as error:
        raise UserError(f"serving needs {error.name}: pip install 'preceptor[serve]'") from None
    if not folders:
        raise UserError("no model was given; give the folder of a run, a stage or a model")
    host, port, token = as_text(host, "host"), as_integer(port, "port"), as_optional_text(token, "token")
    for folder in folders:
        trusted_model(folder, trust_remote_code)
    require_device(device)
    run_server(
        [as_path(folder, "folder") for folder in folders],
        lambda folder: load(folder, device, trust_remote_code=trust_remote_code),
        host=host,
        port=port,
        token=token,
        ready=ready,
    )


def evaluate(
    run: str | Path,
    overrides: Overrides = (),
    *,
    recipe: str | Path | Mapping[str, Any] | BaseRecipe | None = None,
    protocol: str | None = None,
    output: str | Path | None = None,
    images: Sequence[str] = (),
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Score a trained model on the test split of its own or of other data.

    Args:
        run: a run, a stage or a model folder.
        overrides: settings that choose other data, such as ``{"data.root": "OTHER"}``.
        recipe: the recipe whose data the model is evaluated on, by default the one it was trained with. A model that
            was exported, packed or copied alone has none, so it needs this argument. `output` is then required.
        protocol: only this protocol.
        output: folder for predictions and results.json, which must be a new one or that of an earlier evaluation;
            without it, the predictions replace those of the stage.
        images: ask the questions again about other images, to see whether the model uses them: ``blank``, ``shuffled``
            between patients, ``mirrored`` (not for volumes). The results have `image_reliance`.
        trust_remote_code: as in `load`.

    Returns:
        The results: `protocols`, `describes`, `data`, `notes` and what else the task reports.

    Raises:
        UserError: the model has no recipe and none is given, or one of another task; the data, the protocol or the
            images are unknown; or the results would replace those of a training.
    """
    keep_offline()
    from preceptor.pipeline.run_dir import stage_folder

    folder = None if output is None else as_output_folder(output, "output")
    protocol = as_optional_text(protocol, "protocol")
    given = as_path(run, "run")
    model, task = trusted_model(given, trust_remote_code)
    if recipe is None:
        stage = stage_folder(model, given)
        name, resolved = stage.name, resolve(str(stage), overrides)
    else:
        name, resolved = model_name(model, given), resolve(recipe, overrides)
        if folder is None:
            raise UserError("the results on the data of another recipe need their own folder; give --output FOLDER")
        if resolved.task != task:
            raise UserError(f"{run} is a model for {task}, but the recipe is for {resolved.task}; give another recipe")
    check_data_paths(resolved.data)
    # Imported after the checks: a mistake is reported without waiting for torch.
    from preceptor.pipeline.evaluation import evaluate_model

    experiment_class = tasks.module(task, "experiment").EXPERIMENT
    return evaluate_model(experiment_class, resolved, model, name, protocol, folder, as_list(images, "images"))


def check(
    data: str | Path,
    overrides: Overrides = (),
    *,
    teacher: str | Path | None = None,
    students: Sequence[str | Path] = (),
    seeds: int = 1,
    budget: float = 0.1,
) -> dict[str, Any]:
    """Check data before training: unreadable files, empty texts, repeated ids. Nothing is raised for what is found.

    With a `teacher`, also estimate on validation data what it can give to a student (visual question answering only).

    Args:
        data: a recipe, a run folder, or a CSV or JSONL table of questions.
        overrides: settings of the recipe to change.
        teacher: a run, a stage or a model folder.
        students: finished runs of the baseline, each of another seed. Without any, two are trained for a short time.
        seeds: number of seeds that are planned.
        budget: share of the baseline's epochs for which the short students are trained.

    Returns:
        `name`, `variant`, `notes`, the size of each split as `rows`, and `findings` with their severity. With a
        `teacher`, also `headroom` (`preceptor.pipeline.headroom`) with its `verdict`.

    Raises:
        UserError: the recipe cannot be used, or the estimate is not possible.
    """
    keep_offline()
    if teacher is None and students:
        raise UserError("students are compared with a teacher; give --teacher RUN, too")
    seeds, budget = as_positive(seeds, "seeds"), as_share(budget, "budget", positive=True)
    if str(data).endswith((".csv", ".jsonl")):
        raw = {"task": "vqa", "name": Path(data).stem, "data": {"name": "table", "root": str(data)}}
        apply_overrides(raw, override_texts(overrides), str(data))
        recipe: BaseRecipe = tasks.recipe_from(raw, str(data))
    else:
        recipe = resolve(data, overrides)
    check_data_paths(recipe.data)
    experiment_class = tasks.module(recipe.task, "experiment").EXPERIMENT
    found = experiment_class.check(recipe)
    if teacher is not None:
        from preceptor.pipeline.headroom import estimate_headroom

        runs = [as_path(run, "a student") for run in as_list(students, "students")]
        place = as_path(teacher, "teacher")
        found["headroom"] = estimate_headroom(experiment_class, recipe, place, runs, seeds=seeds, budget=budget)
    return found


def cache(recipe: str | Path | BaseRecipe, overrides: Overrides = (), *, verify: float = 0.0) -> dict[str, Any]:
    """Build the teacher cache of a recipe if it is missing or stale. With `verify > 0`, verify that fraction instead.

    Raises:
        UserError: the recipe has no teacher to cache, the teacher is not trained yet, or `verify` is not a share.
    """
    verify = as_share(verify, "verify")
    resolved = resolve(recipe, overrides)
    resolved.require_teacher_cache()
    check_paths(resolved)
    keep_offline(resolved.allow_downloads)
    experiment_class = tasks.module(resolved.task, "experiment").EXPERIMENT
    if verify > 0:
        return experiment_class.cache(resolved, verify)
    from preceptor.pipeline.run import exclusive

    with exclusive(resolved.output_folder):  # a training would write the same cache
        return experiment_class.cache(resolved, verify)


def report(run: str | Path) -> Path:
    """Write the report page of a run again, from the files in its folder; return its path."""
    from preceptor.pipeline.run_dir import refuse_several_seeds

    keep_offline()
    folder = as_path(run, "run")
    refuse_several_seeds(folder)
    if not (folder / "results.json").is_file():
        raise UserError(f"{folder} has no results.json; `preceptor train` writes it when a run is finished")
    recipe = tasks.load_recipe(str(folder))
    return tasks.module(recipe.task, "report").write_report(folder)


def compare(
    runs: str | Path | Sequence[str | Path],
    *,
    baseline: str | None = None,
    protocol: str | None = None,
    output: str | Path = "runs/compare",
) -> Any:
    """Compare runs of one task on the same test units: differences with intervals and tests.

    Args:
        runs: run folders, folders of their stages, or the folder of a training with several seeds; a single one may be
            given without a list. Runs that differ only in the seed form a group.
        baseline: group or run to compare with; by default the stage `baseline`.
        protocol: protocol id; by default the main one of the first run.
        output: folder for compare.json, compare.html, compare.csv and compare.tex.

    Raises:
        UserError: no run is given, or the runs were scored on different data or under different protocols.
    """
    places = [as_path(run, "run") for run in as_list(runs, "runs")]
    folder = as_output_folder(output, "output")
    baseline, protocol = as_optional_text(baseline, "baseline"), as_optional_text(protocol, "protocol")
    from preceptor.comparison.run import compare_runs, write_comparison

    comparison = compare_runs(places, baseline=baseline, protocol=protocol)
    write_comparison(comparison, folder)
    return comparison


def score(predictions: str | Path, protocol: str, **options: Any) -> Scored:
    """Score predictions of any system under a protocol.

    Args:
        predictions: JSON lines of a VQA or grounding system; folder of NIfTI masks of a segmentation system.
        protocol: protocol id, such as ``vqa-rad/clean/451``, ``med-grit/given/birdeval`` or ``brats/all/A``.
        **options: `root` of the data set, and what else the task's `score_file` knows.

    Raises:
        UserError: no task knows the protocol, an option does not apply to it, or a prediction is missing.
    """
    place, protocol = as_path(predictions, "predictions"), as_text(protocol, "protocol")
    if options.get("root") is not None:
        options["root"] = as_path(options["root"], "root")
    for task in tasks.TASKS:
        module = tasks.module(task, "score")
        if module.knows(protocol):
            known = inspect.signature(module.score_file).parameters
            for name in options:
                if name not in known:
                    raise UserError(f"--{name} does not apply to protocol {protocol}; omit it")
            return module.score_file(place, protocol, **options)
    raise UserError(f"protocol {protocol!r} is not known; docs/reference/protocols.md lists the protocols")


def audit(data: str | Path, overrides: Overrides = (), **options: Any) -> dict[str, Any]:
    """Look for leakage, duplicates, shortcuts and traces of patients in a data set.

    Args:
        data: name of a data set, or a CSV or JSONL table.
        overrides: settings of the data sets, such as ``{"data.variant": "published"}`` or ``["against.language=zh"]``.
        **options: `root`, `against`, `against_root`, `output`.

    Returns:
        The document that is written as audit.json.
    """
    from preceptor.auditing.run import audit_data

    defaults: dict[str, Any] = {"against": None, "root": None, "against_root": None, "output": Path("runs/audit")}
    for name in options:
        if name not in defaults:
            raise UserError(f"audit has no option {name!r}{nearest(name, defaults)}")
    found = defaults | options
    root, against_root = (found[key] and as_path(found[key], key) for key in ("root", "against_root"))
    against = found["against"] and str(found["against"])
    output = as_output_folder(found["output"], "output")
    return audit_data(str(data), override_texts(overrides), against, root, against_root, output)


def export(
    run: str | Path, output: str | Path, *, to: str = "onnx", int8: bool = False, table: str | Path | None = None
) -> dict[str, Any]:
    """Export a trained model to a format that other programs run, or to one file.

    Args:
        run: a run, a stage or a model folder.
        output: folder, for ``zip`` a file, that is written; it must not exist.
        to: ``onnx``: a VQA or segmentation model with its preprocessing, for programs without torch and Preceptor.
            ``hf``: a Hugging Face folder, which transformers loads with equal weights. ``monai``: a segmentation model
            as a MONAI bundle. ``zip``: a packed model, which all functions that take a model folder read.
        int8: for ``onnx``, also write `model.int8.onnx`, whose weights have 8 bits, and compare size, time and
            probabilities.
        table: a CSV or JSONL table. For ``onnx`` and VQA, of questions with answers, to compare the accuracy of torch
            and of the files. For ``hf`` and a grounding model with guided positions, of questions, to count the answers
            that change in programs that do not guide them.

    Returns:
        ``onnx``: the content of `model.json`. Its `check` has the largest difference of a probability from torch.
        ``hf``: `class` of transformers, number of equal `tensors`, and for grounding the `guidance` and what changes
        without it (`unguided`). ``monai``: the `metadata`. ``zip``: the number of `files`, `bytes` and `sha256`.

    Raises:
        UserError: the format does not fit the model or the options, a package of the extra `export` is missing, the
            folder exists, or the exported model differs: a probability of ONNX by more than 1e-4, a weight at all.
    """
    from preceptor.exporting.run import export_model
    from preceptor.pipeline.run_dir import model_folder

    keep_offline()
    place, target = as_path(run, "run"), as_path(output, "output")
    table = None if table is None else as_path(table, "table")
    return export_model(model_folder(place), target, to=to, int8=int8, table=table)


def push_to_hub(run: str | Path, repo_id: str, *, private: bool = True, token: str | None = None) -> str:
    """Upload a trained model with its card to the Hugging Face hub.

    Args:
        run: a run, a stage or a model folder.
        repo_id: ``USER/NAME`` of the repository, which is created if it does not exist.
        private: whether a new repository is private.
        token: access token; by default the one that `hf auth login` stored.

    Returns:
        The address of the commit.

    Raises:
        UserError: the folder holds no model, or the hub refuses the upload.
    """
    keep_offline()
    from preceptor.hub import push_folder
    from preceptor.pipeline.run_dir import model_folder

    folder, name = model_folder(as_path(run, "run")), as_text(repo_id, "repo_id")
    return push_folder(folder, name, private=private, token=as_optional_text(token, "token"))


def keep_offline(allow_downloads: bool = False) -> None:
    """Refuse hub downloads at once instead of after many retries, or allow them if the user's environment does."""
    set_offline(not allow_downloads)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # transformers imports DeepSpeed if it is installed, which would print to standard output that there is no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
