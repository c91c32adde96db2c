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
from flowerray.show.contact import TILE, Group, Tile


def photo(folder: Path, name: str, colour: tuple[int, int, int]) -> Path:
    Image.new("RGB", (90, 60), colour).save(folder / name)
    return folder / name


def test_a_name_of_two_lines_is_drawn(tmp_path: Path) -> None:
    """Pillow measures single lines alone, and file systems allow it."""
    odd = photo(tmp_path, "a\nb.png", (0, 0, 255))
    row = SheetRow(odd, "iris\nblue", (Neighbour(odd, "iris\nblue", 0.9),))
    assert retrieval_sheet([row], tmp_path / "sheet.png").exists()


def test_neighbours_are_right_or_wrong_where_the_class_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[list[tuple[Group, Group]]] = []
    monkeypatch.setattr(sheet, "contact_sheet", lambda rows, out: drawn.append(rows))
    path = tmp_path / "a.png"
    same, other = Neighbour(path, "iris", 0.9), Neighbour(path, "rose", 0.1)
    rows = [SheetRow(path, "iris", (same, other)), SheetRow(path, None, (same,))]
    retrieval_sheet(rows, tmp_path / "sheet.png")
    (query, found), (_, unknown) = drawn[0]
    assert [tile.right for tile in found.tiles] == [True, False]
    assert [tile.right for tile in unknown.tiles] == [None]
    assert query.tiles == (Tile(path, ("iris", "a.png")),)
    assert found.tiles[1].captions == ("rose", "2: cosine 0.100")


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
    left, middle = 10 + TILE // 2, 32 + TILE // 2
    with Image.open(out) as image:
        upper, lower = (image.getpixel((left, middle + shift)) for shift in (-TILE // 4, TILE // 4))
        deep = image.getpixel((left + TILE + 24, middle))
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


def test_no_rows(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to draw"):
        retrieval_sheet([], tmp_path / "sheet.png")
