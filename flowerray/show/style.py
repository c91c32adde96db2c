"""The one look of everything that is drawn: colours, fonts, axes, and how a picture is saved."""

from collections.abc import Iterator, Sequence
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any

from PIL import Image

from flowerray.files import atomic_file
from flowerray.text import visible

INK, GREY, PALE, GRID, PAPER = "#222222", "#6b6b6b", "#b8b8b8", "#dddddd", "#ffffff"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"
"""Okabe and Ito's, which the colour-blind tell apart."""
SERIES = (BLUE, ORANGE, GREEN, "#b0528f", "#a07800", "#7a4bb0", "#3d8fc4", GREY)
"""One a curve, dark enough to be seen on white."""
SERIES_ON_DARK = (
    "#56b4e9", "#f08a4b", "#2fc79b", "#e08fc4", "#e6c34a", "#b99be8", "#9ad0f5", "#b5b5b5",
)  # fmt: skip
"""Their counterparts where a page is dark."""
MARKERS = "osD^vPX*"
DPI = 120


def panels(width: float, height: float, rows: int = 1, columns: int = 1, **more: Any) -> Any:
    """A figure of that size (inches) and its (rows, columns) array of axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI, layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def plain_axes(axes: Any, title: str = "", x_label: str = "", y_label: str = "") -> None:
    """Titles and a light grid, no frame."""
    axes.set_title(title, fontsize=11, color=INK, loc="left")
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(color=GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def legend_below(figure: Any, columns: int = 4) -> None:
    """One legend under the figure, each label once, also those that matplotlib hides for a "_"."""
    found: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    if found:
        width, height = figure.get_size_inches()
        figure.set_size_inches(width, height + 0.2 * (-(-len(found) // columns) - 1))
        figure.legend(
            found.values(), [short(label, 40) for label in found], loc="outside lower center",
            ncols=min(columns, len(found)), frameon=False, fontsize=9,
        )  # fmt: skip


def short(text: str, length: int = 24, keep_end: bool = False) -> str:
    """A name in one line of at most `length` characters."""
    text = visible(text)
    if len(text) <= length:
        return text
    return "…" + text[1 - length :] if keep_end else text[: length - 1] + "…"


def save(picture: Any, out_png: Path) -> Path:
    """Writes a matplotlib figure or a Pillow image, whole or not at all."""
    with atomic_file(out_png) as temporary:
        if isinstance(picture, Image.Image):
            picture.save(temporary, format="PNG")
        else:
            legible(picture)
            picture.savefig(temporary, format="png")
    return out_png


def legible(figure: Any) -> None:
    """Shows all text as it stands: "$" begins no mathematics, and what the usual font lacks comes
    from another one.
    """
    from matplotlib.font_manager import fontManager
    from matplotlib.text import Text

    for axes in figure.axes:  # by which tick labels come to be
        axes.get_xticklabels(), axes.get_yticklabels()
    for text in figure.findobj(Text):
        text.set_parse_math(False)
        needed = list(dict.fromkeys(_font_of(c) for c in text.get_text() if not c.isascii()))
        if needed and needed != [_own_font()]:
            known = {font.fname: font.name for font in fontManager.ttflist}
            for path in needed:
                if path not in known:
                    fontManager.addfont(path)
            known = {font.fname: font.name for font in fontManager.ttflist}
            text.set_fontfamily(["DejaVu Sans", *(known[path] for path in needed)])


def font_runs(text: str) -> Iterator[tuple[str, str]]:
    """Text in parts, each with the file of a font that has all its characters."""
    for path, part in groupby(text, _font_of):
        yield path, "".join(part)


@cache
def _font_of(character: str) -> str:
    """DejaVu Sans, else the first installed font that has the character, else boxes that name its
    script.
    """
    for path in (_own_font(), *_installed()):
        if ord(character) in _characters(path):
            return path
    last = Path(_own_font()).with_name("LastResortHE-Regular.ttf")
    return str(last) if last.exists() else _own_font()


@cache
def _own_font() -> str:
    import matplotlib

    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf")


@cache
def _installed() -> Sequence[str]:
    """Fonts of the system, the plain ones first."""
    from matplotlib.font_manager import findSystemFonts

    found = sorted(set(findSystemFonts()))
    return sorted(found, key=lambda path: ("Regular" not in path, "Sans" not in path))


@cache
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError, NotImplementedError):
        return frozenset()  # a bitmap font, or a damaged file
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
