"""The models that are served: loaded in the background, each with a name and a description."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from preceptor.data.limits import MAX_VOXELS
from preceptor.errors import UserError
from preceptor.os_errors import describe_os_error
from preceptor.pipeline.run_dir import model_folder
from preceptor.tasks import task_of_model


class ServedModels:
    """Models by name.

    Args:
        folders: Run, stage or model folder of each name.
        load: Function that loads a folder.

    Attributes:
        tasks: The task of each name, known before the models are loaded.
        errors: For each name whose model cannot be loaded, the sentence that says why.
    """

    def __init__(self, folders: Mapping[str, Path], load: Callable[[Path], Any]) -> None:
        self.folders, self._load = dict(folders), load
        self.tasks = {name: task_of_model(model_folder(folder)) for name, folder in folders.items()}
        self.errors: dict[str, str] = {}
        self._models: dict[str, Any] = {}
        self._loaded = threading.Event()

    def start(self) -> None:
        """Load all models in a thread, so that the page can be opened at once."""
        threading.Thread(target=self.load, name="loading", daemon=True).start()

    def load(self) -> None:
        """Load all models. A model that cannot be loaded is logged, and the others are loaded nevertheless."""
        log = logging.getLogger("preceptor")
        try:
            for name, folder in self.folders.items():
                try:
                    self._models[name] = self._load(folder)
                except Exception as error:
                    sentence = str(error) if isinstance(error, UserError) else describe_os_error(error)
                    self.errors[name] = sentence or f"the model {name} cannot be loaded: {type(error).__name__}"
                    if sentence is None:
                        log.exception("a defect while the model %s was loaded", name)
                    elif len(self.folders) > 1:  # `serve` raises the error of a single model
                        log.error("the model %s cannot be loaded: %s", name, sentence)
        finally:
            self._loaded.set()

    @property
    def error(self) -> str | None:
        """The first sentence that says why a model cannot be loaded, or None."""
        return next(iter(self.errors.values()), None)

    @property
    def loaded(self) -> bool:
        """Whether loading has ended, for each model with success or an error."""
        return self._loaded.is_set()

    @property
    def ready(self) -> bool:
        """Whether all models are loaded."""
        return self.loaded and not self.errors

    @property
    def all_failed(self) -> bool:
        """Whether no model can be loaded at all."""
        return self.loaded and not self._models

    @property
    def max_voxels(self) -> int:
        """The largest number of voxels of a volume that one of the segmentation models reads."""
        models = [model for name, model in self._models.items() if self.tasks[name] == "segmentation"]
        return max((model.max_voxels for model in models), default=MAX_VOXELS)

    def choose(self, name: str, task: str) -> str:
        """Return the name of a model of a task; for an empty name that of the first one.

        Raises UserError if there is none.
        """
        names = [other for other, kind in self.tasks.items() if kind == task]
        if not names:
            raise UserError(f"no model of the task {task} is served")
        if name and name not in names:
            raise UserError(f"{name!r} is not a served model of the task {task}; there are {', '.join(names)}")
        return name or names[0]

    def get(self, name: str) -> Any:
        """Return the model of a name, after loading has ended. Raises UserError if it cannot be loaded."""
        self._loaded.wait()
        if name in self.errors:
            raise UserError(self.errors[name])
        return self._models[name]

    def describe(self) -> list[dict[str, Any]]:
        """Return name and task of each model and, once it is loaded, what it can be asked, or that loading failed."""

        def found(name: str, task: str) -> dict[str, Any]:
            if name in self._models:
                return _details(task, self._models[name])
            return {"failed": True} if name in self.errors else {}

        return [{"name": name, "task": task} | found(name, task) for name, task in self.tasks.items()]


def _details(task: str, model: Any) -> dict[str, Any]:
    if task == "vqa":
        return {"answers": len(model.bundle.vocabulary.answers)}
    if task == "segmentation":
        return {
            "modalities": list(model.modalities),
            "regions": list(model.regions),
            "labels": {region: list(values) for region, values in model.regions.items()},
            "validation": model.config["validation"],
            "validation_cases": model.config["data"]["validation"],
        }
    from preceptor.grounding.settings import MODALITIES

    return {"needs_modality": model.vlm.guidance.kind == "clip", "modalities": list(MODALITIES)}


def unique_names(folders: Sequence[Path]) -> dict[str, Path]:
    """Return the folders by their names; folders of the same name also have the name of the folder above.

    Raises UserError if a folder is given twice.
    """
    places = [folder.resolve() for folder in folders]
    if doubled := next((folder for folder in folders if places.count(folder.resolve()) > 1), None):
        raise UserError(f"{doubled} is given twice")
    depth = 1
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return {"/".join(place.parts[-depth:]): folder for place, folder in zip(places, folders, strict=True)}
