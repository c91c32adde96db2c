"""Charts of a data set as matplotlib figures.

Letters: M images of a map, C classes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.explore.counts import ClassRow
from flowerray.explore.maps import Map
from flowerray.explore.scan import COLOUR_SIDE, Survey
from flowerray.show.style import BLUE, DPI, GRID, ORANGE, PALE, SERIES, panels, plain_axes, short

NAMED = 40
"""Classes whose names fit below the bars."""


def class_bars(counts: Mapping[str, int]) -> Any:
    """Images of each class, the largest first."""
    figure, ((axes,),) = panels(10.0, 3.4 if len(counts) <= NAMED else 3.0)
    plain_axes(axes, "", "", "images")
    axes.bar(range(len(counts)), list(counts.values()), color=BLUE, width=0.85)
    mean = sum(counts.values()) / len(counts)
    axes.axhline(mean, color=ORANGE, linewidth=1.2, linestyle="--", label=f"mean {mean:.1f}")
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    axes.set_xlim(-0.6, len(counts) - 0.4)
    axes.set_ylim(0, 1.18 * max(counts.values()))  # room for the legend
    if len(counts) <= NAMED:
        axes.set_xticks(range(len(counts)), [short(name) for name in counts], rotation=45,
                        ha="right", fontsize=8)  # fmt: skip
        axes.tick_params(axis="x", length=0)
    else:
        axes.set_xticks([])
        names = list(counts)
        axes.set_xlabel(f"{len(names)} classes, from {short(names[0])} to {short(names[-1])}")
    return figure


def size_panels(survey: Survey) -> Any:
    """Widths against heights, and how aspect ratios spread."""
    figure, ((left, right),) = panels(10.0, 3.4, 1, 2)
    plain_axes(left, "", "width (pixels)", "height (pixels)")
    plain_axes(right, "", "width / height", "images")
    step = max(1, round(survey.size_N2.max() / 500))  # finer cannot be seen
    rounded_N2 = (survey.size_N2 / step).round() * step
    places, count = np.unique(rounded_N2, axis=0, return_counts=True)
    left.scatter(*places.T, s=10 + 90 * count / count.max(), color=BLUE, alpha=0.5, linewidths=0)
    top = float(survey.size_N2.max()) * 1.08
    left.set_xlim(0, top)
    left.set_ylim(0, top)
    left.set_aspect("equal")
    ratio_N = survey.size_N2[:, 0] / survey.size_N2[:, 1]
    # 1 : 1 falls into the middle of a bin.
    edges = np.arange(min(0.475, ratio_N.min() - 0.05), max(2.0, ratio_N.max()) + 0.05, 0.05)
    right.hist(ratio_N, bins=edges, color=BLUE)
    return figure


def colour_panels(rows: Sequence[ClassRow]) -> Any:
    """Each class as a dot: brightness against contrast, hue against saturation.

    It has the colour of its images' middle; the outlying classes are named.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.0, 4.2), dpi=DPI, layout="constrained")
    left = figure.add_subplot(1, 2, 1)
    wheel: Any = figure.add_subplot(1, 2, 2, projection="polar")
    plain_axes(left, "", "brightness (mean luma, 0..1)", "contrast (standard deviation)")
    wheel.grid(color=GRID, linewidth=0.6)
    wheel.spines["polar"].set_color(GRID)
    wheel.set_xticks(np.deg2rad([0, 60, 120, 180, 240, 300]),
                     ["red", "yellow", "green", "cyan", "blue", "magenta"])  # fmt: skip
    look: dict[str, Any] = {"edgecolors": "#888888", "linewidths": 0.5, "s": 42}
    colours = [row.colour for row in rows]
    left.scatter([r.brightness for r in rows], [r.contrast for r in rows], c=colours, **look)
    hued = [row for row in rows if not np.isnan(row.hue)]
    if hued:
        angle = np.deg2rad([row.hue for row in hued])
        radius = [row.saturation for row in hued]
        wheel.scatter(angle, radius, c=[row.colour for row in hued], **look)
    wheel.set_ylim(0, max([0.3, *(row.saturation * 1.1 for row in rows)]))
    wheel.tick_params(labelsize=8)
    wheel.set_rlabel_position(30)
    wheel.set_title("dominant hue (angle) and saturation (radius)", fontsize=10)
    points = np.array([(row.brightness, row.contrast) for row in rows])
    for i in _outlying(points):
        left.annotate(short(rows[i].name, 20), points[i], xytext=(5, 4),
                      textcoords="offset points", fontsize=7.5)  # fmt: skip
    left.margins(0.12)
    return figure


def map_panels(
    maps: Mapping[str, Map],
    labels_M: NDArray[np.int64],
    classes: Sequence[str],
    highlighted: Sequence[int],
) -> Any:
    """A row of maps (PCA, t-SNE) for each kind of vector; some classes coloured, the others grey.

    Args:
        maps: title, such as "pixels" -> its maps.
        highlighted: up to 8 labels.
    """
    figure, grid = panels(10.0, 4.5 * len(maps), len(maps), 2)
    shown = list(highlighted)[: len(SERIES)]
    names = [short(classes[label], 26) for label in shown]
    handles: list[Any] = []
    for (title, found), pair in zip(maps.items(), grid, strict=True):
        shares = " + ".join(f"{share:.0%}" for share in found.explained)
        kinds = ((f"PCA of {title} ({shares} of the variance)", found.pca_M2),
                 (f"t-SNE of {title}", found.tsne_M2))  # fmt: skip
        for axes, (heading, points) in zip(pair, kinds, strict=True):
            rest = ~np.isin(labels_M, shown)
            axes.scatter(*points[rest].T, s=7, color=PALE, alpha=0.6, linewidths=0)
            for label, colour in zip(shown, SERIES, strict=False):
                own = labels_M == label
                handles.append(axes.scatter(*points[own].T, s=16, color=colour, linewidths=0))
            axes.set_title(heading, fontsize=10, loc="left")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_color(GRID)
    if shown:
        # Given by hand: a label that starts with "_" is otherwise kept out of legends.
        figure.legend(
            handles[: len(shown)], names, loc="outside lower center", ncols=min(4, len(shown)),
            frameon=False, fontsize=9, markerscale=1.6,
        )  # fmt: skip
    return figure


def picture_map(points_M2: NDArray[np.floating], colour_MSS3: NDArray[np.uint8]) -> Any:
    """A map with the images themselves at their places; crowded places show the first ones.

    Returns:
        A Pillow image.
    """
    from PIL import Image

    cells, side = 36, COLOUR_SIDE
    low, high = points_M2.min(axis=0), points_M2.max(axis=0)
    place_M2 = ((points_M2 - low) / np.maximum(high - low, 1e-9) * (cells - 1)).round().astype(int)
    canvas = np.full((cells * side, cells * side, 3), 255, np.uint8)
    taken: set[tuple[int, int]] = set()
    for (x, y), image_SS3 in zip(place_M2.tolist(), colour_MSS3, strict=True):
        if (x, y) in taken:
            continue
        taken.add((x, y))
        top = (cells - 1 - y) * side
        canvas[top : top + side, x * side : (x + 1) * side] = image_SS3
    return Image.fromarray(canvas)


def _outlying(points_C2: NDArray[np.float64], count: int = 8) -> list[int]:
    """The points furthest from the middle, without those whose names would cover another's."""
    span = np.maximum(np.ptp(points_C2, axis=0), 1e-9)
    place_C2 = (points_C2 - points_C2.mean(axis=0)) / span
    chosen: list[int] = []
    for i in np.argsort(-np.linalg.norm(place_C2, axis=1)).tolist():
        gaps = np.abs(place_C2[chosen] - place_C2[i])
        if len(chosen) < count and not ((gaps[:, 0] < 0.3) & (gaps[:, 1] < 0.06)).any():
            chosen.append(i)
    return chosen
