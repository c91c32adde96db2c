"""Contact sheets: rows of groups of photographs with frames, marks and captions."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, ImageOps

from flowerray.data.images import decode, thumbnail
from flowerray.show.style import GREEN, GREY, INK, ORANGE, PAPER, font_runs, save
from flowerray.text import visible

TILE = 148
"""Pixels; each photograph's side."""
_GAP, _GROUP_GAP, _LINE, _FRAME = 10, 24, 18, 5
_EMPTY = "#eeeeee"


@dataclass(frozen=True)
class Tile:
    """One photograph."""

    picture: Path | NDArray[np.uint8]
    """A file, or square pixels HWC."""
    captions: tuple[str, ...] = ()
    """A line below it each."""
    right: bool | None = None
    """A green frame with a tick, an orange one with a cross, or neither."""


@dataclass(frozen=True)
class Group:
    """Photographs side by side under a heading."""

    heading: str
    """Folded into two lines and cut where it is wider than they are."""
    tiles: tuple[Tile, ...]


Row = Sequence[Group]


def contact_sheet(rows: Sequence[Row], out_png: Path, title: str = "", whole: bool = False) -> Path:
    """Writes `draw_sheet`.

    Raises:
        UserError: an image that cannot be read.
    """
    return save(draw_sheet(rows, title, whole), out_png)


def draw_sheet(rows: Sequence[Row], title: str = "", whole: bool = False) -> Image.Image:
    """Rows of groups one below the other; a row's n-th group stands below the n-th of the others.

    Args:
        whole: show files whole instead of the squares of their middle.

    Raises:
        UserError: an image that cannot be read.
    """
    assert rows, "a sheet without rows"
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    widths = [TILE] * max(map(len, rows))
    for row in rows:
        for column, group in enumerate(row):
            widths[column] = max(widths[column], len(group.tiles) * (TILE + _GAP) - _GAP)
    lefts = [_GAP + sum(w + _GROUP_GAP for w in widths[:n]) for n in range(len(widths))]
    headings = [
        [_folded(pen, g.heading, w) for g, w in zip(row, widths, strict=False)] for row in rows
    ]
    heads = [_LINE * max(map(len, row)) + 4 * any(row) for row in headings]
    tails = [_LINE * max(len(t.captions) for g in row for t in g.tiles) + _GAP for row in rows]
    top = _GAP + (_LINE + _GAP) * bool(title)
    size = lefts[-1] + widths[-1] + _GAP, top + sum(heads) + len(rows) * TILE + sum(tails)
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    _write(pen, (_GAP, _GAP), title, 15, INK, size[0] - 2 * _GAP)
    for row, lines_of, head, tail in zip(rows, headings, heads, tails, strict=True):
        for left, width, group, lines in zip(lefts, widths, row, lines_of, strict=False):
            for n, line in enumerate(lines):
                _write(pen, (left, top + n * _LINE), line, 14, INK, width)
            for column, tile in enumerate(group.tiles):
                place = left + column * (TILE + _GAP), top + head
                sheet.paste(_square(tile.picture, whole), place)
                if tile.right is not None:
                    _mark(pen, place, tile.right)
                for n, caption in enumerate(tile.captions):
                    below = place[0], place[1] + TILE + 2 + _LINE * n
                    _write(pen, below, caption, 13, GREY if n else INK, TILE)
        top += head + TILE + tail
    return sheet


def _square(picture: Path | NDArray[np.uint8], whole: bool) -> Image.Image:
    if isinstance(picture, Path):
        if not whole:
            return thumbnail(picture, TILE)
        return ImageOps.pad(decode(picture), (TILE, TILE), color=_EMPTY)
    return Image.fromarray(picture).resize((TILE, TILE), Image.Resampling.NEAREST)


def _mark(pen: ImageDraw.ImageDraw, place: tuple[int, int], right: bool) -> None:
    """A frame and, in the corner, a tick or a cross: not by colour alone, and drawn, since not
    every font has them.
    """
    (left, top), colour = place, GREEN if right else ORANGE
    end = left + TILE - 1
    pen.rectangle((left, top, end, top + TILE - 1), outline=colour, width=_FRAME)
    x = end - 25
    pen.rectangle((x, top, end, top + 25), fill=colour)
    if right:
        strokes = [[(x + 6, top + 13), (x + 11, top + 19), (x + 20, top + 6)]]
    else:
        strokes = [
            [(x + 7, top + 7), (x + 19, top + 19)],
            [(x + 7, top + 19), (x + 19, top + 7)],
        ]
    for stroke in strokes:
        pen.line(stroke, PAPER, 4, joint="curve")


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str, width: int
) -> None:
    """Text in one line, cut where it would be wider than that."""
    text = visible(text)
    while text and _length(pen, text, size) > width:
        text = text[:-2].rstrip("…") + "…"
    x, baseline = float(place[0]), place[1] + size
    for path, part in font_runs(text):
        pen.text((x, baseline), part, colour, _font(path, size), anchor="ls")
        x += pen.textlength(part, _font(path, size))


def _folded(pen: ImageDraw.ImageDraw, heading: str, width: int) -> list[str]:
    """A heading in at most two lines, parted at a space."""
    heading = visible(heading)
    if _length(pen, heading, 14) <= width:
        return [heading] if heading else []
    first, _, rest = heading.partition(" ")
    while rest and _length(pen, f"{first} {rest.partition(' ')[0]}", 14) <= width:
        word, _, rest = rest.partition(" ")
        first += f" {word}"
    return [first, rest] if rest else [first]


def _length(pen: ImageDraw.ImageDraw, text: str, size: int) -> float:
    return sum(pen.textlength(part, _font(path, size)) for path, part in font_runs(text))


@cache
def _font(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size)
