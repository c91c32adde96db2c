"""One self-contained HTML page, built from blocks: `explore` and `report` write theirs with it.

A page opens from disk without a network: styles and pictures are inside, there is no script. All
text is escaped, and words between backticks are set as code.
"""

import base64
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Literal

from flowerray.errors import UserError
from flowerray.files import atomic_file, writing
from flowerray.show.charts import svg
from flowerray.show.interval import MISSING
from flowerray.show.style import SERIES, SERIES_ON_DARK
from flowerray.text import visible

WIDTHS = (1800, 1000, 600, 320)
"""Pixels; wider pictures are scaled down to the first, or to the next where the page is too big."""
MAX_BYTES = 4_800_000
"""Of a page."""
WIDE = 700
"""Pixels; what is wider is not shrunk to a phone's width but scrolls in its own box."""
HEAVY = 150_000
"""Bytes; heavier bitmaps are stored again as JPEG where that is smaller."""
_NUMBER = re.compile(r"^[+−-]?[\d,]*\.?\d+(?![\w.])|^<|^(nan|inf)$")
_INTERVAL = re.compile(r"^([^\s\[]+) (\[[^\]]+\])")
_CODE = re.compile(r"`([^`]+)`")


class Bold(str):
    """A table's cell that stands out."""

    bold = True


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by an empty line."""

    text: str


@dataclass(frozen=True)
class Note:
    """A box that is seen first: "info" or "warn"."""

    text: str
    level: Literal["info", "warn"] = "info"


@dataclass(frozen=True)
class Commands:
    """Lines for a terminal, or other text as it is."""

    code: str


@dataclass(frozen=True)
class Table:
    """A header and rows; a row's first cell names it, columns of numbers stand right.

    Floats get three decimals, None and NaN a dash.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    caption: str = ""

    def __post_init__(self) -> None:
        assert all(len(row) == len(self.header) for row in self.rows), "a row of another length"

    @property
    def cells(self) -> list[list[str]]:
        """The rows as text."""
        return [[_cell(value) for value in row] for row in self.rows]

    @property
    def numeric(self) -> list[bool]:
        """For each column, whether every value in it starts with a number."""
        columns = list(zip(*self.cells, strict=True)) or [()] * len(self.header)
        return [
            bool(column) and all(_NUMBER.match(cell) for cell in column if cell != MISSING)
            for column in columns
        ]


@dataclass(frozen=True)
class Picture:
    """An image file, the bytes of one, a matplotlib figure, or SVG text of one (`charts.svg`)."""

    source: Any
    alt: str
    """What it shows, for those who do not see it."""
    caption: str = ""

    def __post_init__(self) -> None:
        assert self.alt, "a picture needs an alternative text"


class Pictures:
    """Pictures side by side, as many in a row as fit."""

    def __init__(self, *pictures: Picture, width: int = 220) -> None:
        self.pictures = pictures
        self.width = width
        """Least width of one, in CSS pixels."""


class Details:
    """Blocks that are folded away under a summary, until asked for."""

    def __init__(self, summary: str, *blocks: "Block") -> None:
        self.summary = summary
        self.blocks = blocks


Block = Text | Note | Commands | Table | Picture | Pictures | Details


class Page:
    """A page in the making: `Page("Title").section("One", Text("...")).write(path)`."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[tuple[str, tuple[Block, ...], int]] = []
        self._level = 2
        """Of the next section's heading; 3 within a chapter."""

    def chapter(self, title: str, *blocks: Block) -> "Page":
        """Begins a chapter: the sections that follow belong to it."""
        self._sections.append((title, blocks, 2))
        self._level = 3
        return self

    def section(self, title: str, *blocks: Block) -> "Page":
        """Adds a section."""
        self._sections.append((title, blocks, self._level))
        return self

    def html(self) -> str:
        """The page as text.

        Raises:
            UserError: a picture that cannot be read.
        """
        text, drawn = "", cache(svg)
        for width in WIDTHS:
            text = self._render(width, drawn)
            if len(text.encode()) <= MAX_BYTES:
                break
        return text

    def _render(self, width: int, drawn: Callable[[Any], str]) -> str:
        numbers = count()

        def figure(picture: Picture) -> Any:
            return _figure(picture, next(numbers), width, drawn)

        css = _environment().loader.get_source(_environment(), "page.css")[0]
        light, dark = (
            " ".join(f"--c{n}: {colour};" for n, colour in enumerate(colours))
            for colours in (SERIES, SERIES_ON_DARK)
        )
        series = (
            f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
        )
        template = _environment().get_template("page.html.j2")
        return template.render(
            title=visible(self.title), subtitle=visible(self.subtitle), sections=self._sections,
            css=f"{series}\n{css}", figure=figure,
        )  # fmt: skip

    def write(self, path: Path) -> Path:
        """Writes the page.

        Raises:
            UserError: a picture that cannot be read, or a place that cannot be written.
        """
        text = self.html()
        with writing(path), atomic_file(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
        return path


@cache
def _environment() -> Any:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("flowerray.show", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["prose"] = _prose
    environment.filters["cell"] = _interval
    return environment


def _prose(text: str) -> Any:
    """Escaped text; words between backticks as code."""
    from markupsafe import Markup, escape

    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(visible(text)))))


def _interval(text: str) -> Any:
    """A cell's text; an interval behind a number stands below it, small."""
    from markupsafe import Markup

    return Markup(_INTERVAL.sub(r'\1 <span class="interval">\2</span>', str(_prose(text))))


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return MISSING
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _figure(picture: Picture, number: int, most: int, drawn: Callable[[Any], str]) -> Any:
    """The picture's element: inline SVG, or an image, not wider than that, in a data address."""
    from markupsafe import Markup, escape

    source = picture.source
    if not isinstance(source, Path | bytes):
        text = source if isinstance(source, str) else drawn(source)
        return Markup(_inline(text, str(escape(picture.alt)), f"v{number}-"))
    data, kind, (width, height) = _bitmap(source, most)
    address = f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    wide = ' class="wide"' if width > WIDE else ""
    return Markup('<img{} src="{}" width="{}" height="{}" alt="{}">').format(
        Markup(wide), address, width, height, picture.alt
    )


def _inline(svg: str, alt: str, prefix: str) -> str:
    """The `svg` element alone, its ids made the page's only ones."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r'(\bid="|href="#|url\(#)(?=[^")]+["\)])', rf"\g<1>{prefix}", body)
    found = re.search(r'width="([\d.]+)(pt)?"', body)
    points = float(found[1]) * (4 / 3 if found[2] else 1) if found else 0
    wide = ' class="wide"' if points > WIDE else ""
    return body.replace("<svg", f'<svg{wide} role="img" aria-label="{alt}"', 1)


def _bitmap(source: Path | bytes, most: int) -> tuple[bytes, str, tuple[int, int]]:
    """A bitmap's bytes, kind and size; made smaller where it is wider or heavy."""
    from PIL import Image

    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind, size = (image.format or "png").lower(), image.size
            if len(data) <= HEAVY and size[0] <= most and kind in ("png", "jpeg", "webp"):
                return data, kind, size
            smaller = image.convert("RGBA")
    except OSError as error:
        raise UserError(f"{source!s:.100} cannot be read as a picture: {error}.") from error
    smaller.thumbnail((most, 20 * most))
    paper = Image.new("RGB", smaller.size, "white")
    paper.paste(smaller, mask=smaller.getchannel("A"))
    buffer = io.BytesIO()
    paper.save(buffer, "JPEG", quality=85, optimize=True)
    if kind in ("png", "jpeg", "webp") and size == paper.size and len(data) <= buffer.tell():
        return data, kind, size
    return buffer.getvalue(), "jpeg", paper.size
