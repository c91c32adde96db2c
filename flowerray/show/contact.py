"""Contact sheets: groups of photographs under headings."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from flowerray.data.images import decode
from flowerray.files import atomic_file

_TILE, _GAP, _PART_GAP = 120, 8, 20  # pixels
_HEADING, _CAPTION = 24, 18
_INK, _FAINT, _PAPER, _EMPTY = (34,) * 3, (110,) * 3, (255,) * 3, (238,) * 3


@dataclass(frozen=True)
class Tile:
    """One photograph."""

    path: Path
    caption: str = ""


@dataclass(frozen=True)
class Group:
    """Photographs side by side under a heading."""

    heading: str
    tiles: tuple[Tile, ...]


def contact_sheet(rows: Sequence[Sequence[Group]], out_png: Path) -> Path:
    """Draws rows of groups one below the other, whole images in squares.

    Raises:
        UserError: an image that cannot be read.
    """
    assert rows, "a sheet without rows"
    font, bold = ImageFont.load_default(12), ImageFont.load_default(14)
    captions = any(tile.caption for row in rows for group in row for tile in group.tiles)
    height = _HEADING + _TILE + _CAPTION * captions + 2 * _GAP
    width = _GAP + max(sum(map(_width, row)) for row in rows) - _PART_GAP
    sheet = Image.new("RGB", (width, len(rows) * height + _GAP), _PAPER)
    draw = ImageDraw.Draw(sheet)
    for line, row in enumerate(rows):
        left, top = _GAP, _GAP + line * height
        for group in row:
            _write(draw, (left, top), group.heading, bold, _INK, _width(group) - _PART_GAP)
            for column, tile in enumerate(group.tiles):
                place = left + column * (_TILE + _GAP), top + _HEADING
                picture = ImageOps.pad(decode(tile.path), (_TILE, _TILE), color=_EMPTY)
                sheet.paste(picture, place)
                place = place[0], place[1] + _TILE + 2
                _write(draw, place, tile.caption, font, _FAINT, _TILE)
            left += _width(group)
    with atomic_file(out_png) as temporary:
        sheet.save(temporary, format="PNG")
    return out_png


def _width(group: Group) -> int:
    """Of a group and the gap after it; a heading needs the room of two photographs."""
    return max(2, len(group.tiles)) * (_TILE + _GAP) + _PART_GAP


def _write(
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """Text, cut where it would be wider than that."""
    while text and draw.textlength(text, font) > width:
        text = text[:-2].rstrip("…") + "…"
    draw.text(place, text, colour, font)
