"""Segmentation from any subset of modalities: each is encoded alone, a missing one gets the mean of those there.

LCKD (Wang et al., MICCAI 2023): features f_i of N modalities, a missing f_i filled in by the mean of the available
ones, all concatenated and decoded. Only what is there is encoded: an absent modality costs nothing, and whatever stands
in its channel is never read.

Shapes: B batch, N modalities, C channels, R regions, D H W voxels of the input, d h w of a level, M encoded images.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preceptor.errors import UserError, nearest
from preceptor.extension import construct, load_trusted
from preceptor.files import write_text
from preceptor.segmentation import reference_unet
from preceptor.segmentation.compact_unet import CompactDecoder, CompactEncoder
from preceptor.segmentation.layers import Join, initialise
from preceptor.segmentation.reference_unet import ReferenceDecoder, ReferenceEncoder

MODEL_TYPE = "preceptor-multimodal-unet"
_COMPACT = (16, 32, 64, 128)
_CHOICES = {"encoder": ("shared", "separate"), "fill": ("all_levels", "bottleneck")}

Size = tuple[int, int, int]


@dataclass(frozen=True)
class MultimodalUNetConfig:
    """What the network is built from; JSON-able.

    `net`: ``reference`` is the published network (`reference_unet`), ``compact`` a small one (`compact_unet`) with
    `channels`, 3 to 5 levels. `encoder`: one ``shared`` by all modalities (published code) or ``separate`` ones
    (published figure). `fill`: what stands for a missing modality. ``all_levels``: the mean of the available features,
    at every level. ``bottleneck`` (published code): so at the deepest level only; its skips are those of a zero image.

    Raises UserError for a value that is none of these.
    """

    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    net: str = "compact"
    encoder: Literal["shared", "separate"] = "shared"
    channels: tuple[int, ...] = _COMPACT
    fill: Literal["all_levels", "bottleneck"] = "all_levels"
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("modalities", "regions"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values) or not all(isinstance(v, str) and v for v in values):
                raise UserError(f"{name} of the network must be different names, at least one, not {list(values)}")
        if not self.is_own and self.net not in ("compact", "reference"):
            raise UserError(f"net of the network is {self.net!r}{nearest(self.net, ('compact', 'reference'))}")
        for name, known in _CHOICES.items():
            value = getattr(self, name)
            if value not in known:
                raise UserError(f"{name} of the network is {value!r}{nearest(str(value), known)}")
        good = all(isinstance(c, int) and not isinstance(c, bool) and 1 <= c <= 4096 for c in self.channels)
        if not (good and 3 <= len(self.channels) <= 5):
            raise UserError(f"channels of the network must be 3 to 5 numbers from 1 to 4096, not {list(self.channels)}")
        if self.net == "reference" and self.channels != _COMPACT:
            raise UserError(
                f"channels {list(self.channels)} are for net=compact; net=reference has its own, leave them"
            )

    @property
    def is_own(self) -> bool:
        """Whether `net` is a class of the user's, ``module:Class``."""
        return ":" in self.net

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the features of each level, shallow to deep. A network of the user's has none."""
        if self.is_own:
            return ()
        return self.channels if self.net == "compact" else (*reference_unet.SKIPS, reference_unet.BOTTLENECK)

    def to_dict(self) -> dict[str, Any]:
        """Return a dictionary that JSON can hold."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MultimodalUNetConfig:
        """Return what `to_dict` described. Raises UserError for an unknown or missing key or a wrong type."""
        known = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise UserError(f"the network's configuration has an unknown key {name!r}{nearest(name, known)}")
        given: dict[str, Any] = dict(values)
        for name in ("modalities", "regions", "channels"):
            if name in given:
                if not isinstance(given[name], (list, tuple)):
                    raise UserError(f"{name} of the network must be a list, not {given[name]!r}")
                given[name] = tuple(given[name])
        for name in ("modalities", "regions"):
            if name not in given:
                raise UserError(f"the network's configuration lacks {name!r}")
        return cls(**given)


@dataclass
class Segmentation:
    """What the network says about a batch.

    `logits` (B, R, D, H, W). `features`: from shallow to deep (B, N, C, d, h, w), before fill-in, zero where a modality
    is absent; the last is the bottleneck, which LCKD distils. `available` (B, N) bool.
    """

    logits: Tensor
    features: list[Tensor]
    available: Tensor


class MultimodalUNet(nn.Module):
    """A network that segments any subset of modalities. With `seed` its initial weights depend on the seed alone.

    `net` of the configuration may name a class of the user's, ``module:Class``. It is called as
    ``Class(modalities=N, regions=R, **arguments)`` and is an nn.Module with ``forward(images, available)``: images
    (B, N, D, H, W), zero where a modality is missing, and available (B, N) bool, to logits (B, R, D, H, W). Its
    attribute `stride`, three numbers, says of what the sides of an input must be multiples; default: (1, 1, 1). Each
    subset of modalities is a forward pass of its own, and methods that compare features do not apply.
    """

    def __init__(self, config: MultimodalUNetConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        n, r = len(config.modalities), len(config.regions)
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            encoders = n if config.encoder == "separate" else 1
            self.own: nn.Module | None = None
            if config.is_own:
                kind = load_trusted(config.net, "model.net", nn.Module)
                self.own = construct(kind, {"modalities": n, "regions": r, **config.arguments}, "model.arguments")
                return
            if config.net == "reference":
                self.encoders = nn.ModuleList([ReferenceEncoder() for _ in range(encoders)])
                self.decoder: ReferenceDecoder | CompactDecoder = ReferenceDecoder(n, r)
            else:
                self.encoders = nn.ModuleList([CompactEncoder(config.channels) for _ in range(encoders)])
                self.decoder = CompactDecoder(n, r, config.channels)
            initialise(self)

    @property
    def stride(self) -> Size:
        """Sides of an input must be multiples of these numbers of voxels."""
        if self.own is not None:
            return cast(Size, tuple(getattr(self.own, "stride", (1, 1, 1))))
        if self.config.net == "reference":
            return reference_unet.STRIDES
        side = 2 ** (len(self.config.channels) - 1)
        return side, side, side

    def check_size(self, size: Sequence[int], what: str = "a crop") -> None:
        """Raise UserError if the network cannot take `size` voxels: no multiples, or one voxel left at the bottleneck,
        which instance normalisation cannot take."""
        if any(side % step for side, step in zip(size, self.stride, strict=True)):
            raise UserError(
                f"{what} of {_by(size)} voxels does not fit the {self.config.net} network, whose sides must be "
                f"multiples of {_by(self.stride)}; take {_by(self.fitting(size))}"
            )
        if self.own is None and all(side == step for side, step in zip(size, self.stride, strict=True)):
            raise UserError(f"{what} of {_by(size)} voxels leaves a single one at the bottleneck; take a larger one")

    def fitting(self, size: Sequence[int]) -> Size:
        """Return the smallest size that holds `size` and whose sides are multiples of `stride`."""
        sides = [-(-side // step) * step for side, step in zip(size, self.stride, strict=True)]
        if self.own is None and sides == list(self.stride):
            sides[-1] *= 2
        return cast(Size, tuple(sides))

    def encode(self, images_B1DHW: Tensor, modality: int) -> list[Tensor]:
        """Return the features (B, C, d, h, w) of one modality's images, shallow to deep; the last is the bottleneck."""
        return self._encoder(modality)(images_B1DHW)

    def forward(self, images_BNDHW: Tensor, available_BN: Tensor) -> Segmentation:
        """Segment a batch, of whose images only the available ones are read.

        Raises UserError for sides that are no multiples of `stride` and for a row without any modality.
        """
        self._check(images_BNDHW, available_BN)
        if self.own is not None:
            images = torch.where(available_BN[:, :, None, None, None], images_BNDHW, images_BNDHW.new_zeros(()))
            return Segmentation(self._own_logits(images, available_BN), [], available_BN)
        with_zero = self.config.fill == "bottleneck" and not bool(available_BN.all())
        features, zeros = self._encode(images_BNDHW, available_BN, with_zero)
        logits = self.decode(features, available_BN, cast(Size, tuple(images_BNDHW.shape[2:])), zeros)
        return Segmentation(logits, features, available_BN)

    def _own_logits(self, images_BNDHW: Tensor, available_BN: Tensor) -> Tensor:
        assert self.own is not None
        logits = self.own(images_BNDHW, available_BN)
        shape = (len(images_BNDHW), len(self.config.regions), *images_BNDHW.shape[2:])
        if not isinstance(logits, Tensor) or tuple(logits.shape) != shape:
            returned = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UserError(f"model.net {self.config.net} must return logits {shape}, not {returned}")
        return logits

    def encode_available(self, images_BNDHW: Tensor, available_BN: Tensor) -> list[Tensor]:
        """Return per level (B, N, C, d, h, w): features where there is an image, zeros elsewhere."""
        return self._encode(images_BNDHW, available_BN, with_zero=False)[0]

    def decode(
        self, features: Sequence[Tensor], available_BN: Tensor, size: Size, zeros: list[Tensor] | None = None
    ) -> Tensor:
        """Return logits (B, R, D, H, W) of features as in `Segmentation`; `size` is (D, H, W).

        `zeros` are the `zero_skips`, where they are at hand; they are computed if needed.
        """
        joins: list[Join] = list(self.decoder.joins)  # type: ignore[arg-type]
        if available_BN.all():
            joined = [join(x) for join, x in zip(joins, features, strict=True)]
            return self.decoder.finish(joined, size)
        joined = [joins[-1](fill_with_mean(features[-1], available_BN))]
        if self.config.fill == "all_levels":
            mixes_BNN = mean_mixes(available_BN)
            skips = [join.by_mixes(x, mixes_BNN) for join, x in zip(joins, features[:-1], strict=False)]
        else:
            zeros = zeros or self.zero_skips(size, ~available_BN.all(dim=0))
            parts = [join.of_alike(x) for join, x in zip(joins, zeros, strict=False)]
            # What is absent is zero and adds nothing; in its place the zero image's part.
            skips = [
                join(x) + torch.tensordot((~available_BN).to(part.dtype), part, dims=1)
                for join, x, part in zip(joins, features, parts, strict=False)
            ]
        return self.decoder.finish([*skips, *joined], size)

    def zero_skips(self, size: Size, wanted_N: Tensor) -> list[Tensor]:
        """Return per skip level (N, C, d, h, w), or (1, C, d, h, w) for a shared encoder, the features of a zero image.

        One image serves the whole batch: instance normalisation looks at no other. Rows of separate encoders that are
        not `wanted_N` are zeros.
        """
        if len(self.encoders) == 1:
            return self._encoder(0).zero_skips(size)
        return _stack([self._encoder(m).zero_skips(size) if w else None for m, w in enumerate(wanted_N.tolist())])

    def _encode(
        self, images_BNDHW: Tensor, available_BN: Tensor, with_zero: bool
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the features, and with `with_zero` what `zero_skips` returns, from the same pass.

        One more image costs less than a pass of its own, which would standardise all weights and add up their gradients
        a second time.
        """
        b, n = available_BN.shape
        flat = images_BNDHW.flatten(0, 1)[:, None]
        if len(self.encoders) == 1:
            rows = [available_BN.flatten().nonzero()[:, 0]]
        else:
            rows = [available_BN[:, m].nonzero()[:, 0] * n + m for m in range(n)]
        found: list[list[Tensor]] = []
        zeros: list[list[Tensor] | None] = []
        for m, row in enumerate(rows):
            zero = with_zero and len(row) < b * n // len(rows)
            if not len(row):
                zeros.append(self._encoder(m).zero_skips(cast(Size, tuple(images_BNDHW.shape[2:]))) if zero else None)
                continue
            maps = self._encoder(m)(flat if len(row) == b * n else flat[row], with_zero=zero)
            zeros.append([x[-1:] for x in maps[:-1]] if zero else None)
            found.append([x[: len(row)] for x in maps])
        index = torch.cat(rows)
        levels = [torch.cat(maps) if len(maps) > 1 else maps[0] for maps in zip(*found, strict=True)]
        if len(rows) > 1 or len(index) < b * n:
            levels = [x.new_zeros(b * n, *x.shape[1:]).index_copy(0, index, x) for x in levels]
        return [x.view(b, n, *x.shape[1:]) for x in levels], _stack(zeros) if with_zero else None

    def save(self, folder: Path) -> None:
        """Write config.json and model.safetensors."""
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_type": MODEL_TYPE, **self.config.to_dict()}
        save_file(
            {k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors", {"format": "pt"}
        )
        write_text(folder / "config.json", json.dumps(config, indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> MultimodalUNet:
        """Return the network that `save` wrote. Raises UserError if the folder holds none or a broken one."""
        try:
            config = json.loads((folder / "config.json").read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{folder} holds no network: config.json cannot be read ({error})") from None
        if not isinstance(config, dict) or config.pop("model_type", None) != MODEL_TYPE:
            raise UserError(f"{folder / 'config.json'} describes no {MODEL_TYPE}; give a folder that Preceptor wrote")
        described = MultimodalUNetConfig.from_dict(config)
        # Nothing is drawn for weights that are replaced anyway. A network of the user's may not support this.
        with contextlib.nullcontext() if described.is_own else torch.device("meta"):
            model = cls(described)
        file = folder / "model.safetensors"
        try:
            state = load_file(file)
            model.load_state_dict(state, assign=True)
        except (OSError, SafetensorError, RuntimeError) as error:
            first = str(error).strip().splitlines()
            raise UserError(
                f"{file} does not hold the weights that config.json describes: {' '.join(first[:2])}"
            ) from None
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    def _encoder(self, modality: int) -> ReferenceEncoder | CompactEncoder:
        return cast(ReferenceEncoder | CompactEncoder, self.encoders[modality if len(self.encoders) > 1 else 0])

    def _check(self, images_BNDHW: Tensor, available_BN: Tensor) -> None:
        b, n = len(images_BNDHW), len(self.config.modalities)
        assert images_BNDHW.dim() == 5, f"images are (B, N, D, H, W), not {tuple(images_BNDHW.shape)}"
        assert images_BNDHW.shape[1] == n, f"{images_BNDHW.shape[1]} channels for {n} modalities"
        assert available_BN.shape == (b, n), f"available is {(b, n)}, not {tuple(available_BN.shape)}"
        assert available_BN.dtype == torch.bool, f"available is bool, not {available_BN.dtype}"
        self.check_size(images_BNDHW.shape[2:])
        lacking = (~available_BN.any(dim=1)).nonzero()[:, 0].tolist()
        if lacking:
            raise UserError(f"row {lacking[0]} of the batch has no modality at all; leave such cases out")


def mean_mixes(available_BN: Tensor) -> Tensor:
    """Return (B, N, N) float: how often W_m x_j is in the join of a sample that is filled in by the mean, at (b, j, m).

    The join is ``sum_m W_m y_m`` with y_m = x_m for m in S and the mean of x over S for m outside, that is
    ``sum_{j in S} (W_j + sum_{m not in S} W_m / |S|) x_j``.
    """
    there = available_BN.float()
    own = torch.diag_embed(there)
    return own + there[:, :, None] * (1 - there)[:, None, :] / there.sum(dim=1)[:, None, None]


def fill_with_mean(features_BNCdhw: Tensor, available_BN: Tensor) -> Tensor:
    """Return the features, the mean of the available ones in place of each absent one. Absent features must be zero."""
    there = available_BN[:, :, None, None, None, None]
    count = there.sum(dim=1, keepdim=True).to(features_BNCdhw.dtype)
    return torch.where(there, features_BNCdhw, features_BNCdhw.sum(dim=1, keepdim=True) / count)


def _stack(each: list[list[Tensor] | None]) -> list[Tensor]:
    """Return per level the maps of all, zeros for None."""
    some = next(maps for maps in each if maps is not None)
    nothing = [torch.zeros_like(x) for x in some]
    return [torch.cat(maps) for maps in zip(*(maps or nothing for maps in each), strict=True)]


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
