"""Logits of one crop for many subsets of its modalities, each modality encoded once.

The features of a modality depend on no other. So every modality is encoded once, and its part of every `Join` (a linear
map of the concatenated features) can be computed once; what a subset's join gives is a weighted sum of such parts,
because filling in by a mean is linear as well. Only what comes after the joins is computed per subset.

Shapes: N modalities, n of them available, S subsets, P parts, Q parts of one modality, R regions, C channels in and O
out of a join, D H W voxels, d h w of a level.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from preceptor.segmentation.layers import Join
from preceptor.segmentation.model import MultimodalUNet, Size, mean_mixes
from preceptor.segmentation.subsets import Subset

_ELEMENTS_AT_ONCE = 2**22
"""As many subsets are decoded together as keep a level's map below this: small maps of one subset alone take torch's
slow convolutions, and large ones of several fall out of the cache."""

_PRODUCTS_PER_PART = 33
"""Multiplications that cost as much on a CPU as reading one number of a part from memory."""


def own_mixes(sources: Sequence[int], subsets: Sequence[Subset], *, there: bool) -> Tensor:
    """Return (S, n, N) as `mean_mixes` does: W_j x_j alone, in the subsets that hold j (`there`) or that do not."""
    rows = [[[float(m == j and s[j] == there) for m in range(len(s))] for j in sources] for s in subsets]
    return torch.tensor(rows)


class JoinedOnce:
    """What one join gives for any of the subsets, from the features of one crop (n, C, d, h, w).

    Two ways to the same sum. Where there are few channels a subset's weights are added up and multiply the features;
    where there are many, every W_m x_j that is needed is computed once, and a subset adds up some of them.
    """

    def __init__(self, join: Join, mixes_SnN: Tensor) -> None:
        n, every = mixes_SnN.shape[1:]
        self.join = join
        used_nN = (mixes_SnN != 0).any(dim=0)
        only_one = bool((used_nN.sum(dim=1) == 1).all())
        units_nQN = (
            torch.eye(every)[used_nN.int().argmax(dim=1)][:, None] if only_one else torch.eye(every).expand(n, -1, -1)
        )
        self.coefficients_SP = torch.einsum("snm,nqm->snq", mixes_SnN, units_nQN).flatten(1).to(join.weight)
        self.units_nQN = units_nQN.to(join.weight)
        few = n * join.inside <= _PRODUCTS_PER_PART * self.coefficients_SP.shape[1]
        self.weights_SOC: Tensor | None = None
        if join.kind == "pointwise" and few:
            self.weights_SOC = join.mixed_weights(mixes_SnN.to(join.weight)).transpose(1, 2).flatten(2)

    def see(self, maps_nCdhw: Tensor) -> JoinedOnce:
        """Take the features of a crop."""
        self.outer = maps_nCdhw.shape[2:]
        if self.weights_SOC is not None:
            self.inner = maps_nCdhw.flatten(0, 1).flatten(1)
        else:
            parts = self.join.mixed(maps_nCdhw, self.units_nQN).flatten(0, 1)
            self.outer, self.inner = parts.shape[2:], parts.flatten(1)
        return self

    def of(self, some: slice) -> Tensor:
        """Return (S', O, d, h, w) of some subsets."""
        if self.weights_SOC is not None:
            return torch.matmul(self.weights_SOC[some], self.inner).unflatten(2, self.outer)
        return (self.coefficients_SP[some] @ self.inner).view(-1, self.join.outside, *self.outer)


class SubsetDecoder:
    """Decodes crops of `size` voxels of volumes with the modalities `available_N`, for each of `subsets`.

    Make a new one when the weights have changed. Use without gradients.
    """

    def __init__(
        self, model: MultimodalUNet, available_N: Sequence[bool], subsets: Sequence[Subset], size: Size
    ) -> None:
        self.model, self.size, self.count = model, size, len(subsets)
        self.sources = [m for m, there in enumerate(available_N) if there]
        joins: list[Join] = list(model.decoder.joins)  # type: ignore[arg-type]
        by_mean = mean_mixes(torch.tensor(subsets))[:, self.sources]
        published = model.config.fill == "bottleneck"
        skips = own_mixes(self.sources, subsets, there=True) if published else by_mean
        self.joined = [JoinedOnce(join, skips) for join in joins[:-1]] + [JoinedOnce(joins[-1], by_mean)]
        self.of_zeros: list[JoinedOnce] = []
        absent = [m for m in range(len(available_N)) if not all(s[m] for s in subsets)]
        if published and absent:
            # The features of the zero image are those of every crop. A shared encoder's are one map for all modalities.
            zeros = model.zero_skips(size, torch.tensor([m in absent for m in range(len(available_N))]))
            shared = model.config.encoder == "shared"
            mixes = ~torch.tensor(subsets)[:, None] if shared else own_mixes(absent, subsets, there=False)
            self.of_zeros = [
                JoinedOnce(join, mixes.float()).see(x if shared else x[absent])
                for join, x in zip(joins, zeros, strict=False)
            ]

    def __call__(self, crop_nDHW: Tensor) -> Iterator[Tensor]:
        """Yield logits (S', R, D, H, W) of the subsets in turn, some at a time."""
        features = self._encode(crop_nDHW)[::-1]
        for joined in self.joined:
            joined.see(features.pop())
        every = slice(0, self.count)
        x = self.model.decoder.start(self.joined[-1].of(every))
        yield from self._decode(len(self.joined) - 2, x, every)

    def _decode(self, level: int, x: Tensor, some: slice) -> Iterator[Tensor]:
        if level < 0:
            yield self.model.decoder.end(x, self.size)
            return
        once = self.joined[level]
        step = max(1, _ELEMENTS_AT_ONCE // (once.join.outside * once.outer.numel()))
        for start in range(some.start, some.stop, step):
            part = slice(start, min(start + step, some.stop))
            joined = once.of(part)
            if self.of_zeros:
                joined += self.of_zeros[level].of(part)
            y = self.model.decoder.step(level, x[part.start - some.start : part.stop - some.start], joined)
            yield from self._decode(level - 1, y, part)

    def _encode(self, crop_nDHW: Tensor) -> list[Tensor]:
        if self.model.config.encoder == "shared":
            return self.model.encode(crop_nDHW[:, None], 0)
        each = [self.model.encode(x[None, None], m) for m, x in zip(self.sources, crop_nDHW, strict=True)]
        return [torch.cat(maps) for maps in zip(*each, strict=True)]
