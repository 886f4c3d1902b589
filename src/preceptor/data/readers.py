"""The readers of data sets by name. A new data set is a module with a `read` function and one line here.

A reader is called as ``read(config, scratch)`` with the data settings of the recipe and a folder for generated files,
and returns a `Dataset`. A recipe may also name a function of the user's, ``data.name: my_module:read``, which is called
as ``read(root, **arguments)``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, ValidationInfo

from preceptor.data.types import Dataset
from preceptor.errors import UserError, nearest
from preceptor.extension import find_module, load_function

VQA = {
    "phantom": "preceptor.data.vqa.phantom",
    "table": "preceptor.data.vqa.table",
    "vqa-rad": "preceptor.data.vqa.vqa_rad",
    "vqa-med-2019": "preceptor.data.vqa.vqa_med_2019",
    "slake": "preceptor.data.vqa.slake",
    "path-vqa": "preceptor.data.vqa.path_vqa",
}
SEGMENTATION = {
    "phantom": "preceptor.data.segmentation.phantom",
    "brats": "preceptor.data.segmentation.cases",
    "volumes": "preceptor.data.segmentation.cases",
}
GROUNDING = {
    "phantom-grounding": "preceptor.data.grounding.phantom",
    "slake-grounding": "preceptor.data.grounding.slake",
    "med-grit": "preceptor.data.grounding.med_grit",
    "sharegpt": "preceptor.data.grounding.sharegpt",
}


def require_applies(config: Any, only_for: Mapping[str, tuple[Sequence[str], object]]) -> None:
    """Raise UserError if data settings have a value that the reader of ``config.name`` does not use.

    `only_for` holds, by setting, the data sets that it applies to, and its value for all other data sets.
    """
    for setting, (names, default) in only_for.items():
        if config.name not in names and getattr(config, setting) != default:
            raise UserError(
                f"data.{setting}={getattr(config, setting)} applies to {' and '.join(names)}, not to "
                f"data.name={config.name}; remove it"
            )


def read_named(readers: Mapping[str, str], config: Any, scratch: Path) -> Any:
    """Return the data set that ``config.name`` names. Raises UserError as its reader."""
    if ":" in config.name:
        return _read_own(config)
    require_applies(config, {"arguments": (["module:function"], {})})
    return import_module(readers[config.name]).read(config, scratch)


def _read_own(config: Any) -> Dataset:
    read = load_function(config.name, "data.name")
    try:
        data = read(Path(config.root) if config.root else None, **config.arguments)
    except TypeError as error:
        raise UserError(f"data.name={config.name} does not accept the arguments {config.arguments}: {error}") from error
    if not isinstance(data, Dataset):
        raise UserError(
            f"data.name={config.name} must return a preceptor.data.types.Dataset, not {type(data).__name__}"
        )
    return data


def _checked(readers: Mapping[str, str]) -> AfterValidator:
    def check(name: str, info: ValidationInfo) -> str:
        if ":" in name:
            find_module(name, "", (info.context or {}).get("folder"))
            return name
        plain = name.replace("_", "-")
        if plain not in readers:
            raise ValueError(f"it must be a data set or module:function{nearest(plain, readers)}")
        return plain

    return AfterValidator(check)


VqaName = Annotated[str, _checked(VQA)]
SegmentationName = Annotated[str, _checked(SEGMENTATION)]
GroundingName = Annotated[str, _checked(GROUNDING)]
