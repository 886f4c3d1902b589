"""A trained network on one case, whatever modalities it has: masks on the source's grid."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from preceptor.data.segmentation.cases import find_case
from preceptor.data.types import CaseData
from preceptor.data.volumes import save_mask, save_probabilities, to_labels, to_regions, to_source_grid
from preceptor.errors import UserError
from preceptor.pipeline.run_dir import model_folder
from preceptor.segmentation.config import EvaluationConfig
from preceptor.segmentation.dataset import VolumeExamples, VolumeSettings
from preceptor.segmentation.evaluate import THRESHOLD, predict_case
from preceptor.segmentation.metrics import post_process
from preceptor.segmentation.model import MultimodalUNet
from preceptor.segmentation.stage import INFERENCE_CONFIG
from preceptor.segmentation.subsets import name as subset_name


def segment_case(
    run: Path, path: Path | Sequence[Path], output: Path, *, probabilities: bool = False, post: bool = False
) -> dict[str, Any]:
    """Segment a case (a folder, its files, or one 4-D file) into ``output/CASE_seg.nii.gz``; return what was done.

    The document names the modalities that are there and missing, the mean Dice that validation found for just these,
    and the volume of each region in ml. `probabilities` adds ``CASE_prob.nii.gz`` (X, Y, Z, regions in order); `post`
    applies the post-processing of the recipe.

    Raises UserError where the case has none of the network's modalities, or files that cannot be used.
    """
    folder = model_folder(run)
    network = MultimodalUNet.load(folder).eval()
    facts = _facts(folder)
    modalities, regions = network.config.modalities, {name: tuple(v) for name, v in facts["regions"].items()}
    # A label map that lies beside the images is nobody's business here.
    case = replace(find_case(path, modalities), mask=None)
    data = CaseData("case", "none", folder, modalities, regions, [case])
    preparation = facts["preparation"]
    window = tuple(preparation["patch_size"])
    settings = VolumeSettings(
        patch_size=window,
        intensity=preparation["intensity"],
        augment="none",
        spacing=tuple(preparation["spacing"]) if preparation["spacing"] else None,
    )
    whole = VolumeExamples([case], data, settings).whole(0)
    config = EvaluationConfig.model_validate(facts["inference"])
    subset = tuple(bool(there) for there in whole.available)
    found = predict_case(network, whole, config, window, only=[subset])[subset].float().cpu().numpy()
    full = np.zeros((len(regions), *whole.images.shape[1:]), np.float32)
    full[(slice(None), *whole.box)] = found
    label = to_source_grid(to_labels(full >= THRESHOLD, regions), whole.loaded)
    if post:
        label = post_process(label, regions, config)
    target = output / f"{case.id}_seg.nii.gz"
    output.mkdir(parents=True, exist_ok=True)
    save_mask(target, label, whole.loaded)
    files = [str(target)]
    if probabilities:
        target = output / f"{case.id}_prob.nii.gz"
        save_probabilities(target, full, whole.loaded)
        files.append(str(target))
    masks, millilitres = to_regions(label, regions), float(np.prod(whole.loaded.geometry.spacing)) / 1000
    name = subset_name(subset, modalities)
    missing = [modality for modality, there in zip(modalities, subset, strict=True) if not there]
    return {
        "case": case.id,
        "subset": name,
        "missing": missing,
        "validation": {
            "cases": facts["data"]["validation"],
            "dice": facts["validation"].get(name),
            "dice_of_all": facts["validation"].get(subset_name((True,) * len(modalities), modalities)),
        },
        "volume_ml": {r: round(float(masks[i].sum()) * millilitres, 2) for i, r in enumerate(regions)},
        "post_processed": post,
        "files": files,
    }


def _facts(folder: Path) -> dict[str, Any]:
    try:
        facts = json.loads((folder / INFERENCE_CONFIG).read_text("utf-8"))
        for key in ("regions", "preparation", "inference", "validation", "data"):
            facts[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{folder / INFERENCE_CONFIG} is missing or damaged ({error}); copy the model's folder again"
        ) from error
    return dict(facts)


def sentences(found: dict[str, Any]) -> list[str]:
    """Return what was done, in words."""
    lines = [f"{found['case']}: from {found['subset']}"]
    if found["missing"]:
        lines[0] += f"; missing: {', '.join(found['missing'])}"
    promise = found["validation"]
    if promise["dice"] is None:
        lines.append("No validation case had these modalities, so nothing is known about how good this is.")
    else:
        scores = ", ".join(f"{region} {100 * value:.1f}" for region, value in promise["dice"].items())
        lines.append(f"Mean Dice of these modalities on {promise['cases']} validation cases: {scores}")
        if found["missing"] and promise["dice_of_all"]:
            scores = ", ".join(f"{region} {100 * value:.1f}" for region, value in promise["dice_of_all"].items())
            lines.append(f"With all modalities it was {scores}")
    lines.append("Volumes: " + ", ".join(f"{region} {value:g} ml" for region, value in found["volume_ml"].items()))
    return lines + [f"wrote {file}" for file in found["files"]]
