"""Pictures of explanations.

Letters: N images, K concepts, M crops, H W S pixels or cells, P positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.explain.cam import upsample
from flowerray.files import atomic_file
from flowerray.statistics import Interval

INK, GREY = "#222222", "#777777"
DIVERGING = "PuOr_r"
"""Orange: more alike, purple: less alike; told apart by the colour-blind."""
MATCHES = ("#0072b2", "#d55e00", "#009e73")
"""Okabe and Ito's blue, vermillion, green: the three strongest pairs of regions."""


@dataclass(frozen=True)
class Match:
    """A region of one image that goes with one of the other."""

    first: tuple[int, int]
    """Row and column of the cell in the first image's grid."""
    second: tuple[int, int]
    share: float
    """What the pair of cells adds to the cosine."""


@dataclass(frozen=True)
class ConceptStrip:
    """One concept of a pair, as it is drawn."""

    name: str
    drop: float
    """Of the cosine, without the concept."""
    shares: tuple[float, float]
    """Of the concept among all concepts of each image, 0..1."""
    maps_2HW: NDArray[np.float32]
    crops_MSS3: NDArray[np.uint8]


@dataclass(frozen=True)
class Pair:
    """Everything in the picture of two images."""

    images_2SS3: NDArray[np.uint8]
    names: tuple[str, str]
    maps_2HW: NDArray[np.float32]
    """Raw, on one scale."""
    method: str
    similarity: float
    threshold: float
    matches: tuple[Match, ...]
    grid: tuple[int, int]
    concepts: tuple[ConceptStrip, ...]


def best_matches(shares_PP: NDArray, grid: tuple[int, int], count: int = 3) -> tuple[Match, ...]:
    """The strongest pairs of regions, each region used once, those below 0 left out."""
    left = shares_PP.astype(np.float64).copy()
    found: list[Match] = []
    while len(found) < count and left.size and left.max() > 0:
        first, second = divmod(int(left.argmax()), left.shape[1])
        share = float(shares_PP[first, second])
        found.append(Match(divmod(first, grid[1]), divmod(second, grid[1]), share))
        left[first], left[:, second] = -np.inf, -np.inf
    return tuple(found)


def draw_pair(pair: Pair, out_png: Path) -> Path:
    """Why two images are alike or not: regions that match, both heat maps on one scale with its
    bar, and the concepts that they share.
    """
    from matplotlib.figure import Figure

    strips = len(pair.concepts)
    figure = Figure(figsize=(11, 3.6 + 1.45 * strips + (0.4 if strips else 0)), dpi=110)
    figure.set_layout_engine("constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.3, 0.01 + 1.5 * strips])
    same = pair.similarity >= pair.threshold
    verdict = "same class" if same else "different classes"
    sign = "≥" if same else "<"
    figure.suptitle(
        f"similarity {pair.similarity:.3f} {sign} threshold {pair.threshold:.3f}: {verdict}",
        color=INK, fontsize=14, fontweight="bold",
    )  # fmt: skip
    axes = parts[0].subplots(1, 4)
    for side in range(2):
        _photograph(axes[side], pair.images_2SS3[side])
        _boxes(axes[side], pair, side)
        axes[side].set_title(_short(pair.names[side]), fontsize=10, color=INK)
    top = float(np.abs(pair.maps_2HW).max()) or 1.0
    for side in range(2):
        _overlay(axes[2 + side], pair.images_2SS3[side], pair.maps_2HW[side], top)
        axes[2 + side].set_title(f"heat map of image {side + 1}", fontsize=10, color=INK)
    _bar(parts[0], axes[2:], top, pair.method)
    if pair.matches:
        text = "   ".join(f"{n}: {m.share:+.3f}" for n, m in enumerate(pair.matches, 1))
        axes[0].set_xlabel(f"regions that match   {text}", fontsize=9, color=GREY, x=1.05)
    else:
        axes[0].set_xlabel("no exact matching of regions", fontsize=9, color=GREY, x=1.05)
    if strips:
        _strips(parts[1], pair)
    return _save(figure, out_png)


def draw_sheet(
    title: str,
    images_NSS3: NDArray[np.uint8],
    masks_NSS: NDArray[np.bool_] | None,
    columns: Mapping[str, NDArray[np.float32]],
    captions: Mapping[str, Sequence[str]],
    rows: Sequence[str],
    out_png: Path,
) -> Path:
    """Images in rows, methods in columns; each map on its own scale, since methods differ in
    theirs.

    Args:
        columns: heading -> raw maps, one an image.
        captions: heading -> a line below each map.
        rows: a line below each photograph.
    """
    from matplotlib.figure import Figure

    count, width = len(images_NSS3), 1 + len(columns)
    figure = Figure(figsize=(1.75 * width, 1.95 * count + 0.7), dpi=100, layout="constrained")
    figure.suptitle(title, fontsize=11, color=INK)
    axes = figure.subplots(count, width, squeeze=False)
    for n in range(count):
        _photograph(axes[n, 0], images_NSS3[n])
        if masks_NSS is not None and masks_NSS[n].any() and not masks_NSS[n].all():
            axes[n, 0].contour(masks_NSS[n], [0.5], colors="white", linewidths=2.0)
            axes[n, 0].contour(masks_NSS[n], [0.5], colors=INK, linewidths=0.9)
        axes[n, 0].set_xlabel(_short(rows[n], 24), fontsize=8, color=GREY)
        for place, (name, maps) in enumerate(columns.items(), 1):
            map_HW = maps[n]
            _overlay(axes[n, place], images_NSS3[n], map_HW, float(np.abs(map_HW).max()) or 1.0)
            axes[n, place].set_xlabel(captions[name][n], fontsize=8, color=GREY)
            if n == 0:
                axes[0, place].set_title(name, fontsize=9, color=INK)
    heading = "photograph" if masks_NSS is None else "photograph, mask"
    axes[0, 0].set_title(heading, fontsize=9, color=INK)
    return _save(figure, out_png)


def draw_scores(
    title: str,
    table: Mapping[str, Mapping[str, Interval]],
    labels: Mapping[str, str],
    out_png: Path,
) -> Path:
    """Each metric's means with 95 % intervals, methods from top to bottom, the first one marked."""
    from matplotlib.figure import Figure

    names, metrics = list(table), list(labels)
    columns = min(4, len(metrics))
    lines = -(-len(metrics) // columns)
    figure = Figure(
        figsize=(13, 0.8 + lines * (0.9 + 0.27 * len(names))), dpi=110, layout="constrained"
    )
    figure.suptitle(title, fontsize=11, color=INK)
    axes = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for place, axis in enumerate(axes.flat):
        if place >= len(metrics):
            axis.set_visible(False)
            continue
        metric = metrics[place]
        for height, name in enumerate(names):
            found = table[name][metric]
            colour = MATCHES[1] if height == 0 else MATCHES[0]
            low, high = np.nan_to_num([found.low, found.high], nan=found.mean)
            axis.plot([low, high], [height, height], color=colour, linewidth=2)
            axis.plot([found.mean], [height], "o", color=colour, markersize=5)
        axis.axvline(table[names[0]][metric].mean, color=MATCHES[1], linewidth=0.6, alpha=0.6)
        axis.set_yticks(range(len(names)), names, fontsize=9)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="x", color="#dddddd", linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_title(labels[metric], fontsize=10, color=INK)
    return _save(figure, out_png)


def _strips(part: Any, pair: Pair) -> None:
    """A line a concept: on both images, then the training images that show it best."""
    crops = pair.concepts[0].crops_MSS3.shape[0]
    axes = part.subplots(len(pair.concepts), 3 + crops, squeeze=False)
    part.suptitle(
        "concepts: their share of each image, the similarity without them, where they are, and "
        "the training images that show them best",
        fontsize=10, color=INK,
    )  # fmt: skip
    for line, strip in zip(axes, pair.concepts, strict=True):
        line[0].axis("off")
        first, second = (f"{share:.0%}" for share in strip.shares)
        text = f"{strip.name}\n{first} and {second}\nwithout it {-strip.drop:+.3f}"
        line[0].text(0.98, 0.5, text, ha="right", va="center", fontsize=10, color=INK)
        top = float(strip.maps_2HW.max()) or 1.0
        for side in range(2):
            _overlay(line[1 + side], pair.images_2SS3[side], strip.maps_2HW[side], top)
        for axis, crop in zip(line[3:], strip.crops_MSS3, strict=True):
            _photograph(axis, crop)


def _boxes(axis: Any, pair: Pair, side: int) -> None:
    from matplotlib.patches import Rectangle

    size = pair.images_2SS3.shape[1]
    height, width = size / pair.grid[0], size / pair.grid[1]
    for number, (match, colour) in enumerate(zip(pair.matches, MATCHES, strict=False), 1):
        row, column = match.second if side else match.first
        corner = (column * width - 0.5, row * height - 0.5)
        for line, edge in ((4.5, "white"), (2.5, colour)):
            axis.add_patch(
                Rectangle(corner, width, height, fill=False, edgecolor=edge, linewidth=line)
            )
        axis.text(
            corner[0] + 0.12 * width, corner[1] + 0.12 * height, str(number), color="white",
            fontsize=9, fontweight="bold", va="top", ha="left", backgroundcolor=colour,
            bbox={"facecolor": colour, "edgecolor": "none", "pad": 1.5},
        )  # fmt: skip


def _overlay(axis: Any, image_SS3: NDArray[np.uint8], map_HW: NDArray, top: float) -> None:
    """A map in colour over the grey photograph: the further from 0, the less of it shows."""
    from matplotlib import colormaps

    size = image_SS3.shape[0]
    value = np.clip(_large(map_HW, size) / top, -1, 1)
    colour = colormaps[DIVERGING]((value + 1) / 2)[..., :3]
    grey = (image_SS3 @ np.array([0.299, 0.587, 0.114]))[..., None] / 255
    grey = 0.25 + 0.7 * grey.repeat(3, -1)
    weight = (0.85 * np.abs(value) ** 0.7)[..., None]
    axis.imshow(weight * colour + (1 - weight) * grey)
    _bare(axis)


def _large(map_HW: NDArray, size: int) -> NDArray[np.float32]:
    if map_HW.shape == (size, size):
        return np.asarray(map_HW, np.float32)
    return upsample(map_HW[None], size)[0]


def _bar(part: Any, axes: Any, top: float, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = part.colorbar(
        ScalarMappable(Normalize(-top, top), DIVERGING), ax=list(axes), shrink=0.75, aspect=22
    )
    bar.set_label(f"{label}\nless alike ←  → more alike", fontsize=8, color=GREY)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _photograph(axis: Any, image: NDArray[np.uint8]) -> None:
    axis.imshow(image)
    _bare(axis)


def _bare(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)


def _short(text: str, longest: int = 34) -> str:
    text = text if len(text) <= longest else "…" + text[-longest + 1 :]
    return text.replace("$", r"\$")  # two of them would be read as mathematics


def _save(figure: Any, out_png: Path) -> Path:
    with atomic_file(out_png) as temporary:
        figure.savefig(temporary, format="png")
    return out_png
