"""Make transformers' Auto classes load the model folders of Preceptor, without importing transformers here.

Importing transformers takes seconds, so `import preceptor` must not do it. The models are registered as soon as anybody
imports transformers' Auto classes, before or after `import preceptor`.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

AUTO = "transformers.models.auto.modeling_auto"


def register_when_imported() -> None:
    """Register the models as soon as transformers' Auto classes are imported, or now if they already are."""
    if AUTO in sys.modules:
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _register() -> None:
    # The modules register their classes. Other grounding models than that with DINOv2 are those of transformers.
    import preceptor.grounding.dinov2_tower
    import preceptor.segmentation.auto_model
    import preceptor.vqa.model  # noqa: F401


class _Finder(MetaPathFinder):
    """Finds the module of the Auto classes, with a loader that registers the models after it.

    It stays until the registration has succeeded. Transformers first imports the Auto classes while a configuration
    such as that of Qwen2-VL is only half imported, so that it cannot be registered yet; transformers ignores that
    error and imports the Auto classes again when they are used.
    """

    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != AUTO:
            return None
        sys.meta_path.remove(self)
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            sys.meta_path.insert(0, self)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec


class _Loader(Loader):
    def __init__(self, loader: Any, finder: _Finder) -> None:
        self.loader = loader
        self.finder = finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _register()
        sys.meta_path.remove(self.finder)
