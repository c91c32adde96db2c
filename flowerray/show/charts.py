"""Charts of several groups, and any figure as SVG text that follows a page's colours."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowerray.show.style import (
    DPI,
    GRID,
    INK,
    MARKERS,
    PALE,
    SERIES,
    legend_below,
    legible,
    panels,
    plain_axes,
    short,
)
from flowerray.statistics import Interval

MOST_POINTS = 8000
"""Of the curves of one panel together: more cannot be seen."""
_FONT = re.compile(r"font: ([\d.]+px)[^;\"]*|font-family: [^;\"]*")
_PLACES = re.compile(r'(?<= )(?:d|x|y|points|transform)="[^"]*"')
_DIGITS = re.compile(r"(\.\d{2})\d+")

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""


def svg(figure: Any) -> str:
    """A matplotlib figure as SVG without a background; ink, grid and series colours become the
    page's, text stays text in the page's font, and places keep two decimals. Closes nothing: a
    `Figure` needs no closing.
    """
    import matplotlib

    legible(figure)
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flowerray"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None}, dpi=DPI)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _FONT.sub(lambda m: f"font-size: {m[1]}" if m[1] else "", text)
    text = _PLACES.sub(lambda m: _DIGITS.sub(r"\1", m[0]), text)
    for number, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--c{number}, {colour})")
    text = text.replace(GRID, f"var(--line, {GRID})")
    for ink in (INK, "#000000"):
        text = text.replace(ink, "currentColor")
    return text


def curves(
    content: Mapping[str, Mapping[str, Sequence[Curve]]],
    x_label: str,
    y_label: str = "",
    others: Mapping[str, Sequence[Curve]] | None = None,
) -> Any:
    """One panel a title; in it a colour a group, a faint line a seed and their mean in full.

    Args:
        content: title -> group -> one curve a seed. The mean is over the x that all seeds have.
        y_label: of every panel; none where the title says it.
        others: title -> curves in pale grey behind them.
    """
    groups = list(dict.fromkeys(name for panel in content.values() for name in panel))
    figure, grid = panels(4.2 * len(content), 3.4, 1, len(content))
    for axes, (title, panel) in zip(grid[0], content.items(), strict=True):
        plain_axes(axes, title, x_label, y_label)
        axes.locator_params(axis="x", nbins=6, integer=True)
        behind = (others or {}).get(title, ())
        count = len(behind) + sum(map(len, panel.values()))
        most = max(8, MOST_POINTS // max(count, 1))
        for curve in behind:
            axes.plot(*zip(*thinned(curve, most), strict=True), color=PALE, linewidth=0.7, zorder=1)
        for name, seeds in panel.items():
            look = group_look(groups.index(name))
            marker = look.pop("marker")
            for curve in seeds if len(seeds) > 1 else ():
                points = thinned(curve, most)
                axes.plot(*zip(*points, strict=True), alpha=0.3, linewidth=0.9, **look)
            mean = thinned(mean_curve(seeds), 200)
            axes.plot(
                [x for x, _ in mean], [y for _, y in mean], marker, linestyle="-", linewidth=1.8,
                markersize=3.5, markevery=max(1, len(mean) // 30), label=name, **look,
            )  # fmt: skip
    legend_below(figure, 3)
    return figure


def bands(
    content: Mapping[str, Mapping[str, Interval]],
    ticks: Sequence[str],
    title: str,
    x_label: str,
    y_label: str = "",
) -> Any:
    """A curve with an interval's band for each group, at evenly spaced ticks, y from 0 to 1.

    Args:
        content: group -> tick -> interval.
    """
    figure, ((axes,),) = panels(7.2, 4.0)
    plain_axes(axes, title, x_label, y_label)
    for number, (name, found) in enumerate(content.items()):
        look = group_look(number)
        x = [ticks.index(tick) for tick in found]
        low, high = [i.low for i in found.values()], [i.high for i in found.values()]
        axes.fill_between(x, low, high, alpha=0.18, linewidth=0, color=look["color"])
        axes.plot(x, [i.mean for i in found.values()], markersize=4.5, label=name, **look)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylim(-0.02, 1.02)
    legend_below(figure, 3)
    return figure


def forest(
    content: Mapping[str, Mapping[str, Interval]],
    colours: Mapping[str, str] | None = None,
    columns: int = 4,
    values: Mapping[str, Mapping[str, Sequence[float]]] | None = None,
) -> Any:
    """A point with its interval for each name, one below the other, the same names beside every
    panel.

    Args:
        content: panel -> name -> interval.
        colours: of names; the others have the colours that groups have in `curves`.
        columns: panels side by side.
        values: panel -> name -> what the mean is of, as faint points.
    """
    names = list(dict.fromkeys(name for panel in content.values() for name in panel))
    given = colours or {}
    free = [name for name in names if name not in given]
    columns = min(columns, len(content))
    lines = -(-len(content) // columns)
    height = lines * (1.0 + 0.3 * len(names))
    labels = [short(name, 48) for name in names]
    room = max(2.2, 0.09 * max(map(len, labels), default=0))
    figure, grid = panels(3.2 * columns + room, height, lines, columns, sharey=True)
    for axes in grid.flat[len(content) :]:
        axes.set_visible(False)
    for axes, (title, panel) in zip(grid.flat, content.items(), strict=False):
        plain_axes(axes, title)
        for place, name in enumerate(names):
            if (found := panel.get(name)) is None:
                continue
            colour = given[name] if name in given else group_look(free.index(name))["color"]
            dots = (values or {}).get(title, {}).get(name, ())
            axes.plot(dots, [place] * len(dots), "o", color=colour, alpha=0.4, markersize=4)
            axes.plot([found.low, found.high], [place, place], linewidth=2.2, color=colour)
            axes.plot([found.mean], [place], "o", markersize=6, color=colour)
        axes.set_yticks(range(len(names)), labels)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.locator_params(axis="x", nbins=5)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
    return figure


def group_look(number: int) -> dict[str, Any]:
    """Colour and marker of the n-th group."""
    return {"color": SERIES[number % len(SERIES)], "marker": MARKERS[number % len(MARKERS)]}


def thinned(curve: Curve, most: int) -> Curve:
    """At most that many points of a curve, evenly chosen, both ends among them."""
    if len(curve) <= most:
        return curve
    step = (len(curve) - 1) / (most - 1)
    return [curve[round(i * step)] for i in range(most)]


def mean_curve(seeds: Sequence[Curve]) -> list[tuple[float, float]]:
    """Mean y over the seeds, at the x that every seed has."""
    tables = [dict(curve) for curve in seeds]
    shared = sorted(set.intersection(*map(set, tables)))
    return [(x, sum(table[x] for table in tables) / len(tables)) for x in shared]
