"""What the charts draw, read from their axes."""

import re

import numpy as np
import pytest

from flowerray.show.charts import Curve, bands, curves, forest, mean_curve, svg, thinned
from flowerray.show.style import GREY, PALE, SERIES
from flowerray.statistics import Interval


def test_curves_show_seeds_faint_and_their_mean() -> None:
    seeds: list[Curve] = [[(1, 0.2), (2, 0.4)], [(1, 0.4), (2, 0.8), (3, 0.9)]]
    figure = curves({"loss": {"a": seeds}, "R@1": {"b": [[(1, 0.5)]]}}, "epoch", "nats")
    left, right = figure.axes
    *faint, mean = left.lines
    assert [line.get_alpha() for line in faint] == [0.3, 0.3]
    np.testing.assert_allclose(mean.get_xydata(), [(1, 0.3), (2, 0.6)])
    assert mean.get_color() == SERIES[0] and right.lines[0].get_color() == SERIES[1]
    assert (left.get_title(loc="left"), left.get_xlabel(), left.get_ylabel()) == (
        "loss", "epoch", "nats",
    )  # fmt: skip
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]


def test_many_long_curves_are_thinned_to_what_can_be_seen() -> None:
    rng = np.random.default_rng(0)

    def curve() -> Curve:
        return list(enumerate(rng.random(1000).tolist()))

    behind = [curve() for _ in range(200)]
    figure = curves({"loss": {"a": [curve() for _ in range(100)]}}, "step", others={"loss": behind})
    lines = figure.axes[0].lines
    assert len(lines) == 301
    assert sum(len(line.get_xdata()) for line in lines) < 10_000
    assert [line.get_color() for line in lines[:200]] == [PALE] * 200
    assert all(line.get_xdata()[[0, -1]].tolist() == [0, 999] for line in lines[:-1])
    assert len(svg(figure)) < 400_000


def test_thinning_keeps_the_ends() -> None:
    line: Curve = [(float(x), 0.0) for x in range(100)]
    assert thinned(line, 100) is line
    few = thinned(line, 7)
    assert len(few) == 7 and few[0] == line[0] and few[-1] == line[-1]
    assert mean_curve([[(1, 0.0), (2, 1.0)], [(2, 3.0)]]) == [(2, 2.0)]


def test_bands() -> None:
    content = {"a": {"0": Interval(9, 0.9, 0.8, 1.0), "2": Interval(9, 0.4, 0.3, 0.5)},
               "b": {"2": Interval(9, 0.6, 0.5, 0.7)}}  # fmt: skip
    axes = bands(content, ["0", "1", "2"], "title", "radius").axes[0]
    assert [line.get_xydata().tolist() for line in axes.lines] == [
        [[0, 0.9], [2, 0.4]], [[2, 0.6]],
    ]  # fmt: skip
    corners = axes.collections[0].get_paths()[0].vertices
    assert corners[:, 1].min() == pytest.approx(0.3) and corners[:, 1].max() == 1
    assert axes.get_ylim() == (-0.02, 1.02)
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0", "1", "2"]


def test_forest() -> None:
    found = {"frozen": Interval(9, 0.5, np.nan, np.nan), "triplet": Interval(9, 0.9, 0.8, 1.0)}
    values = {"R@1": {"triplet": [0.85, 0.95]}}
    figure = forest({"R@1": found, "MAP@R": found}, {"frozen": GREY}, values=values)
    axes = figure.axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["frozen", "triplet"] and axes.get_ylim() == (1.5, -0.5)
    drawn = [(line.get_color(), line.get_xdata().tolist()) for line in axes.lines[3:]]
    assert drawn == [(SERIES[0], [0.85, 0.95]), (SERIES[0], [0.8, 1.0]), (SERIES[0], [0.9])]
    assert {line.get_color() for line in axes.lines[:3]} == {GREY}


def test_charts_take_the_pages_colours() -> None:
    chart = svg(curves({"loss": {"a": [[(1, 1.0)]], "b": [[(1, 2.0)]]}}, "epoch", "nats"))
    assert {"var(--c0", "var(--c1", "var(--line", "currentColor"} <= set(
        re.findall(r"var\(--\w+|currentColor", chart)
    )
    assert "font-family" not in chart and "DejaVu" not in chart and "#ffffff" not in chart
    assert not re.search(r' d="[^"]*\.\d{3}', chart)
