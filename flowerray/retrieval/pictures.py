"""Contact sheets of retrieval: each query with its neighbours, right and wrong ones told apart."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from flowerray.data.images import thumbnail
from flowerray.errors import UserError
from flowerray.files import atomic_file
from flowerray.retrieval.measure import Measurement

_TILE = 148
_FRAME = 5
_GAP = 10
_CAPTION = 40
_HEADER = 26
_INK, _PAPER, _GREY = (34, 34, 34), (255, 255, 255), (150, 150, 150)
# Close to Okabe and Ito's bluish green and vermillion, which the colour-blind can tell apart; the
# marks say the same once more.
_SAME, _OTHER = (0, 140, 100), (205, 70, 0)


@dataclass(frozen=True)
class Neighbour:
    """One image that was found."""

    path: Path
    class_name: str
    similarity: float
    """Cosine, -1..1."""


@dataclass(frozen=True)
class SheetRow:
    """A query and what was found for it, nearest first."""

    path: Path
    class_name: str | None
    """None where the query's class is not known: nothing is then right or wrong."""
    neighbours: tuple[Neighbour, ...]


def measurement_rows(
    measurement: Measurement, count: int = 8, top: int = 8, seed: int = 0
) -> list[SheetRow]:
    """A seeded draw of queries, half of them with a wrong nearest neighbour as far as there are."""
    hit = measurement.per_query["hit"]
    rng = np.random.default_rng(seed)
    counted = measurement.per_query["num_relevant"] > 0
    wrong = rng.permutation(np.flatnonzero(counted & ~hit))
    right = rng.permutation(np.flatnonzero(counted & hit))
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    chosen = [*wrong[:num_wrong], *right[: count - num_wrong]]
    return [_measured_row(measurement, int(query), top) for query in chosen]


def _measured_row(measurement: Measurement, query: int, top: int) -> SheetRow:
    names, emb = measurement.classes, measurement.query_emb[query].astype(np.float64)
    found = []
    for index in measurement.per_query["nearest"][query, :top]:
        if index < 0:
            break
        other = measurement.gallery_emb[index].astype(np.float64)
        cosine = emb @ other / max(np.linalg.norm(emb) * np.linalg.norm(other), 1e-12)
        class_name = names[measurement.gallery_labels[index]]
        found.append(Neighbour(measurement.gallery_paths[index], class_name, float(cosine)))
    class_name = names[measurement.query_labels[query]]
    return SheetRow(measurement.query_paths[query], class_name, tuple(found))


def retrieval_sheet(rows: Sequence[SheetRow], out_png: Path) -> Path:
    """Writes one line a query: the query, then its neighbours with rank, class and similarity.

    A neighbour of the query's class has a green frame and a tick, another a red frame and a cross.

    Raises:
        UserError: no rows, or an image that cannot be read.
    """
    if not rows:
        raise UserError("There is nothing to draw: the retrieval sheet needs at least one query.")
    columns = max(len(row.neighbours) for row in rows)
    step, height = _TILE + _GAP, _TILE + _CAPTION + _GAP
    indent = step + 2 * _GAP  # the queries stand apart
    size = (indent + columns * step + _GAP, _HEADER + len(rows) * height + _GAP)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    small, bold = ImageFont.load_default(13), ImageFont.load_default(15)
    draw.text((_GAP, 6), "query", _INK, bold)
    for rank in range(columns):
        draw.text((indent + rank * step, 6), f"{rank + 1}", _INK, bold)
    draw.line([(step + _GAP, 8), (step + _GAP, size[1] - _GAP)], _GREY)
    for line, row in enumerate(rows):
        top = _HEADER + line * height
        name = row.class_name or "class unknown"
        _tile(sheet, draw, (_GAP, top), row.path, _GREY, [name, row.path.name], small)
        for rank, found in enumerate(row.neighbours):
            place = (indent + rank * step, top)
            caption = [found.class_name, f"{found.similarity:.3f}"]
            same = None if row.class_name is None else row.class_name == found.class_name
            colour = _GREY if same is None else _SAME if same else _OTHER
            _tile(sheet, draw, place, found.path, colour, caption, small)
            if same is not None:
                _mark(draw, (place[0] + _TILE, top), same)
    with atomic_file(out_png) as temporary:
        sheet.save(temporary, format="PNG")
    return out_png


def _tile(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    place: tuple[int, int],
    path: Path,
    colour: tuple[int, int, int],
    caption: list[str],
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
) -> None:
    left, top = place
    sheet.paste(thumbnail(path, _TILE), place)
    draw.rectangle((left, top, left + _TILE - 1, top + _TILE - 1), outline=colour, width=_FRAME)
    for line, written in enumerate(caption):
        text = "".join(c if c.isprintable() else "?" for c in written)
        while draw.textlength(text, font) > _TILE:
            text = text[:-2].rstrip("…") + "…"
        draw.text((left, top + _TILE + 3 + 17 * line), text, _INK, font)


def _mark(draw: ImageDraw.ImageDraw, corner: tuple[int, int], same: bool) -> None:
    """A tick or a cross in the upper right corner, drawn, since not every font has them."""
    right, top = corner
    x, y = right - 26, top
    draw.rectangle((x, y, right - 1, y + 25), fill=_SAME if same else _OTHER)
    if same:
        draw.line([(x + 6, y + 13), (x + 11, y + 19), (x + 20, y + 6)], _PAPER, 4, joint="curve")
    else:
        draw.line([(x + 7, y + 7), (x + 19, y + 19)], _PAPER, 4)
        draw.line([(x + 7, y + 19), (x + 19, y + 7)], _PAPER, 4)
