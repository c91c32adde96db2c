"""Contact sheets keep every photograph whole and in its place."""

from pathlib import Path

import numpy as np
from PIL import Image

from flowerray.show.contact import Group, Tile, contact_sheet


def colour(path: Path, rgb: tuple[int, int, int], size: tuple[int, int]) -> Tile:
    Image.new("RGB", size, rgb).save(path)
    return Tile(path, path.name * 9)


def test_rows_of_groups(tmp_path: Path) -> None:
    red = colour(tmp_path / "r.png", (255, 0, 0), (60, 30))
    blue = colour(tmp_path / "b.png", (0, 0, 255), (30, 60))
    rows = [[Group("first " * 40, (red, blue)), Group("second", (blue,))], [Group("", (red,))]]
    with Image.open(contact_sheet(rows, tmp_path / "sheet.png")) as sheet:
        pixels = np.asarray(sheet.convert("RGB")).astype(int)
    is_red = (pixels == (255, 0, 0)).all(axis=2)
    is_blue = (pixels == (0, 0, 255)).all(axis=2)
    # The wide one fills 120 x 60, the tall one 60 x 120, each is there twice and nothing is cut.
    assert is_red.sum() == is_blue.sum() == 2 * 120 * 60
    top, bottom = np.split(is_red, [len(is_red) // 2])
    assert top.sum() == bottom.sum()
    columns = np.flatnonzero(is_blue.any(axis=0))
    assert columns[0] > np.flatnonzero(top.any(axis=0))[-1]
    heading = pixels[: 8 + 24].min(axis=2).min(axis=0) < 120  # the ink of the first line of text
    assert np.flatnonzero(heading).size and not heading[8 + 2 * 128 : 8 + 2 * 128 + 18].any()
