"""The contact sheet: right and wrong neighbours look different, in the right places."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerray.errors import UserError
from flowerray.retrieval import pictures as sheet
from flowerray.retrieval.measure import Measurement
from flowerray.retrieval.pictures import Neighbour, SheetRow, measurement_rows, retrieval_sheet
from flowerray.retrieval.search import retrieval_per_query


def photo(folder: Path, name: str, colour: tuple[int, int, int]) -> Path:
    Image.new("RGB", (90, 60), colour).save(folder / name)
    return folder / name


def frame_colours(path: Path, row: int, columns: int) -> list[tuple[int, int, int]]:
    """The frame's colour of the query and of each neighbour, read at their left edges."""
    step = sheet._TILE + sheet._GAP
    y = sheet._HEADER + row * (sheet._TILE + sheet._CAPTION + sheet._GAP) + sheet._TILE // 2
    lefts = [sheet._GAP] + [step + 2 * sheet._GAP + rank * step for rank in range(columns)]
    with Image.open(path) as image:
        return [image.convert("RGB").getpixel((x + 1, y)) for x in lefts]  # type: ignore[misc]


def test_a_name_of_two_lines_is_drawn(tmp_path: Path) -> None:
    """Pillow measures single lines alone, and file systems allow it."""
    odd = photo(tmp_path, "a\nb.png", (0, 0, 255))
    row = SheetRow(odd, "iris\nblue", (Neighbour(odd, "iris\nblue", 0.9),))
    assert retrieval_sheet([row], tmp_path / "sheet.png").exists()


def test_frames_and_marks(tmp_path: Path) -> None:
    blue = photo(tmp_path, "blue.png", (0, 0, 255))
    same, other = (
        Neighbour(blue, "iris", 0.9),
        Neighbour(blue, "a name too long for its tile " * 3, 0.1),
    )
    rows = [SheetRow(blue, "iris", (same, other)), SheetRow(blue, None, (same,))]
    out = retrieval_sheet(rows, tmp_path / "new" / "sheet.png")
    assert frame_colours(out, 0, 2) == [sheet._GREY, sheet._SAME, sheet._OTHER]
    assert frame_colours(out, 1, 1) == [sheet._GREY, sheet._GREY]
    with Image.open(out) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    step, top = sheet._TILE + sheet._GAP, sheet._HEADER
    marks = []
    for rank in range(2):
        right = step + 2 * sheet._GAP + rank * step + sheet._TILE
        marks.append(pixels[top : top + 26, right - 26 : right].min(2) > 200)
    assert marks[0].sum() > 30 and marks[1].sum() > 30
    assert (marks[0] != marks[1]).sum() > 20, "a tick and a cross have different shapes"


def test_photographs_stand_upright_and_16_bits_are_scaled(tmp_path: Path) -> None:
    lying = Image.new("RGB", (60, 60), (255, 0, 0))
    lying.paste((0, 0, 255), (0, 0, 30, 60))  # blue on the left, and above once it is turned
    exif = Image.Exif()
    exif[0x0112] = 6
    lying.save(tmp_path / "lying.jpg", exif=exif, quality=95)
    grey = np.full((60, 60), 0x8000, np.uint16)
    Image.fromarray(grey).save(tmp_path / "deep.png")
    found = Neighbour(tmp_path / "deep.png", "iris", 0.9)
    out = retrieval_sheet([SheetRow(tmp_path / "lying.jpg", "iris", (found,))], tmp_path / "s.png")
    left, middle = sheet._GAP + sheet._TILE // 2, sheet._HEADER + sheet._TILE // 2
    with Image.open(out) as image:
        upper, lower = (
            image.getpixel((left, middle + shift))
            for shift in (-sheet._TILE // 4, sheet._TILE // 4)
        )
        deep = image.getpixel((left + sheet._TILE + 3 * sheet._GAP, middle))
    assert upper == pytest.approx((0, 0, 255), abs=9) and lower == pytest.approx((255, 0, 0), abs=9)
    assert deep == (128, 128, 128)


def test_rows_of_a_measurement(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 6)
    emb = (np.eye(4)[labels] + rng.normal(0, 0.5, (24, 4))).astype(np.float32)
    per_query = retrieval_per_query(emb, labels)
    paths = tuple(tmp_path / f"{i}.png" for i in range(24))
    data = (paths, labels, emb)
    measurement = Measurement({}, per_query, *data, *data, classes=("a", "b", "c", "d"))
    assert 4 < (~per_query["hit"]).sum() < 20
    rows = measurement_rows(measurement, count=8, top=5)
    assert rows == measurement_rows(measurement, count=8, top=5)
    assert len({row.path for row in rows}) == 8
    right = [row.neighbours[0].class_name == row.class_name for row in rows]
    assert right == [False] * 4 + [True] * 4
    for row in rows:
        query = paths.index(row.path)
        assert len(row.neighbours) == 5 and row.class_name == "abcd"[labels[query]]
        for found, index in zip(row.neighbours, per_query["nearest"][query], strict=False):
            assert (found.path, found.class_name) == (paths[index], "abcd"[labels[index]])
            lengths = np.linalg.norm(emb[query]) * np.linalg.norm(emb[index])
            assert found.similarity == pytest.approx(emb[query] @ emb[index] / lengths, abs=1e-6)
    assert len(measurement_rows(measurement, count=100)) == 24


def test_unreadable_image_and_no_rows(tmp_path: Path) -> None:
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"not an image")
    with pytest.raises(UserError, match=r"broken\.jpg cannot be read"):
        retrieval_sheet([SheetRow(broken, None, ())], tmp_path / "sheet.png")
    assert not (tmp_path / "sheet.png").exists()
    with pytest.raises(UserError, match="nothing to draw"):
        retrieval_sheet([], tmp_path / "sheet.png")
