"""Pictures of explanations.

Letters: N images, K concepts, M crops, H W S pixels or cells, P positions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from flowerray.explain.cam import upsample
from flowerray.show.charts import forest
from flowerray.show.contact import TILE, Group, Tile, contact_sheet
from flowerray.show.style import BLUE, DPI, GREY, INK, ORANGE, SERIES, save, short
from flowerray.statistics import Interval

DIVERGING = "PuOr_r"
"""Orange: more alike, purple: less alike; told apart by the colour-blind."""


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
    threshold: float | None
    """None: the picture gives no verdict."""
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
    size = (11, 3.6 + 1.45 * strips + (0.4 if strips else 0))
    figure = Figure(figsize=size, dpi=DPI, layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.3, 0.01 + 1.5 * strips])
    title = f"similarity {pair.similarity:.3f}"
    if pair.threshold is not None:
        same = pair.similarity >= pair.threshold
        verdict = "same class" if same else "different classes"
        title += f" {'≥' if same else '<'} threshold {pair.threshold:.3f}: {verdict}"
    figure.suptitle(title, color=INK, fontsize=14, fontweight="bold")
    axes = parts[0].subplots(1, 4)
    for side in range(2):
        _show(axes[side], pair.images_2SS3[side])
        _boxes(axes[side], pair, side)
        axes[side].set_title(short(pair.names[side], 34, keep_end=True), fontsize=10, color=INK)
    top = float(np.abs(pair.maps_2HW).max()) or 1.0
    for side in range(2):
        _show(axes[2 + side], _overlay(pair.images_2SS3[side], pair.maps_2HW[side], top))
        axes[2 + side].set_title(f"heat map of image {side + 1}", fontsize=10, color=INK)
    _bar(parts[0], axes[2:], top, pair.method)
    if pair.matches:
        text = "   ".join(f"{n}: {m.share:+.3f}" for n, m in enumerate(pair.matches, 1))
        axes[0].set_xlabel(f"regions that match   {text}", fontsize=9, color=GREY, x=1.05)
    else:
        axes[0].set_xlabel("no exact matching of regions", fontsize=9, color=GREY, x=1.05)
    if strips:
        _strips(parts[1], pair)
    return save(figure, out_png)


def overlays(pair: Pair) -> NDArray[np.uint8]:
    """Both heat maps over their images on one scale, (2, S, S, 3)."""
    top = float(np.abs(pair.maps_2HW).max()) or 1.0
    drawn = [_overlay(*one, top) for one in zip(pair.images_2SS3, pair.maps_2HW, strict=True)]
    return (np.stack(drawn) * 255).round().astype(np.uint8)


def draw_sheet(
    title: str,
    images_NSS3: NDArray[np.uint8],
    masks_NSS: NDArray[np.bool_] | None,
    columns: Mapping[str, NDArray[np.float32]],
    captions: Mapping[str, Sequence[str]],
    names: Sequence[str],
    out_png: Path,
) -> Path:
    """Images in rows, methods in columns; each map on its own scale, since methods differ in
    theirs.

    Args:
        columns: heading -> raw maps, one an image.
        captions: heading -> a line below each map.
        names: a line below each photograph.
    """
    rows = []
    for n, image_SS3 in enumerate(_tiles(images_NSS3)):
        first = image_SS3 if masks_NSS is None else _outlined(image_SS3, masks_NSS[n])
        groups = [("photograph" if masks_NSS is None else "photograph, mask", first, names[n])]
        for heading, maps_NHW in columns.items():
            top = float(np.abs(maps_NHW[n]).max()) or 1.0
            drawn = (_overlay(image_SS3, maps_NHW[n], top) * 255).round().astype(np.uint8)
            groups.append((heading, drawn, captions[heading][n]))
        rows.append([Group("" if n else h, (Tile(tile, (below,)),)) for h, tile, below in groups])
    return contact_sheet(rows, out_png, title)


def draw_scores(
    title: str,
    table: Mapping[str, Mapping[str, Interval]],
    labels: Mapping[str, str],
    out_png: Path,
) -> Path:
    """Each metric's means with 95 % intervals, methods from top to bottom, the first one marked."""
    first = next(iter(table))
    colours = {name: ORANGE if name == first else BLUE for name in table}
    content = {
        label: {name: row[metric] for name, row in table.items()}
        for metric, label in labels.items()
    }
    figure = forest(content, colours)
    for axes, metric in zip(figure.axes, labels, strict=False):
        axes.axvline(table[first][metric].mean, color=ORANGE, linewidth=0.6, alpha=0.6)
    figure.suptitle(title, fontsize=11, color=INK)
    return save(figure, out_png)


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
            _show(line[1 + side], _overlay(pair.images_2SS3[side], strip.maps_2HW[side], top))
        for axis, crop in zip(line[3:], strip.crops_MSS3, strict=True):
            _show(axis, crop)


def _boxes(axis: Any, pair: Pair, side: int) -> None:
    from matplotlib.patches import Rectangle

    size = pair.images_2SS3.shape[1]
    height, width = size / pair.grid[0], size / pair.grid[1]
    for number, (match, colour) in enumerate(zip(pair.matches, SERIES, strict=False), 1):
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


def _overlay(image_SS3: NDArray[np.uint8], map_HW: NDArray, top: float) -> NDArray[np.float64]:
    """A map in colour over the grey photograph, 0..1: the nearer to 0, the less of it shows."""
    from matplotlib import colormaps

    value = np.clip(_large(map_HW, image_SS3.shape[0]) / top, -1, 1)
    colour = colormaps[DIVERGING]((value + 1) / 2)[..., :3]
    grey = (image_SS3 @ np.array([0.299, 0.587, 0.114]))[..., None] / 255
    grey = 0.25 + 0.7 * grey.repeat(3, -1)
    weight = (0.85 * np.abs(value) ** 0.7)[..., None]
    return weight * colour + (1 - weight) * grey


def _large(map_HW: NDArray, size: int) -> NDArray[np.float32]:
    if map_HW.shape == (size, size):
        return np.asarray(map_HW, np.float32)
    return upsample(map_HW[None], size)[0]


def _tiles(images_NSS3: NDArray[np.uint8]) -> list[NDArray[np.uint8]]:
    """Photographs of a contact sheet's size."""
    size = (TILE, TILE)
    return [np.asarray(Image.fromarray(i).resize(size, Image.Resampling.BICUBIC))
            for i in images_NSS3]  # fmt: skip


def _outlined(image_SS3: NDArray[np.uint8], mask_HW: NDArray[np.bool_]) -> NDArray[np.uint8]:
    """The photograph with the mask's outline, dark within white."""
    size = image_SS3.shape[:2]
    mask = Image.fromarray(mask_HW).resize(size, Image.Resampling.NEAREST).convert("L")
    inside, wide = (np.asarray(mask.filter(ImageFilter.MinFilter(n))) > 0 for n in (3, 7))
    image = image_SS3.copy()
    image[(np.asarray(mask) > 0) & ~wide] = 255
    image[inside & ~(np.asarray(mask.filter(ImageFilter.MinFilter(5))) > 0)] = 34
    return image


def _bar(part: Any, axes: Any, top: float, label: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    bar = part.colorbar(
        ScalarMappable(Normalize(-top, top), DIVERGING), ax=list(axes), shrink=0.75, aspect=22
    )
    bar.set_label(f"{label}\nless alike ←  → more alike", fontsize=8, color=GREY)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_visible(False)


def _show(axis: Any, image: NDArray) -> None:
    axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.spines[:].set_visible(False)
