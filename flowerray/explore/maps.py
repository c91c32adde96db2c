"""Flat maps of a data set: PCA and t-SNE of pixels and of embeddings.

Letters: N images, M of the map, D dimensions.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flowerray.config import Config

LEAST = 5
"""Images from which a map is drawn."""
_COMPONENTS = 50  # t-SNE starts from the first principal components, as its authors do


class MapConfig(Config):
    """How large the maps are."""

    max_images: int = Field(2000, ge=LEAST, le=20_000)
    """Images on a map, drawn at random where the set has more; t-SNE takes about 5 s for 2,000."""
    seed: int = Field(0, ge=0)
    """Of the draw and of t-SNE."""


@dataclass(frozen=True)
class Map:
    """Two maps of the same vectors."""

    pca_M2: NDArray[np.float64]
    explained: tuple[float, float]
    """Share of the variance that each axis of the PCA shows."""
    tsne_M2: NDArray[np.float64]


def draw_images(count: int, config: MapConfig) -> NDArray[np.int64]:
    """Which of `count` images a map shows, ascending."""
    if count <= config.max_images:
        return np.arange(count)
    rng = np.random.default_rng((config.seed, 0))
    return np.sort(rng.choice(count, config.max_images, replace=False))


def make_map(vectors_MD: NDArray[np.floating], config: MapConfig) -> Map | None:
    """PCA, and t-SNE (van der Maaten and Hinton 2008) of its first 50 components.

    The perplexity is 30, or a third of the images where they are fewer than 91.

    Returns:
        None for fewer than 5 images, or where all are the same.
    """
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    vectors_MD = np.asarray(vectors_MD, np.float64)
    num, dims = vectors_MD.shape
    if num < LEAST or not np.ptp(vectors_MD, axis=0).any():
        return None
    components = min(_COMPONENTS, num, dims)
    pca = PCA(components, svd_solver="randomized", random_state=config.seed)
    scores = pca.fit_transform(vectors_MD)
    tsne = TSNE(
        2, perplexity=min(30, (num - 1) / 3), init="pca", random_state=config.seed, n_jobs=1
    )
    first, second = pca.explained_variance_ratio_[:2].tolist()
    return Map(scores[:, :2], (first, second), tsne.fit_transform(scores))
