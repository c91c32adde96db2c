"""One thumbnail laid over another."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from flowerray.explore import align
from flowerray.explore.align import agreement, plausible


def smooth(seed: int, side: int = 160) -> NDArray[np.uint8]:
    """Seeded blobs of several sizes."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side))
    for sigma in (2, 5, 12):
        total += gaussian_filter(rng.normal(size=(side, side)), sigma) * sigma
    return (255 * (total - total.min()) / np.ptp(total)).astype(np.uint8)


def thumbnail(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    small = Image.fromarray(image).resize((64, 64), Image.Resampling.BOX)
    return np.array(small)


@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(0, 0, 160, 144), (8, 8, 152, 152), (16, 0, 144, 160), (0, 8, 152, 152)],
)
def test_crops_agree(top: int, left: int, height: int, width: int) -> None:
    whole = smooth(0)
    crop = whole[top : top + height, left : left + width]
    assert agreement(thumbnail(whole), thumbnail(crop)) > 0.9
    assert agreement(thumbnail(crop), thumbnail(whole)) > 0.9


def test_others_do_not() -> None:
    scores = [agreement(thumbnail(smooth(i)), thumbnail(smooth(i + 50))) for i in range(8)]
    assert max(scores) < 0.5
    mirrored = np.ascontiguousarray(smooth(0)[:, ::-1])
    assert agreement(thumbnail(smooth(0)), thumbnail(mirrored)) < 0.5


def test_the_layout_alone_is_not_enough() -> None:
    """A bright disc in the middle of both, other petals: look-alikes."""
    rows, columns = np.mgrid[:160, :160] - 79.5
    disc = (np.hypot(rows, columns) < 50).astype(np.float64)
    one, two = (0.8 * 255 * disc + 0.2 * smooth(seed) for seed in (1, 2))
    pair = np.stack([thumbnail(image.astype(np.uint8)) for image in (one, two)])
    assert plausible(pair, np.array([[0, 1]])).any()
    assert agreement(*pair) < 0.85


def test_equal_and_empty() -> None:
    flat = np.full((64, 64), 9, np.uint8)
    assert agreement(flat, flat) == 1
    assert agreement(flat, thumbnail(smooth(0))) == 0


def test_half_of_an_image_is_not_its_duplicate() -> None:
    whole = smooth(3)
    assert agreement(thumbnail(whole), thumbnail(whole[:, 80:])) < 0.85


def test_equal_images_of_one_colour_are_plausible() -> None:
    """Nothing in them correlates, not even with itself."""
    flat = np.full((3, 64, 64), 255, np.uint8)
    flat[2] = 254
    found = plausible(flat, np.array([[0, 1], [0, 2]]))
    assert found[:, 0].tolist() == [True, False] and agreement(flat[0], flat[1]) == 1.0


def test_plausible_tells_the_way_round(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = thumbnail(smooth(4))
    three = np.stack([whole, np.ascontiguousarray(whole[:, ::-1]), thumbnail(smooth(5))])
    found = plausible(three, np.array([[0, 0], [0, 1], [0, 2]]))
    assert found.tolist() == [[True, False], [False, True], [False, False]]
    many = np.array([[0, n % 3] for n in range(100)])
    monkeypatch.setattr(align, "_PAIRS", 7)  # at a time
    assert np.array_equal(plausible(three, many), found[np.arange(100) % 3])
