"""Write, check and quantise ONNX files."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import statistics
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from preceptor.errors import UserError

if TYPE_CHECKING:
    import onnx

MODEL, INT8_MODEL = "model.onnx", "model.int8.onnx"
TOLERANCE = 1e-4
"""Largest accepted difference between a probability of the ONNX file and of torch."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
_OPSET = 20
_TIMED_RUNS = 10

Inputs = Mapping[str, np.ndarray]


def require_packages() -> None:
    """Raise UserError unless the packages of the extra `export` are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        are = "are" if len(missing) > 1 else "is"
        raise UserError(
            f"the export to ONNX needs {', '.join(missing)}, which {are} not installed: pip install 'preceptor[export]'"
        )


def trace(
    module: nn.Module, arguments: tuple[torch.Tensor, ...], inputs: Sequence[str], output: str
) -> onnx.ModelProto:
    """Return a module with inputs of the shapes of `arguments` as an ONNX model.

    Raises:
        UserError: torch cannot express the module in ONNX.
    """
    module.eval()
    with _silenced(), torch.no_grad():
        try:
            program: Any = torch.onnx.export(
                module,
                arguments,
                dynamo=True,
                verbose=False,
                input_names=list(inputs),
                output_names=[output],
                opset_version=_OPSET,
            )
        except Exception as error:  # the exporter wraps whatever its many steps raise
            reason = next((line.strip() for line in str(error.__cause__ or error).splitlines() if line.strip()), "")
            raise UserError(
                f"torch {torch.__version__} cannot express this network in ONNX ({reason[:200]}); run it with "
                "preceptor.load, or train one of the built-in networks"
            ) from error
    model = program.model_proto
    _forget_source(model)
    return model


def _forget_source(model: onnx.ModelProto) -> None:
    """Remove the stack traces that torch stores with every node: they name files of this machine."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Hide the warnings of the exporter, which concern its own parts."""
    disabled = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


class Session:
    """An ONNX file in onnxruntime on the CPU, with as many threads as torch uses."""

    def __init__(self, path: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def __call__(self, inputs: Inputs) -> np.ndarray:
        """Return the output `probabilities`."""
        return self._session.run(["probabilities"], dict(inputs))[0]

    def milliseconds(self, inputs: Inputs) -> float:
        """Return the median time of a run in ms."""
        self(inputs)
        times = []
        for _ in range(_TIMED_RUNS):
            start = time.perf_counter()
            self(inputs)
            times.append(time.perf_counter() - start)
        return 1000 * statistics.median(times)


def compare_outputs(path: Path, inputs: Sequence[Inputs], expected: Sequence[np.ndarray]) -> float:
    """Return the largest difference between the outputs of a file and those of torch."""
    session = Session(path)
    return max(
        float(np.abs(session(one) - right).max()) if np.isfinite(right).all() else np.inf
        for one, right in zip(inputs, expected, strict=True)
    )


def check_outputs(path: Path, inputs: Sequence[Inputs], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """Compare a file with torch; return the result for `model.json`.

    Raises:
        UserError: a probability differs by more than `TOLERANCE`.
    """
    difference = compare_outputs(path, inputs, expected)
    if not difference <= TOLERANCE:
        raise UserError(
            f"the exported network differs from torch by {difference:.2g} in a probability, more than {TOLERANCE:g}; "
            "nothing was written: run the model with preceptor.load, or try other versions of onnxscript and "
            "onnxruntime"
        )
    return {"inputs": len(inputs), "largest_difference": difference, "tolerance": TOLERANCE}


def quantise(folder: Path, inputs: Sequence[Inputs], expected: Sequence[np.ndarray]) -> dict[str, Any]:
    """Write `model.int8.onnx`, whose weights have 8 bits; return sizes, times and the largest difference from torch."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    full, small = folder / MODEL, folder / INT8_MODEL
    with _silenced():
        quantize_dynamic(full, small, weight_type=QuantType.QUInt8, extra_options={"DefaultTensorType": 1})
    return {
        "bytes": {"float32": full.stat().st_size, "int8": small.stat().st_size},
        "milliseconds": {
            "float32": round(Session(full).milliseconds(inputs[0]), 3),
            "int8": round(Session(small).milliseconds(inputs[0]), 3),
        },
        "largest_difference": compare_outputs(small, inputs, expected),
    }
