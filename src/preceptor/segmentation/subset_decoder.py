"""Compute the logits of a crop for many subsets of its modalities, with one encoder pass per modality.

The features of a modality do not depend on the other modalities, so that each is encoded once. A `Join` is a linear map
of the concatenated features, and filling in a mean is linear too. The output of a join for a subset is therefore a
weighted sum of parts that are computed once. Only the layers after the joins are computed per subset.

Shapes: N modalities, n of them available, S subsets, P parts, Q parts of one modality, R regions, C input and O output
channels of a join, D H W voxels, d h w of a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from preceptor.segmentation.layers import Join
from preceptor.segmentation.model import MultimodalUNet, Size, mean_mixes
from preceptor.segmentation.subsets import SubsetFlags

_ELEMENTS_AT_ONCE = 2**22
"""Limit for the elements of a map of subsets that are decoded together. Small maps are faster together; large maps of
several subsets do not fit into the cache."""

_PRODUCTS_PER_PART = 33
"""Number of multiplications that take as long on a CPU as reading one number of a part from memory."""


def single_mixes(sources: Sequence[int], subsets: Sequence[SubsetFlags], *, there: bool) -> Tensor:
    """Return coefficients (S, n, N) like `mean_mixes`: only W_j x_j, for subsets with j (`there`) or without j."""
    rows = [[[float(m == j and s[j] == there) for m in range(len(s))] for j in sources] for s in subsets]
    return torch.tensor(rows)


class JoinedOnce:
    """Computes the output of one join for any subset from the features (n, C, d, h, w) of one crop.

    There are two ways to compute the same sum. With few channels, the weights of a subset are summed and multiplied by
    the features. With many channels, every W_m x_j that is needed is computed once, and a subset sums some of them.
    """

    def __init__(self, join: Join, mixes_SnN: Tensor) -> None:
        n, modalities = mixes_SnN.shape[1:]
        self.join = join
        used_nN = (mixes_SnN != 0).any(dim=0)
        only_one = bool((used_nN.sum(dim=1) == 1).all())
        units_nQN = (
            torch.eye(modalities)[used_nN.int().argmax(dim=1)][:, None]
            if only_one
            else torch.eye(modalities).expand(n, -1, -1)
        )
        self.coefficients_SP = torch.einsum("snm,nqm->snq", mixes_SnN, units_nQN).flatten(1).to(join.weight)
        self.units_nQN = units_nQN.to(join.weight)
        few = n * join.inside <= _PRODUCTS_PER_PART * self.coefficients_SP.shape[1]
        self.weights_SOC: Tensor | None = None
        if join.kind == "pointwise" and few:
            self.weights_SOC = join.mixed_weights(mixes_SnN.to(join.weight)).transpose(1, 2).flatten(2)

    def see(self, maps_nCdhw: Tensor) -> JoinedOnce:
        """Set the features of the crop."""
        self.outer = maps_nCdhw.shape[2:]
        if self.weights_SOC is not None:
            self.inner = maps_nCdhw.flatten(0, 1).flatten(1)
        else:
            parts = self.join.mixed(maps_nCdhw, self.units_nQN).flatten(0, 1)
            self.outer, self.inner = parts.shape[2:], parts.flatten(1)
        return self

    def of(self, subsets: slice) -> Tensor:
        """Return the outputs (S', O, d, h, w) of some subsets."""
        if self.weights_SOC is not None:
            return torch.matmul(self.weights_SOC[subsets], self.inner).unflatten(2, self.outer)
        return (self.coefficients_SP[subsets] @ self.inner).view(-1, self.join.outside, *self.outer)


class SubsetDecoder:
    """Decodes crops of `size` voxels with the modalities `available_N`, for each of `subsets`.

    It has to be created again if the weights change. Use it without gradients.
    """

    def __init__(
        self, model: MultimodalUNet, available_N: Sequence[bool], subsets: Sequence[SubsetFlags], size: Size
    ) -> None:
        self.model, self.size, self.count = model, size, len(subsets)
        self.sources = [m for m, there in enumerate(available_N) if there]
        joins: list[Join] = list(model.decoder.joins)  # type: ignore[arg-type]
        by_mean = mean_mixes(torch.tensor(subsets))[:, self.sources]
        published = model.config.fill == "bottleneck"
        skips = single_mixes(self.sources, subsets, there=True) if published else by_mean
        self.joined = [JoinedOnce(join, skips) for join in joins[:-1]] + [JoinedOnce(joins[-1], by_mean)]
        self.of_zeros: list[JoinedOnce] = []
        absent = [m for m in range(len(available_N)) if not all(s[m] for s in subsets)]
        if published and absent:
            # The features of the zero image are the same for every crop, and with a shared encoder for all modalities.
            zeros = model.zero_skips(size, torch.tensor([m in absent for m in range(len(available_N))]))
            shared = model.config.encoder == "shared" and not model.config.norm_per_modality
            mixes = ~torch.tensor(subsets)[:, None] if shared else single_mixes(absent, subsets, there=False)
            self.of_zeros = [
                JoinedOnce(join, mixes.float()).see(x if shared else x[absent])
                for join, x in zip(joins, zeros, strict=False)
            ]

    def __call__(self, crop_nDHW: Tensor) -> Iterator[Tensor]:
        """Yield the logits (S', R, D, H, W) of the subsets in order, several at a time."""
        features = self._encode(crop_nDHW)[::-1]
        for joined in self.joined:
            joined.see(features.pop())
        all_subsets = slice(0, self.count)
        x = self.model.decoder.start(self.joined[-1].of(all_subsets))
        yield from self._decode(len(self.joined) - 2, x, all_subsets)

    def _decode(self, level: int, x: Tensor, subsets: slice) -> Iterator[Tensor]:
        if level < 0:
            yield self.model.decoder.end(x, self.size)
            return
        source = self.joined[level]
        step = max(1, _ELEMENTS_AT_ONCE // (source.join.outside * source.outer.numel()))
        for start in range(subsets.start, subsets.stop, step):
            part = slice(start, min(start + step, subsets.stop))
            joined = source.of(part)
            if self.of_zeros:
                joined += self.of_zeros[level].of(part)
            y = self.model.decoder.step(level, x[part.start - subsets.start : part.stop - subsets.start], joined)
            yield from self._decode(level - 1, y, part)

    def _encode(self, crop_nDHW: Tensor) -> list[Tensor]:
        if self.model.config.encoder == "shared":
            return self.model.encode_shared(crop_nDHW[:, None], self.sources)
        each = [self.model.encode(x[None, None], m) for m, x in zip(self.sources, crop_nDHW, strict=True)]
        return [torch.cat(maps) for maps in zip(*each, strict=True)]
