"""One self-contained HTML page, built from blocks: `explore` and `report` write theirs with it.

A page opens from disk without a network: styles and pictures are inside, there is no script. All
text is escaped, and words between backticks are set as code.
"""

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from flowerray.errors import UserError
from flowerray.files import atomic_file, writing

MAX_WIDTH = 1800
"""Pixels; wider pictures are scaled down to it."""
WIDE = 700
"""Pixels; what is wider is not shrunk to a phone's width but scrolls in its own box."""
HEAVY = 150_000
"""Bytes; heavier bitmaps are stored again as JPEG where that is smaller."""
_NUMBER = re.compile(r"^[+−-]?[\d,]*\.?\d+(?![\w.])|^<|^(nan|inf)$")
_INTERVAL = re.compile(r"^([^\s\[]+) (\[[^\]]+\])")
_CODE = re.compile(r"`([^`]+)`")
_EMPTY = "–"


class Bold(str):
    """A table's cell that stands out."""

    bold = True


@dataclass(frozen=True)
class Text:
    """Paragraphs, parted by an empty line."""

    text: str
    kind: Literal["text"] = "text"

    @property
    def paragraphs(self) -> list[str]:
        """The text's paragraphs."""
        return [part for part in self.text.split("\n\n") if part.strip()]


@dataclass(frozen=True)
class Note:
    """A box that is seen first: "info" or "warn"."""

    text: str
    level: Literal["info", "warn"] = "info"
    kind: Literal["note"] = "note"


@dataclass(frozen=True)
class Commands:
    """Lines for a terminal, or other text as it is."""

    code: str
    kind: Literal["commands"] = "commands"


@dataclass(frozen=True)
class Table:
    """A header and rows; a row's first cell names it, columns of numbers stand right.

    Floats get three decimals, None and NaN a dash.
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str | float | None]]
    caption: str = ""
    kind: Literal["table"] = "table"

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
        filled = [[cell for cell in column if cell != _EMPTY] for column in columns]
        return [bool(column) and all(map(_NUMBER.match, column)) for column in filled]


@dataclass(frozen=True)
class Picture:
    """An image file, the bytes of one, or SVG text of our own making (`charts.svg`)."""

    source: Path | bytes | str
    alt: str
    """What it shows, for those who do not see it."""
    caption: str = ""
    kind: Literal["picture"] = "picture"

    def __post_init__(self) -> None:
        assert self.alt, "a picture needs an alternative text"


class Pictures:
    """Pictures side by side, as many in a row as fit."""

    kind = "pictures"

    def __init__(self, *pictures: Picture, width: int = 220) -> None:
        self.pictures = pictures
        self.width = width
        """Least width of one, in CSS pixels."""


class Details:
    """Blocks that are folded away under a summary, until asked for."""

    kind = "details"

    def __init__(self, summary: str, *blocks: "Block") -> None:
        self.summary = summary
        self.blocks = blocks


Block = Text | Note | Commands | Table | Picture | Pictures | Details


@dataclass(frozen=True)
class _Section:
    title: str
    blocks: tuple[Block, ...]
    level: int
    """Of its heading, 2 or 3."""
    anchor: str


class Page:
    """A page in the making: `Page("Title").section("One", Text("...")).write(path)`."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title = title
        self.subtitle = subtitle
        self._sections: list[_Section] = []
        self._in_chapter = False

    def chapter(self, title: str, *blocks: Block) -> "Page":
        """Begins a chapter: the sections that follow belong to it."""
        self._in_chapter = True
        return self._add(title, blocks, 2)

    def section(self, title: str, *blocks: Block) -> "Page":
        """Adds a section."""
        return self._add(title, blocks, 3 if self._in_chapter else 2)

    def _add(self, title: str, blocks: tuple[Block, ...], level: int) -> "Page":
        self._sections.append(_Section(title, blocks, level, f"s{len(self._sections) + 1}"))
        return self

    def html(self) -> str:
        """The page as text.

        Raises:
            UserError: a picture that cannot be read.
        """
        numbers = iter(range(10**6))

        def figure(picture: Picture) -> Any:
            return _figure(picture, next(numbers))

        css = _environment().loader.get_source(_environment(), "page.css")[0]
        template = _environment().get_template("page.html.j2")
        return template.render(
            title=self.title, subtitle=self.subtitle, sections=self._sections, css=css,
            figure=figure,
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

    return Markup(_CODE.sub(r"<code>\1</code>", str(escape(text))))


def _interval(text: str) -> Any:
    """A cell's text; an interval behind a number stands below it, small."""
    from markupsafe import Markup

    return Markup(_INTERVAL.sub(r'\1 <span class="interval">\2</span>', str(_prose(text))))


def _cell(value: str | float | None) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        return _EMPTY
    return f"{value:,}" if isinstance(value, int) else f"{value:.3f}"


def _figure(picture: Picture, number: int) -> Any:
    """The picture's element: inline SVG, or an image inside a data address."""
    from markupsafe import Markup, escape

    if isinstance(picture.source, str):
        return Markup(_inline(picture.source, str(escape(picture.alt)), f"v{number}-"))
    data, kind, (width, height) = _bitmap(picture.source)
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


def _bitmap(source: Path | bytes) -> tuple[bytes, str, tuple[int, int]]:
    """A bitmap's bytes, kind and size; made smaller where it is wide or heavy."""
    from PIL import Image

    try:
        data = source if isinstance(source, bytes) else source.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind, size = (image.format or "png").lower(), image.size
            if len(data) <= HEAVY and size[0] <= MAX_WIDTH and kind in ("png", "jpeg", "webp"):
                return data, kind, size
            smaller = image.convert("RGBA")
    except OSError as error:
        raise UserError(f"{source!s:.100} cannot be read as a picture: {error}.") from error
    smaller.thumbnail((MAX_WIDTH, 20 * MAX_WIDTH))
    paper = Image.new("RGB", smaller.size, "white")
    paper.paste(smaller, mask=smaller.getchannel("A"))
    buffer = io.BytesIO()
    paper.save(buffer, "JPEG", quality=85, optimize=True)
    if kind in ("png", "jpeg", "webp") and size == paper.size and len(data) <= buffer.tell():
        return data, kind, size
    return buffer.getvalue(), "jpeg", paper.size
