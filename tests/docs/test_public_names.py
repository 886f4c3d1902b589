"""The names that `import preceptor` provides."""

from __future__ import annotations

import importlib

import preceptor


def test_importing_a_subpackage_does_not_replace_a_public_function() -> None:
    for name in ("preceptor.comparison.run", "preceptor.auditing.run"):
        importlib.import_module(name)
    assert all(callable(getattr(preceptor, name)) for name in preceptor.__all__)
