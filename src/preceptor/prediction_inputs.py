"""The inputs of `predict`, which depend on the task of the model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from preceptor.arguments import as_list, as_path, as_positive, as_text
from preceptor.errors import UserError

NO_INPUTS = {
    **dict.fromkeys(("image", "question", "table", "case", "files")),
    "top": 3,
    "modality": "",
    **dict.fromkeys(("post", "probabilities", "dicom_seg", "copy_patient"), False),
}
"""The inputs of `predict` of all tasks, with the value that changes nothing. The command line gives all of them."""


def checked_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the inputs of `predict` that are given as the types that models expect. Raises UserError for others."""
    given = {name: value for name, value in inputs.items() if value is not None}
    checked: dict[str, Any] = {name: as_path(given[name], name) for name in ("image", "table") if name in given}
    checked |= {name: as_text(given[name], name) for name in ("question", "modality") if name in given}
    if "top" in given:
        checked["top"] = as_positive(given["top"], "top")
    if "case" in given:
        checked["case"] = [as_path(file, "case") for file in as_list(given["case"], "case")]
    if "files" in given:
        if not isinstance(given["files"], Mapping):
            raise UserError(f"files must be a mapping of modalities to paths, not {type(given['files']).__name__}")
        checked["files"] = {name: as_path(file, f"files[{name!r}]") for name, file in given["files"].items()}
    return checked


def require_inputs_of(model: Any, inputs: Mapping[str, Any]) -> None:
    """Raise UserError for an input that the task of a model does not have, and that is more than its default."""
    known = {name for function in (model.items, model.predict_rows) for name in inspect.signature(function).parameters}
    for name, value in inputs.items():
        if name not in known and value and value != NO_INPUTS[name]:
            raise UserError(f"{name} does not apply to {type(model).__name__}; omit it")
