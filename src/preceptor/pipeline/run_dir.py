"""A run's folder: its log, and where its model lies."""

from __future__ import annotations

import contextlib
import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path

from preceptor.errors import UserError

FINAL = ("clinkd", "distilled")
"""The stages whose model a recipe of several stages is about, the first that is there."""


@contextlib.contextmanager
def logged_to(path: Path, wanted: bool = True) -> Iterator[None]:
    """Write what is logged to a file too, appending."""
    log = logging.getLogger("preceptor")
    handler = logging.FileHandler(path, encoding="utf-8") if wanted else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)
        handler.close()


def start_afresh(folder: Path) -> None:
    """Remove what earlier trainings left in the folder of a stage."""
    for part in ("checkpoints", "model", "predictions"):
        shutil.rmtree(folder / part, ignore_errors=True)
    for part in ("metrics.jsonl", "results.json", "report.html"):
        (folder / part).unlink(missing_ok=True)


def model_folder(folder: Path) -> Path:
    """Return the model folder of a run, a stage or a model folder itself."""
    for candidate in (folder, folder / "model", *(folder / stage / "model" for stage in FINAL)):
        if (candidate / "config.json").is_file() and (candidate / "model.safetensors").is_file():
            return candidate
    for old in (folder / "student", *(folder / stage / "student" for stage in FINAL)):
        if (old / "model.safetensors").is_file():
            raise UserError(f"{old} was written by an earlier version; the folder is now called model: rename it")
    raise UserError(
        f"{folder} holds no trained model: expected config.json and model.safetensors in it, in {folder}/model or in "
        f"{folder}/{FINAL[-1]}/model"
    )


def holds_vlm(folder: Path) -> bool:
    """Return whether a model folder holds a vision-language model."""
    from preceptor.grounding.guided_rope import FAMILIES

    return json.loads((folder / "config.json").read_text("utf-8")).get("model_type") in FAMILIES
