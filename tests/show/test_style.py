"""One look: any text is readable, and pictures are written whole."""

import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from flowerray.show import style
from flowerray.show.style import font_runs, legend_below, panels, plain_axes, save, short

RARE = "\u20d2\u2460\U0001d538"
"""In STIX, which comes with matplotlib, and not all in DejaVu Sans."""


@pytest.fixture
def stix(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A machine with one font beside matplotlib's own."""
    path = str(Path(style._own_font()).with_name("STIXGeneral.ttf"))
    monkeypatch.setattr(style, "_installed", lambda: [path])
    style._font_of.cache_clear()
    yield path
    style._font_of.cache_clear()


def test_letters_come_from_a_font_that_has_them(stix: str) -> None:
    assert list(font_runs("pâquerette, Ромашка, μαργαρίτα")) == [
        (style._own_font(), "pâquerette, Ромашка, μαργαρίτα")
    ]
    assert list(font_runs("a\u20d2b")) == [
        (style._own_font(), "a"), (stix, "\u20d2"), (style._own_font(), "b"),
    ]  # fmt: skip
    ((path, _),) = font_runs("\U00013000")  # a hieroglyph
    assert path not in (stix, style._own_font())


def test_no_name_warns_or_is_read_as_mathematics(stix: str, tmp_path: Path) -> None:
    figure, ((axes,),) = panels(4, 3)
    names = ["a$b_c_d$", "雏菊 \U00013000", RARE, "plain"]
    axes.barh(names, range(4), label="_hidden")
    plain_axes(axes, names[0], *names[1:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figure, tmp_path / "new" / "a.png")
    assert [label.get_text() for label in axes.get_yticklabels()] == names
    assert not any(text.get_parse_math() for text in figure.findobj(Text) if text.get_text())
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["a.png"]
    with Image.open(tmp_path / "new" / "a.png") as image:
        assert image.size == (4 * style.DPI, 3 * style.DPI)
        assert np.asarray(image.convert("L")).min() < 60


def test_a_legend_says_everything_once() -> None:
    figure, grid = panels(4, 3, 1, 2)
    for axes in grid.flat:
        axes.plot([0, 1], label="a")
    grid[0, 1].plot([1, 0], label="b")
    legend_below(figure)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    empty, _ = panels(4, 3)
    legend_below(empty)
    assert empty.legends == []


def test_short_names() -> None:
    assert short("rose", 4) == "rose" and short("two\nlines") == r"two\nlines"
    assert short("chrysanthemum", 6) == "chrys…"
    assert short("folder/rose.jpg", 9, keep_end=True) == "…rose.jpg"
