"""Verification pairs: what may be in them, what decides them, and what their scores mean."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score

from flowerray.errors import UserError
from flowerray.retrieval.pairs import (
    Pairs,
    fit_threshold,
    load_pairs,
    make_pairs,
    pair_cosines,
    pair_metrics,
    save_pairs,
)


def draw(seed: int, sizes: list[int], noise: float = 1.0) -> tuple[NDArray, NDArray[np.int64]]:
    means = np.random.default_rng(77).normal(size=(len(sizes), 8))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    return means[labels] + noise * rng.normal(size=(len(labels), 8)), labels


@pytest.mark.parametrize("sizes", [[10] * 20, [2, 3, 5, 1, 1, 40], [40, 1]])
@pytest.mark.parametrize("number", [5, 60, 3000])
def test_pairs_are_valid_and_all_different(sizes: list[int], number: int) -> None:
    """The notebooks' (i, i) fallback and repeated pairs cannot occur, however small the set."""
    features, labels = draw(0, sizes)
    pairs = make_pairs(labels, 0, number, features)
    first, second = pairs.index.T
    assert (first < second).all(), "an image with itself, or an unordered pair"
    assert len(np.unique(pairs.index, axis=0)) == len(pairs.index)
    assert ((labels[first] == labels[second]) == pairs.same).all()
    every = list(itertools.combinations(labels, 2))
    positives = sum(a == b for a, b in every)
    counts = np.bincount(pairs.kind, minlength=3)
    assert counts[0] == min(number, positives)
    assert 0 < counts[2] <= number
    assert counts[1] == min(number, len(every) - positives - counts[2])


def test_pairs_depend_on_the_seed_alone() -> None:
    """The notebooks drew them from unseeded global state."""
    features, labels = draw(1, [12] * 10)
    expected = make_pairs(labels, 3, 50, features)
    np.random.seed(123)
    again = make_pairs(labels, 3, 50, features)
    assert np.array_equal(again.index, expected.index)
    assert np.array_equal(again.kind, expected.kind)
    other = make_pairs(labels, 4, 50, features)
    assert not np.array_equal(other.index, expected.index)


def test_hard_negatives_are_the_nearest_of_another_class() -> None:
    features, labels = draw(2, [9] * 8)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    cosine = unit @ unit.T
    cosine[labels[:, None] == labels] = -np.inf
    nearest = {tuple(sorted((i, int(j)))) for i, j in enumerate(cosine.argmax(1))}
    few = make_pairs(labels, 0, 10, features)
    assert {tuple(pair) for pair in few.index[few.kind == 2].tolist()} <= nearest
    many = make_pairs(labels, 0, 70, features)
    hard = {tuple(pair) for pair in many.index[many.kind == 2].tolist()}
    assert len(hard) == 70 and nearest <= hard
    scores = pair_cosines(features, many)
    assert scores[many.kind == 2].mean() > scores[many.kind == 1].mean() + 0.2
    assert (make_pairs(labels, 0, 10).kind != 2).all(), "no features, no hard negatives"


def test_easy_and_positive_pairs_cover_all_images_evenly() -> None:
    _, labels = draw(3, [20] * 5)
    pairs = make_pairs(labels, 0, 200)
    for kind in (0, 1):
        seen = np.bincount(pairs.index[pairs.kind == kind].ravel(), minlength=100)
        assert (seen > 0).mean() > 0.9 and seen.max() < 14, "expected 4 an image"


def test_save_and_load_by_name(tmp_path: Path) -> None:
    features, labels = draw(4, [6] * 6)
    names = [f"class {label}/image {i:03d}.jpg" for i, label in enumerate(labels)]
    pairs = make_pairs(labels, 0, 20, features)
    save_pairs(tmp_path / "pairs.json", {"val": (pairs, names)}, seed=0)
    same = load_pairs(tmp_path / "pairs.json", "val", names)
    assert same is not None
    assert np.array_equal(same.index, pairs.index) and np.array_equal(same.kind, pairs.kind)
    assert load_pairs(tmp_path / "pairs.json", "test", names) is None
    order = np.random.default_rng(0).permutation(len(names))
    moved = load_pairs(tmp_path / "pairs.json", "val", [names[i] for i in order])
    assert moved is not None
    assert np.allclose(pair_cosines(features[order], moved), pair_cosines(features, pairs))
    with pytest.raises(UserError, match="not in split val"):
        load_pairs(tmp_path / "pairs.json", "val", names[1:])


@pytest.mark.parametrize(
    "content",
    [
        None,
        "",
        "[]",
        '{"val": {}}',
        '{"val": {"files": ["a"], "positive": [[0, 1]], "easy": [], "hard": []}}',
    ],
)
def test_a_broken_file_is_a_sentence(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "pairs.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match="verification pairs"):
        load_pairs(path, "val", ["a"])


def test_metrics_by_hand() -> None:
    features, labels = draw(5, [10] * 8, noise=2.0)
    pairs = make_pairs(labels, 0, 90, features)
    scores, same = pair_cosines(features, pairs), pairs.same
    for (i, j), score in zip(pairs.index, scores, strict=True):
        lengths = np.linalg.norm(features[i]) * np.linalg.norm(features[j])
        assert score == pytest.approx(features[i] @ features[j] / lengths)
    metrics = pair_metrics(features, pairs, threshold=0.3)
    wins = [(p > n) + 0.5 * (p == n) for p in scores[same] for n in scores[~same]]
    assert metrics["pair_auc"] == pytest.approx(np.mean(wins))
    chosen = pairs.kind != 1
    assert metrics["pair_auc_hard"] == pytest.approx(roc_auc_score(same[chosen], scores[chosen]))
    assert metrics["pair_auc_hard"] < metrics["pair_auc"] - 0.05
    assert metrics["pair_accuracy"] == pytest.approx(
        (np.mean(scores[same] >= 0.3) + np.mean(scores[~same] < 0.3)) / 2
    )
    misses_at = [(np.mean(scores[same] < t), np.mean(scores[~same] >= t)) for t in np.sort(scores)]
    closest = min(misses_at, key=lambda rates: abs(rates[0] - rates[1]))
    assert metrics["pair_eer"] == pytest.approx(np.mean(closest), abs=0.01)


def test_perfect_reversed_and_constant_scores() -> None:
    pairs = Pairs(np.array([[0, 1], [2, 3], [0, 2], [1, 3]]), np.array([0, 0, 1, 1]))
    apart = np.array([[1.0, 0], [1, 0], [0, 1], [0, 1]])
    perfect = pair_metrics(apart, pairs, 0.5)
    assert perfect == {"pair_auc": 1.0, "pair_eer": 0.0, "pair_accuracy": 1.0}
    crossed = np.array([[1.0, 0], [0, 1], [1, 0], [0, 1]])
    assert pair_metrics(crossed, pairs, 0.5) == {
        "pair_auc": 0.0,
        "pair_eer": 1.0,
        "pair_accuracy": 0.0,
    }
    constant = pair_metrics(np.ones((4, 2)), pairs, 0.5)
    assert constant == pytest.approx({"pair_auc": 0.5, "pair_eer": 0.5, "pair_accuracy": 0.5})


def test_the_threshold_is_never_fitted_on_what_it_judges() -> None:
    """The notebooks re-fitted it on the test set: accuracy there must follow the frozen value."""
    features, labels = draw(6, [10] * 8, noise=0.6)
    pairs = make_pairs(labels, 0, 90, features)
    assert "pair_accuracy" not in pair_metrics(features, pairs), "no threshold, no accuracy"
    fitted = fit_threshold(pair_cosines(features, pairs), pairs.same)
    at = {t: pair_metrics(features, pairs, t)["pair_accuracy"] for t in (-1.0, 1.1, fitted)}
    assert at[-1.0] == at[1.1] == 0.5, "a threshold that calls everything alike is at chance"
    assert at[fitted] > 0.7
    assert (
        pair_metrics(features, pairs, -1.0)["pair_auc"] == pair_metrics(features, pairs)["pair_auc"]
    )


def test_fitted_threshold_is_the_best_there_is() -> None:
    rng = np.random.default_rng(7)
    for _ in range(20):
        same = rng.random(60) < 0.3
        cosine = np.round(rng.normal(0.2 * same, 0.2), 1)  # with ties

        def balanced(threshold: float, cosine: NDArray = cosine, same: NDArray = same) -> float:
            return (
                float((cosine[same] >= threshold).mean() + (cosine[~same] < threshold).mean()) / 2
            )

        best = max(balanced(t) for t in np.linspace(-2, 2, 401))
        assert balanced(fit_threshold(cosine, same)) == pytest.approx(best)
    assert fit_threshold([0.9, 0.8, 0.2, 0.1], [1, 1, 0, 0]) == pytest.approx(0.5)


BAD = {
    "one class": lambda: make_pairs([0, 0, 0], 0),
    "no positives": lambda: make_pairs([0, 1, 2], 0),
    "empty": lambda: make_pairs([], 0),
    "feature rows": lambda: make_pairs([0, 0, 1], 0, 5, np.ones((2, 3))),
    "feature nan": lambda: make_pairs([0, 0, 1], 0, 5, np.full((3, 3), np.nan)),
    "only same": lambda: fit_threshold([0.1, 0.2], [1, 1]),
    "nan score": lambda: fit_threshold([0.1, np.nan], [1, 0]),
    "too few": lambda: pair_metrics(np.eye(3), Pairs(np.array([[0, 3]]), np.array([0]))),
    "nan": lambda: pair_metrics(np.full((4, 2), np.nan), Pairs(np.array([[0, 3]]), np.array([0]))),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(call: object) -> None:
    assert callable(call)
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
