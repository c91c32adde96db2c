"""Charts as SVG text that follows the page's colours, light and dark."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

from flowerray.show.style import BLUE, GREEN, GREY, GRID, INK, ORANGE
from flowerray.statistics import Interval

SERIES = (BLUE, ORANGE, GREEN, "#b0528f", "#a07800", "#7a4bb0", "#3d8fc4", GREY)
"""One a curve, in page.css as --c0, --c1 and so on with their counterparts for the dark page."""
MARKERS = "osD^vPX*"
_FONT = re.compile(r"font: ([\d.]+px)[^;\"]*|font-family: [^;\"]*")

Curve = Sequence[tuple[float, float]]
"""Points (x, y)."""


def svg(figure: Any) -> str:
    """A matplotlib figure as SVG without a background; ink, grid and series colours become the
    page's, text stays text in the page's font. Closes nothing: a `Figure` needs no closing.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "flowerray"}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = _FONT.sub(lambda m: f"font-size: {m[1]}" if m[1] else "", text)
    for number, colour in enumerate(SERIES):
        text = text.replace(colour, f"var(--c{number}, {colour})")
    text = text.replace(GRID, f"var(--line, {GRID})")
    for ink in (INK, "#000000"):
        text = text.replace(ink, "currentColor")
    return text


def plain_axes(axes: Any, title: str, x_label: str, y_label: str) -> None:
    """Titles and a light grid, no frame."""
    axes.set_title(title, fontsize=11, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def curves(
    panels: Mapping[str, Mapping[str, Sequence[Curve]]], x_label: str, y_label: str = ""
) -> str:
    """One panel a title; in it a colour a group, a faint line a seed and their mean in full.

    Args:
        panels: title -> group -> one curve a seed. The mean is over the x that all seeds have.
        y_label: of every panel; none where the title says it.
    """
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    rows = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (title, panel) in zip(rows, panels.items(), strict=True):
        plain_axes(axes, title, x_label, y_label)
        for name, seeds in panel.items():
            number = groups.index(name)
            look: dict[str, Any] = {"color": SERIES[number % len(SERIES)]}
            for curve in seeds if len(seeds) > 1 else ():
                axes.plot(*zip(*curve, strict=True), alpha=0.3, linewidth=0.9, **look)
            look["marker"] = MARKERS[number % len(MARKERS)]
            axes.plot(*mean_curve(seeds), linewidth=1.8, markersize=3.5, label=name, **look)
    _legend(figure, rows, len(groups))
    return svg(figure)


def bands(
    panel: Mapping[str, Mapping[str, Interval]], ticks: Sequence[str], title: str, x_label: str
) -> str:
    """A curve with an interval's band for each group, at evenly spaced ticks, y from 0 to 1.

    Args:
        panel: group -> tick -> interval.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.0), layout="constrained")
    axes = figure.subplots()
    plain_axes(axes, title, x_label, "")
    for number, (name, found) in enumerate(panel.items()):
        look: dict[str, Any] = {"color": SERIES[number % len(SERIES)]}
        x = [ticks.index(tick) for tick in found]
        low, high = [i.low for i in found.values()], [i.high for i in found.values()]
        axes.fill_between(x, low, high, alpha=0.18, linewidth=0, **look)
        look["marker"] = MARKERS[number % len(MARKERS)]
        axes.plot(x, [i.mean for i in found.values()], markersize=4.5, label=name, **look)
    axes.set_xticks(range(len(ticks)), ticks)
    axes.set_ylim(-0.02, 1.02)
    _legend(figure, [axes], len(panel))
    return svg(figure)


def forest(panels: Mapping[str, Mapping[str, Interval]], floors: Sequence[str] = ()) -> str:
    """A point with its interval for each name, the same names beside every panel.

    Args:
        floors: names in grey; the others have the colours that they have in `curves`.
    """
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(name for panel in panels.values() for name in panel))
    trained = [name for name in names if name not in floors]
    figure = Figure(figsize=(8.6, 1.0 + 0.34 * len(names)), layout="constrained")
    rows = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, panel) in zip(rows, panels.items(), strict=True):
        plain_axes(axes, title, "", "")
        for name in names:
            if (found := panel.get(name)) is None:
                continue
            colour = GREY if name in floors else SERIES[trained.index(name) % len(SERIES)]
            look: dict[str, Any] = {"color": colour}
            axes.plot([found.low, found.high], [name, name], linewidth=2.2, **look)
            axes.plot([found.mean], [name], marker="o", markersize=6, **look)
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.margins(y=0.6 / max(len(names), 1))
    rows[0].invert_yaxis()
    return svg(figure)


def mean_curve(seeds: Sequence[Curve]) -> tuple[list[float], list[float]]:
    """x and mean y over the seeds, at the x that every seed has."""
    tables = [dict(curve) for curve in seeds]
    shared = sorted(set.intersection(*map(set, tables)))
    return list(shared), [sum(table[x] for table in tables) / len(tables) for x in shared]


def _legend(figure: Any, rows: Sequence[Any], groups: int) -> None:
    found: dict[str, Any] = {}
    for axes in rows:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=min(groups, 3),
        frameon=False, fontsize=9,
    )  # fmt: skip
