"""True matches at a false-match rate, unknown classes, and whether a threshold fits other data."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from flowerray.calibration import Calibration
from flowerray.retrieval.decisions import Decisions, best_cosines, judge, misfit, open_set
from flowerray.retrieval.pairs import calibrate, make_pairs, pair_cosines, random_pairs
from flowerray.retrieval.pictures import draw_reliability
from flowerray.retrieval.table import decisions


def photographs(
    seed: int, classes: int = 40, each: int = 8, spread: float = 1.2
) -> tuple[NDArray, NDArray[np.int64]]:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), each))
    return rng.normal(size=(classes, 16))[labels] + spread * rng.normal(
        size=(len(labels), 16)
    ), labels


@pytest.fixture(scope="module")
def calibration() -> Calibration:
    return calibrate(*photographs(0))


@pytest.fixture(scope="module")
def judged(calibration: Calibration) -> Decisions:
    emb, labels = photographs(1)
    return judge(emb, labels, make_pairs(labels, 0, 500, emb), 0.5, calibration)


def test_random_pairs_give_every_class_the_same_weight() -> None:
    labels = np.repeat([0, 1, 2], [200, 10, 10])
    pairs = random_pairs(labels)
    first, second = pairs.index.T
    assert (first < second).all() and ((labels[first] == labels[second]) == pairs.same).all()
    same = np.bincount(labels[first[pairs.same]]) / pairs.same.sum()
    assert same == pytest.approx([1 / 3] * 3, abs=0.02)
    other = pairs.index[~pairs.same]
    assert np.bincount(labels[other].ravel()) / other.size == pytest.approx([1 / 3] * 3, abs=0.02)
    assert np.array_equal(random_pairs(labels).index, pairs.index)


def test_true_matches_are_those_of_every_pair(judged: Decisions) -> None:
    """Classes of one size: drawing them evenly is taking every pair."""
    emb, labels = photographs(1)
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    upper = np.triu_indices(len(labels), 1)
    cosine, same = (unit @ unit.T)[upper], (labels[:, None] == labels)[upper]
    for rate in (0.1, 0.01):
        at = np.quantile(cosine[~same], 1 - rate)
        assert judged.metrics[f"cosine_at_far_{rate:g}"] == pytest.approx(at, abs=0.01)
        told = judged.intervals[f"tar_at_far_{rate:g}"]
        assert told.mean == pytest.approx((cosine[same] >= at).mean(), abs=0.02)
        assert told.low < told.mean - 0.02 < told.mean + 0.02 < told.high
        assert judged.metrics[f"tar_at_far_{rate:g}_hard"] < told.mean
    assert judged.metrics["far_at_threshold"] == pytest.approx(
        (cosine[~same] >= 0.5).mean(), abs=0.003
    )
    assert judged.metrics["far_at_threshold_hard"] > 3 * judged.metrics["far_at_threshold"]
    assert judged.metrics["calibration_error"] < 0.03 < judged.metrics["calibration_error_hard"]


def test_a_threshold_is_called_unfit_where_other_photographs_score_otherwise(
    calibration: Calibration,
) -> None:
    other = judge(*photographs(2), None, 0.5, calibration)
    assert misfit(other, 0.5, calibration) is None
    emb, labels = photographs(3, spread=0.5)
    looking_alike = judge(emb + 2, labels, None, 0.5, calibration)
    said = misfit(looking_alike, 0.5, calibration)
    assert said and said.startswith("the threshold 0.500 does not fit these photographs")
    assert f"{looking_alike.metrics['far_at_threshold']:.1%} of different" in said
    assert misfit(looking_alike, 0.5, None) is None


@pytest.mark.parametrize("itself", [True, False])
def test_unknown_classes_by_a_loop_over_queries(itself: bool) -> None:
    emb, labels = photographs(4, classes=12)
    queries, gallery = (emb, labels), None
    unit = emb / np.linalg.norm(emb, axis=1, keepdims=True)
    against, others = unit, labels
    if not itself:
        kept = np.flatnonzero(labels[40:] != 11) + 40  # the gallery lacks a class
        queries, gallery = (emb[:40], labels[:40]), (emb[kept], labels[kept])
        against, others = unit[kept], labels[kept]
    within, outside = best_cosines(*queries, gallery)
    for q in range(0, len(queries[0]), 7):
        cosine, same = against @ unit[q], others == labels[q]
        if itself:
            same[q] = False
            cosine[q] = -1
        assert outside[q] == pytest.approx(cosine[others != labels[q]].max())
        assert within[q] == pytest.approx(cosine[same].max()) if same.any() else within[q] < -9
    found = open_set(*queries, gallery, 0.6)
    counted = np.isfinite(within)
    within, outside = within[counted], outside[counted]
    assert found.metrics["known_found"] == ((within > outside) & (within >= 0.6)).mean()
    assert found.metrics["unknown_accepted"] == (outside >= 0.6).mean()
    assert found.metrics["unknown_accepted_strict"] == pytest.approx(0.1, abs=0.03)
    best = np.maximum(within, outside)
    wins = (best[:, None] > outside).mean() + (best[:, None] == outside).mean() / 2
    assert found.metrics["unknown_auroc"] == pytest.approx(wins)
    assert found.intervals["known_found"].n == counted.sum()


def test_decisions_in_80_columns_and_as_a_picture(judged: Decisions, tmp_path: Path) -> None:
    both = judged.joined(open_set(*photographs(1), None, 0.5))
    both = replace(both, metrics=both.metrics | {"cosine_at_far_0.1": -0.1234})
    lines = decisions(both)
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    for word in ("TAR at FAR 0.01", "-0.123", "hard pairs", "AUROC", "calibration error"):
        assert word in text
    assert decisions(Decisions()) == []
    draw_reliability(judged.reliability, tmp_path / "reliability.png")
    assert Image.open(tmp_path / "reliability.png").size[0] > 300
    assert {name: len(bins) > 3 for name, bins in both.to_dict().items()} == {
        "random": True, "hard": True,
    }  # fmt: skip


def test_sets_without_enough_pairs_have_no_rates() -> None:
    emb, labels = photographs(5, classes=3, each=2)
    found = judge(emb, labels, None, 0.5, None)
    assert set(found.metrics) == {"far_at_threshold"}
    told = found.intervals["far_at_threshold"]
    pairs = random_pairs(labels)
    assert told.mean == (pair_cosines(emb, pairs)[~pairs.same] >= 0.5).mean()
    assert told.high - told.low > 0.2, "twelve pairs, however often they were drawn"
