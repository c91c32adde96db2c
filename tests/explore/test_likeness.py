"""Look-alikes and variation on embeddings whose answer is known."""

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from flowerray.explore.likeness import agreement_of_nearest, look_alikes, variations


def unit(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def classes(seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Five classes of 6; 1 and 4 share their centre."""
    rng = np.random.default_rng(seed)
    centres = np.eye(16)[:5] * 4
    centres[4] = centres[1]
    labels = np.repeat(np.arange(5), 6)
    return unit(centres[labels] + rng.normal(0, 0.3, (30, 16))), labels


def test_look_alikes_by_hand() -> None:
    emb, labels = classes()
    cosine = emb @ emb.T
    np.fill_diagonal(cosine, -2)
    neighbour = labels[cosine.argmax(axis=1)]
    first, *others = look_alikes(emb, labels, count=10)
    assert (first.first, first.second) == (1, 4) and len(others) == 9
    crossed = ((labels == 1) & (neighbour == 4)).sum() + ((labels == 4) & (neighbour == 1)).sum()
    assert crossed > 0 and first.crossing == crossed / 12
    assert first.cosine == pytest.approx((emb[labels == 1] @ emb[labels == 4].T).mean())
    assert all(other.crossing == 0 for other in others)
    assert [o.cosine for o in others] == sorted((o.cosine for o in others), reverse=True)
    nearest = np.flatnonzero(labels == 1)[
        np.argsort(-(emb[labels == 1] @ emb[labels == 4].T).mean(axis=1))[:4]
    ]
    assert list(first.first_images) == nearest.tolist()


def test_the_numbers_of_the_labels_do_not_matter() -> None:
    emb, labels = classes()
    renamed = np.array([7, 2, 5, 3, 0])[labels]
    first = look_alikes(emb, renamed)[0]
    assert (first.first, first.second) == (0, 2)
    assert first.crossing == look_alikes(emb, labels)[0].crossing


def test_variation_finds_the_odd_one() -> None:
    emb, labels = classes()
    emb[8] = emb[20]  # an image of class 1 that looks like class 3
    found = variations(emb, labels)
    assert found[0].label == 1 and found[0].odd[0] == 8 and 8 not in found[0].typical
    assert [v.cosine for v in found] == sorted(v.cosine for v in found)
    assert len(found[0].typical) == len(found[0].odd) == 3
    mean = unit(emb[[i for i in range(6, 12) if i != 8]].mean(axis=0)[None])[0]
    own = [emb[i] @ unit((emb[6:12].sum(axis=0) - emb[i])[None])[0] for i in range(6, 12)]
    assert own[2] == pytest.approx(emb[8] @ mean)
    assert found[0].cosine == pytest.approx(np.mean(own))


def test_few_images() -> None:
    rng = np.random.default_rng(0)
    emb = unit(rng.normal(size=(3, 4)))
    assert look_alikes(emb, np.zeros(3, np.int64)) == []
    (only,) = variations(emb, np.array([0, 0, 1]))
    assert only.label == 0 and {*only.typical, *only.odd} == {0, 1}
    (pair,) = look_alikes(emb, np.array([0, 0, 1]))
    assert pair.second_images == (2,)
    assert math.isnan(agreement_of_nearest(emb[:1], np.array([0])))


def test_agreement_of_nearest() -> None:
    emb = unit(np.array([[1, 0.0], [1, 0.1], [0, 1.0], [0.1, 1], [0.9, 1]]))
    assert agreement_of_nearest(emb, np.array([0, 0, 1, 1, 0])) == pytest.approx(0.8)
