"""Intervals and paired tests: how sure a mean is, and whether two models differ.

How often each interval holds the truth: docs/statistics.md. Letters: Q queries, S seeds.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowerray.errors import UserError

_SMALLEST_P = 1e-6
"""Where a p-value of `paired_difference` stops: further out no interval is to be believed."""


@dataclass(frozen=True)
class Interval:
    """A mean (or mean difference) and its confidence interval."""

    n: int
    """Queries or seeds behind the mean."""
    mean: float
    low: float
    high: float
    """NaN bounds where one value allows no interval."""
    level: float = 0.95
    """Coverage in the long run."""

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON, which has no NaN: bounds that do not exist are None."""
        low, high = (None if np.isnan(bound) else float(bound) for bound in (self.low, self.high))
        return {"mean": self.mean, "low": low, "high": high, "n": self.n}


@dataclass(frozen=True)
class PairedTest(Interval):
    """A mean difference with its interval and the two-sided p-value of no difference."""

    p_value: float = 1.0


def mean_interval(scores: ArrayLike, *, level: float = 0.95) -> Interval:
    """Interval of a mean score over other queries and, of several trainings, other seeds.

    Args:
        scores: (Q,) of one model, or (S, Q).

    Returns:
        No bounds for one query; `n` counts queries.

    Raises:
        UserError: no scores, or one that is not finite.
    """
    found = _Mean(_checked("scores", np.atleast_2d(np.asarray(scores, np.float64)), 2))
    queries = found.scores_SQ.shape[1]
    if queries == 1:
        return Interval(1, found.mean, math.nan, math.nan, level)
    tail = (1 - level) / 2
    return Interval(queries, found.mean, *found.bounds(tail, found.critical(tail)), level)


def paired_difference(
    first_SQ: ArrayLike, second_SQ: ArrayLike, *, level: float = 0.95
) -> PairedTest:
    """The mean of first - second on the same queries, over other queries and other seeds.

    The bounds are those of the wins and of the losses, put together by how much they go along with
    each other (MOVER, Zou and Donner 2008).

    Args:
        first_SQ: one side's score of each query, a row a seed (or one row for a single run).
        second_SQ: the other's; a single row is compared with every row of the first (frozen
            features).

    Returns:
        The interval, and the p-value at which it begins to hold 0; for the hits of one run against
        one, McNemar's exact test (1947). `n` counts queries.

    Raises:
        UserError: shapes that do not pair, one query, or a value that is not finite.
    """
    first, second = _pair(first_SQ, second_SQ)
    difference_SQ = first - second
    seeds, queries = difference_SQ.shape
    if queries == 1:
        raise UserError("One query allows no paired comparison: give at least two.")
    found = _Difference(difference_SQ)
    if seeds == 1 and np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        p_value = _mcnemar((difference_SQ > 0).sum(), (difference_SQ < 0).sum())
    else:
        p_value = found.p_value()
    return PairedTest(queries, found.mean, *found.bounds((1 - level) / 2), level, p_value)


def _mcnemar(wins: int, losses: int) -> float:
    from scipy.stats import binomtest  # takes a second to import

    return float(binomtest(wins, wins + losses, 0.5).pvalue) if wins + losses else 1.0


class _Mean:
    """The mean of a table of scores whose rows and columns were both drawn at random."""

    def __init__(self, scores_SQ: NDArray[np.float64]) -> None:
        self.scores_SQ = scores_SQ
        self.mean = float(scores_SQ.mean())

    @cached_property
    def parts(self) -> tuple[float, float]:
        """The mean's variance: the seeds' part, and that of the queries which they share.

        An analysis of variance with two crossed random factors (Searle, Casella and McCulloch
        1992, chapter 4). Seeds that agree by chance do not leave less than a quarter of what
        S x Q separate scores would have.
        """
        scores, (seeds, queries) = self.scores_SQ, self.scores_SQ.shape
        separate = float(scores.var(ddof=1)) / scores.size
        if seeds == 1:
            return 0.0, separate
        rows_S1, columns_Q = scores.mean(1, keepdims=True), scores.mean(0)
        rest = ((scores - rows_S1 - columns_Q + self.mean) ** 2).sum() / (seeds - 1) / (queries - 1)
        of_seeds = float(rows_S1.var(ddof=1)) / seeds
        of_queries = float(columns_Q.var(ddof=1) - rest / seeds) / queries
        return of_seeds, max(of_queries, separate / 4 - of_seeds, 0.0)

    def critical(self, tail: float) -> float:
        """Student's quantiles with S - 1 and Q - 1 degrees of freedom, weighted by the variance's
        parts (Cochran and Cox 1957, section 4.14).
        """
        from scipy.special import stdtrit

        of_seeds, of_queries = self.parts
        seeds, queries = self.scores_SQ.shape
        critical = -stdtrit(queries - 1, tail)
        if of_seeds > 0:
            weight = of_seeds / (of_seeds + of_queries)
            critical += weight * (-stdtrit(seeds - 1, tail) - critical)
        return float(critical)

    def bounds(self, tail: float, critical: float) -> tuple[float, float]:
        """Of a mean within 0..1 the bounds of a share, outside `critical` standard errors.

        A share with this mean has the mean's variance at an effective number of queries n (Korn
        and Graubard 1998, who also allow for the degrees of freedom). Where little is seen of what
        is rare, so is the variance, and n goes to Q: one query counts as much as a share's. The
        bounds are quantiles of beta distributions half-way between Clopper and Pearson's (1934),
        which are too wide, and Jeffreys', which are too narrow.
        """
        mean, variance = self.mean, sum(self.parts)
        least, most = float(self.scores_SQ.min()), float(self.scores_SQ.max())
        if least < 0 or most > 1:
            half = critical * math.sqrt(variance)
            return mean - half, mean + half
        queries = self.scores_SQ.shape[1]
        return _share_bounds(mean, variance if least < most else 0.0, queries, tail, critical)


def _share_bounds(
    mean: float, variance: float, size: int, tail: float, critical: float
) -> tuple[float, float]:
    """See `_Mean.bounds`; a variance of 0 is none that was seen."""
    from scipy.special import betainccinv, betaincinv, ndtri

    n = float(size)
    if variance > 0:
        rare = min(mean, 1 - mean)
        n = (rare * mean * (1 - mean) / variance + 1) / (rare + 1 / size)
    n *= (ndtri(tail) / critical) ** 2
    a, b = n * mean, n * (1 - mean)
    low = betaincinv(a + 0.25, b + 0.75, tail) if a > 0 else 0.0
    high = betainccinv(a + 0.75, b + 0.25, tail) if b > 0 else 1.0
    return min(float(low), mean), max(float(high), mean)


class _Difference:
    """A mean difference as that of wins less that of losses."""

    def __init__(self, difference_SQ: NDArray[np.float64]) -> None:
        self.both = _Mean(difference_SQ)
        self.wins, self.losses = (_Mean((s * difference_SQ).clip(min=0)) for s in (1, -1))
        self.mean = self.both.mean
        total, wins, losses = (sum(m.parts) for m in (self.both, self.wins, self.losses))
        spread = 2 * math.sqrt(wins * losses)
        self.correlation = max(-1.0, min(1.0, (wins + losses - total) / spread)) if spread else 0.0

    def bounds(self, tail: float) -> tuple[float, float]:
        critical = self.both.critical(tail)
        wins, losses = (side.bounds(tail, critical) for side in (self.wins, self.losses))

        def reach(a: float, b: float) -> float:
            return math.sqrt(max(a * a + b * b - 2 * self.correlation * a * b, 0.0))

        low = self.mean - reach(self.wins.mean - wins[0], losses[1] - self.losses.mean)
        high = self.mean + reach(wins[1] - self.wins.mean, self.losses.mean - losses[0])
        return low, high

    def p_value(self) -> float:
        """Two-sided: the level at which the bounds reach 0."""
        from scipy.optimize import brentq

        def beyond(log_p: float) -> float:
            low, high = self.bounds(math.exp(log_p) / 2)
            return max(low, -high)

        least, most = math.log(_SMALLEST_P), -1e-6
        if self.mean == 0 or beyond(most) <= 0:
            return 1.0
        if beyond(least) >= 0:
            return _SMALLEST_P
        return math.exp(brentq(beyond, least, most, xtol=1e-6))


def pair_interval(hits_P: ArrayLike, *members: NDArray[np.int64], level: float = 0.95) -> Interval:
    """Interval of a share of pairs that share images and classes, and so are not P separate draws.

    Pairs with a member in common go along with each other (dyadic clusters: Aronow, Samii and
    Assenova 2015, equation 4); of several groupings the one that makes the share least sure counts.
    Bounds as of `mean_interval`.

    Args:
        hits_P: whether each pair counts.
        members: (P, 2) each: the two images of a pair, its two classes. A pair that is there
            several times has more weight, and is one draw.

    Raises:
        UserError: no pairs.
    """
    hits_P = _checked("pairs", hits_P, 1)
    mean, tail = float(hits_P.mean()), (1 - level) / 2
    size = distinct(members[0]) if members else len(hits_P)
    from scipy.special import stdtrit

    variance, groups = mean * (1 - mean) / size, size
    for ends_P2 in members:
        found, number = _dyadic_variance(hits_P - mean, ends_P2)
        if found > variance:
            variance, groups = found, number
    critical = -float(stdtrit(max(groups - 1, 1), tail))
    return Interval(size, mean, *_share_bounds(mean, variance, size, tail, critical), level)


def distinct(pairs_P2: NDArray[np.int64]) -> int:
    """Number of different pairs, each with its smaller number first."""
    return len(np.unique(pairs_P2[:, 0] * (pairs_P2.max(initial=0) + 1) + pairs_P2[:, 1]))


def _dyadic_variance(rest_P: NDArray, ends_P2: NDArray[np.int64]) -> tuple[float, int]:
    """Variance of a mean over pairs, and the number of members that pairs have in common."""
    names, codes = np.unique(ends_P2, return_inverse=True)
    first, second = np.sort(codes.reshape(ends_P2.shape), axis=1).T
    apart = first != second
    sums = np.bincount(first, rest_P, len(names))
    sums += np.bincount(second, rest_P * apart, len(names))
    _, twice = np.unique(first[apart] * len(names) + second[apart], return_inverse=True)
    both = np.bincount(twice, rest_P[apart])  # of the pairs with two members in common
    total = float((sums**2).sum() - (both**2).sum())
    return total / len(rest_P) ** 2 * len(names) / max(len(names) - 1, 1), len(names)


def t_interval(values_S: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's t interval of a mean over independent runs (one value a seed), for the queries that
    they were measured on; no bounds for one value.

    Raises:
        UserError: no values, or one that is not finite.
    """
    values = _checked("values", values_S, 1)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(1, mean, float("nan"), float("nan"), level)
    from scipy.special import stdtrit

    half = float(stdtrit(n - 1, (1 + level) / 2) * values.std(ddof=1) / np.sqrt(n))
    return Interval(n, mean, mean - half, mean + half, level)


def holm(p_values_T: ArrayLike) -> NDArray[np.float64]:
    """p-values of T tests, adjusted for having made them all (Holm 1979): compared with 0.05, they
    keep the chance of any false finding below 5 %.

    Raises:
        UserError: no values, or one that is not finite.
    """
    values = _checked("p-values", p_values_T, 1)
    order = np.argsort(values, kind="stable")
    factors = len(values) - np.arange(len(values))
    adjusted = np.empty_like(values)
    adjusted[order] = np.maximum.accumulate(factors * values[order]).clip(max=1)
    return adjusted


def _checked(name: str, values: ArrayLike, ndim: int) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != ndim or array.size == 0 or not np.isfinite(array).all():
        raise UserError(
            f"The {name} to compare have shape {array.shape}: at least one finite number is needed."
        )
    return array


def _pair(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    one = _checked("scores", np.atleast_2d(np.asarray(first, np.float64)), 2)
    two = _checked("scores", np.atleast_2d(np.asarray(second, np.float64)), 2)
    if one.shape[1] != two.shape[1] or (len(one) != len(two) and len(two) != 1):
        raise UserError(
            f"Scores of shapes {one.shape} and {two.shape} cannot be paired: "
            "both runs must be measured on the same queries."
        )
    return one, two


def front(points: Sequence[Sequence[float]]) -> list[int]:
    """The points that no other beats in one value without losing in another."""

    def beats(a: Sequence[float], b: Sequence[float]) -> bool:
        pairs = list(zip(a, b, strict=True))
        return all(x >= y for x, y in pairs) and any(x > y for x, y in pairs)

    return [i for i, p in enumerate(points) if not any(beats(other, p) for other in points)]
