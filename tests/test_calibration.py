"""Probabilities and thresholds of a cosine: what is fitted on some classes holds on others."""

import numpy as np
import pytest
from numpy.typing import NDArray

from flowerray.calibration import (
    Calibration,
    calibration_error,
    fit_calibration,
    reliability,
    share_above,
)
from flowerray.errors import UserError
from flowerray.retrieval.pairs import make_pairs, pair_cosines


def scores(seed: int, classes: int = 40, each: int = 10) -> tuple[NDArray, ...]:
    """Cosines of random pairs of 16-d embeddings whose classes overlap; who is in them."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(np.arange(classes), each)
    emb = rng.normal(size=(classes, 16))[labels] + 1.2 * rng.normal(size=(len(labels), 16))
    pairs = make_pairs(labels, seed, 20_000)
    return pair_cosines(emb, pairs), pairs.same, pairs.index, labels


@pytest.fixture(scope="module")
def fitted() -> Calibration:
    return fit_calibration(*scores(0))


def test_probabilities_come_true_on_other_classes(fitted: Calibration) -> None:
    cosine, same, *_ = scores(1)
    bins = reliability(fitted, cosine, same)
    assert calibration_error(bins) < 0.03 < calibration_error(reliability(fitted, cosine**3, same))
    assert sum(part.weight for part in bins) == pytest.approx(1)
    by_hand = fitted.probability(cosine)
    assert (np.diff(by_hand[np.argsort(cosine)]) >= 0).all(), "a higher cosine is likelier"


def test_another_prior_moves_the_odds(fitted: Calibration) -> None:
    """One same pair in ten different ones: shares by counting in a narrow stretch of cosines."""
    cosine, same, *_ = scores(2, classes=60)
    kept = np.concatenate([np.flatnonzero(same)[: (~same).sum() // 10], np.flatnonzero(~same)])
    cosine, same = cosine[kept], same[kept]
    there = (cosine > 0.5) & (cosine < 0.6)
    said = fitted.probability(cosine[there], prior=1 / 11).mean()
    assert said == pytest.approx(same[there].mean(), abs=0.08)
    assert fitted.probability(0.55) - said > 0.2
    for prior in (0.0, 1.0, float("nan")):
        with pytest.raises(UserError, match="`prior` .* inside 0..1"):
            fitted.probability(0.5, prior)


def test_scores_that_crowd_near_one_and_scores_without_an_error() -> None:
    """A logistic of the cosine itself would need weights beyond what converges."""
    cosine, same, index, labels = scores(3)
    crowded = fit_calibration(1 - (1 - cosine) * 1e-3, same, index, labels)
    bins = reliability(crowded, 1 - (1 - cosine) * 1e-3, same)
    assert calibration_error(bins) < 0.05
    apart = fit_calibration(np.where(same, 0.9, 0.1), same, index, labels)
    low, high = apart.probability([0.1, 0.9])
    assert 0 < low < 0.001 and 0.999 < high < 1


def test_the_rate_of_a_threshold_lies_in_its_interval_on_other_images(fitted: Calibration) -> None:
    """Ten other draws of classes, of which at most two may miss a 95 % interval."""
    missed = 0
    for seed in range(10, 20):
        cosine, same, index, labels = scores(seed, classes=200, each=4)
        chosen = fitted.threshold(0.02)
        rate = share_above(cosine[~same], chosen.cosine, index[~same], labels)
        assert rate.low < rate.mean < rate.high
        missed += not (chosen.low <= rate.mean <= chosen.high)
    assert missed <= 2
    kept = fitted.false_match
    assert [m.far for m in kept] == sorted((m.far for m in kept), reverse=True)
    assert kept[0].far == 0.5 and kept[-1].far == 0.001
    assert kept[3].cosine < fitted.threshold(0.03).cosine < kept[4].cosine
    assert fitted.threshold(0.05) == kept[3]
    with pytest.raises(UserError, match="`far` 0.0001: .* rates of 0.001 to 0.5"):
        fitted.threshold(1e-4)
    with pytest.raises(UserError, match="rates of none"):
        Calibration(a=1, b=1, c=0).threshold(0.01)


def test_rates_need_pairs_behind_them() -> None:
    cosine, same, index, labels = scores(0, classes=6, each=4)
    assert (~same).sum() == 240
    kept = fit_calibration(cosine, same, index, labels).false_match
    assert [m.far for m in kept] == [0.5, 0.2, 0.1, 0.05]
    for m in kept:
        assert (cosine[~same] >= m.cosine).mean() == pytest.approx(m.far, abs=1 / 240)


def test_what_cannot_be_fitted_is_refused() -> None:
    cosine, same, index, labels = scores(0, classes=6, each=4)
    for scored, truth in ((cosine, same & False), (cosine, same | True), (cosine * np.nan, same)):
        with pytest.raises(UserError, match="both same and different pairs"):
            fit_calibration(scored, truth, index, labels)
