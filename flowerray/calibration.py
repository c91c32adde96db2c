"""From a cosine to a decision: the probability of one class, and thresholds by false-match rate.

Fitted on validation pairs of classes that were drawn evenly, and kept in thresholds.json and in the
exported model. Letters: P pairs, N images.
"""

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field

from flowerray.config import Config
from flowerray.errors import UserError
from flowerray.statistics import Interval, distinct, pair_interval

PRIOR = 0.5
"""Chance of one class before the images are seen, where no other is given."""
RATES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 0.005, 0.002, 0.001)
"""False-match rates that are kept where at least `LEAST` pairs of the fit are behind them."""
LEAST = 5
BINS = 15
_EDGE = 1e-6
"""Of (1 + cosine) / 2, whose logarithms are taken."""


class FalseMatch(Config):
    """A cosine and how often two random images of different classes reach it."""

    cosine: float
    far: float = Field(ge=0, le=1)
    """The rate on the pairs of the fit."""
    low: float
    """Lower bound of the 95 % interval of that rate for other images and classes."""
    high: float
    """Upper bound."""


class Calibration(Config):
    """Log-odds of one class: a log(s) - b log(1 - s) + c with s = (1 + cosine) / 2, at even odds
    beforehand.

    The beta calibration of Kull, Silva Filho and Flach (2017, equation 4), a logistic regression on
    two logarithms: unlike one on the cosine itself it also fits scores that crowd near 1.
    """

    a: float = Field(ge=0)
    b: float = Field(ge=0)
    c: float
    false_match: tuple[FalseMatch, ...] = ()
    """By falling rate."""

    def probability(self, cosine: ArrayLike, prior: float = PRIOR) -> NDArray[np.float64]:
        """Chance that two images of each cosine show one class.

        Args:
            cosine: any shape.
            prior: share of same pairs where it is asked, by which the log-odds move (Bayes' rule).

        Raises:
            UserError: a prior that is not inside 0..1.
        """
        if not 0 < prior < 1:
            raise UserError(f"`prior` {prior} is no chance of one class: give one inside 0..1.")
        share = _share(np.asarray(cosine, np.float64))
        odds = self.a * np.log(share) - self.b * np.log1p(-share) + self.c
        return _logistic(odds + math.log(prior / (1 - prior)))

    def threshold(self, far: float) -> FalseMatch:
        """The cosine with a false-match rate, straight between the kept ones over its logarithm.

        Raises:
            UserError: a rate that the pairs of the fit do not tell.
        """
        if not (kept := self.false_match) or not kept[-1].far <= far <= kept[0].far:
            told = f"{kept[-1].far:g} to {kept[0].far:g}" if kept else "none"
            raise UserError(
                f"`far` {far:g}: the validation pairs of this model tell rates of {told}."
            )
        at = [math.log(m.far) for m in reversed(kept)]

        def between(field: str) -> float:
            return float(np.interp(math.log(far), at, [getattr(m, field) for m in reversed(kept)]))

        return FalseMatch(
            cosine=between("cosine"), far=far, low=between("low"), high=between("high")
        )

    def rate(self, cosine: float) -> FalseMatch:
        """The false-match rate of a cosine, at the ends that of the last cosine that is kept."""
        at = [m.cosine for m in self.false_match]

        def between(field: str) -> float:
            logs = [math.log(max(getattr(m, field), 1e-9)) for m in self.false_match]
            return float(np.exp(np.interp(cosine, at, logs)))

        return FalseMatch(
            cosine=cosine, far=between("far"), low=between("low"), high=between("high")
        )


def fit_calibration(
    cosine_P: ArrayLike, same_P: ArrayLike, images_P2: NDArray[np.int64], labels_N: ArrayLike
) -> Calibration:
    """Fits probabilities and false-match rates on validation pairs.

    Maximum likelihood, same and different pairs with the same weight; a and b at least 0, so that a
    higher cosine is never less likely; towards Platt's targets (1999), which keep pairs that are
    parted without an error from becoming certainties.

    Args:
        cosine_P: of each pair.
        same_P: whether it is of one class.
        images_P2: its images.
        labels_N: class of each image.

    Raises:
        UserError: no pair of one of the two sorts, or a cosine that is not finite.
    """
    from scipy.optimize import minimize

    cosine, same = np.asarray(cosine_P, np.float64), np.asarray(same_P, bool)
    if same.all() or not same.any() or not np.isfinite(cosine).all():
        raise UserError("A calibration needs finite cosines of both same and different pairs.")
    positives, negatives = distinct(images_P2[same]), distinct(images_P2[~same])
    target = np.where(same, (positives + 1) / (positives + 2), 1 / (negatives + 2))
    weight = np.where(same, PRIOR / same.sum(), (1 - PRIOR) / (~same).sum())
    share = _share(cosine)
    columns_P2 = np.stack([np.log(share), -np.log1p(-share)], axis=1)
    centre_2, scale_2 = columns_P2.mean(0), columns_P2.std(0) + 1e-12
    inputs_P3 = np.column_stack([(columns_P2 - centre_2) / scale_2, np.ones(len(cosine))])

    def loss(weights: NDArray) -> tuple[float, NDArray]:
        odds = inputs_P3 @ weights
        gradient = inputs_P3.T @ (weight * (_logistic(odds) - target))
        return float(weight @ (np.logaddexp(0, odds) - target * odds)), gradient

    bounds = [(0, None), (0, None), (None, None)]
    found = minimize(loss, np.array([0.5, 0.5, 0.0]), jac=True, method="L-BFGS-B", bounds=bounds,
                     options={"ftol": 1e-12, "maxiter": 500})  # fmt: skip
    a, b = found.x[:2] / scale_2
    return Calibration(
        a=float(a),
        b=float(b),
        c=float(found.x[2] - a * centre_2[0] - b * centre_2[1]),
        false_match=false_matches(cosine[~same], images_P2[~same], labels_N),
    )


def false_matches(
    cosine_P: NDArray[np.float64],
    images_P2: NDArray[np.int64],
    labels_N: ArrayLike,
    rates: Sequence[float] = RATES,
) -> tuple[FalseMatch, ...]:
    """The lowest cosines that at most these shares of different pairs reach; rates with fewer than
    `LEAST` pairs behind them are left out.
    """
    falling, number = np.sort(cosine_P)[::-1], distinct(images_P2)
    found = []
    for rate in rates:
        passing = int(rate * len(falling) + 1e-9)
        if rate * number >= LEAST and passing < len(falling):
            cosine = float(falling[passing - 1] + falling[passing]) / 2
            told = share_above(cosine_P, cosine, images_P2, labels_N)
            found.append(FalseMatch(cosine=cosine, far=rate, low=told.low, high=told.high))
    return tuple(found)


def share_above(
    cosine_P: NDArray[np.float64],
    threshold: float,
    images_P2: NDArray[np.int64],
    labels_N: ArrayLike,
) -> Interval:
    """Share of pairs that reach a threshold, with its interval for other images and classes."""
    return pair_interval(cosine_P >= threshold, images_P2, np.asarray(labels_N)[images_P2])


class Reliability(Config):
    """Pairs whose probabilities lie in one of `BINS` equal parts of 0..1."""

    probability: float
    """Their mean."""
    same: float
    """Share of them that are of one class."""
    weight: float
    """Their share of all pairs."""


def reliability(
    calibration: Calibration, cosine_P: NDArray[np.float64], same_P: NDArray[np.bool_]
) -> list[Reliability]:
    """What the probabilities come to on other pairs, same and different ones with the same weight,
    as in the fit.
    """
    probability_P = calibration.probability(cosine_P)
    weight_P = np.where(same_P, PRIOR / same_P.sum(), (1 - PRIOR) / (~same_P).sum())
    bin_P = np.minimum((probability_P * BINS).astype(int), BINS - 1)
    found = []
    for inside in (bin_P == number for number in range(BINS)):
        if weight := float(weight_P[inside].sum()):
            said, was = (float((weight_P * v)[inside].sum()) / weight
                         for v in (probability_P, same_P))  # fmt: skip
            found.append(Reliability(probability=said, same=was, weight=weight))
    return found


def calibration_error(bins: Sequence[Reliability]) -> float:
    """Expected calibration error (Guo et al. 2017, equation 3), 0..1."""
    return sum(part.weight * abs(part.probability - part.same) for part in bins)


def _share(cosine: NDArray[np.float64]) -> NDArray[np.float64]:
    return ((1 + cosine) / 2).clip(_EDGE, 1 - _EDGE)


def _logistic(odds: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.exp(-np.logaddexp(0, -odds))
