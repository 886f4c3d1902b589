from __future__ import annotations

import math
import xml.etree.ElementTree as ET
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from preceptor.report.figures import BOTTOM, HEIGHT, LEFT, POINTS, RIGHT, TOP, WIDTH, Line, line_chart, ticks


def polylines(svg: str) -> list[list[tuple[float, float]]]:
    found = []
    for node in ET.fromstring(svg).iter("polyline"):
        found.append([tuple(map(float, pair.split(","))) for pair in node.attrib["points"].split()])
    return found


def test_points_land_where_the_axes_say():
    svg = line_chart("t", [Line("a", "teacher", [(0, 0.0), (50, 1.0), (100, 2.0)])], x_title="step")
    (line,) = polylines(svg)
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    assert line == [(LEFT, bottom), ((LEFT + right) / 2, (TOP + bottom) / 2), (right, TOP)]


def test_nothing_finite_is_no_figure():
    assert line_chart("t", [Line("a", "x", [])], x_title="step") == ""
    assert line_chart("t", [Line("a", "x", [(1, math.nan), (2, math.inf)])], x_title="step") == ""


def test_lost_values_are_left_out():
    svg = line_chart("t", [Line("a", "x", [(0, 1.0), (1, math.nan), (2, 3.0)])], x_title="step")
    assert len(polylines(svg)[0]) == 2
    assert "nan" not in svg


def test_many_points_are_averaged_not_dropped():
    noisy = [(x, 5.0 + (-1) ** x) for x in range(10 * POINTS)]
    (line,) = polylines(line_chart("t", [Line("a", "x", noisy)], x_title="step"))
    assert len(line) == POINTS
    assert max(y for _, y in line) - min(y for _, y in line) < 1e-6


def test_names_are_escaped_and_spoken():
    svg = line_chart("<b>", [Line("<i>", "x", [(0, 0.25), (1, 0.5)], marked=1)], x_title="<s>", percent=True)
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"].startswith("<b>. <i>: from 25")
    assert len(list(root.iter("circle"))) == 1


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-6, 1e6),
    st.integers(2, 8),
)
def test_ticks_cover_the_range_evenly(low: float, width: float, count: int):
    found = ticks(low, low + width, count)
    step = found[1] - found[0]
    tolerance = 1e-6 * max(1, abs(low), width)
    assert found[0] <= low + tolerance
    assert found[-1] >= low + width - tolerance
    assert 2 <= len(found) <= count + 2
    assert all(b - a == pytest.approx(step, rel=1e-3, abs=1e-9) for a, b in pairwise(found))


def test_ticks_of_a_flat_curve():
    assert ticks(0.5, 0.5, 4)[0] <= 0.5 < ticks(0.5, 0.5, 4)[-1]
    assert ticks(0, 0, 4) == [0, 0.25, 0.5, 0.75, 1]


def test_intervals_are_drawn_in_full_and_side_by_side():
    lines = [
        Line("a", "teacher", [(10, 0.4), (100, 0.6)], spreads=[(0.2, 0.5), (0.5, 0.8)]),
        Line("b", "baseline", [(10, 0.4), (100, 0.6)], spreads=[(0.3, 0.5), (0.5, 0.7)]),
    ]
    svg = line_chart("t", lines, x_title="share", percent=True)
    drawn = [node.attrib for node in ET.fromstring(svg).iter("line") if node.attrib["class"].startswith("spread")]
    assert [node["class"] for node in drawn] == ["spread teacher"] * 2 + ["spread baseline"] * 2
    heights = [float(node["y1"]) - float(node["y2"]) for node in drawn]
    assert heights == pytest.approx([heights[0], heights[0], heights[0] * 2 / 3, heights[0] * 2 / 3], abs=0.2)
    assert all(TOP <= float(node[end]) <= HEIGHT - BOTTOM for node in drawn for end in ("y1", "y2"))
    assert float(drawn[2]["x1"]) - float(drawn[0]["x1"]) == pytest.approx(4)
    assert svg.count("<circle") == 4


def test_counts_keep_room_and_names_do_not_overlap():
    lines = [Line(f"modality {i}", f"m{i}", [(1, 0.5), (2, 0.6 + i / 1000)], rings=(2,)) for i in range(4)]
    svg = line_chart("t", lines, x_title="n", percent=True, counts=True, named=True)
    root = ET.fromstring(svg)
    texts = list(root.iter("text"))
    assert [t.text for t in texts if t.attrib.get("text-anchor") == "middle"] == ["1", "2", "n"]
    ends = sorted(float(t.attrib["y"]) for t in texts if t.attrib["class"].startswith("end"))
    assert len(ends) == 4
    assert all(below - above >= 13 - 1e-6 for above, below in pairwise(ends))
    assert ends[-1] <= HEIGHT - BOTTOM + 4 + 1e-6
    assert len(list(root.iter("circle"))) == 4
    assert min(x for line in polylines(svg) for x, _ in line) > LEFT
