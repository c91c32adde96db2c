"""Maps that know nothing of the model."""

import numpy as np
import torch
from scipy.ndimage import sobel

from flowerray.explain import baselines
from tests.explain.cases import embedder, images

MODEL = embedder()
NOTHING = torch.zeros(2, 16)


def test_centre_gaussian() -> None:
    (first, second) = baselines.centre_gaussian(0.2)(MODEL, images(2, 20), NOTHING)
    assert np.array_equal(first, second) and np.allclose(first, first[::-1, ::-1])
    rows, columns = (np.mgrid[:20, :20] + 0.5) / 20 - 0.5
    spread = np.exp(-(rows**2 + columns**2) / 0.08)
    np.testing.assert_allclose(first, spread, rtol=1e-5)


def test_mean_mask() -> None:
    masks = np.random.default_rng(0).random((7, 9, 9)) < 0.4
    found = baselines.mean_mask(masks)(MODEL, images(2), NOTHING)
    np.testing.assert_allclose(found[1], masks.mean(0), rtol=1e-6)


def test_random_goes_with_the_image_not_with_the_batch() -> None:
    saliency, batch = baselines.random(seed=1), images(3)
    together = saliency(MODEL, batch, NOTHING)
    assert np.array_equal(together[1:2], saliency(MODEL, batch[1:2], NOTHING))
    assert len(np.unique(together)) == together.size
    assert not np.array_equal(together, baselines.random(seed=2)(MODEL, batch, NOTHING))


def test_edges_are_sobels() -> None:
    batch = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = baselines.edges(MODEL, batch, NOTHING)
    grey = np.einsum("bchw,c->bhw", batch.double().numpy(), [0.299, 0.587, 0.114])
    for one, picture in zip(found, grey, strict=True):
        expected = np.hypot(sobel(picture, 0, mode="nearest"), sobel(picture, 1, mode="nearest"))
        np.testing.assert_allclose(one, expected / 8, rtol=1e-4, atol=1e-6)
