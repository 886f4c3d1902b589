from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET
from importlib import resources

import pytest

from preceptor.report.plots import MOST_POINTS, PALETTE, Box, Dot, Line, box_plot, interval_plot, line_chart

KINDS = ("teacher", "baseline", "distilled", "guided", "clinkd", "other")


def curve(svg: str, key: str) -> list[tuple[float, float]]:
    """The points of the one curve of a colour, in the coordinates of the figure."""
    styled = {node.get("style", ""): node for node in ET.fromstring(svg).iter("path")}
    (path,) = [node for style, node in styled.items() if re.search(rf"^fill: none;.* stroke: var\(--{key}\)", style)]
    numbers = list(map(float, re.findall(r"[\d.]+", path.attrib["d"])))
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def test_points_are_proportional_to_the_values():
    line = Line("a", "teacher", [(0, 0.0), (50, 1.0), (75, 2.0)])
    (x0, y0), (x1, y1), (x2, y2) = curve(line_chart("t", [line], x_title="step"), "teacher")
    assert (x2 - x0) / (x1 - x0) == pytest.approx(1.5, abs=1e-3)
    assert (y2 - y0) / (y1 - y0) == pytest.approx(2, abs=1e-3)
    assert y0 > y2  # up is more


def test_without_a_finite_value_there_is_no_figure():
    assert line_chart("t", [Line("a", "other", [])], x_title="step") == ""
    assert line_chart("t", [Line("a", "other", [(1, math.nan), (2, math.inf)])], x_title="step") == ""
    assert interval_plot("t", [("a", [])], x_title="x") == ""
    assert box_plot("t", [Box("a", "other", [True], [])], x_title="x") == ""


def test_missing_values_are_left_out():
    svg = line_chart("t", [Line("a", "other", [(0, 1.0), (1, math.nan), (2, 3.0)])], x_title="step")
    assert len(curve(svg, "other")) == 2
    assert "nan" not in svg


def test_many_points_are_averaged_not_dropped():
    noisy = [(x, 5.0 + (-1) ** x) for x in range(10 * MOST_POINTS)]
    svg = line_chart("t", [Line("a", "other", noisy)], x_title="step")
    assert "a: from 5 to 5." in svg


def test_names_are_escaped_described_and_no_formulas():
    svg = line_chart("<b>", [Line("<i> $x$", "other", [(0, 0.25), (1, 0.5)], [1])], x_title="<s>$", as_percent=True)
    root = ET.fromstring(svg)
    assert root.attrib["aria-label"] == "<b>. <i> $x$: from 25.0\u00a0% to 50.0\u00a0%."
    assert len(list(root.iter("use"))) == 1  # the ring
    assert "<s>$" in [node.text for node in root.iter("text")]


def test_intervals_are_described():
    rows = [("ET", [Dot("a", "distilled", 0.012, -0.004, 0.03)]), ("WT", [Dot("", "teacher", -0.02)])]
    svg = interval_plot("Difference", rows, x_title="points")
    label = ET.fromstring(svg).attrib["aria-label"].replace("\u2212", "-")
    assert label == "Difference, in percentage points. ET, a: +1.2 (-0.4 to +3.0); WT: -2.0."


def test_medians_are_described():
    svg = box_plot("Dice", [Box("FLAIR", "teacher", [True, False], [0.1, 0.2, 0.6], 0.3)], x_title="Dice")
    assert ET.fromstring(svg).attrib["aria-label"] == "Dice. Medians: FLAIR: 20.0\u00a0%."


def test_a_figure_has_no_style_rules_links_or_clipping_and_is_reproducible():
    chart = lambda: line_chart("t", [Line("a", "baseline", [(0, 1.0), (1, 2.0)], [1])], x_title="step")  # noqa: E731
    svg = chart()
    assert svg == chart()
    for text in ("<style", "http", "url(", "#000000", "font-family", "metadata"):
        assert text not in svg
    assert not [color for color in PALETTE.values() if color in svg]


def palette(scheme: int) -> dict[str, str]:
    """The colours of the style sheet: light or dark."""
    css = (resources.files("preceptor.report") / "templates" / "page.css").read_text("utf-8")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", css, re.S)[scheme]))


def heat(scheme: int) -> dict[str, str]:
    css = (resources.files("preceptor.segmentation") / "templates" / "report.css").read_text("utf-8")
    return dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", re.findall(r":root \{(.*?)\}", css, re.S)[scheme]))


def test_the_palette_is_that_of_the_style_sheet():
    light, dark = palette(0), palette(1)
    assert PALETTE.items() <= light.items()
    assert PALETTE.keys() <= dark.keys()
    assert len(set(PALETTE.values())) == len(PALETTE)


def contrast(a: str, b: str) -> float:
    """Contrast of two colours, WCAG 2.1."""

    def luminance(color: str) -> float:
        channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_contrast_of_text_and_marks(scheme: int):
    colors = palette(scheme)
    for ground in ("page", "card", "note", "leak"):
        assert contrast(colors["text"], colors[ground]) >= 7
        assert contrast(colors["soft"], colors[ground]) >= 4.5
    for mark in ("correct", "wrong", *(f"m{place}" for place in range(6))):
        assert contrast(colors[mark], colors["card"]) >= 4.5
    for mark in KINDS:
        assert contrast(colors[mark], colors["card"]) >= 3
    cells = heat(scheme)
    assert all(contrast(cells["ink"], cells[f"h{level}"]) >= 4.5 for level in range(9))
