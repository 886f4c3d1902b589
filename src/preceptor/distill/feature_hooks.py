"""Outputs of inner modules by module path, without changing the network."""

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
    """Return a module's path without the names that DDP, FSDP and `torch.compile` insert."""
    return OUTER.sub("", INNER.sub("", path).lstrip("."))


def _natural(path: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in path.split(".")]


class FeatureHooks:
    """Forward hooks that capture the outputs of the modules whose path matches a pattern (`fnmatch`, as ``embed_*``).

    For a module that returns a tuple, list or dictionary its first tensor is captured. The tensors are not copied:
    gradients flow through them, and several loss terms may use one.

        hooks = FeatureHooks(model, ["fusion.3", "embed_*"])
        with hooks.capture() as features:
            model(x)
            loss = distance(features["fusion.3"])

    Raises UserError at construction, with near names, for a pattern that no module matches.
    """

    def __init__(self, module: nn.Module, patterns: Sequence[str]) -> None:
        # ModuleList and ModuleDict have no forward, so they have no output.
        modules = {
            plain_path(path): child
            for path, child in module.named_modules()
            if plain_path(path) and not isinstance(child, (nn.ModuleList, nn.ModuleDict))
        }
        chosen: set[str] = set()
        for pattern in patterns:
            matched = {path for path in modules if fnmatchcase(path, pattern)}
            if not matched:
                near = _near(pattern, modules)
                raise UserError(f"no module of {type(module).__name__} matches the feature path {pattern!r}{near}")
            chosen |= matched
        self.names = sorted(chosen, key=_natural)
        self._features: dict[str, Tensor] = {}
        self._open = False
        self._handles: list[RemovableHandle] = [
            modules[name].register_forward_hook(self._hook(name, modules[name])) for name in self.names
        ]

    def _hook(self, name: str, hooked: nn.Module):
        def keep(module: nn.Module, inputs: Any, output: Any) -> None:
            # A deep copy of the network, such as an EMA teacher, carries these hooks too.
            if not self._open or module is not hooked:
                return
            if name in self._features:
                raise RuntimeError(f"module {name!r} ran twice in one forward pass, so its output is ambiguous")
            self._features[name] = _first_tensor(output, name)

        return keep

    @contextlib.contextmanager
    def capture(self) -> Iterator[dict[str, Tensor]]:
        """Yield a dictionary that the forward passes inside the block fill."""
        self._features, self._open = {}, True
        try:
            yield self._features
        finally:
            self._features, self._open = {}, False

    def close(self) -> None:
        """Remove the hooks from the network."""
        for handle in self._handles:
            handle.remove()


def _first_tensor(output: Any, name: str) -> Tensor:
    if isinstance(output, Tensor):
        return output
    parts = output.values() if isinstance(output, dict) else output
    for part in parts:
        if isinstance(part, Tensor):
            return part
    raise RuntimeError(f"module {name!r} returned no tensor")


def _near(pattern: str, modules: dict[str, nn.Module]) -> str:
    if len(modules) <= 12:
        return nearest(pattern, modules)
    stem = pattern.split(".")[0].rstrip("*")
    near = sorted((path for path in modules if path.startswith(stem)), key=_natural)[:8] if stem else []
    return f"; near: {', '.join(near)}" if near else nearest(pattern, (path for path in modules if path.count(".") < 2))
