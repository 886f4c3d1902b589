"""What the verbs beside `train` do with a segmentation run: evaluate, check, report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preceptor.data.segmentation.check import check_cases
from preceptor.errors import UserError, nearest
from preceptor.files import write_text
from preceptor.segmentation.config import SegmentationRecipe
from preceptor.segmentation.data import read_cases
from preceptor.segmentation.model import MultimodalUNet
from preceptor.segmentation.report import write_segmentation_report
from preceptor.segmentation.stage import evaluate, write_rows


def evaluate_network(
    folder: Path, recipe: SegmentationRecipe, protocol: str | None, target: Path, *, whole: bool
) -> dict[str, Any]:
    """Score a network on the test split of its own or other data; with `whole`, write results.json to `target` too.

    Raises UserError where the data have other modalities or regions, and for an unknown protocol.
    """
    data = read_cases(recipe.data, recipe.output_folder / "data", needed=("test",))
    network = MultimodalUNet.load(folder).eval()
    for what, own, theirs in (
        ("modalities", network.config.modalities, data.modalities),
        ("regions", network.config.regions, data.regions),
    ):
        if tuple(own) != tuple(theirs):
            raise UserError(f"the network of {folder} knows the {what} {list(own)}, and the data have {list(theirs)}")
    results, rows = evaluate(network, recipe, data)
    if protocol is not None:
        if protocol not in rows:
            raise UserError(f"protocol {protocol!r} is not known{nearest(protocol, rows)}")
        results["protocols"], rows = {protocol: results["protocols"][protocol]}, {protocol: rows[protocol]}
    write_rows(target, rows)
    if whole:
        write_text(target / "results.json", json.dumps(results, indent=1))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    return {"stage": folder.parent.name, **results, "parameters": parameters}


def check_recipe(recipe: SegmentationRecipe) -> dict[str, Any]:
    """Return what `doctor` finds in the cases of a recipe."""
    data = read_cases(recipe.data, recipe.output_folder / "data", needed=())
    findings = [
        {"severity": f.severity, "ids": list(f.sample_ids), "file": f.file.name if f.file else "", "reason": f.reason}
        for f in check_cases(data, max_voxels=recipe.data.max_voxels)
    ]
    return {
        "name": data.name,
        "variant": data.variant,
        "notes": data.notes,
        "modalities": list(data.modalities),
        "regions": {name: list(values) for name, values in data.regions.items()},
        "rows": {split: len(data.split(split)) for split in ("train", "validation", "test")},
        "findings": findings,
    }


def report_segmentation(run: Path, recipe: SegmentationRecipe) -> Path:
    """Write a run's report page from what lies in its folder."""
    try:
        data = read_cases(recipe.data, recipe.output_folder / "data", needed=())
    except UserError:
        data = None  # the page is then written without overlays
    return write_segmentation_report(run, data=data, recipe=recipe)
