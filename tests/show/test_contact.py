"""Contact sheets keep every photograph in its place and tell right from wrong."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerray.errors import UserError
from flowerray.show.contact import TILE, Group, Tile, contact_sheet, draw_sheet
from flowerray.show.style import GREEN, ORANGE


def colour(path: Path, rgb: tuple[int, int, int], size: tuple[int, int]) -> Tile:
    Image.new("RGB", size, rgb).save(path)
    return Tile(path, (path.name * 9,))


def spots(pixels: np.ndarray, colour: str) -> np.ndarray:
    rgb = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (pixels == rgb).all(axis=2)


def test_rows_of_groups(tmp_path: Path) -> None:
    red = colour(tmp_path / "r.png", (255, 0, 0), (60, 30))
    blue = colour(tmp_path / "b.png", (0, 0, 255), (30, 60))
    rows = [[Group("first " * 40, (red, blue)), Group("second", (blue,))], [Group("", (red,))]]
    with Image.open(contact_sheet(rows, tmp_path / "sheet.png", whole=True)) as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    is_red, is_blue = spots(pixels, "#ff0000"), spots(pixels, "#0000ff")
    # The wide one fills a tile's width, the tall one its height, each is there twice and whole.
    assert is_red.sum() == is_blue.sum() == 2 * TILE * TILE // 2
    middle = len(pixels) // 2
    top, bottom = is_red[:middle], is_red[middle:]
    assert top.sum() == bottom.sum()
    assert np.flatnonzero(top.any(0)).tolist() == np.flatnonzero(bottom.any(0)).tolist()
    assert np.flatnonzero(is_blue.any(0))[0] > np.flatnonzero(top.any(0))[-1]
    ink = np.flatnonzero(pixels[:24].min(axis=(0, 2)) < 120)  # the first line of text
    gap = np.diff(ink).argmax()
    assert ink[gap] < 10 + 2 * TILE + 10 < ink[gap + 1]  # the long heading is cut
    with Image.open(contact_sheet(rows, tmp_path / "sheet.png")) as sheet:
        is_red = spots(np.asarray(sheet.convert("RGB")), "#ff0000")
    assert is_red.sum() == 2 * TILE * TILE


def test_frames_and_marks() -> None:
    black = np.zeros((4, 4, 3), np.uint8)
    tiles = (Tile(black, ("x",), True), Tile(black, ("x",), False), Tile(black, ("x",)))
    pixels = np.asarray(draw_sheet([[Group("", tiles)]], title="all"))
    marks = []
    for frame, other in ((GREEN, ORANGE), (ORANGE, GREEN)):
        rows, columns = np.nonzero(spots(pixels, frame))
        assert np.ptp(rows) == np.ptp(columns) == TILE - 1
        tile = pixels[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
        assert not spots(tile, other).any()
        marks.append(tile[:26, -26:].min(2) > 200)
    assert min(mark.sum() for mark in marks) > 30
    assert (marks[0] != marks[1]).sum() > 20, "a tick and a cross have different shapes"
    last = pixels[:, 10 + 2 * (TILE + 10) : 10 + 3 * TILE + 20]
    assert spots(last, "#000000").sum() == TILE * TILE  # without a frame


def test_what_is_written_differs_by_letter() -> None:
    """Letters with accents and of other scripts are no boxes."""
    black = np.zeros((2, 2, 3), np.uint8)
    seen = {
        name: np.asarray(draw_sheet([[Group("", (Tile(black, (name,)),))]])).tobytes()
        for name in ("é", "ł", "ж", "λ", "a\nb", "a\tc")
    }
    assert len(set(seen.values())) == len(seen)


def test_an_image_that_cannot_be_read(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.jpg cannot be read"):
        contact_sheet([[Group("", (Tile(broken),))]], tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
