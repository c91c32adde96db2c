"""One photograph laid over another."""

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

from flowerray.explore.align import Alignment, align, find_keypoints


def smooth(seed: int, side: int = 160) -> Image.Image:
    """Seeded blobs of several sizes."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side, side))
    for sigma in (2, 5, 12):
        total += gaussian_filter(rng.normal(size=(side, side)), sigma) * sigma
    return Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8))


def thumbnail(image: Image.Image) -> NDArray[np.uint8]:
    return np.array(image.resize((64, 64), Image.Resampling.BOX))


def aligned(first: Image.Image, second: Image.Image, mirrored: bool = False) -> Alignment | None:
    return align(
        find_keypoints(first), find_keypoints(second), thumbnail(first), thumbnail(second), mirrored
    )


@pytest.mark.parametrize(
    "box", [(0, 0, 144, 160), (8, 8, 160, 160), (16, 30, 160, 160), (20, 20, 140, 150)]
)
def test_crops_lie_where_they_were_cut(box: tuple[int, int, int, int]) -> None:
    whole = smooth(0)
    crop = whole.crop(box)
    there, back = aligned(whole, crop), aligned(crop, whole)
    assert there is not None and back is not None
    assert min(there.score, back.score) > 0.9
    area = crop.width * crop.height / 160**2
    assert there.area == pytest.approx(area, rel=0.02) == 1 / back.area
    assert abs(there.turned) < 1


@pytest.mark.parametrize("angle", [5, 90, 180, -90, 37])
def test_turns_are_told(angle: int) -> None:
    found = aligned(smooth(1), smooth(1).rotate(angle, Image.Resampling.BICUBIC))
    assert found is not None and found.score > 0.8
    assert (found.turned - angle + 180) % 360 - 180 == pytest.approx(0, abs=1)


def test_the_signatures_of_the_mirror_image_are_known_without_it() -> None:
    flipped = smooth(2).transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    found = aligned(smooth(2), flipped, mirrored=True)
    assert found is not None and found.score > 0.9 and abs(found.turned) < 1
    assert aligned(smooth(2), flipped) is None
    upside_down = smooth(2).transpose(Image.Transpose.FLIP_TOP_BOTTOM)
    found = aligned(smooth(2), upside_down, mirrored=True)
    assert found is not None and abs(found.turned) > 179


def test_others_do_not_lie_on_each_other() -> None:
    pairs = [(smooth(seed), smooth(seed + 50)) for seed in range(8)]
    assert [aligned(*pair) for pair in pairs] == [None] * 8


def test_the_layout_alone_is_not_enough() -> None:
    """A bright disc in the middle of both, other petals: look-alikes."""
    rows, columns = np.mgrid[:160, :160] - 79.5
    disc = (np.hypot(rows, columns) < 50).astype(np.float64)
    one, two = (
        Image.fromarray((0.8 * 255 * disc + 0.2 * np.asarray(smooth(seed))).astype(np.uint8))
        for seed in (1, 2)
    )
    found = aligned(one, two)
    assert found is None or found.score < 0.6


def test_equal_and_empty() -> None:
    flat = Image.new("L", (64, 64), 9)
    assert aligned(flat, flat) == Alignment(1, 0, 1)
    assert aligned(flat, smooth(0)) is None and aligned(smooth(0), flat) is None
