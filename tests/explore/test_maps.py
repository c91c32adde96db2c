"""PCA and t-SNE of small clouds."""

import numpy as np
import pytest

from flowerray.explore.maps import MapConfig, draw_images, make_map


def test_pca_is_that_of_the_covariance() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 6)) * [5, 3, 1, 0.5, 0.2, 0.1]
    found = make_map(vectors, MapConfig())
    assert found is not None
    values = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    assert found.explained == pytest.approx(tuple(values[:2] / values.sum()))
    assert found.pca_M2.var(axis=0, ddof=1) == pytest.approx(values[:2])
    assert found.tsne_M2.shape == (40, 2) and np.isfinite(found.tsne_M2).all()


def test_tsne_keeps_clusters_and_its_seed() -> None:
    rng = np.random.default_rng(1)
    vectors = np.repeat(np.eye(8)[:2] * 10, 20, axis=0) + rng.normal(0, 0.5, (40, 8))
    first, again = (make_map(vectors, MapConfig(seed=3)) for _ in range(2))
    assert first is not None and again is not None
    assert np.array_equal(first.tsne_M2, again.tsne_M2)
    distance = np.linalg.norm(first.tsne_M2[:, None] - first.tsne_M2[None], axis=2)
    np.fill_diagonal(distance, np.inf)
    assert ((distance.argmin(axis=1) < 20) == (np.arange(40) < 20)).all()


@pytest.mark.parametrize("vectors", [np.ones((9, 3)), np.eye(4)])
def test_no_map(vectors: np.ndarray) -> None:
    assert make_map(vectors, MapConfig()) is None


def test_five_images_are_enough() -> None:
    found = make_map(np.random.default_rng(0).normal(size=(5, 3)), MapConfig())
    assert found is not None and np.isfinite(found.tsne_M2).all()


def test_the_draw() -> None:
    config = MapConfig(max_images=10)
    drawn = draw_images(100, config)
    assert len(np.unique(drawn)) == 10 and (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, draw_images(100, config))
    assert not np.array_equal(drawn, draw_images(100, MapConfig(max_images=10, seed=1)))
    assert draw_images(7, config).tolist() == list(range(7))
