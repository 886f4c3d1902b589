"""Features by module path: what a network computes inside, without changing the network."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from preceptor.errors import UserError, nearest

INNER = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.|$)")
OUTER = re.compile(r"^(module(\.|$))+")  # DDP's; deeper down `module` is a name that a network may use itself


def plain_path(path: str) -> str:
    """Return a module's path without the names that DDP, FSDP and `torch.compile` put in."""
    return OUTER.sub("", INNER.sub("", path).lstrip("."))


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


class FeatureHooks:
    """Keeps the outputs of the modules whose path matches a pattern (`fnmatch`: ``fusion.*``, ``embed_*``).

    A module that returns a tuple or list is represented by its first tensor. The tensors are the network's own:
    gradients flow through them, and several terms may use one.

        taps = FeatureHooks(model, ["fusion.3", "embed_*"])
        with taps.capture() as features:
            model(x)
            loss = distance(features["fusion.3"])

    Raises UserError at construction, with near names, for a pattern that no module matches.
    """

    def __init__(self, module: nn.Module, patterns: Sequence[str]) -> None:
        # ModuleList and ModuleDict never run, so they have no output to tap.
        modules = {
            plain_path(path): child
            for path, child in module.named_modules()
            if plain_path(path) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        }
        chosen: set[str] = set()
        for pattern in patterns:
            matched = {path for path in modules if fnmatchcase(path, pattern)}
            if not matched:
                raise UserError(
                    f"no module of {type(module).__name__} matches the tap {pattern!r}{_near(pattern, modules)}"
                )
            chosen |= matched
        self.names = sorted(chosen, key=_natural)
        self._features: dict[str, Tensor] = {}
        self._open = False
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._hook(name, modules[name])) for name in self.names
        ]

    def _hook(self, name: str, tapped: nn.Module):
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            # A deep copy of the network (an EMA teacher) carries these hooks too, and is another network.
            if not self._open or module is not tapped:
                return
            if name in self._features:
                raise RuntimeError(
                    f"module {name!r} ran twice in one forward pass; a tap cannot tell the outputs apart"
                )
            self._features[name] = _first_tensor(output, name)

        return keep

    @contextlib.contextmanager
    def capture(self) -> Iterator[dict[str, Tensor]]:
        """Give a dict that fills while the network runs; outside this block nothing is kept."""
        self._features, self._open = {}, True
        try:
            yield self._features
        finally:
            self._features, self._open = {}, False

    def close(self) -> None:
        """Take the hooks out of the network."""
        for handle in self._handles:
            handle.remove()


def _first_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise RuntimeError(f"module {name!r} returned no tensor to tap")


def _near(pattern: str, modules: dict[str, nn.Module]) -> str:
    if len(modules) <= 12:
        return nearest(pattern, modules)
    stem = pattern.split(".")[0].rstrip("*")
    near = sorted((path for path in modules if path.startswith(stem)), key=_natural)[:8] if stem else []
    return f"; near: {', '.join(near)}" if near else nearest(pattern, (path for path in modules if path.count(".") < 2))
