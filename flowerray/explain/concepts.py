"""Concepts: directions of the last map that many training images share, and what they are worth.

One non-negative factorisation A = U V over the positions of many images (CRAFT, Fel et al. 2023;
Collins et al. 2018), so that concept k means the same in every image.

Letters: N images of the fit, B images, K concepts, F features, H W cells, P pixels of a crop, D
embedding dimensions.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from flowerray.config import Config
from flowerray.data.store import floats
from flowerray.errors import UserError
from flowerray.explain.layers import from_map, to_map
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating
from flowerray.retrieval.embed import Images

_NEGATIVE = 0.1
"""Largest share of a map's absolute sum that may be negative; it is then cut off."""
_BATCH = 32


class ConceptsConfig(Config):
    """The factorisation."""

    count: int = Field(12, ge=2, le=64)
    """Concepts."""
    images: int = Field(300, ge=2)
    """Training images that it is fitted on, drawn from `seed`."""
    crops: int = Field(3, ge=1, le=12)
    """Images that show each concept best."""
    iterations: int = Field(150, ge=1)
    """At most, of the solver."""
    seed: int = Field(0, ge=0)
    """Of the draw and of the factorisation."""


@dataclass(frozen=True)
class Concepts:
    """A fitted dictionary of concepts."""

    basis_KF: NDArray[np.float32]
    """Unit length, not negative."""
    crops_KMPP3: NDArray[np.uint8]
    """The M pictures that show each concept best, best first."""
    explained: float
    """Share of the maps' squared sum that the concepts hold, 0..1."""

    def __len__(self) -> int:
        return len(self.basis_KF)


def fit_concepts(
    embedder: Embedder,
    store: Images,
    config: ConceptsConfig,
    progress: Callable[[int], object] | None = None,
) -> Concepts:
    """Factorises the last maps of images of a store.

    Raises:
        UserError: see `last_map`; fewer positions than concepts.
    """
    from sklearn.decomposition import NMF
    from sklearn.exceptions import ConvergenceWarning

    rng = np.random.default_rng(config.seed)
    chosen = np.sort(rng.permutation(len(store))[: config.images])
    device, size = embedder.projection.weight.device, embedder.image_size
    maps = []
    for start in range(0, len(chosen), _BATCH):
        images = floats(store.centre(chosen[start : start + _BATCH], size), device)
        maps.append(last_map(embedder, images).cpu())
        if progress is not None:
            progress(len(images))
    maps_NFHW = torch.cat(maps)
    rows = maps_NFHW.permute(0, 2, 3, 1).flatten(0, 2).numpy()
    if min(rows.shape) < config.count:
        raise UserError(
            f"{config.count} concepts cannot be told apart in {rows.shape[0]} positions of "
            f"{rows.shape[1]} features: ask for fewer with `concepts`."
        )
    model = NMF(
        config.count, init="nndsvda", max_iter=config.iterations, random_state=config.seed, tol=1e-3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # `explained` says how good it is
        weights = model.fit_transform(rows)
    length_K = np.linalg.norm(model.components_, axis=1).clip(1e-12)
    basis_KF = (model.components_ / length_K[:, None]).astype(np.float32)
    weights = weights * length_K
    explained = 1 - float(np.square(rows - weights @ basis_KF).sum() / np.square(rows).sum())
    grid = maps_NFHW.shape[2:]
    coef_NKHW = weights.reshape(len(chosen), *grid, -1).transpose(0, 3, 1, 2)
    crops = [
        _crops(store, chosen, coef_NKHW[:, k], size, config.crops) for k in range(len(basis_KF))
    ]
    return Concepts(basis_KF, np.stack(crops), explained)


def last_map(embedder: Embedder, images_BCHW: Tensor) -> Tensor:
    """What `forward_features` gives, as maps_BFHW cut at 0.

    Raises:
        UserError: no map, or one that is negative to a good part: it has no non-negative parts.
    """
    with evaluating(embedder), torch.no_grad():
        maps_BFHW = to_map(embedder.backbone, embedder.feature_map(images_BCHW))
    if maps_BFHW is None or hasattr(embedder.backbone, "num_prefix_tokens"):
        raise UserError(
            f"{embedder.config.backbone} has no last map that its head pools: concepts need one; "
            "leave them out with `concepts` 0."
        )
    size = maps_BFHW.abs().sum()
    if float(-maps_BFHW.clamp_max(0).sum()) > _NEGATIVE * float(size):
        raise UserError(
            f"The last map of {embedder.config.backbone} is negative to a good part and has no "
            "non-negative factors: concepts need a backbone that ends in ReLU or the like; leave "
            "them out with `concepts` 0."
        )
    return maps_BFHW.float().clamp_min(0)


def concept_maps(concepts: Concepts, maps_BFHW: Tensor) -> NDArray[np.float32]:
    """How much of each concept is in each cell: (B, K, H, W), not negative (least squares)."""
    from sklearn.decomposition import non_negative_factorization

    rows = maps_BFHW.permute(0, 2, 3, 1).flatten(0, 2).cpu().numpy()
    weights, _, _ = non_negative_factorization(
        rows, H=concepts.basis_KF, n_components=len(concepts), update_H=False, max_iter=500
    )
    batch, _, *grid = maps_BFHW.shape
    return weights.reshape(batch, *grid, -1).transpose(0, 3, 1, 2).astype(np.float32)


def without_each(
    embedder: Embedder, concepts: Concepts, maps_BFHW: Tensor, coef_BKHW: NDArray[np.float32]
) -> Tensor:
    """Unit embeddings (K, B, D) of the images without one concept each, through the model's own
    pooling and projection.
    """
    basis_KF = torch.from_numpy(concepts.basis_KF).to(maps_BFHW)
    coef = torch.from_numpy(coef_BKHW).to(maps_BFHW)
    found = []
    for k in range(len(concepts)):
        part = torch.einsum("bhw,f->bfhw", coef[:, k], basis_KF[k])
        found.append(from_last_map(embedder, (maps_BFHW - part).clamp_min(0)))
    return torch.stack(found)


def from_last_map(embedder: Embedder, maps_BFHW: Tensor) -> Tensor:
    """Unit embeddings (B, D) of maps, through whatever the model does behind its last map."""
    with evaluating(embedder), torch.no_grad():
        native = from_map(embedder.backbone, maps_BFHW)
        features_BF = embedder.backbone.forward_head(native)  # type: ignore[operator]
        return F.normalize(embedder.projection(features_BF), dim=1, eps=1e-6)


@dataclass(frozen=True)
class Shared:
    """What two images share."""

    coef_2KHW: NDArray[np.float32]
    """Both images' concept maps."""
    drop_K: NDArray[np.float64]
    """Drop of their cosine when a concept is removed from both."""

    @property
    def shares(self) -> NDArray[np.float64]:
        """How much of each image is each concept; a row sums to 1."""
        mass = self.coef_2KHW.sum((2, 3), dtype=np.float64)
        return mass / mass.sum(1, keepdims=True).clip(1e-12)


def shared(embedder: Embedder, concepts: Concepts, images_2CHW: Tensor) -> Shared:
    """Both concept maps of a pair, and what each concept does to their likeness."""
    maps = last_map(embedder, images_2CHW)
    coef = concept_maps(concepts, maps)
    first_D, second_D = from_last_map(embedder, maps)
    without = without_each(embedder, concepts, maps, coef)
    drop_K = first_D @ second_D - (without[:, 0] * without[:, 1]).sum(1)
    return Shared(coef, drop_K.cpu().double().numpy())


def _crops(
    store: Images, chosen: NDArray[np.int64], coef_NHW: NDArray, size: int, count: int
) -> NDArray[np.uint8]:
    """The images with the largest cell, cut around it: (M, P, P, 3)."""
    order = np.argsort(-coef_NHW.max((1, 2)), kind="stable")[:count]
    rows, columns = coef_NHW.shape[1:]
    side = min(size, round(2.5 * size / max(rows, columns)))
    images = store.centre(chosen[order], size).permute(0, 2, 3, 1).numpy()
    found = []
    for image, index in zip(images, order, strict=True):
        row, column = np.unravel_index(int(coef_NHW[index].argmax()), (rows, columns))
        top = int(np.clip(round((row + 0.5) * size / rows - side / 2), 0, size - side))
        left = int(np.clip(round((column + 0.5) * size / columns - side / 2), 0, size - side))
        found.append(image[top : top + side, left : left + side])
    return np.stack(found)
