"""The preprocessing of images as an ONNX graph: raw pixels in, what the network reads out.

The `Resize` of ONNX is not the one of Pillow, not even with antialiasing (up to 20 of 255 grey levels apart in
onnxruntime 1.32). Pillow multiplies the rows and then the columns by the weights of a triangle filter, which are
integers times 2^-22, and rounds to 8 bits after each of both passes. A matrix product in double precision computes
these sums exactly, so the graph returns the same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from preceptor.vqa.dataset import Preprocessing

if TYPE_CHECKING:
    import onnx

_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}, "preceptor": 1]>
preprocessing (uint8[height, width, 3] image) => (float[1, 3, {side}, {side}] pixels)
<double side = {{{side}}}, float[1, 3, 1, 1] mean = {{{mean}}}, float[1, 3, 1, 1] std = {{{std}}}>
{{
  channels_first = Transpose <perm = [2, 0, 1]> (image)
  values = Cast <to = 11> (channels_first)
  shape = Shape (values)
  row_axis = Constant <value_int = 1> ()
  column_axis = Constant <value_int = 2> ()
  rows = Gather (shape, row_axis)
  columns = Gather (shape, column_axis)
  across = preceptor.Weights (columns, side)
  down = preceptor.Weights (rows, side)
  {order}
  float_bytes = Cast <to = 1> (bytes)
  first = Constant <value_ints = [0]> ()
  batch = Unsqueeze (float_bytes, first)
  white = Constant <value_float = 255.0> ()
  scaled = Div (batch, white)
  centred = Sub (scaled, mean)
  pixels = Div (centred, std)
}}
<domain: "preceptor", opset_import: ["": {opset}]>
Weights (count, side) => (weights)
{{
  zero = Constant <value = double {{0}}> ()
  half = Constant <value = double {{0.5}}> ()
  one = Constant <value = double {{1}}> ()
  precision = Constant <value = double {{4194304}}> ()
  first = Constant <value_ints = [0]> ()
  last = Constant <value_ints = [1]> ()
  size = Cast <to = 11> (count)
  ratio = Div (size, side)
  support = Max (ratio, one)
  inputs = Range (zero, size, one)
  outputs = Range (zero, side, one)
  middles = Add (outputs, half)
  scaled = Mul (middles, ratio)
  centres = Unsqueeze (scaled, first)
  places = Unsqueeze (inputs, last)
  differences = Sub (places, centres)
  offsets = Add (differences, half)
  distances = Abs (offsets)
  relative = Div (distances, support)
  complement = Sub (one, relative)
  triangle = Max (complement, zero)
  total = ReduceSum (triangle, first)
  shares = Div (triangle, total)
  fixed = Mul (shares, precision)
  raised = Add (fixed, half)
  weights = Floor (raised)
}}
<domain: "preceptor", opset_import: ["": {opset}]>
Pass (values, weights) => (bytes)
{{
  half = Constant <value = double {{0.5}}> ()
  white = Constant <value = double {{255}}> ()
  precision = Constant <value = double {{4194304}}> ()
  sums = MatMul (values, weights)
  means = Div (sums, precision)
  raised = Add (means, half)
  whole = Floor (raised)
  bytes = Min (whole, white)
}}
<domain: "preceptor", opset_import: ["": {opset}]>
Swap (values) => (swapped) {{ swapped = Transpose <perm = [0, 2, 1]> (values) }}
<domain: "preceptor", opset_import: ["": {opset}]>
RowsFirst (values, across, down) => (bytes)
{{
  narrow = preceptor.Pass (values, across)
  turned = preceptor.Swap (narrow)
  small = preceptor.Pass (turned, down)
  bytes = preceptor.Swap (small)
}}
<domain: "preceptor", opset_import: ["": {opset}]>
ColumnsFirst (values, across, down) => (bytes)
{{
  turned = preceptor.Swap (values)
  short = preceptor.Pass (turned, down)
  upright = preceptor.Swap (short)
  bytes = preceptor.Pass (upright, across)
}}
"""

_ONE_ORDER = "bytes = preceptor.RowsFirst (values, across, down)"
_TWO_ORDERS = """
  height = Cast <to = 11> (rows)
  width = Cast <to = 11> (columns)
  two = Constant <value = double {{2}}> ()
  shrinks = Greater (height, side)
  sum = Add (height, side)
  twice = Mul (width, two)
  much_higher = Greater (sum, twice)
  tall = And (shrinks, much_higher)
  bytes = If (tall) <
    then_branch = columns_first () => (double[3, {side}, {side}] a) {{
      a = preceptor.ColumnsFirst (values, across, down)
    }},
    else_branch = rows_first () => (double[3, {side}, {side}] b) {{
      b = preceptor.RowsFirst (values, across, down)
    }}
  >
"""


def preprocessing_graph(preprocessing: Preprocessing, opset: int, ir_version: int) -> onnx.ModelProto:
    """Return a model that maps `image` (H, W, 3) uint8 to `pixels` (1, 3, side, side), as `resize` and `pixels` do."""
    from onnx import inliner, parser

    side = preprocessing.image_size
    order = _TWO_ORDERS.format(side=side) if resizes_tall_images_down_first() else _ONE_ORDER
    text = _GRAPH.format(
        opset=opset,
        ir_version=ir_version,
        side=side,
        mean=_floats(preprocessing.mean),
        std=_floats(preprocessing.std),
        order=order,
    )
    return inliner.inline_local_functions(parser.parse_model(text))


def _floats(values: tuple[float, ...]) -> str:
    return ", ".join(f"{value:.17g}" if value % 1 else f"{value:.1f}" for value in values)


def resizes_tall_images_down_first() -> bool:
    """Return whether this version of Pillow resizes the columns of a tall image before its rows, as 13 does.

    It does so if H > side and H + side > 2 W, which is cheaper. The rounding after the first pass makes a difference of
    one grey level.
    """
    values = np.random.default_rng(0).integers(0, 256, (400, 20, 3)).astype(np.uint8)
    tall, method = Image.fromarray(values), Image.Resampling.BILINEAR
    rows_first = tall.resize((16, 400), method).resize((16, 16), method)
    return not np.array_equal(np.asarray(tall.resize((16, 16), method)), np.asarray(rows_first))
