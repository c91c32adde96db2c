"""Concepts that a user names by example images, and whether a class's likeness depends on them.

TCAV (Kim et al. 2018) on similarity: the derivative is that of the cosine to the class prototype.
Any set of images points somewhere, and its score is steady however often it is told apart from
other sets. So a concept is compared with random concepts, sets of as many random images that are
treated alike: a permutation test, exact where a concept is one of them. It goes by the alignment,
the cosine between derivative and concept: the score, a share, has few values.

Letters: N images, B images of a class, C channels, D embedding dimensions, R random concepts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.explain.layers import Layer, capture
from flowerray.model.embedder import Embedder
from flowerray.statistics import holm

_BATCH = 32


class TcavConfig(Config):
    """How sure a concept has to be."""

    random_concepts: int = Field(199, ge=19)
    """Sets of random images that are scored as a concept is; p is at least 1 / (this + 1)."""
    repetitions: int = Field(5, ge=1)
    """Sets of random images that each concept, and each random one, is told apart from."""
    level: float = Field(0.05, gt=0, lt=1)
    """Familywise error over the concepts (Holm 1979)."""
    seed: int = Field(0, ge=0)
    """Of the draws."""


@dataclass(frozen=True)
class ConceptScore:
    """One named concept."""

    name: str
    score: float
    """Share of the class's images that become more like their prototype along the concept, mean
    over repetitions."""
    random: float
    """The same for random concepts, mean over them."""
    accuracy: float
    """How well the concept is told apart from random images that were not fitted on, 0.5..1."""
    p_value: float
    """Share of random concepts that lie as far from the mean, after Holm's correction."""
    significant: bool


def tcav(
    embedder: Embedder,
    layer: Layer,
    concepts: Mapping[str, Tensor],
    random_NCHW: Tensor,
    images_BCHW: Tensor,
    reference_BD: Tensor,
    config: TcavConfig,
    progress: Callable[[int], object] | None = None,
) -> list[ConceptScore]:
    """Scores each concept for one class.

    Args:
        concepts: name -> example images, float NCHW in [0,1].
        random_NCHW: images to draw random sets from; none of the concepts' own.
        reference_BD: the class prototype, a row an image.

    Raises:
        UserError: a concept with fewer than four images, or too few random images.
    """
    for name, images in concepts.items():
        if len(images) < 4:
            raise UserError(f"The concept {name} has {len(images)} images: give at least four.")
    if len(random_NCHW) < 8:
        raise UserError(
            f"{len(random_NCHW)} random images are too few to tell a concept from: at least eight "
            "are needed."
        )
    pool_NC, _ = _pooled(embedder, layer, random_NCHW, None)
    _, slopes_BC = _pooled(embedder, layer, images_BCHW, reference_BD)
    rng = np.random.default_rng(config.seed)
    found = []
    chance: dict[int, NDArray[np.float64]] = {}
    for name, images in concepts.items():
        own_NC, _ = _pooled(embedder, layer, images, None)
        own_NC = rng.permutation(own_NC)[: len(pool_NC) // 2]  # or no random concept is as large
        score, alignment = measure(own_NC, pool_NC, slopes_BC, config, rng)
        if len(own_NC) not in chance:
            chance[len(own_NC)] = measure_random(len(own_NC), pool_NC, slopes_BC, config, rng)
        chance_R2 = chance[len(own_NC)]
        accuracy = float(np.mean([
            _accuracy(own_NC, rng.permutation(pool_NC)[: len(own_NC)], rng)
            for _ in range(config.repetitions)
        ]))  # fmt: skip
        p, random = p_value(alignment, chance_R2[:, 1]), float(chance_R2[:, 0].mean())
        found.append(ConceptScore(name, score, random, accuracy, p, False))
        if progress is not None:
            progress(1)
    adjusted = holm([one.p_value for one in found]).tolist()
    return [
        replace(one, p_value=p, significant=p < config.level)
        for one, p in zip(found, adjusted, strict=True)
    ]


def measure_random(
    size: int, pool_NC: NDArray, slopes_BC: NDArray, config: TcavConfig, rng: np.random.Generator
) -> NDArray[np.float64]:
    """(R, 2): `measure` of random concepts of so many images."""
    found = []
    for _ in range(config.random_concepts):
        shuffled_NC = rng.permutation(pool_NC)
        found.append(measure(shuffled_NC[:size], shuffled_NC[size:], slopes_BC, config, rng))
    return np.array(found)


def p_value(value: float, chance_R: NDArray[np.float64]) -> float:
    """The share of all R + 1 values that lie as far from their mean as this one, itself counted:
    exact where it is a random concept's too.
    """
    both = np.append(chance_R, value)
    away = np.abs(both - both.mean())
    return float((away >= away[-1] - 1e-9).mean())


def measure(
    own_NC: NDArray,
    pool_NC: NDArray,
    slopes_BC: NDArray,
    config: TcavConfig,
    rng: np.random.Generator,
) -> tuple[float, float]:
    """Share of the derivatives that point towards a concept, and their mean cosine with it; means
    over random sets that the concept is told apart from.
    """
    length_B1 = np.maximum(np.linalg.norm(slopes_BC, axis=1, keepdims=True), 1e-12)
    cosines = np.concatenate([
        slopes_BC / length_B1 @ _direction(own_NC, rng.permutation(pool_NC)[: len(own_NC)])
        for _ in range(config.repetitions)
    ])  # fmt: skip
    return float((cosines > 0).mean()), float(cosines.mean())


def _pooled(
    embedder: Embedder, layer: Layer, images_NCHW: Tensor, reference_ND: Tensor | None
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean over positions of the layer's output, and the derivative of the cosine when every
    position moves alike: both (N, C).
    """
    means, slopes = [], []
    for start in range(0, len(images_NCHW), _BATCH):
        images = images_NCHW[start : start + _BATCH].to(embedder.projection.weight.device)
        if reference_ND is None:
            reference = torch.ones(1, embedder.dim, device=images.device)
        else:
            reference = reference_ND[start : start + _BATCH].to(images.device)
        (captured,) = capture(embedder, images, [layer.name], reference)
        assert captured is not None, "a layer that `find_layers` gave"
        means.append(captured.maps_BCHW.mean((2, 3)).double().cpu().numpy())
        slopes.append(captured.grads_BCHW.sum((2, 3)).double().cpu().numpy())
    return np.concatenate(means), np.concatenate(slopes)


def _direction(concept_NC: NDArray, random_NC: NDArray) -> NDArray[np.float64]:
    """(C,): the normal, towards the concept, of the plane between two sets."""
    inputs, labels, spread_C = _scaled(concept_NC, random_NC)
    normal_C = _plane().fit(inputs, labels).coef_[0] / spread_C
    found: NDArray[np.float64] = normal_C / max(float(np.linalg.norm(normal_C)), 1e-12)
    return found


def _accuracy(concept_NC: NDArray, random_NC: NDArray, rng: np.random.Generator) -> float:
    """How well a plane that is fitted on three quarters of two sets tells the rest apart."""
    inputs, labels, _ = _scaled(concept_NC, random_NC)
    held = np.concatenate(
        [rng.permutation(n) < max(1, n // 4) for n in (len(concept_NC), len(random_NC))]
    )
    plane = _plane().fit(inputs[~held], labels[~held])
    return float(plane.score(inputs[held], labels[held]))


def _scaled(concept_NC: NDArray, random_NC: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """Both sets with equal spreads, 1 for each row of the concept, and the spreads (C,)."""
    inputs = np.concatenate([concept_NC, random_NC])
    spread_C = inputs.std(0) + 1e-6 * inputs.std() + 1e-12
    labels = np.repeat([1, 0], [len(concept_NC), len(random_NC)])
    return (inputs - inputs.mean(0)) / spread_C, labels, spread_C


def _plane() -> Any:
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(C=0.01, max_iter=200)
