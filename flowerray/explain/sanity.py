"""Checks that a heat map has to pass before anybody should look at it (Adebayo et al. 2018).

Letters: B images, C channels, H W cells or pixels, D embedding dimensions.
"""

from collections import deque
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowerray.explain.baselines import Saliency
from flowerray.explain.cam import Explainer, upsample
from flowerray.explain.faithfulness import FaithfulnessConfig, faithfulness
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating

LEVELS = 4
"""Steps from the head downwards in which the weights are made random."""


@dataclass(frozen=True)
class SanityCheck:
    """One check's figure and whether it is good enough."""

    value: float
    passed: bool
    rule: str
    """What passes, in words."""


def sanity(
    embedder: Embedder,
    saliency: Saliency,
    images_BCHW: Tensor,
    reference_BD: Tensor,
    config: FaithfulnessConfig | None = None,
    one_class: bool = False,
) -> dict[str, SanityCheck]:
    """Runs every check on a few images.

    Args:
        images_BCHW: float pixels in [0,1], at least two.
        reference_BD: their references. Each is exchanged with the one before it, so neighbours
            should be of different classes; where all are of one class, say so.
        one_class: leaves the check `reference` out, which compares a class with itself.

    Returns:
        Checks by name. `randomised` is the mean rank correlation of the maps with those of a model
        of random weights, `reference` the change of the maps when the references are exchanged (as
        a share of their size), `flip` the correlation of the mirrored image's map with the mirrored
        map, `repeated` the largest difference between two calls, `order` how much more the cosine
        drops without the most relevant pixels than without the least relevant; `complete`, for the
        decomposition only, how far the cells' sum is from the cosine.
    """
    config = config or FaithfulnessConfig()
    maps = saliency(embedder, images_BCHW, reference_BD)
    size = images_BCHW.shape[-1]
    (untrained,) = deque(randomised(embedder), maxlen=1)
    last = saliency(untrained, images_BCHW, reference_BD)
    exchanged = saliency(embedder, images_BCHW, reference_BD.roll(1, 0))
    mirrored = saliency(embedder, images_BCHW.flip(3), reference_BD)[..., ::-1]
    again = saliency(embedder, images_BCHW, reference_BD)
    large = upsample(maps, size)
    drops = []
    for image, reference, map_HW in zip(images_BCHW, reference_BD, large, strict=True):
        score = faithfulness(embedder, image, reference, map_HW[None], config)[0]
        drops.append(score.road_morf - score.road_lerf)
    likeness = float(np.mean([spearman(a, b) for a, b in zip(maps, last, strict=True)]))
    change = float(np.linalg.norm(exchanged - maps) / max(float(np.linalg.norm(maps)), 1e-12))
    flip = float(np.mean([_pearson(a, b) for a, b in zip(maps, mirrored, strict=True)]))
    repeated = float(np.abs(again - maps).max())
    order = float(np.mean(drops))
    found = {
        "randomised": SanityCheck(likeness, likeness < 0.5, "below 0.5"),
        "reference": SanityCheck(change, change > 0.1, "above 0.1"),
        "flip": SanityCheck(flip, flip > 0.5, "above 0.5"),
        "repeated": SanityCheck(repeated, repeated == 0.0, "0"),
        "order": SanityCheck(order, order > 0.0, "above 0"),
    }
    if one_class:
        del found["reference"]
    if isinstance(saliency, Explainer) and saliency.method == "decomposition":
        with evaluating(embedder), torch.no_grad():
            cosine_B = (embedder(images_BCHW) * reference_BD).sum(1).cpu().numpy()
        gap = float(np.abs(maps.sum((1, 2)) - cosine_B).max())
        found["complete"] = SanityCheck(gap, gap < 1e-5, "below 1e-5")
    return found


def cascade(
    embedder: Embedder, saliency: Saliency, images_BCHW: Tensor, reference_BD: Tensor
) -> list[float]:
    """Mean rank correlation with the trained model's maps while more and more weights are random,
    from the head down; the last entry has none of the trained weights.
    """
    maps = saliency(embedder, images_BCHW, reference_BD)
    found = []
    for copy in randomised(embedder):
        other = saliency(copy, images_BCHW, reference_BD)
        found.append(float(np.mean([spearman(a, b) for a, b in zip(maps, other, strict=True)])))
    return found


def randomised(embedder: Embedder, seed: int = 0) -> Iterator[Embedder]:
    """Copies with the values of more and more weights exchanged among themselves, so that each
    layer keeps its scale: the projection, then thirds of the backbone from the top.
    """
    copy = deepcopy(embedder)
    generator = torch.Generator().manual_seed(seed)
    layers: list[nn.Module] = [
        m for m in copy.backbone.modules() if any(True for _ in m.parameters(recurse=False))
    ]
    cuts = np.linspace(len(layers), 0, LEVELS).astype(int)
    _shuffle(copy.projection, generator)
    yield copy
    for high, low in zip(cuts[:-1], cuts[1:], strict=True):
        for layer in layers[low:high]:
            _shuffle(layer, generator)
        yield copy


def spearman(first: NDArray, second: NDArray) -> float:
    """Rank correlation of two maps; 0 where one of them is flat."""
    from scipy.stats import rankdata

    return _pearson(rankdata(first), rankdata(second))


def _pearson(first: NDArray, second: NDArray) -> float:
    one, two = (np.asarray(x, np.float64).ravel() for x in (first, second))
    one, two = one - one.mean(), two - two.mean()
    length = float(np.linalg.norm(one) * np.linalg.norm(two))
    return float(one @ two) / length if length > 0 else 0.0


def _shuffle(layer: nn.Module, generator: torch.Generator) -> None:
    with torch.no_grad():
        for value in layer.parameters(recurse=False):
            order = torch.randperm(value.numel(), generator=generator).to(value.device)
            value.copy_(value.flatten()[order].view_as(value))
