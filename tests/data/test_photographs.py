"""A photograph as it is read: orientation, colour modes, damage, and how it is made smaller."""

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from flowerray.data.store import build_store, eval_image, load_image, resize_side
from flowerray.errors import UserError
from tests.data.pictures import jpeg, picture, six_pictures


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    return six_pictures(tmp_path)


def test_the_shorter_side_is_the_crop_over_0_875() -> None:
    assert [resize_side(size) for size in (96, 128, 160, 224)] == [110, 146, 183, 256]


def test_shorter_side_and_the_cut_of_long_images(paths: list[Path]) -> None:
    shapes = [load_image(path, 18).shape for path in paths]
    assert shapes == [(18, 27, 3), (27, 18, 3), (18, 18, 3), (18, 18, 3), (18, 36, 3), (36, 18, 3)]


def test_a_panorama_keeps_its_middle() -> None:
    pixels = np.zeros((20, 100, 3), np.uint8)
    pixels[:, 30:70] = (0, 255, 0)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    assert (load_image(buffer.getvalue(), 20) == (0, 255, 0)).all()


def test_pixels_equal_pillow_resize_then_crop(paths: list[Path]) -> None:
    for path, size, rows, columns in (
        (paths[0], (27, 18), slice(1, 17), slice(5, 21)),
        (paths[1], (18, 27), slice(5, 21), slice(1, 17)),
    ):
        with Image.open(path) as image:
            resized_HWC = np.asarray(image.resize(size, Image.Resampling.BICUBIC))
        assert np.array_equal(load_image(path, 18), resized_HWC)
        assert np.array_equal(eval_image(path, 16), resized_HWC[rows, columns].transpose(2, 0, 1))


def test_a_mistyped_tag_does_not_make_a_photograph_damaged(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    """Its orientation still counts; the maker's name is a number."""
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, 20:] = (255, 0, 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn to the right
    file = tmp_path / "a.jpg"
    Image.fromarray(pixels).save(file, exif=exif.tobytes(), quality=95)
    data = bytearray(file.read_bytes())
    entry = data.index(b"\x01\x12")  # one entry: tag, type, count, value
    start = entry - 2
    wrong = (
        b"\x00\x02" + data[entry : entry + 12] + b"\x01\x0f\x00\x0c\x00\x00\x00\x01\x00\x00\x00\x26"
    )
    offset = data.index(b"Exif\x00\x00") + 6
    tiff = data[offset:start] + wrong + b"\x00\x00\x00\x00" + b"\x3f\xf8" + b"\x00" * 6
    segment = b"Exif\x00\x00" + bytes(tiff)
    app1 = data.index(b"\xff\xe1")
    length = int.from_bytes(data[app1 + 2 : app1 + 4], "big")
    rest = bytes(data[app1 + 2 + length :])
    header = bytes(data[:app1]) + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big")
    file.write_bytes(header + segment + rest)
    with pytest.raises(Exception, match="encode"):  # what Pillow's own helper makes of it
        ImageOps.exif_transpose(Image.open(file))
    shown = load_image(file, 20)
    assert shown.shape == (30, 20, 3) and shown[25, 10, 0] > 200 and shown[5, 10, 0] < 50
    assert all(warning.filename.endswith("TiffImagePlugin.py") for warning in recwarn.list)


def test_a_file_that_would_start_a_program_is_no_photograph(tmp_path: Path) -> None:
    file = tmp_path / "a.jpg"
    Image.new("RGB", (8, 8)).save(file, "EPS")
    with pytest.raises(UserError, match="no known image format"):
        load_image(file, 8)


def test_shrinking_averages_instead_of_skipping() -> None:
    """A checkerboard of single pixels turns grey; without antialiasing it would not."""
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(board).save(buffer, "PNG")
    small = load_image(buffer.getvalue(), 8)
    assert abs(small.astype(int) - 127).max() <= 6


def test_exif_orientation_is_applied() -> None:
    upright = picture(3, 20, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    turned = jpeg(upright.transpose(Image.Transpose.ROTATE_90), exif=exif, quality=100)
    plain = jpeg(upright, quality=100)
    difference = load_image(turned, 20).astype(int) - load_image(plain, 20)
    assert load_image(turned, 20).shape == (20, 32, 3)
    assert abs(difference).mean() < 4


@pytest.mark.parametrize("mode", ["L", "CMYK", "YCbCr"])
def test_jpeg_colour_modes(mode: str) -> None:
    colour = Image.new("RGB", (10, 10), (200, 200, 200))
    decoded = load_image(jpeg(colour.convert(mode), quality=100), 10)
    assert decoded.shape == (10, 10, 3)
    assert abs(decoded.astype(int) - 200).max() <= 3


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "I;16"])
def test_png_colour_modes(mode: str) -> None:
    if mode == "I;16":
        image = Image.fromarray(np.full((10, 10), 200 * 257, np.uint16))
    else:
        image = Image.new("RGB", (10, 10), (255, 255, 255) if mode == "1" else (200,) * 3)
        image = image.quantize(4) if mode == "P" else image.convert(mode)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    expected = 255 if mode == "1" else 200
    assert (load_image(buffer.getvalue(), 10) == expected).all()


def test_transparent_parts_are_white_not_black() -> None:
    image = Image.new("RGBA", (10, 10), (0, 0, 0, 0))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    assert (load_image(buffer.getvalue(), 10) == 255).all()


DAMAGE = {
    "cut in the middle": lambda data: data[: len(data) // 2],
    "cut in the header": lambda data: data[:3],
    "end filled with zeros": lambda data: data[: len(data) // 2] + bytes(len(data) // 2),
    "empty": lambda data: b"",
    "text": lambda data: b"<html>404</html>",
    "zeros": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_files_are_refused_by_name(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "rose.jpg"
    path.write_bytes(DAMAGE[damage](jpeg(picture(5, 200, 200), quality=95)))
    for read in (lambda: eval_image(path, 16), lambda: build_store([path], 18, progress=False)):
        with pytest.raises(UserError, match=r"rose\.jpg") as caught:
            read()
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")
    with pytest.raises(UserError, match="given bytes"):
        eval_image(path.read_bytes(), 16)


def test_a_photograph_may_carry_more_after_its_end() -> None:
    data = jpeg(picture(5, 40, 40))
    assert np.array_equal(load_image(data + bytes(100), 16), load_image(data, 16))


def test_a_text_is_no_photograph(paths: list[Path]) -> None:
    with pytest.raises(UserError, match="a text is neither"):
        eval_image(str(paths[0]), 16)  # type: ignore[arg-type]
