"""Small models, their exports, and a Python without torch, transformers and Preceptor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import preceptor
from preceptor.segmentation.config import EvaluationConfig
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig
from preceptor.segmentation.predict import SegmentationModel
from tests.vqa.conftest import make_bundle, make_data

BLOCKED = ("torch", "transformers", "preceptor", "monai")


@dataclass
class Exported:
    """A model folder and its export."""

    model: Path
    folder: Path
    settings: dict[str, Any]

    def run(self, *arguments: object, code: str | None = None) -> subprocess.CompletedProcess[str]:
        """Run the runner, or `code` that may import it, in a Python that cannot import torch or Preceptor."""
        blocker = self.folder.parent / "blocker"
        blocker.mkdir(exist_ok=True)
        (blocker / "sitecustomize.py").write_text(f"import sys\nsys.modules.update(dict.fromkeys({BLOCKED}))\n")
        program = [str(self.folder / "run_onnx.py")] if code is None else ["-c", code]
        environment = os.environ | {"PYTHONPATH": f"{blocker}{os.pathsep}{self.folder}"}
        command = [sys.executable, *program, *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    def compute(self, code: str, *arguments: object) -> Any:
        """Return the JSON document that `code` prints."""
        result = self.run(*arguments, code=code)
        assert result.returncode == 0, result.stderr
        return json.loads(result.stdout)


def unsettle(network: nn.Module) -> None:
    """Give shifts and scales other values than 0 and 1, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)


def save_vqa(folder: Path) -> Path:
    bundle = make_bundle(make_data(folder / "images"), 16, 0)
    unsettle(bundle.model)
    bundle.save(folder / "vqa")
    return folder / "vqa"


def save_segmentation(folder: Path, modalities: tuple[str, ...], window: tuple[int, int, int], **changes: Any) -> Path:
    """Write a network with the nested regions of BraTS, labels 1, 2 and 4."""
    regions = {"wt": [1, 2, 4], "tc": [1, 4], "et": [4]}
    network = MultimodalUNet(MultimodalUNetConfig(modalities, tuple(regions), channels=(4, 6, 8)), seed=0)
    unsettle(network)
    config = {
        "regions": regions,
        "preparation": {"patch_size": list(window), "intensity": "percentile", "spacing": None},
        "inference": EvaluationConfig().model_dump(mode="json"),
        "validation": {},
        "data": {"validation": 4},
    }
    config["preparation"] |= changes.pop("preparation", {})
    SegmentationModel(network, config | changes).save_pretrained(folder)
    return folder


def export(model: Path, folder: Path, **options: Any) -> Exported:
    return Exported(model, folder, preceptor.export(model, folder, **options))


@pytest.fixture(scope="session")
def vqa(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exports")
    model = save_vqa(folder)
    images = sorted((folder / "images").glob("*.png"))[:4]
    rows = "".join(f"{image.name},Where is the disc?,{('yes', 'right')[n % 2]}\n" for n, image in enumerate(images))
    (folder / "images" / "table.csv").write_text("image,question,answer\n" + rows)
    return export(model, folder / "onnx", int8=True, table=folder / "images" / "table.csv")


@pytest.fixture(scope="session")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("exports")
    return export(save_segmentation(folder / "model", ("flair", "t1", "t2"), (16, 24, 16)), folder / "onnx")
