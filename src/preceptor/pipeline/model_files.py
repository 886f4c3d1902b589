"""Read the files of a model folder: whatever is wrong with them is reported in one sentence, before they are used."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from preceptor.errors import UserError
from preceptor.pipeline.run_dir import read_object

if TYPE_CHECKING:
    from torch import Tensor, nn

COPY_AGAIN = "copy the folder of the model again from its source"
_MOST_LISTED = 5
_LONGEST_REASON = 300

# Tied weights are stored once and built twice. A layer has about one module for each tensor.
_MOST_NUMBERS_PER_STORED, _MOST_MODULES_PER_TENSOR = 2, 10
_SPARE_NUMBERS, _SPARE_MODULES = 10**7, 10**3


@contextlib.contextmanager
def reading(place: str | Path, part: str = "the model") -> Iterator[None]:
    """Turn errors of damaged or missing files into a UserError that names the place and the part.

    The constructors of transformers, tokenizers, safetensors and torch raise errors of every kind for a damaged
    configuration, so that no list of them would be complete. The error itself is kept as the cause.
    """
    try:
        yield
    except UserError as error:
        if str(place) in str(error):
            raise
        raise UserError(f"{place}: {error}") from error
    except MemoryError:
        raise
    except Exception as error:
        raise UserError(f"{place}: {part} cannot be read ({_reason(error)}); {COPY_AGAIN}") from error


def _reason(error: Exception) -> str:
    """Return the first line of an error's message without addresses and classes of Python."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    line = re.sub(r"<class '([^']*)'>", r"\1", re.sub(r" object at 0x[0-9a-f]+", "", line))
    if isinstance(error, OSError | UserError) and line:
        return line[:_LONGEST_REASON]
    return f"{type(error).__name__}: {line}"[:_LONGEST_REASON]


def read_settings(path: Path) -> dict[str, Any]:
    """Return a JSON file of a model folder. Raises UserError if it is missing, damaged or not an object."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; {COPY_AGAIN}")
    return read_object(path, path.read_bytes(), COPY_AGAIN)


def count_stored(folder: Path) -> tuple[int, int]:
    """Return how many tensors and how many numbers the safetensors files of a folder have, by their headers."""
    from math import prod

    from safetensors import safe_open

    shapes = []
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            shapes += [stored.get_slice(name).get_shape() for name in stored.keys()]  # noqa: SIM118
    return len(shapes), sum(prod(shape) for shape in shapes)


@contextlib.contextmanager
def bounded_by_weights(folder: Path) -> Iterator[None]:
    """Raise UserError as soon as a model that is built in the block is much larger than the stored weights.

    Libraries build the model of config.json before they compare it with the weights, and allocate what does not match.
    A single changed number would cost all memory. Without safetensors files nothing is bounded.
    """
    from torch.nn.modules import module as hooks

    tensors, numbers = count_stored(folder)
    most_numbers = _MOST_NUMBERS_PER_STORED * numbers + _SPARE_NUMBERS
    most_modules = _MOST_MODULES_PER_TENSOR * tensors + _SPARE_MODULES
    # transformers first builds a model on the device meta, without memory, and then again from the file.
    built, modules, thread = {"meta": 0}, 0, threading.get_ident()

    def count(numel: int, layers: int, device: str = "meta") -> None:
        nonlocal modules
        if threading.get_ident() != thread or not tensors:
            return
        built[device], modules = built.get(device, 0) + numel, modules + layers
        if built[device] > most_numbers or modules > most_modules:
            raise UserError(
                f"{folder / 'config.json'} describes a model that is much larger than its weights ({tensors:,} "
                f"tensors, {numbers:,} numbers); {COPY_AGAIN}"
            )

    def of_tensor(module: nn.Module, name: str, value: Tensor | None) -> None:
        if value is not None:
            count(value.numel(), 0, value.device.type)

    def of_module(module: nn.Module, name: str, value: nn.Module | None) -> None:
        count(0, 1)

    handles = (
        hooks.register_module_parameter_registration_hook(of_tensor),
        hooks.register_module_buffer_registration_hook(of_tensor),
        hooks.register_module_module_registration_hook(of_module),
    )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_loaded(place: str | Path, found: Mapping[str, Any]) -> None:
    """Raise UserError if `from_pretrained` found tensors that are missing, unknown or of another size."""
    mismatched = [key if isinstance(key, str) else key[0] for key in found["mismatched_keys"]]
    names = sorted([*found["missing_keys"], *found["unexpected_keys"], *mismatched])
    if names:
        listed = ", ".join(names[:_MOST_LISTED]) + (", ..." if len(names) > _MOST_LISTED else "")
        raise UserError(f"{place}: the weights do not match config.json: {listed}; {COPY_AGAIN}")


def require_finite(values: Tensor, place: str | Path | None) -> None:
    """Raise UserError if a model of a folder answers with NaN or infinite numbers.

    The weights can be finite and too large at once.
    """
    if not bool(values.isfinite().all()):
        prefix = "" if place is None else f"{place}: "
        raise UserError(f"{prefix}the model answers with numbers that are not finite; {COPY_AGAIN}")


def check_weights(place: str | Path, model: nn.Module) -> None:
    """Raise UserError if a weight is not finite, or if a file stores integers for a weight that has fractions.

    Libraries load both without a word.
    """
    from safetensors import safe_open

    weights = model.state_dict()
    # Older checkpoints have other names. Unless a model has integers, every tensor of its files has fractions.
    kinds = {weight.is_floating_point() for weight in weights.values()}
    for file in sorted(Path(place).glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118 - not a dictionary
                kind = stored.get_slice(name).get_dtype()
                expected = {weights[name].is_floating_point()} if name in weights else kinds
                if kind.startswith(("F", "BF")) not in expected:
                    raise UserError(f"{file}: the tensor {name} has the wrong type of numbers ({kind}); {COPY_AGAIN}")
    for name, weight in weights.items():
        if weight.is_floating_point() and weight.dtype.itemsize > 1 and not bool(weight.isfinite().all()):
            raise UserError(f"{place}: the weights contain NaN or infinite numbers ({name}); {COPY_AGAIN}")
