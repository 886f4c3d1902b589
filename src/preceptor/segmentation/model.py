"""Segmentation network for any subset of modalities. Each is encoded separately; missing ones are filled in by a mean.

LCKD (Wang et al., MICCAI 2023): the features f_i of N modalities are concatenated and decoded. A missing f_i is
replaced by the mean of the available ones. Only available modalities are encoded, so that a missing modality costs
nothing and the content of its channel is never read.

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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from preceptor.errors import UserError, nearest
from preceptor.extension import construct, load_trusted
from preceptor.files import apply_umask, write_text
from preceptor.pipeline.model_files import check_loaded, check_weights, read_settings, reading
from preceptor.segmentation import reference_unet
from preceptor.segmentation.compact_unet import CompactDecoder, CompactEncoder
from preceptor.segmentation.early_fusion import EarlyFusionUNet
from preceptor.segmentation.layers import Join, initialise
from preceptor.segmentation.reference_unet import ReferenceDecoder, ReferenceEncoder

MODEL_TYPE = "preceptor-multimodal-unet"
_COMPACT = (16, 32, 64, 128)
_NETS = ("compact", "reference", "early")
_CHOICES = {"encoder": ("shared", "separate"), "fill": ("all_levels", "bottleneck")}

Size = tuple[int, int, int]


@dataclass(frozen=True)
class MultimodalUNetConfig:
    """Configuration of the network, which can be stored as JSON.

    Attributes:
        modalities: Input channels, in order.
        regions: Output channels, in order.
        net: ``reference`` is the published network (`reference_unet`), ``compact`` a small one (`compact_unet`), and
            ``early`` has the modalities as channels (`early_fusion`); `encoder` and `fill` do not apply to it.
        encoder: One encoder ``shared`` by all modalities (published code), or ``separate`` ones (published figure).
        channels: Channels of the 3 to 5 levels of ``compact`` and ``early``.
        fill: Features of a missing modality. ``all_levels``: the mean of the available features at every level.
            ``bottleneck`` (published code): the mean at the deepest level only; its skips are those of a zero image.
        norm_per_modality: With ``compact`` and a ``shared`` encoder: each modality has its own scales and shifts of the
            encoder's instance normalisations.

    Raises:
        UserError: a value is invalid.
    """

    modalities: tuple[str, ...]
    regions: tuple[str, ...]
    net: str = "compact"
    encoder: Literal["shared", "separate"] = "shared"
    channels: tuple[int, ...] = _COMPACT
    fill: Literal["all_levels", "bottleneck"] = "all_levels"
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    norm_per_modality: bool = False

    def __post_init__(self) -> None:
        for name in ("modalities", "regions"):
            values = getattr(self, name)
            names = all(isinstance(v, str) and v.strip() == v != "" and v.isprintable() for v in values)
            if not values or not names or len(set(values)) != len(values):
                raise UserError(f"{name} of the network must be a non-empty list of distinct names, not {list(values)}")
        if not self.is_own and self.net not in _NETS:
            raise UserError(f"net of the network is {self.net!r}{nearest(self.net, _NETS)}")
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise UserError(f"{name} of the network is {value!r}{nearest(str(value), choices)}")
        valid = all(isinstance(c, int) and not isinstance(c, bool) and 1 <= c <= 4096 for c in self.channels)
        if not (valid and 3 <= len(self.channels) <= 5):
            raise UserError(f"channels of the network must be 3 to 5 numbers from 1 to 4096, not {list(self.channels)}")
        if self.net == "reference" and self.channels != _COMPACT:
            raise UserError(
                f"channels={list(self.channels)} applies to net=compact and net=early only; remove it, or set net"
            )

        if self.norm_per_modality and (self.net, self.encoder) != ("compact", "shared"):
            raise UserError(
                f"norm_per_modality=true needs net=compact with encoder=shared, and the network is net={self.net} with "
                f"encoder={self.encoder}; set norm_per_modality=false"
            )

    @property
    def is_own(self) -> bool:
        """Whether `net` is a class of the user's, ``module:Class``."""
        return ":" in self.net

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the features of each level, from shallow to deep; empty if modalities have none of their own."""
        if self.is_own or self.net == "early":
            return ()
        return self.channels if self.net == "compact" else (*reference_unet.SKIPS, reference_unet.BOTTLENECK)

    def to_dict(self) -> dict[str, Any]:
        """Return the configuration as a dict for JSON."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> MultimodalUNetConfig:
        """Read the dict of `to_dict`. Raises UserError for unknown or missing keys and wrong types."""
        choices = {field.name for field in dataclasses.fields(cls)}
        for name in values:
            if name not in choices:
                raise UserError(
                    f"the configuration of the network has the unknown key {name!r}{nearest(name, choices)}"
                )
        fields: dict[str, Any] = dict(values)
        for name in ("modalities", "regions", "channels"):
            if name in fields:
                if not isinstance(fields[name], (list, tuple)):
                    raise UserError(f"{name} of the network must be a list, not {fields[name]!r}")
                fields[name] = tuple(fields[name])
        for name in ("modalities", "regions"):
            if name not in fields:
                raise UserError(f"the configuration of the network lacks {name!r}")
        return cls(**fields)


@dataclass
class Segmentation:
    """Output of the network for a batch.

    Attributes:
        logits: Logits (B, R, D, H, W).
        features: Features (B, N, C, d, h, w) from shallow to deep, before missing modalities are filled in; zero for
            missing ones. The last element is the bottleneck, which LCKD distils.
        available: Available modalities (B, N) bool.
    """

    logits: Tensor
    features: list[Tensor]
    available: Tensor


class MultimodalUNet(nn.Module):
    """Network that segments any subset of modalities.

    With `seed` the initial weights depend only on it, otherwise on the global state of torch.

    `net` of the configuration may name a class of the user, ``module:Class``. It is called as
    ``Class(modalities=N, regions=R, **arguments)`` and is an nn.Module. Its ``forward(images, available)`` takes images
    (B, N, D, H, W), zero for missing modalities, and available (B, N) bool, and returns logits (B, R, D, H, W). The
    sides of an input must be multiples of its attribute `stride` (three numbers, default (1, 1, 1)). Every subset of
    modalities needs a separate forward pass, and methods that compare features do not apply.
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
            if config.net == "early":
                self.own = EarlyFusionUNet(n, r, config.channels)
                initialise(self)
                return
            if config.net == "reference":
                self.encoders = nn.ModuleList([ReferenceEncoder() for _ in range(encoders)])
                self.decoder: ReferenceDecoder | CompactDecoder = ReferenceDecoder(n, r)
            else:
                norms_for = n if config.norm_per_modality else 0
                self.encoders = nn.ModuleList(
                    [CompactEncoder(config.channels, norms_for=norms_for) for _ in range(encoders)]
                )
                self.decoder = CompactDecoder(n, r, config.channels)
            initialise(self)

    @property
    def stride(self) -> Size:
        """The sides of an input must be multiples of these numbers of voxels."""
        if self.config.is_own:
            return cast(Size, tuple(getattr(self.own, "stride", (1, 1, 1))))
        if self.config.net == "reference":
            return reference_unet.STRIDES
        side = 2 ** (len(self.config.channels) - 1)
        return side, side, side

    def check_size(self, size: Sequence[int], what: str = "a crop") -> None:
        """Raise UserError if the network cannot process `size` voxels.

        The sides must be multiples of `stride`, and the bottleneck must have more than one voxel, because instance
        normalisation of a single voxel is undefined.
        """
        if any(side % step for side, step in zip(size, self.stride, strict=True)):
            raise UserError(
                f"{what} of {_format_size(size)} voxels does not fit the {self.config.net} network, whose sides must "
                f"be multiples of {_format_size(self.stride)}; use {_format_size(self.fitting(size))}"
            )
        if not self.config.is_own and all(side == step for side, step in zip(size, self.stride, strict=True)):
            raise UserError(
                f"{what} of {_format_size(size)} voxels leaves a single voxel at the bottleneck; use a larger one"
            )

    def fitting(self, size: Sequence[int]) -> Size:
        """Return the smallest valid size that contains `size`."""
        sides = [-(-side // step) * step for side, step in zip(size, self.stride, strict=True)]
        if not self.config.is_own and sides == list(self.stride):
            sides[-1] *= 2
        return cast(Size, tuple(sides))

    def encode(self, images_B1DHW: Tensor, modality: int) -> list[Tensor]:
        """Return the features (B, C, d, h, w) of images of a modality, shallow to deep. The last is the bottleneck."""
        return self.encode_shared(images_B1DHW, [modality] * len(images_B1DHW), modality)

    def encode_shared(self, images_M1DHW: Tensor, modalities_M: Sequence[int], encoder: int = 0) -> list[Tensor]:
        """Return the features (M, C, d, h, w) of images of several modalities, all by the encoder of one of them."""
        if not self.config.norm_per_modality:
            return self._encoder(encoder)(images_M1DHW)
        return self._encoder(encoder)(images_M1DHW, modality_M=torch.tensor(modalities_M, device=images_M1DHW.device))

    def forward(self, images_BNDHW: Tensor, available_BN: Tensor) -> Segmentation:
        """Segment a batch. Only available modalities are read.

        Raises:
            UserError: the sides are not multiples of `stride`, or a sample has no modality.
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
        """Return the features (B, N, C, d, h, w) of every level, with zeros for missing modalities."""
        return self._encode(images_BNDHW, available_BN, with_zero=False)[0]

    def decode(
        self, features: Sequence[Tensor], available_BN: Tensor, size: Size, zeros: list[Tensor] | None = None
    ) -> Tensor:
        """Return the logits (B, R, D, H, W) of features as in `Segmentation`.

        `size` is (D, H, W). `zeros` is the result of `zero_skips`; by default it is computed if needed.
        """
        joins: list[Join] = list(self.decoder.joins)  # type: ignore[arg-type]
        if available_BN.all():
            joined = [join(x) for join, x in zip(joins, features, strict=True)]
            return self.decoder.finish(joined, size)
        return self.decode_incomplete(features, available_BN, size, zeros)

    def decode_incomplete(
        self, features: Sequence[Tensor], available_BN: Tensor, size: Size, zeros: list[Tensor] | None = None
    ) -> Tensor:
        """Return the same as `decode`, by the steps that only missing modalities need."""
        joins: list[Join] = list(self.decoder.joins)  # type: ignore[arg-type]
        joined = [joins[-1](fill_with_mean(features[-1], available_BN))]
        if self.config.fill == "all_levels":
            mixes_BNN = mean_mixes(available_BN)
            skips = [join.by_mixes(x, mixes_BNN) for join, x in zip(joins, features[:-1], strict=False)]
        else:
            zeros = zeros or self.zero_skips(size, ~available_BN.all(dim=0))
            parts = [join.of_alike(x) for join, x in zip(joins, zeros, strict=False)]
            # Missing features are zero and add nothing. Add the part of the zero image instead.
            skips = [
                join(x) + torch.tensordot((~available_BN).to(part.dtype), part, dims=1)
                for join, x, part in zip(joins, features, parts, strict=False)
            ]
        return self.decoder.finish([*skips, *joined], size)

    def zero_skips(self, size: Size, needed_N: Tensor) -> list[Tensor]:
        """Return the skips of a zero image, (N, C, d, h, w) or, if modalities share all weights, (1, C, d, h, w).

        One image is enough for the batch, because instance normalisation treats images separately. Rows of separate
        encoders that are not `needed_N` are zeros.
        """
        if len(self.encoders) == 1:
            return self._encoder(0).zero_skips(size)
        return _stack([self._encoder(m).zero_skips(size) if w else None for m, w in enumerate(needed_N.tolist())])

    def _encode(
        self, images_BNDHW: Tensor, available_BN: Tensor, with_zero: bool
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """Return the features and, if `with_zero` is set, the result of `zero_skips` from the same pass.

        An additional image is cheaper than a separate pass, which would standardise all weights again and accumulate
        their gradients a second time.
        """
        b, n = available_BN.shape
        own_norms = self.config.norm_per_modality
        with_zero = with_zero and not own_norms  # otherwise there is a zero image per modality: `decode` computes them
        flat = images_BNDHW.flatten(0, 1)[:, None]
        if len(self.encoders) == 1:
            rows = [available_BN.flatten().nonzero()[:, 0]]
        else:
            rows = [available_BN[:, m].nonzero()[:, 0] * n + m for m in range(n)]
        encoded: list[list[Tensor]] = []
        zeros: list[list[Tensor] | None] = []
        for m, row in enumerate(rows):
            zero = with_zero and len(row) < b * n // len(rows)
            if not len(row):
                zeros.append(self._encoder(m).zero_skips(cast(Size, tuple(images_BNDHW.shape[2:]))) if zero else None)
                continue
            images = flat if len(row) == b * n else flat[row]
            of = {"modality_M": row % n} if own_norms else {}
            maps = self._encoder(m)(images, with_zero=zero, **of)
            zeros.append([x[-1:] for x in maps[:-1]] if zero else None)
            encoded.append([x[: len(row)] for x in maps])
        index = torch.cat(rows)
        levels = [torch.cat(maps) if len(maps) > 1 else maps[0] for maps in zip(*encoded, strict=True)]
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
        apply_umask(folder)

    @classmethod
    def load(cls, folder: Path) -> MultimodalUNet:
        """Load the network that `save` wrote. Raises UserError if the folder contains no valid network."""
        config = read_settings(folder / "config.json")
        if config.pop("model_type", None) != MODEL_TYPE:
            raise UserError(
                f"{folder / 'config.json'} does not describe a {MODEL_TYPE}; give a model folder of Preceptor"
            )
        with reading(folder / "config.json", "the network"):
            settings = MultimodalUNetConfig.from_dict(config)
            # The meta device avoids initialising weights that are replaced. A network of the user may not support it.
            with contextlib.nullcontext() if settings.is_own else torch.device("meta"):
                model = cls(settings)
        file = folder / "model.safetensors"
        with reading(file, "the weights"):
            state, own = load_file(file), model.state_dict()
            other = {name for name in state.keys() & own.keys() if state[name].shape != own[name].shape}
            names = {
                "missing_keys": own.keys() - state,
                "unexpected_keys": state.keys() - own,
                "mismatched_keys": other,
            }
            check_loaded(file, names)
            model.load_state_dict({name: value.to(own[name].dtype) for name, value in state.items()}, assign=True)
            check_weights(folder, model)
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
            raise UserError(f"row {lacking[0]} of the batch has no modality; remove such cases")


def mean_mixes(available_BN: Tensor) -> Tensor:
    """Return the coefficients (B, N, N) of W_m x_j at (b, j, m) in the join of a sample filled in by the mean.

    The join is ``sum_m W_m y_m``, where y_m = x_m for m in S and the mean of x over S for other m, that is
    ``sum_{j in S} (W_j + sum_{m not in S} W_m / |S|) x_j``.
    """
    present = available_BN.float()
    diagonal = torch.diag_embed(present)
    return diagonal + present[:, :, None] * (1 - present)[:, None, :] / present.sum(dim=1)[:, None, None]


def fill_with_mean(features_BNCdhw: Tensor, available_BN: Tensor) -> Tensor:
    """Replace missing features by the mean of the available ones. Missing features must be zero."""
    available = available_BN[:, :, None, None, None, None]
    count = available.sum(dim=1, keepdim=True).to(features_BNCdhw.dtype)
    return torch.where(available, features_BNCdhw, features_BNCdhw.sum(dim=1, keepdim=True) / count)


def _stack(maps_of_encoders: list[list[Tensor] | None]) -> list[Tensor]:
    """Concatenate the maps of all encoders per level, with zeros for None."""
    example = next(maps for maps in maps_of_encoders if maps is not None)
    zeros = [torch.zeros_like(x) for x in example]
    return [torch.cat(maps) for maps in zip(*(maps or zeros for maps in maps_of_encoders), strict=True)]


def _format_size(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
