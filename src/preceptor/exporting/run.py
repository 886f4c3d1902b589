"""Export a model folder to another format."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

from preceptor import tasks
from preceptor.errors import UserError
from preceptor.extension import class_references
from preceptor.files import new_folder, sha256, to_json, write_text
from preceptor.pipeline.model_files import read_settings
from preceptor.pipeline.packed_model import pack
from preceptor.pipeline.run_dir import weights_sha256

TEMPLATES = Path(__file__).parent / "templates"
FORMATS = ("onnx", "hf", "monai", "zip")
_WITH_TABLE = {("onnx", "vqa"), ("hf", "grounding")}
"""Formats and tasks that are compared on questions of the user's."""


def export_model(
    model: Path, output: Path, *, to: str = "onnx", int8: bool = False, table: Path | None = None
) -> dict[str, Any]:
    """Write a model in one of `FORMATS`; return what was written and compared.

    The folder, for zip the file, appears when everything in it is complete and checked.

    Raises:
        UserError: the format is not known or does not fit the task or the options, the model is of a kind that is not
            exported, a package is missing, `output` exists, or the exported model differs.
    """
    if to not in FORMATS:
        raise UserError(f"the format {to!r} is not known; choose one of {', '.join(FORMATS)}")
    task = tasks.task_of_model(model)
    if int8 and to != "onnx":
        raise UserError(f"--int8 belongs to the format onnx; leave it out for {to}")
    if table and (to, task) not in _WITH_TABLE:
        raise UserError(
            "--table belongs to VQA models with --to onnx and to grounding models with --to hf; leave it out for a "
            f"{task} model with --to {to}"
        )
    if output.exists() and (to == "zip" or not output.is_dir() or any(output.iterdir())):
        what = "file" if to == "zip" else "folder"
        raise UserError(f"{output} already exists; choose another {what}, or remove it")
    if to == "zip":
        return {"format": to, "task": task, **_write_packed(model, output)}
    if to == "onnx" and task == "grounding":
        raise UserError(
            f"{model}: a grounding model writes its answer token by token, which is not exported to ONNX; export it "
            "with --to hf, and load it with AutoModelForImageTextToText or serve it with vLLM"
        )
    if to == "monai" and task != "segmentation":
        raise UserError(f"{model} is a {task} model, and MONAI bundles are written for segmentation only; use --to hf")
    for reference in class_references(read_settings(model / "config.json")):
        raise UserError(
            f"{model}: the class {reference} is your own, which is not exported; load the model with "
            "preceptor.load(FOLDER, trust_remote_code=True) and convert it yourself"
        )
    if to == "onnx":
        from preceptor.exporting.onnx_files import require_packages

        require_packages()
    with new_folder(output, output.with_name(f".{output.name}.tmp")) as temporary:
        if to == "onnx":
            return _write_onnx(model, temporary, task, int8=int8, table=table)
        if to == "hf":
            from preceptor.exporting.hf import write_hf

            return {"format": to, "task": task, **write_hf(model, temporary, table)}
        from preceptor.exporting.monai_bundle import write_bundle

        readme = (TEMPLATES / "README-monai.md").read_text("utf-8")
        return {"format": to, "task": task, "metadata": write_bundle(model, temporary, readme)}


def _write_packed(model: Path, file: Path) -> dict[str, Any]:
    """Write a model and the scores of its stage into one file; return its number of files, size and checksum."""
    if file.suffix.lower() != ".zip":
        raise UserError(f"{file} must end in .zip: a packed model is one file")
    scores = model.parent / "results.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    files = pack(model, file, {scores.name: scores.read_bytes()} if scores.is_file() else {})
    return {"files": files, "bytes": file.stat().st_size, "sha256": sha256(file)}


def _write_onnx(model: Path, folder: Path, task: str, *, int8: bool, table: Path | None) -> dict[str, Any]:
    """Write a model as ONNX with its settings, a runner without torch, and a README; return the content of model.json.

    Raises UserError if the ONNX file differs from torch.
    """
    from preceptor.environment import versions
    from preceptor.exporting.onnx_files import PACKAGES

    inputs = {} if table is None else {"table": table}
    settings = import_module(f"preceptor.exporting.{task}").write_onnx(model, folder, int8=int8, **inputs)
    settings = {
        "task": task,
        **settings,
        "weights_sha256": weights_sha256(model),
        "versions": versions("numpy", *PACKAGES),
    }
    write_text(folder / "model.json", to_json(settings, indent=1) + "\n")
    write_text(folder / "run_onnx.py", (TEMPLATES / f"run_{task}.py").read_text("utf-8"))
    readme = (TEMPLATES / f"README-{task}.md").read_text("utf-8")
    difference = f"{settings['check']['largest_difference']:.1e}"
    write_text(folder / "README.md", readme.replace("{largest_difference}", difference))
    return settings
