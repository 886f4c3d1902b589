"""Preceptor trains small medical multimodal models with the help of strong ones.

The public functions and classes are those of `__all__`. Importing the package is fast: torch and transformers are
imported by the function that needs them.
"""

from importlib.metadata import version

from preceptor._transformers import register_when_imported
from preceptor.api import (
    Run,
    audit,
    cache,
    check,
    compare,
    evaluate,
    export,
    load,
    predict,
    push_to_hub,
    score,
    serve,
    train,
)
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
    "export",
    "load",
    "predict",
    "push_to_hub",
    "score",
    "serve",
    "train",
]

register_when_imported()
