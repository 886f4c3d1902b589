"""Preceptor trains small medical multimodal models with the help of strong ones.

The public functions and classes are those of `__all__`. Importing the package is fast: torch and transformers are
imported by the function that needs them.
"""

import sys
from importlib.metadata import version
from types import ModuleType
from typing import Any

from preceptor._transformers import register_when_imported
from preceptor.api import Run, audit, cache, check, compare, evaluate, load, predict, push_to_hub, score, train
from preceptor.errors import UserError

__version__ = version("preceptor")
__all__ = [
    "Run",
    "UserError",
    "audit",
    "cache",
    "check",
    "compare",
    "evaluate",
    "load",
    "predict",
    "push_to_hub",
    "score",
    "train",
]


class _Package(ModuleType):
    """Keep the public functions when a subpackage of the same name, such as `preceptor.compare`, is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in __all__ and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
register_when_imported()
