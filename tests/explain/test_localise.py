"""Masks and the three scores against them."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerray.data.images import eval_image
from flowerray.explain.localise import energy, iou, pointing, read_masks


def test_a_mask_is_cut_like_its_photograph(tmp_path: Path) -> None:
    """A white flower on black; its mask is the flower on Oxford's blue, a JPEG."""
    rows, columns = np.mgrid[:300, :500]
    flower = (rows - 125) ** 2 + (columns - 290) ** 2 < 90**2
    photograph = np.where(flower[..., None], 255, 0).astype(np.uint8).repeat(3, -1)
    mask = np.where(flower[..., None], photograph, np.array([0, 0, 254], np.uint8))
    Image.fromarray(photograph).save(tmp_path / "a.png")
    Image.fromarray(mask).save(tmp_path / "b.jpg", quality=85)
    (found,) = read_masks([tmp_path / "b.jpg"], 32)
    expected = eval_image(tmp_path / "a.png", 32)[0] > 127
    assert 0.2 < expected.mean() < 0.8 and (found != expected).mean() < 0.02


def test_masks_of_the_rendered_set_cover_the_flowers(small_set: Path) -> None:
    files = sorted((small_set / "segmim").iterdir())[:10]
    masks = read_masks(files, 32)
    assert masks.shape == (10, 32, 32) and all(0.01 < m.mean() < 0.95 for m in masks)


def test_energy() -> None:
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    map_HW = np.random.default_rng(0).normal(size=(4, 4))
    positive = np.where(map_HW > 0, map_HW, 0)
    assert energy(map_HW, mask) == pytest.approx(positive[:2].sum() / positive.sum())
    assert energy(-np.ones((4, 4)), mask) == 0.5  # says nothing: like a flat map
    assert energy(np.zeros((4, 4)), mask) == 0.5


def test_pointing_shares_a_tie() -> None:
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    map_HW = np.random.default_rng(0).random((4, 4))
    map_HW[0, 2] = 2
    assert pointing(map_HW, mask) == 1
    map_HW[3, 1] = map_HW[3, 2] = map_HW[2, 2] = 2
    assert pointing(map_HW, mask) == 0.25


def test_iou() -> None:
    rng = np.random.default_rng(0)
    mask = rng.random((8, 8)) < 0.3
    assert iou(mask + rng.random((8, 8)) / 2, mask) == 1
    map_HW = rng.random((8, 8))
    top = map_HW >= np.sort(map_HW.ravel())[-mask.sum()]
    assert iou(map_HW, mask) == pytest.approx((top & mask).sum() / (top | mask).sum())
    assert iou(map_HW, np.zeros((8, 8), bool)) == 0
    flat = iou(np.zeros((50, 50)), np.pad(np.ones((10, 50), bool), ((0, 40), (0, 0))))
    assert flat < 0.2, "ties from the top left would give 1"
