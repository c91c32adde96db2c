"""Concepts that a user names by example images, and whether a class's likeness depends on them.

TCAV (Kim et al. 2018) on similarity: the derivative is that of the cosine to the class prototype.

Letters: N images, B images of a class, C channels, D embedding dimensions, R repetitions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.evaluate.statistics import holm
from flowerray.explain.layers import Layer, capture, similarity
from flowerray.model import Embedder

_BATCH = 32


class TcavConfig(Config):
    """How sure a concept has to be."""

    repetitions: int = Field(20, ge=3)
    """Random image sets that each concept is told apart from, and random pairs of sets."""
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
    """The same for directions between random sets."""
    accuracy: float
    """How well the concept is told apart from random images that were not fitted on, 0.5..1."""
    p_value: float
    """Of no difference to random (Welch's t-test), after Holm's correction."""
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
        layer: whose mean over positions a concept is a direction of.
        concepts: name -> example images, float NCHW in [0,1].
        random_NCHW: images to draw random sets from; none of the concepts' own.
        images_BCHW: of the class.
        reference_BD: the class prototype, a row an image.
        progress: called with 1 after each concept.

    Raises:
        UserError: a concept with fewer than four images, or too few random images.
    """
    for name, images in concepts.items():
        if len(images) < 4:
            raise UserError(f"The concept {name} has {len(images)} images: give at least four.")
        if len(random_NCHW) < 2 * len(images):
            raise UserError(
                f"{len(random_NCHW)} random images are too few for {len(images)} of the concept "
                f"{name}: at least twice as many are needed."
            )
    pool_NC, _ = _pooled(embedder, layer, random_NCHW, None)
    _, slopes_BC = _pooled(embedder, layer, images_BCHW, reference_BD)
    rng = np.random.default_rng(config.seed)
    rows = []
    for name, images in concepts.items():
        own_NC, _ = _pooled(embedder, layer, images, None)
        scores, accuracies, chance = [], [], []
        for _ in range(config.repetitions):
            order = rng.permutation(len(pool_NC))
            one, two = pool_NC[order[: len(own_NC)]], pool_NC[order[len(own_NC) : 2 * len(own_NC)]]
            direction_C, accuracy = _direction(own_NC, one, rng)
            scores.append(float((slopes_BC @ direction_C > 0).mean()))
            accuracies.append(accuracy)
            direction_C, _ = _direction(two, one, rng)
            chance.append(float((slopes_BC @ direction_C > 0).mean()))
        rows.append((name, scores, chance, accuracies, _welch(scores, chance)))
        if progress is not None:
            progress(1)
    adjusted = holm([row[-1] for row in rows]).tolist()
    return [
        ConceptScore(
            name, float(np.mean(scores)), float(np.mean(chance)), float(np.mean(accuracies)), p,
            p < config.level,
        )
        for (name, scores, chance, accuracies, _), p in zip(rows, adjusted, strict=True)
    ]  # fmt: skip


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
        (captured,) = capture(embedder, images, [layer.name], similarity(reference))
        assert captured is not None, "a layer that `find_layers` gave"
        means.append(captured.maps_BCHW.mean((2, 3)).double().cpu().numpy())
        slopes.append(captured.grads_BCHW.sum((2, 3)).double().cpu().numpy())
    return np.concatenate(means), np.concatenate(slopes)


def _direction(
    concept_NC: NDArray, random_NC: NDArray, rng: np.random.Generator
) -> tuple[NDArray[np.float64], float]:
    """The normal, towards the concept, of the plane between two sets, and how well a plane fitted
    on three quarters tells the rest apart.
    """
    from sklearn.linear_model import LogisticRegression

    inputs = np.concatenate([concept_NC, random_NC])
    spread_C = inputs.std(0) + 1e-6 * inputs.std() + 1e-12
    inputs = (inputs - inputs.mean(0)) / spread_C
    labels = np.repeat([1, 0], [len(concept_NC), len(random_NC)])
    held = np.concatenate(
        [rng.permutation(n) < max(1, n // 4) for n in (len(concept_NC), len(random_NC))]
    )
    model = LogisticRegression(C=0.01, max_iter=200)
    accuracy = float(model.fit(inputs[~held], labels[~held]).score(inputs[held], labels[held]))
    normal_C = model.fit(inputs, labels).coef_[0] / spread_C
    return normal_C / max(float(np.linalg.norm(normal_C)), 1e-12), accuracy


def _welch(first: list[float], second: list[float]) -> float:
    """Two-sided p-value of equal means (Welch 1947); 1 for equal constants, 0 for different ones,
    where the test has no spread to go by.
    """
    from scipy.stats import t

    one, two = np.asarray(first), np.asarray(second)
    errors = np.array([one.var(ddof=1) / len(one), two.var(ddof=1) / len(two)])
    gap = float(one.mean() - two.mean())
    if errors.sum() == 0:
        return 1.0 if gap == 0 else 0.0
    freedom = errors.sum() ** 2 / (errors**2 / np.array([len(one) - 1, len(two) - 1])).sum()
    return float(2 * t.sf(abs(gap) / np.sqrt(errors.sum()), freedom))
