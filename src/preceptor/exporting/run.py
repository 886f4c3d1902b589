"""Export a model folder to another format."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from preceptor import tasks
from preceptor.errors import UserError
from preceptor.extension import class_references
from preceptor.files import new_folder, to_json, write_text
from preceptor.pipeline.model_files import read_settings
from preceptor.pipeline.run_dir import weights_sha256

TEMPLATES = Path(__file__).parent / "templates"
_TASKS = ("vqa", "segmentation")


def export_onnx(model: Path, folder: Path, *, int8: bool, table: Path | None) -> dict[str, Any]:
    """Write a model as ONNX with its settings, a runner without torch, and a README; return the content of model.json.

    The folder appears when everything in it is complete and checked.

    Raises:
        UserError: the model is of a kind that is not exported, a package is missing, `folder` exists, or the ONNX file
            differs from torch.
    """
    task = tasks.task_of_model(model)
    if task not in _TASKS:
        raise UserError(
            f"{model}: a grounding model writes its answer token by token, which is not exported to ONNX; its folder "
            "is one of transformers, so load it with AutoModelForImageTextToText or serve it with vLLM"
        )
    for reference in class_references(read_settings(model / "config.json")):
        raise UserError(
            f"{model}: the class {reference} is your own, which is not exported; load the model with preceptor.load "
            "and call torch.onnx.export yourself"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} already exists; choose another folder, or remove it")
    from preceptor.environment import versions
    from preceptor.exporting.onnx_files import PACKAGES, require_packages

    require_packages()
    with new_folder(folder, folder.with_name(f".{folder.name}.tmp")) as temporary:
        settings = import_module(f"preceptor.exporting.{task}").write_onnx(model, temporary, int8=int8, table=table)
        settings = {
            "task": task,
            **settings,
            "weights_sha256": weights_sha256(model),
            "versions": versions("numpy", *PACKAGES),
        }
        write_text(temporary / "model.json", to_json(settings, indent=1) + "\n")
        write_text(temporary / "run_onnx.py", (TEMPLATES / f"run_{task}.py").read_text("utf-8"))
        readme = (TEMPLATES / f"README-{task}.md").read_text("utf-8")
        difference = f"{settings['check']['largest_difference']:.1e}"
        write_text(temporary / "README.md", readme.replace("{largest_difference}", difference))
    return settings
