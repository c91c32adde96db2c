"""What embeddings say about classes: which look alike, which vary, which images are typical.

Letters: N images, D embedding dimensions, C classes with an image.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowerray.retrieval.neighbours import partners

SHOWN = 4
"""Images of each class that stand for it."""


@dataclass(frozen=True)
class LookAlike:
    """Two classes that are taken for each other."""

    first: int
    """Label."""
    second: int
    crossing: float
    """Share of the images of both whose nearest other image is of the other one, 0..1."""
    cosine: float
    """Mean cosine of an image of one and an image of the other."""
    first_images: tuple[int, ...]
    """Up to 4 images of the first class, those nearest to the second one first."""
    second_images: tuple[int, ...]


def look_alikes(
    emb_ND: NDArray[np.floating], labels_N: NDArray[np.int64], count: int = 8
) -> list[LookAlike]:
    """The pairs of classes with most nearest neighbours across, then the highest mean cosine."""
    names, group_N = np.unique(labels_N, return_inverse=True)
    if len(names) < 2:
        return []
    neighbour_N = partners(emb_ND)
    images_C = np.bincount(group_N)
    mean_CD = np.zeros((len(names), emb_ND.shape[1]))
    np.add.at(mean_CD, group_N, np.asarray(emb_ND, np.float64))
    mean_CD /= images_C[:, None]
    crossed_CC = np.zeros((len(names), len(names)))
    np.add.at(crossed_CC, (group_N, group_N[neighbour_N]), 1)
    share_CC = (crossed_CC + crossed_CC.T) / (images_C[:, None] + images_C[None, :])
    cosine_CC = mean_CD @ mean_CD.T
    a_M, b_M = np.triu_indices(len(names), 1)
    order = np.lexsort((-cosine_CC[a_M, b_M], -share_CC[a_M, b_M]))[:count]
    towards_NC = emb_ND @ mean_CD.T

    def closest(own: int, other: int) -> tuple[int, ...]:
        images = np.flatnonzero(group_N == own)
        ranked = images[np.argsort(-towards_NC[images, other], kind="stable")]
        return tuple(ranked[:SHOWN].tolist())

    return [
        LookAlike(
            first=int(names[a]),
            second=int(names[b]),
            crossing=float(share_CC[a, b]),
            cosine=float(cosine_CC[a, b]),
            first_images=closest(a, b),
            second_images=closest(b, a),
        )
        for a, b in zip(a_M[order].tolist(), b_M[order].tolist(), strict=True)
    ]


@dataclass(frozen=True)
class Variation:
    """How much the images of one class differ."""

    label: int
    cosine: float
    """Mean cosine of an image with the mean of the class's others; low = varied."""
    typical: tuple[int, ...]
    """Up to 4 images, the most typical first."""
    odd: tuple[int, ...]
    """Up to 4 others, the least typical first."""


def variations(emb_ND: NDArray[np.floating], labels_N: NDArray[np.int64]) -> list[Variation]:
    """Each class of at least two images, the most varied first."""
    emb_ND = np.asarray(emb_ND, np.float64)
    found = []
    for c in np.unique(labels_N):
        images = np.flatnonzero(labels_N == c)
        if len(images) < 2:
            continue
        own = emb_ND[images]
        others = own.sum(axis=0) - own
        norm = np.maximum(np.linalg.norm(others, axis=1), 1e-12)
        cosine = (own * others).sum(axis=1) / norm
        ranked = images[np.argsort(-cosine, kind="stable")].tolist()
        half = min(SHOWN, len(ranked) // 2)
        found.append(
            Variation(
                label=int(c),
                cosine=float(cosine.mean()),
                typical=tuple(ranked[: min(SHOWN, len(ranked) - half)]),
                odd=tuple(ranked[::-1][:half]),
            )
        )
    return sorted(found, key=lambda v: (v.cosine, v.label))


def agreement_of_nearest(vectors_ND: NDArray[np.floating], labels_N: NDArray[np.int64]) -> float:
    """Share of images whose nearest other image is of their class; NaN for one image."""
    if len(labels_N) < 2:
        return float("nan")
    neighbour_N = partners(vectors_ND)
    return float((labels_N[neighbour_N] == labels_N).mean())
