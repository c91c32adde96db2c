"""Robustness as pictures: R@1 over the radius, and the queries that fell.

Letters: C H W an image, K neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowerray.data.images import thumbnail
from flowerray.files import atomic_file
from flowerray.show.style import BLUE, GREEN, GRID, INK, ORANGE

MAGNIFIED = 10
"""Times that a perturbation is enlarged in the picture, around mid-grey."""
_TILE, _GAP, _CAPTION, _HEAD = 150, 10, 24, 50
_INK, _PAPER, _GREY = (34, 34, 34), (255, 255, 255), (150, 150, 150)
_SAME, _OTHER = (0, 140, 100), (205, 70, 0)


def plot_robustness(results: dict[str, dict[str, Any]], title: str, out_png: Path) -> Path:
    """R@1 of the worst case over the radius, with its 95 % band, one line a model.

    Args:
        results: name -> a record of robustness.json (`worst_case`, `attacks`, `audit`); the first
            is the model itself, whose single attacks are drawn thin.
        title: over the picture.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=120, layout="constrained")
    axes = figure.subplots()
    positions: dict[str, int] = {}
    for record in results.values():
        for eps in record["worst_case"]:
            positions.setdefault(eps, len(positions))
    for number, (name, record) in enumerate(results.items()):
        colour = (BLUE, ORANGE, GREEN)[number % 3]
        worst = record["worst_case"]
        x = [positions[eps] for eps in worst]
        failed = (record.get("audit") or {}).get("failed")
        label = f"{name}: AUDIT FAILED" if failed else name
        axes.plot(
            x, [w["recall_at_1"] for w in worst.values()],
            color=colour, marker="os^"[number % 3], linewidth=2.0, markersize=5, label=label,
        )  # fmt: skip
        low, high = np.array([w["ci"] for w in worst.values()], float).T
        axes.fill_between(x, low, high, color=colour, alpha=0.18, linewidth=0)
        if number == 0 and record["rows"] == "independent":
            for scores in record["attacks"].values():
                axes.plot(
                    [positions[eps] for eps in scores],
                    [score["recall_at_1"] for score in scores.values()],
                    color=colour, alpha=0.4, linewidth=0.8, linestyle="--",
                )  # fmt: skip
    axes.set_xticks(range(len(positions)), list(positions))
    axes.set_xlabel("largest change, in 1/255")
    axes.set_ylabel("R@1, worst case over the attacks")
    axes.set_ylim(-0.02, 1.02)
    axes.set_title(title, fontsize=10, color=INK, loc="left")
    axes.grid(color=GRID, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out_png) as temporary:
        figure.savefig(temporary, format="png")
    return out_png


@dataclass(frozen=True)
class Fallen:
    """A query that was right as a photograph and wrong after an attack."""

    class_name: str
    attack: str
    clean_CHW: np.ndarray
    """Pixels in [0,1]."""
    adversarial_CHW: np.ndarray
    before: Sequence[tuple[Path, str]]
    """File and class of the photograph's neighbours, nearest first."""
    after: Sequence[tuple[Path, str]]


def worst_sheet(rows: Sequence[Fallen], title: str, out_png: Path) -> Path:
    """One line a query: photograph, perturbation enlarged, adversarial image, neighbours before and
    after. Right neighbours have a green frame and a tick, wrong ones a red frame and a cross.
    """
    assert rows
    shown = max(len(row.before) for row in rows)
    step, height = _TILE + _GAP, _TILE + _CAPTION + _GAP
    lefts = [_GAP + column * step for column in range(3)]
    before = _GAP + 3 * step + 2 * _GAP
    after = before + shown * step + 2 * _GAP
    size = (after + shown * step, _HEAD + len(rows) * height + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    small, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    draw.text((_GAP, 6), title, _INK, bold)
    heads = ("query", f"change x{MAGNIFIED}", "attacked query")
    for left, text in [*zip(lefts, heads, strict=True), (before, "neighbours before"),
                       (after, "neighbours after")]:  # fmt: skip
        draw.text((left, 28), text, _INK, small)
    for line, row in enumerate(rows):
        top = _HEAD + line * height
        change = (row.adversarial_CHW - row.clean_CHW) * MAGNIFIED + 0.5
        pictures = (row.clean_CHW, change, row.adversarial_CHW)
        captions = (row.class_name, "", f"by {row.attack}")
        for left, picture, caption in zip(lefts, pictures, captions, strict=True):
            sheet.paste(_pixels(picture), (left, top))
            draw.text((left, top + _TILE + 3), _short(draw, caption, small), _INK, small)
        for start, found in ((before, row.before), (after, row.after)):
            for rank, (path, class_name) in enumerate(found[:shown]):
                left, same = start + rank * step, class_name == row.class_name
                sheet.paste(thumbnail(path, _TILE), (left, top))
                _frame(draw, left, top, same)
                text = _short(draw, class_name, small)
                draw.text((left, top + _TILE + 3), text, _INK, small)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out_png) as temporary:
        sheet.save(temporary, format="PNG")
    return out_png


def _pixels(image_CHW: np.ndarray) -> Image.Image:
    pixels_HWC = (image_CHW.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels_HWC).resize((_TILE, _TILE), Image.Resampling.NEAREST)


def _short(
    draw: ImageDraw.ImageDraw, text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> str:
    while draw.textlength(text, font) > _TILE:
        text = text[:-2].rstrip("…") + "…"
    return text


def _frame(draw: ImageDraw.ImageDraw, left: int, top: int, same: bool) -> None:
    """A frame and, in the corner, a tick or a cross: not by colour alone."""
    colour = _SAME if same else _OTHER
    right, bottom = left + _TILE - 1, top + _TILE - 1
    draw.rectangle((left, top, right, bottom), outline=colour, width=5)
    x = right - 25
    draw.rectangle((x, top, right, top + 25), fill=colour)
    if same:
        draw.line([(x + 6, top + 13), (x + 11, top + 19), (x + 20, top + 6)], _PAPER, 4)
    else:
        draw.line([(x + 7, top + 7), (x + 19, top + 19)], _PAPER, 4)
        draw.line([(x + 7, top + 19), (x + 19, top + 7)], _PAPER, 4)
