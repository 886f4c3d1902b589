"""A segmentation model as a MONAI bundle, whose configuration calls the installed Preceptor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from preceptor.environment import versions
from preceptor.exporting.hf import write_hf
from preceptor.files import to_json, write_text
from preceptor.pipeline.model_files import read_settings
from preceptor.segmentation.predict import INFERENCE_CONFIG

SCHEMA = "https://github.com/Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/meta_schema_20240725.json"
_MODEL = "@bundle_root + '/models'"
_INFERENCE = {
    "imports": ["$import preceptor"],
    "bundle_root": ".",
    "dataset_dir": None,
    "files": None,
    "output_dir": "$@bundle_root + '/eval'",
    "network_def": f"$preceptor.load({_MODEL}).network",
    "run": [f"$preceptor.predict({_MODEL}, case=@dataset_dir, files=@files, output=@output_dir)"],
}


def write_bundle(model: Path, folder: Path, readme: str) -> dict[str, Any]:
    """Write a bundle to `folder` and return its metadata.

    Raises:
        UserError: as `write_hf`.
    """
    write_hf(model, folder / "models")
    metadata = describe(model)
    write_text(folder / "configs" / "metadata.json", to_json(metadata, indent=1) + "\n")
    write_text(folder / "configs" / "inference.json", to_json(_INFERENCE, indent=1) + "\n")
    write_text(folder / "docs" / "README.md", readme)
    return metadata


def describe(model: Path) -> dict[str, Any]:
    """Return the metadata of a bundle, as its schema demands, from the files of a model folder."""
    network, settings = read_settings(model / "config.json"), read_settings(model / INFERENCE_CONFIG)
    modalities, regions = network["modalities"], settings["regions"]
    window = settings["preparation"]["patch_size"]
    installed = versions("monai", "nibabel")
    labels = "; ".join(f"{name}: labels {', '.join(map(str, values))}" for name, values in regions.items())

    def tensor(kind: str, form: str, channels: list[str], **others: Any) -> dict[str, Any]:
        names = {str(number): name for number, name in enumerate(channels)}
        described = {"type": kind, "format": form, "num_channels": len(channels), "spatial_shape": window}
        return described | {"dtype": "float32", "value_range": [], "is_patch_data": True, "channel_def": names} | others

    return {
        "schema": SCHEMA,
        "version": "1.0.0",
        "changelog": {"1.0.0": f"exported with Preceptor {installed['preceptor']}"},
        "monai_version": installed["monai"],
        "pytorch_version": installed["torch"],
        "numpy_version": installed["numpy"],
        "required_packages_version": {name: installed[name] for name in ("preceptor", "nibabel", "safetensors")},
        "task": f"Segmentation of {', '.join(regions)} in any subset of {', '.join(modalities)}",
        "description": "Segments a case with the modalities that it has, and writes one label map per case.",
        "authors": "see models/README.md",
        "copyright": "see models/README.md",
        "data_type": "nibabel",
        "image_classes": f"one volume per modality: {', '.join(modalities)}",
        "pred_classes": labels,
        "eval_metrics": {
            subset: {f"dice_{region}": dice for region, dice in scores.items()}
            for subset, scores in settings["validation"].items()
        },
        "intended_use": "Research only; not a medical device.",
        "network_data_format": {
            "inputs": {
                "images": tensor("image", "magnitude", modalities),
                "available": tensor(
                    "vector",
                    "flags",
                    modalities,
                    spatial_shape=[],
                    dtype="bool",
                    value_range=[0, 1],
                    is_patch_data=False,
                ),
            },
            "outputs": {"logits": tensor("image", "segmentation", list(regions))},
        },
    }
