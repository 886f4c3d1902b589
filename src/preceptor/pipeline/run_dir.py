"""The files of a run folder: its log, its models, its results and its predictions."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from preceptor.errors import UserError
from preceptor.files import json_lines, sha256, write_text
from preceptor.pipeline.packed_model import unpack
from preceptor.recipe import differences

FINAL_STAGES = ("clinkd", "distilled")
"""The stages whose model stands for a run of several stages; the first that exists counts."""


@contextlib.contextmanager
def log_to(path: Path, enabled: bool = True) -> Iterator[None]:
    """Append log messages to a file."""
    log = logging.getLogger("preceptor")
    handler = _LogFile(path, encoding="utf-8", errors="backslashreplace") if enabled else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


class _LogFile(logging.FileHandler):
    def handleError(self, record: logging.LogRecord) -> None:
        raise  # a full disk, which logging would print with a traceback


def clear_stage(folder: Path) -> None:
    """Delete the files that earlier trainings left in the folder of a stage."""
    for name in ("checkpoints", "model", "predictions", "figures"):
        shutil.rmtree(folder / name, ignore_errors=True)
    for name in ("metrics.jsonl", "results.json", "report.html"):
        (folder / name).unlink(missing_ok=True)


def seed_folders(folder: Path) -> list[Path]:
    """Return the runs ``seed-N`` in a folder that a training with several seeds wrote, in the order of their seeds.

    A folder that is a finished run itself stands for this run, and has none.
    """
    return [] if (folder / "results.json").is_file() else _runs_of_seeds(folder)


def _runs_of_seeds(folder: Path) -> list[Path]:
    runs = [path.parent for path in folder.glob("seed-*/recipe.yaml") if path.parent.name[5:].isdigit()]
    return sorted(runs, key=lambda run: int(run.name[5:]))


def refuse_run_and_seeds(folder: Path) -> None:
    """Raise UserError if a folder contains a finished run and also runs of several seeds."""
    if (folder / "results.json").is_file() and (seeds := _runs_of_seeds(folder)):
        raise UserError(
            f"{folder} contains a run (results.json) and also one run per seed ({seeds[0].name}), so it is not clear "
            f"which is meant; move the folders seed-N elsewhere, or give them one by one, such as {seeds[0]}"
        )


Layout = Literal["a run of one stage", "a run of several stages", "one run per seed"]


def require_layout(folder: Path, layout: Layout, kinds: Iterable[str], hint: str = "") -> None:
    """Raise UserError if an output folder contains a training with another layout, whose files would be mixed up.

    Args:
        folder: output folder of the training that is about to start.
        layout: of this training.
        kinds: kinds of stages of the task, which name the folders of a run of several stages.
        hint: how a run of several stages may use a finished run of one stage, as the end of the sentence.
    """
    one = [folder / name for name in ("checkpoints", "model") if (folder / "recipe.yaml").is_file()]
    traces: dict[Layout, list[Path]] = {
        "a run of one stage": [path for path in one if path.is_dir()],
        "a run of several stages": [folder / kind for kind in kinds if (folder / kind / "recipe.yaml").is_file()],
        "one run per seed": _runs_of_seeds(folder),
    }
    for other, paths in traces.items():
        if paths and other != layout:
            raise UserError(
                f"output={folder} already contains {other} ({paths[0].name}), and this training would write {layout} "
                f"into the same folder; give another output=FOLDER"
                + (hint if (other, layout) == ("a run of one stage", "a run of several stages") else "")
            )


def refuse_several_seeds(folder: Path) -> None:
    """Raise UserError if the folder is not one run but the runs of several seeds."""
    if seeds := seed_folders(folder):
        raise UserError(f"{folder} contains one run per seed; give one of them, such as {seeds[0]}")


def model_folder(folder: Path) -> Path:
    """Return the model folder of a run, of a stage or of a model folder itself; a packed model is unpacked."""
    if folder.is_file():
        folder = unpack(folder)
    candidates = [folder, folder / "model", *(folder / stage / "model" for stage in FINAL_STAGES)]
    if stages := _summarized_stages(folder):
        # The model that the results are about. Earlier trainings may have left others in the folder.
        final = [stage for stage in FINAL_STAGES if stage in stages] or FINAL_STAGES
        candidates = [folder / stage / "model" for stage in final]
    for candidate in candidates:
        if (candidate / "config.json").is_file() and any(candidate.glob("*.safetensors")):
            return candidate
    for old in (folder / "student", *(folder / stage / "student" for stage in FINAL_STAGES)):
        if old.is_dir():
            raise UserError(
                f"{folder} was written by an earlier version: its model is in {old}, which is now called model; rename "
                "that folder to model, or train again"
            )
    refuse_several_seeds(folder)
    raise UserError(
        f"{folder} contains no trained model: expected config.json and model.safetensors in it, in {folder}/model or "
        f"in {folder}/{FINAL_STAGES[-1]}/model"
    )


def _summarized_stages(folder: Path) -> list[str]:
    """Return the stages of which results.json of a folder is the summary; none for one stage or a damaged file."""
    with contextlib.suppress(UserError):
        stages = (read_results(folder) or {}).get("stages")
        return list(stages) if isinstance(stages, dict) else []
    return []


def stage_folder(model: Path, given: Path | None = None) -> Path:
    """Return the folder of the stage whose `model` a folder is.

    Raises UserError, which names `given` (default: the model folder), for another model, such as an exported one: the
    recipe of another training may lie beside it.
    """
    model = model if model.name == "model" else model.resolve()  # the user may be inside of it
    if model.name != "model" or not (model.parent / "recipe.yaml").is_file():
        raise UserError(
            f"{given or model} has no recipe.yaml of its training, so the data to evaluate it on are unknown; give the "
            "run or stage folder that it comes from, or the data with --recipe RECIPE"
        )
    return model.parent


def weights_sha256(model: Path) -> str:
    """Return the SHA-256 of a model's weights; of several safetensors files, of their hashes in order."""
    files = sorted(model.glob("*.safetensors"))
    if len(files) == 1:
        return sha256(files[0])
    return hashlib.sha256("\n".join(sha256(file) for file in files).encode()).hexdigest()


def read_results(folder: Path) -> dict[str, Any] | None:
    """Return results.json of a folder, or None if it does not exist. Raises UserError if it is damaged."""
    path = folder / "results.json"
    return (
        read_object(path, path.read_bytes(), "evaluate the run again, or delete the file") if path.is_file() else None
    )


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write results.json."""
    write_text(folder / "results.json", json.dumps(results, indent=1))


def require_results_of(results: Mapping[str, Any], model: Path, folder: Path) -> None:
    """Raise UserError if results.json in `folder` is not about the model in the folder `model`.

    It is the summary of several stages, or the weights have another hash. Old results have none.
    """
    if "stages" in results:
        why = f"the stages {', '.join(results['stages'])}"
    elif results.get("weights_sha256") not in (None, weights_sha256(model)):
        why = "a model with other weights"
    else:
        return
    raise UserError(
        f"{folder / 'results.json'} describes {why}, not {model}; write the new scores elsewhere: preceptor evaluate "
        f"{model} --output FOLDER"
    )


def require_same_evaluation(results: Mapping[str, Any], settings: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError if the results of a stage in `folder` were obtained with other settings of the evaluation.

    Only settings that both have are compared: a stage that was the last one has more, and old results have none.
    """
    stored = results.get("evaluation")
    before = stored if isinstance(stored, dict) else {}
    both = before.keys() & settings.keys()
    if changed := differences({key: before[key] for key in both}, {key: settings[key] for key in both}):
        raise UserError(
            f"{folder} was evaluated with other settings ({', '.join(changed)}); restore these values, or write the "
            f"new scores elsewhere: preceptor evaluate {folder} KEY=VALUE --output FOLDER"
        )


def require_same_test_data(results: Mapping[str, Any], data: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError if the results of a stage in `folder` are about other test samples, or other files of them.

    Args:
        results: results.json of the stage, or an empty mapping.
        data: the entry `data` of the new results.
        folder: of the stage.
    """
    stored = results.get("data")
    before = stored if isinstance(stored, dict) else {}
    if any(key in before and before[key] != data[key] for key in ("test_sha256", "test_files_sha256")):
        raise UserError(
            f"{folder} was evaluated on other test data, whose predictions would be lost; write the new elsewhere: "
            f"preceptor evaluate {folder} --output FOLDER"
        )


def predictions_file(folder: Path, protocol: str) -> Path:
    """Return the path of a stage's predictions under a protocol; slashes of its id become dashes."""
    return folder / "predictions" / f"{protocol.replace('/', '-')}.jsonl"


def write_predictions(folder: Path, rows: Mapping[str, Iterable[Mapping[str, Any]]]) -> None:
    """Write the predictions of a stage, one file per protocol."""
    for protocol, lines in rows.items():
        write_text(predictions_file(folder, protocol), json_lines(lines))


def read_predictions(folder: Path, protocol: str) -> list[dict[str, Any]]:
    """Return the predictions that a stage wrote under a protocol. Raises UserError if they are missing or damaged."""
    path, again = predictions_file(folder, protocol), f"`preceptor evaluate {folder}` writes them again"
    if not path.is_file():
        raise UserError(f"{path} does not exist; {again}")
    lines = path.read_bytes().splitlines()
    return [read_object(f"{path}, line {number}", line, again) for number, line in enumerate(lines, 1)]


def read_object(place: Path | str, data: bytes, fix: str) -> dict[str, Any]:
    """Return a JSON object. Raises UserError, which ends in `fix`, if the data are anything else."""
    try:
        found = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is damaged ({error}); {fix}") from error
    if not isinstance(found, dict):
        raise UserError(f"{place} is damaged (no JSON object); {fix}")
    return found
