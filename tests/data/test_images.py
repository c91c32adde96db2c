"""What is read as an image, and the map over decoding processes; test_photographs has what a
photograph becomes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowerray.data.images import decode, decoding_map, examine, map_ahead
from flowerray.errors import UserError


class Pool:
    """Does at once what it is asked for, as fast processes would."""

    def __init__(self) -> None:
        self.done = 0

    def map(self, function: Callable, items: Iterable[int], chunksize: int) -> Iterator[int]:
        found = [function(item) for item in items]
        self.done += len(found)
        return iter(found)


def test_decoding_does_not_run_far_ahead_of_its_reader() -> None:
    pool: Any = Pool()
    read = []
    for number in map_ahead(pool, 8, lambda n: n * n, iter(range(100))):
        read.append(number)
        assert pool.done <= len(read) + 2 * 8
    assert read == [n * n for n in range(100)]
    assert list(map_ahead(pool, 8, str, [])) == []


def test_processes_keep_the_order() -> None:
    with decoding_map(300, processes=2) as run:
        assert list(run(abs, range(-300, 0))) == list(range(300, 0, -1))


def test_a_process_that_dies_is_a_sentence() -> None:
    """What the system does to it where memory is short."""
    with (
        pytest.raises(UserError, match="process that decodes images died: free some memory"),
        decoding_map(2, processes=2) as run,
    ):
        list(run(os._exit, [1, 1]))


@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a folder"])
def test_only_regular_files_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.jpg"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    assert examine(path) == ("", f"it is {kind}")
    with pytest.raises(UserError, match=f"x.jpg is {kind}: give the path of a photograph"):
        decode(path)


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    with path.open("wb") as file:
        file.truncate(2**30)
    with pytest.raises(UserError, match="has 1,024 MB, more than 512"):
        decode(path)


@pytest.mark.parametrize("dtype", [np.int32, np.float32])
def test_32_bit_pixels_are_refused_where_nothing_says_what_is_white(
    tmp_path: Path, dtype: type
) -> None:
    pixels: Any = np.arange(64, dtype=dtype).reshape(8, 8) * 70_000
    Image.fromarray(pixels).save(tmp_path / "x.tiff")
    with pytest.raises(UserError, match="32-bit numbers, .*: save it with 8 or 16 bits"):
        decode(tmp_path / "x.tiff")
    Image.fromarray(np.arange(64, dtype=np.int32).reshape(8, 8)).save(tmp_path / "y.tiff")
    assert decode(tmp_path / "y.tiff").getextrema()[0] == (0, 63)


def test_heic_is_read_where_its_reader_is_installed(tmp_path: Path) -> None:
    reader = pytest.importorskip("pillow_heif", reason="pillow-heif is not installed")
    reader.from_pillow(Image.new("RGB", (64, 48), "red")).save(tmp_path / "x.heic")
    assert decode(tmp_path / "x.heic").size == (64, 48)
