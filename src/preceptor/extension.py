"""Classes from the user's own files, named ``module:Name`` in a recipe or given as objects in Python.

The module is looked for like any import, then in the current directory, then in the folder of the recipe. A recipe that
names a module runs its code, as a script would. A model folder that names one needs the caller's consent
(`trust_remote_code=True`), unless a recipe of this process named it before; its code is never read from the folder.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, ValidationInfo

from preceptor.errors import UserError, nearest

T = TypeVar("T")

_trusted: set[str] = set()


def reference_to(value: Any) -> str:
    """Return ``module:Name`` of a class or function."""
    return f"{value.__module__}:{value.__qualname__}"


def load_object(reference: str, place: str, kind: type[T], folder: Path | None = None) -> type[T]:
    """Import the class ``module:Name`` that `place` names and return it.

    Raises UserError if the module is not found or cannot be imported, if it has no such name, or if the object is not a
    subclass of `kind`.
    """
    found = _import(reference, place, folder)
    if not (isinstance(found, type) and issubclass(found, kind)):
        raise UserError(f"{place}: {reference} is not a subclass of {kind.__module__}.{kind.__qualname__}")
    return found


def load_function(reference: str, place: str, folder: Path | None = None) -> Callable[..., Any]:
    """Import the function ``module:function`` that `place` names and return it. Raises UserError as `load_object`."""
    found = _import(reference, place, folder)
    if not callable(found):
        raise UserError(f"{place}: {reference} is not a function")
    return found


def _import(reference: str, place: str, folder: Path | None) -> Any:
    find_module(reference, place, folder)
    module_name, _, name = reference.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(f"{place}: importing {module_name} failed: {type(error).__name__}: {error}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            public = [key for key in vars(found) if not key.startswith("_")]
            raise UserError(f"{place}: module {module_name} has no {name!r}{nearest(name, public)}")
        found = getattr(found, part)
    return found


def find_module(reference: str, place: str, folder: Path | None = None) -> None:
    """Raise UserError unless ``module:Name`` is well formed and its module can be found. Nothing is imported.

    The folder in which the module is found, the current directory or `folder`, is added to the end of `sys.path`.
    """
    prefix = f"{place}: " if place else ""
    module, colon, name = reference.partition(":")
    if not (colon and name and all(part.isidentifier() for part in (*module.split("."), *name.split(".")))):
        raise UserError(f"{prefix}{reference!r} must look like module:Name")
    for path in (None, Path.cwd(), folder):
        if path is not None:
            if str(path) in sys.path or not any(
                (path / f"{module.split('.')[0]}{end}").exists() for end in ("", ".py")
            ):
                continue
            sys.path.append(str(path))
            importlib.invalidate_caches()
        try:
            if module in sys.modules or importlib.util.find_spec(module) is not None:
                return
        except (ImportError, ValueError):
            continue
    places = f"in the current directory or in {folder}" if folder else "or in the current directory"
    raise UserError(f"{prefix}there is no module {module!r} on the Python path, {places}")


def construct(kind: type[T], arguments: Mapping[str, Any], place: str) -> T:
    """Return ``kind(**arguments)``. Raises UserError if the class does not accept the arguments."""
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(f"{place}: {kind.__name__} does not accept {dict(arguments)}: {error}") from error


def load_trusted(reference: str, place: str, kind: type[T]) -> type[T]:
    """Return the class that the configuration of a model names.

    Raises UserError unless a recipe of this process names the class, or the caller trusts it (`trust`).
    """
    if reference not in _trusted:
        raise _not_trusted(reference, place)
    return load_object(reference, place, kind)


def trust(reference: str) -> None:
    """Allow models to use the class ``module:Name``."""
    _trusted.add(reference)


def require_trust(folder: Path, trust_remote_code: bool) -> None:
    """Raise UserError if the config.json of a model folder names a class of the user's that is not trusted.

    With `trust_remote_code`, trust it instead. The code itself is never read from the folder.
    """
    path = folder / "config.json"
    for reference in class_references(json.loads(path.read_text("utf-8"))):
        if trust_remote_code:
            trust(reference)
        elif reference not in _trusted:
            raise _not_trusted(reference, str(path))


def class_references(config: Any) -> Iterator[str]:
    """Yield the names ``module:Class`` of the user's classes in the config.json of a model."""
    for key, value in config.items() if isinstance(config, dict) else ():
        if key in ("module", "net") and isinstance(value, str) and ":" in value:
            yield value
        yield from class_references(value)


def _not_trusted(reference: str, place: str) -> UserError:
    return UserError(
        f"the model needs the class {reference} ({place}), whose code would be run: pass --trust-remote-code, or "
        "trust_remote_code=True in Python, if you know this code"
    )


def _as_text(value: Any) -> Any:
    return reference_to(value) if isinstance(value, type) else value


def _check(value: str, info: ValidationInfo) -> str:
    find_module(value, "", (info.context or {}).get("folder"))
    _trusted.add(value)
    return value


Reference = Annotated[str, BeforeValidator(_as_text), AfterValidator(_check)]
"""A key of a recipe that names a class of the user's: ``module:Name``, or in Python the class itself."""
