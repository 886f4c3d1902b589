"""Initial weights of a network from one that was trained before."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from preceptor.data.segmentation.modalities import spelled_as
from preceptor.errors import UserError
from preceptor.segmentation.model import MultimodalUNet, MultimodalUNetConfig


def load_network(folder: Path, modalities: Sequence[str]) -> MultimodalUNet:
    """Load a network for data with these modalities, whose spelling replaces its own: t1ce for t1c, for example.

    Raises UserError as `MultimodalUNet.load`.
    """
    network = MultimodalUNet.load(folder)
    names = tuple(spelled_as(modalities, network.config.modalities))
    network.config = dataclasses.replace(network.config, modalities=names)
    return network


def require_same_network(own: MultimodalUNetConfig, earlier: MultimodalUNetConfig, what: str) -> None:
    """Raise UserError if two networks differ in more than their regions. `what` names the earlier one's setting."""
    mine, its = own.to_dict(), earlier.to_dict()
    different = [name for name in mine if name != "regions" and mine[name] != its[name]]
    if different:
        name = different[0]
        raise UserError(
            f"{what} has another network, with {name}={its[name]}, and the recipe has {name}={mine[name]}; change the "
            "recipe, or start without these weights"
        )


def copy_weights(network: MultimodalUNet, earlier: MultimodalUNet, what: str) -> list[str]:
    """Copy the weights of an earlier network, and return the regions whose outputs it has.

    The regions may differ: the outputs of the regions of both are copied by name, and the others keep their weights.

    Raises:
        UserError: they are different networks (see `require_same_network`).
    """
    require_same_network(network.config, earlier.config, what)
    known = {region: row for row, region in enumerate(earlier.config.regions)}
    pairs = [(row, known[region]) for row, region in enumerate(network.config.regions) if region in known]
    rows, rows_of_earlier = ([pair[side] for pair in pairs] for side in (0, 1))
    state, weights = network.state_dict(), earlier.state_dict()
    for name in _by_region(network.config):
        kept: Tensor = state[name].clone()
        kept[rows] = weights[name][rows_of_earlier]
        weights[name] = kept
    network.load_state_dict(weights)
    return [network.config.regions[row] for row in rows]


def copied_parameters(network: MultimodalUNet, earlier: MultimodalUNet) -> frozenset[str]:
    """Return the names of the parameters of which `copy_weights` copies every value.

    A layer with outputs for a region that the earlier network does not have is partly new, and not among them.
    """
    is_whole = set(network.config.regions) <= set(earlier.config.regions)
    partly_new = [] if is_whole else _by_region(network.config)
    return frozenset(name for name, _ in network.named_parameters() if name not in partly_new)


def _by_region(config: MultimodalUNetConfig) -> list[str]:
    """Return the names of the tensors with a row per region: those that grow with one region more."""
    more = dataclasses.replace(config, regions=(*config.regions, "".join(config.regions) + "+"))
    one, other = (MultimodalUNet(c, seed=0).state_dict() for c in (config, more))
    return [name for name in one if one[name].shape != other[name].shape]
