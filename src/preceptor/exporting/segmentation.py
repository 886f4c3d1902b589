"""Export a segmentation network to ONNX: one window and what modalities are there in, probabilities out."""

from __future__ import annotations

import inspect
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from preceptor.data.volumes import to_labels
from preceptor.errors import UserError
from preceptor.exporting.onnx_files import MODEL, Inputs, check_outputs, quantise, trace
from preceptor.files import write_text
from preceptor.segmentation import intensity, region_masks
from preceptor.segmentation.evaluate import THRESHOLD
from preceptor.segmentation.model import MultimodalUNet, Size
from preceptor.segmentation.predict import SegmentationModel
from preceptor.segmentation.sliding_window import predict_subsets
from preceptor.segmentation.subsets import all_subsets

_MOST_REGIONS = 16
_MOST_SUBSETS, _MOST_OF_LARGE, _LARGE = 15, 5, 2**18
"""Number of subsets of the modalities for which the file is compared with torch, for windows up to so many voxels and
for larger ones, which take seconds each."""
_ERRORS_IMPORT = "from preceptor.errors import UserError, nearest\n"
_ERRORS = """
UserError = SystemExit


def nearest(name, known):
    return f"; known: {', '.join(known)}"
"""


class WindowNetwork(nn.Module):
    """The network on one window, without branches on which modalities are available.

    All modalities are encoded; then the features of missing ones are replaced. Their voxels are never read.
    """

    def __init__(self, network: MultimodalUNet, size: Size) -> None:
        super().__init__()
        self.network, self.size = network, size

    def forward(self, images_NDHW: Tensor, available_N: Tensor) -> Tensor:
        """Return the probabilities (R, D, H, W)."""
        network = self.network
        images = torch.where(available_N[:, None, None, None], images_NDHW, images_NDHW.new_zeros(()))
        if network.own is not None:
            return network.own(images[None], available_N[None])[0].sigmoid()
        count = len(network.config.modalities)
        if len(network.encoders) == 1:
            features = network.encode_shared(images[:, None], list(range(count)))
        else:
            each = [network.encode(images[m][None, None], m) for m in range(count)]
            features = [torch.cat(level) for level in zip(*each, strict=True)]
        there = available_N[:, None, None, None, None]
        features = [torch.where(there, x, x.new_zeros(()))[None] for x in features]
        zeros = None
        if network.config.fill == "bottleneck":
            # onnxruntime computes what depends on no input once, when it loads the file.
            of_encoders = [encoder.zero_skips(self.size) for encoder in network.encoders]  # type: ignore[operator]
            zeros = [torch.cat(level) for level in zip(*of_encoders, strict=True)]
        return network.decode_incomplete(features, available_N[None], self.size, zeros)[0].sigmoid()


def write_onnx(model: Path, folder: Path, *, int8: bool) -> dict[str, Any]:
    """Write the ONNX files of a model folder to `folder`; return the content of `model.json`.

    Raises:
        UserError: the model cannot be exported, or its ONNX file differs from torch.
    """
    import onnx

    segmenter = SegmentationModel.load(model)
    network, config = segmenter.network, segmenter.config
    if len(segmenter.regions) > _MOST_REGIONS:
        raise UserError(f"{model} has {len(segmenter.regions)} regions; at most {_MOST_REGIONS} are exported")
    window: Size = tuple(config["preparation"]["patch_size"])
    inputs = _generated_inputs(network, window)
    with torch.inference_mode(False):
        traced = trace(
            WindowNetwork(network, window),
            (torch.from_numpy(inputs[0]["images"]), torch.ones(len(segmenter.modalities), dtype=torch.bool)),
            ("images", "available"),
            "probabilities",
        )
    onnx.save(traced, folder / MODEL)
    expected = [_probabilities(network, one, window) for one in inputs]
    settings: dict[str, Any] = {
        "modalities": list(segmenter.modalities),
        "regions": {name: list(values) for name, values in segmenter.regions.items()},
        "labels": label_table(segmenter.regions),
        "threshold": THRESHOLD,
        "window": list(window),
        "overlap": segmenter.inference.overlap,
        "mode": segmenter.inference.mode,
        "intensity": config["preparation"]["intensity"],
        "spacing": config["preparation"]["spacing"],
        "validation": config["validation"],
        "check": check_outputs(folder / MODEL, inputs, expected),
    }
    if int8:
        settings["int8"] = quantise(folder, inputs, expected)
    write_text(folder / "intensity.py", stand_alone_intensity())
    write_text(folder / "region_masks.py", inspect.getsource(region_masks))
    return settings


def label_table(regions: dict[str, tuple[int, ...]]) -> list[int]:
    """Return the label of a voxel for each set of its regions: bit r of the index stands for region r."""
    present = np.array(list(product((False, True), repeat=len(regions))))[:, ::-1]
    return to_labels(present.T[:, :, None, None], regions)[:, 0, 0].tolist()


def stand_alone_intensity() -> str:
    """Return the source of `preceptor.segmentation.intensity` without the import from Preceptor."""
    source = inspect.getsource(intensity)
    assert source.count("preceptor") == _ERRORS_IMPORT.count("preceptor")
    return source.replace(_ERRORS_IMPORT, _ERRORS)


def _generated_inputs(network: MultimodalUNet, window: Size) -> list[dict[str, np.ndarray]]:
    """Return windows of noise, each with other modalities: all subsets, or some of them. Missing ones are NaN."""
    choices = all_subsets(len(network.config.modalities))
    count = _MOST_SUBSETS if prod(window) <= _LARGE else _MOST_OF_LARGE
    picked = np.unique(np.linspace(0, len(choices) - 1, count).round().astype(int))
    rng = np.random.default_rng(0)
    found = []
    for number in picked.tolist():
        available = np.array(choices[number])
        images = rng.standard_normal((len(available), *window)).astype(np.float32)
        images[~available] = np.nan
        found.append({"images": images, "available": available})
    return found


def _probabilities(network: MultimodalUNet, inputs: Inputs, window: Size) -> np.ndarray:
    """Return the probabilities (R, D, H, W) that torch computes for a window."""
    subset = tuple(inputs["available"].tolist())
    return predict_subsets(network, torch.from_numpy(inputs["images"]), subset, window, subsets=[subset])[
        subset
    ].numpy()
