"""The page builder: one file, escaped, valid, and nothing that it would have to fetch."""

import base64
import io
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerray.errors import UserError
from flowerray.show import page as page_module
from flowerray.show.charts import curves, svg
from flowerray.show.page import (
    HEAVY,
    WIDTHS,
    Bold,
    Commands,
    Details,
    Note,
    Page,
    Picture,
    Pictures,
    Table,
    Text,
    _inline,
)
from flowerray.show.style import SERIES, SERIES_ON_DARK

VOID = {"meta", "link", "img", "br", "path", "use"}


class Reader(HTMLParser):
    """Tags with their attributes; fails where an end tag closes another element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.found if found == tag]


def check_page(text: str) -> Reader:
    """What holds for every page: self-contained, each picture described, ids used once."""
    reader = Reader(text)
    assert reader.all("script") == []
    for tag, attrs in reader.found:
        for name in ("src", "href", "xlink:href"):
            address = attrs.get(name) or "#"
            assert address.startswith(("#", "data:")), (tag, address)
        assert not any(name.startswith("on") for name in attrs)
    assert not re.search(r"url\((?!#)|@import", text)
    assert all(attrs["alt"] for attrs in reader.all("img"))
    assert all(a.get("aria-label") and a["role"] == "img" for a in reader.all("svg"))
    ids = [attrs["id"] for _, attrs in reader.found if "id" in attrs]
    assert len(ids) == len(set(ids))
    targets = [a["href"] for a in reader.all("a")]
    assert {f"#{i}" for i in ids} >= set(targets)
    return reader


def noise(width: int, height: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def stored(reader: Reader) -> list[Image.Image]:
    sources = [attrs["src"] or "" for attrs in reader.all("img")]
    return [Image.open(io.BytesIO(base64.b64decode(s.partition(",")[2]))) for s in sources]


def test_every_block(tmp_path: Path) -> None:
    small = tmp_path / "small.png"
    small.write_bytes(png(noise(20, 10)))
    chart = curves({"loss": {"a": [[(1, 0.5), (2, 0.25)], [(1, 0.7), (2, 0.35)]]}}, "epoch")
    page = Page("Flowers", "of `today`")
    page.section("Words", Text("one\n\ntwo"), Note("careful", "warn"), Note("by the way"))
    page.section("Numbers", Table(["name", "R@1"], [["a", 0.5]], "caption"), Commands("ls -l"))
    page.section(
        "Pictures",
        Pictures(Picture(small, "noise"), Picture(small.read_bytes(), "the same", "again")),
        Details("more", Picture(chart, "a curve"), Picture(svg(chart), "again"), Text("folded")),
    )
    out = page.write(tmp_path / "page.html")
    reader = check_page(out.read_text())
    for words in ("Flowers", "one", "two", "Warning:", "careful", "Note:", "0.500", "caption"):
        assert words in reader.text
    assert [image.size for image in stored(reader)] == [(20, 10)] * 2
    assert len(reader.all("svg")) == 2 and "<text" in out.read_text()
    assert len(reader.all("p")) == 2 + 2 + 1 + 1  # texts, notes, the folded one, the subtitle
    assert [file.name for file in tmp_path.iterdir() if file.suffix == ".html"] == ["page.html"]


def test_everything_is_escaped() -> None:
    bad = "<script>alert('&')</script>"
    page = Page(bad, bad).section(
        bad, Text(f"{bad} `{bad}`"), Note(bad), Commands(bad), Details(bad, Text(bad)),
        Table([bad, bad], [[bad, Bold(bad)]], bad), Picture(png(noise(2, 2)), f'"{bad}', bad),
    )  # fmt: skip
    page.section(bad, Picture("<svg></svg>", f'"{bad}'))
    reader = check_page(page.html())
    assert reader.text.count(bad) > 10
    assert reader.all("img")[0]["alt"] == f'"{bad}' == reader.all("svg")[0]["aria-label"]


def test_numbers_stand_right_and_missing_ones_are_a_dash() -> None:
    rows: list[list[str | float | None]] = [
        ["a", 1234, "0.91 [0.80, 0.95]", "x", Bold("0.5")],
        ["b", None, "−0.1", "1", float("nan")],
    ]
    table = Table(["", "n", "R@1", "words", "bold"], rows)
    assert table.numeric == [False, True, True, False, True]
    assert table.cells[0][1] == "1,234" and table.cells[1][1] == table.cells[1][4] == "–"
    reader = check_page(Page("t").section("s", table).html())
    assert [a.get("class") for a in reader.all("td")][:4] == ["number", "number", None, "number"]
    assert len(reader.all("strong")) == 1
    assert {"class": "interval"} in reader.all("span")
    assert Table(["a"], []).numeric == [False]
    words: list[list[str | float | None]] = [["1/255", "0.1.0", "10bee7", "< 0.001", "+0.5 [0, 1]"]]
    assert Table([*"abcde"], words).numeric == [True, False, False, True, True]


def test_chapters_nest_in_the_contents() -> None:
    page = Page("t").chapter("One").section("part").chapter("Two").section("part")
    text = page.html()
    reader = check_page(text)
    assert len(reader.all("h2")) == len(reader.all("h3")) == 2
    assert [a["class"] for a in reader.all("li")] == ["level2", "level3"] * 2
    flat = Reader(Page("t").section("One").html())
    assert len(flat.all("h2")) == 1 and flat.all("nav") == []


def test_heavy_and_wide_pictures_are_made_smaller() -> None:
    heavy, wide = png(noise(400, 300)), png(noise(WIDTHS[0] * 2, 4))
    assert len(heavy) > HEAVY
    page = Page("t").section("s", Picture(heavy, "heavy"), Picture(wide, "wide"))
    first, second = stored(check_page(page.html()))
    assert first.format == "JPEG" and first.size == (400, 300)
    assert second.size == (WIDTHS[0], 2)
    clear = png(Image.new("RGBA", (WIDTHS[0] + 1, 2), (0, 0, 0, 0)))
    (flat,) = stored(check_page(Page("t").section("s", Picture(clear, "clear")).html()))
    assert flat.convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def test_series_have_colours_for_light_and_dark() -> None:
    css = Page("t").section("s").html()
    for number, colours in enumerate(zip(SERIES, SERIES_ON_DARK, strict=True)):
        assert re.findall(rf"--c{number}: (#\w+);", css) == list(colours)


def test_a_page_stays_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_module, "MAX_BYTES", 200_000)
    page = Page("t").section("s", *(Picture(png(noise(1000, 700)), "noise") for _ in range(2)))
    text = page.html()
    assert len(text) < 400_000
    assert {image.width for image in stored(check_page(text))} == {WIDTHS[-1]}


def test_faults_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"none.png cannot be read"):
        Page("t").section("s", Picture(tmp_path / "none.png", "x")).html()
    with pytest.raises(UserError, match="cannot be read"):
        Page("t").section("s", Picture(b"no picture", "x")).html()
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written"):
        Page("t").section("s").write(tmp_path / "file" / "page.html")
    with pytest.raises(AssertionError, match="alternative"):
        Picture(b"", "")
    with pytest.raises(AssertionError, match="length"):
        Table(["a", "b"], [["only one"]])


def test_inlined_pictures_share_no_ids() -> None:
    svg = (
        '<?xml version="1.0"?><svg width="10pt"><defs><path id="m1" d="M0"/><clipPath id="m1-a"/>'
        '</defs><use xlink:href="#m1"/><g clip-path="url(#m1-a)"/><text>id="m1" #m1</text></svg>'
    )
    found = _inline(svg, "alt", "v7-")
    assert re.findall(r'<\w+ id="([^"]+)"', found) == ["v7-m1", "v7-m1-a"]
    assert 'xlink:href="#v7-m1"' in found and "url(#v7-m1-a)" in found
