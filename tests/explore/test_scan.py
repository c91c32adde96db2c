"""One look at every file."""

import math
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flowerray.data.folder import read_all
from flowerray.data.images import eval_image, examine
from flowerray.errors import UserError
from flowerray.explore.scan import Photograph, scan, take_survey
from tests.data.pictures import class_folders, save_picture


def saved(path: Path, colour: tuple[int, int, int], size: tuple[int, int] = (40, 20)) -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def test_a_plain_colour(tmp_path: Path) -> None:
    found = look(saved(tmp_path / "a.png", (0, 0, 200)))
    assert not isinstance(found, str)
    assert (found.width, found.height) == (40, 20)
    assert found.brightness == pytest.approx(0.114 * 200 / 255, abs=1e-3)
    assert found.contrast == pytest.approx(0, abs=1e-3)
    assert found.saturation == pytest.approx(1)
    assert found.hue == pytest.approx(240, abs=10)
    assert found.colour_SS3[3, 3].tolist() == [0, 0, 200]
    assert found.grey_PP.shape == (64, 64) and abs(int(found.grey_PP[0, 0]) - 23) <= 1


def look(path: Path) -> Photograph | str:
    return scan(path, 8)[1]


def flat(crops_BHWC: NDArray[np.uint8]) -> NDArray[np.float32]:
    """An embedding: the pixels."""
    rows = crops_BHWC.reshape(len(crops_BHWC), -1).astype(np.float32) + 1
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize(("colour", "hue"), [((255, 0, 0), 0), ((0, 255, 0), 120)])
def test_hue_wraps(tmp_path: Path, colour: tuple[int, int, int], hue: float) -> None:
    found = look(saved(tmp_path / "a.png", colour))
    assert not isinstance(found, str)
    assert abs((found.hue - hue + 180) % 360 - 180) <= 10


def test_black_and_white(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "white")
    image.paste((0, 0, 0), (0, 0, 32, 64))
    image.save(tmp_path / "a.png")
    found = look(tmp_path / "a.png")
    assert not isinstance(found, str)
    assert found.brightness == pytest.approx(0.5, abs=0.01)
    assert found.contrast == pytest.approx(0.5, abs=0.01)
    assert found.saturation == 0 and math.isnan(found.hue)


def test_unreadable_files_are_left_out(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", {"a": 3, "b": 2})
    (root / "a" / "001.jpg").write_bytes(b"no image")
    (root / "b" / "000.jpg").write_bytes((root / "b" / "001.jpg").read_bytes())
    survey = take_survey(read_all(root), 8, flat, progress=False)
    assert [(p.name, why) for p, why in survey.unreadable] == [("001.jpg", "no known image format")]
    assert survey.dataset.labels_N.tolist() == [0, 0, 1, 1]
    assert survey.dataset.splits["test"].tolist() == [0, 1, 2, 3]
    assert [survey.name(i) for i in range(4)] == [
        "a/000.jpg",
        "a/002.jpg",
        "b/000.jpg",
        "b/001.jpg",
    ]
    assert survey.digests[2] == survey.digests[3] != survey.digests[0]
    assert survey.split_names().tolist() == ["test"] * 4
    assert survey.size_N2.tolist() == [[16, 12]] * 4
    assert np.array_equal(survey.grey_NPP[2], survey.grey_NPP[3])
    crops = [eval_image(path, 8).transpose(1, 2, 0) for path in survey.dataset.paths]
    assert np.array_equal(survey.emb_ND, flat(np.stack(crops)))
    assert survey.examined()[root / "a" / "001.jpg"] == ("", "no known image format")
    assert survey.examined()[root / "b" / "000.jpg"] == examine(root / "b" / "000.jpg")


def test_nothing_readable(tmp_path: Path) -> None:
    root = class_folders(tmp_path / "set", {"a": 1})
    (root / "a" / "000.jpg").write_bytes(b"")
    with pytest.raises(UserError, match="None of the 1 images"):
        take_survey(read_all(root), 8, flat, progress=False)
    found = look(root / "a" / "000.jpg")
    assert found == "the file is empty"
    assert look(save_picture(tmp_path / "x.jpg", 0).with_name("gone.jpg")) == (
        "no such file or directory"
    )
