"""Intervals and paired tests: how sure a mean is, and whether two runs differ.

Letters: Q queries, S seeds, R resamples or permutations.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowerray.errors import UserError

_CHUNK = 2**22
"""Random numbers held at a time."""

_RARE = 10
"""Hits or misses below which a share's bounds are Wilson's."""


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


def bootstrap_interval(
    values_Q: ArrayLike, *, seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> Interval:
    """Percentile bootstrap of a mean over queries (Efron 1979).

    Of rare hits or misses (fewer than ten) the resamples tell too little: of 512 queries without a
    hit none differs, and with 5 of them the interval holds the truth in 88 of 100 cases. There the
    bounds are Wilson's (1927).

    Raises:
        UserError: no values, or one that is not finite.
    """
    values = _checked("values", values_Q, 1)
    if len(values) == 1:
        return Interval(1, float(values[0]), float("nan"), float("nan"), level)
    hits = int((values == 1).sum())
    if hits + (values == 0).sum() == len(values) and min(hits, len(values) - hits) < _RARE:
        return _wilson(hits, len(values), level)
    means = np.concatenate(
        [values[index].mean(1) for index in _resamples(len(values), seed, resamples)]
    )
    return Interval(len(values), float(values.mean()), *_percentiles(means, level), level)


def _wilson(hits: int, queries: int, level: float) -> Interval:
    """Wilson's score interval of a share."""
    z2 = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = hits / queries
    middle = (share + z2 / (2 * queries)) / (1 + z2 / queries)
    spread = (share * (1 - share) / queries + z2 / (4 * queries**2)) * z2
    half = math.sqrt(spread) / (1 + z2 / queries)
    low, high = max(0.0, middle - half), min(1.0, middle + half)
    if hits in (0, queries):  # exact there, without the last digit's rounding
        low, high = (0.0, high) if hits == 0 else (low, 1.0)
    return Interval(queries, share, low, high, level)


def t_interval(values_S: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's t interval of a mean over independent runs (one value a seed); no bounds for one
    value.

    Raises:
        UserError: no values, or one that is not finite.
    """
    values = _checked("values", values_S, 1)
    mean, n = float(values.mean()), len(values)
    if n == 1:
        return Interval(1, mean, float("nan"), float("nan"), level)
    from scipy import stats  # takes a second to import

    half = float(stats.t.ppf((1 + level) / 2, n - 1) * values.std(ddof=1) / np.sqrt(n))
    return Interval(n, mean, mean - half, mean + half, level)


def paired_bootstrap(
    first_SQ: ArrayLike,
    second_SQ: ArrayLike,
    *,
    seed: int = 0,
    resamples: int = 10_000,
    level: float = 0.95,
) -> PairedTest:
    """Bootstrap of the mean of first - second over the same queries, resampling seeds and queries
    alike.

    Each resample draws S seeds and Q queries with replacement and keeps a drawn query's scores
    together across the drawn seeds, since the seeds share the test set (the pigeonhole bootstrap,
    Owen 2007). With few seeds the spread between them is understated: say how many there were.

    Args:
        first_SQ: one run's score of each query, a row a seed (or one row for a single run).
        second_SQ: the other's; a single row is compared with every row of the first (frozen
            features).

    Returns:
        The interval, and the p-value that belongs to it: twice the share of resampled means on the
        other side of 0, counted as (1 + number) / (1 + resamples); `n` counts queries.

    Raises:
        UserError: shapes that do not pair, or a value that is not finite.
    """
    first, second = _pair(first_SQ, second_SQ)
    difference_QS = (first - second).T.copy()
    queries, seeds = difference_QS.shape
    if queries == 1:
        raise UserError("One query allows no paired comparison: give at least two.")
    rng = np.random.default_rng((seed, 1))
    means = []
    for index_RQ in _resamples(queries, seed, resamples, width=seeds):
        per_seed_RS = difference_QS[index_RQ].mean(1)
        drawn_RS = rng.integers(seeds, size=per_seed_RS.shape)
        means.append(np.take_along_axis(per_seed_RS, drawn_RS, axis=1).mean(1))
    means_R = np.concatenate(means)
    fewer = min((means_R <= 0).sum(), (means_R >= 0).sum())
    p_value = min(1.0, 2 * (1 + int(fewer)) / (1 + resamples))
    mean = float(difference_QS.mean())
    return PairedTest(queries, mean, *_percentiles(means_R, level), level, p_value)


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


def mcnemar(first_hit_Q: ArrayLike, second_hit_Q: ArrayLike, *, level: float = 0.95) -> PairedTest:
    """Exact (binomial) test of equal hit rates on the same queries (McNemar 1947).

    The interval of the difference first - second is Newcombe's (1998, method 10): Wilson's bounds
    of both rates, put together by how much they go along with each other.

    Raises:
        UserError: lengths that differ, no values, or a value that is neither 0 nor 1.
    """
    first, second = (side[0] for side in _pair(first_hit_Q, second_hit_Q))
    if not np.isin(np.concatenate([first, second]), (0, 1)).all():
        raise UserError("McNemar's test compares hits and misses: every value must be 0 or 1.")
    queries = len(first)
    wins, losses = int((first > second).sum()), int((first < second).sum())
    both = int((first * second).sum())
    neither = queries - both - wins - losses
    one, two = (_wilson(hits, queries, level) for hits in (both + wins, both + losses))
    along = float(both * neither - wins * losses)
    if along > 0:
        along = max(along - queries / 2, 0)
    spread = math.sqrt(math.prod((both + wins, neither + losses, both + losses, neither + wins)))
    phi = along / spread if spread else 0.0

    def reach(a: float, b: float) -> float:
        return math.sqrt(a * a - 2 * phi * a * b + b * b)

    mean = (wins - losses) / queries
    low = mean - reach(one.mean - one.low, two.high - two.mean)
    high = mean + reach(one.high - one.mean, two.mean - two.low)
    if wins + losses == 0:
        return PairedTest(queries, mean, low, high, level, 1.0)
    from scipy import stats

    p_value = float(stats.binomtest(wins, wins + losses, 0.5).pvalue)
    return PairedTest(queries, mean, low, high, level, p_value)


def permutation_test(
    first_Q: ArrayLike,
    second_Q: ArrayLike,
    *,
    seed: int = 0,
    permutations: int = 10_000,
    level: float = 0.95,
) -> PairedTest:
    """Paired permutation test: where nothing differs, every difference could have the other sign.

    p = (1 + as extreme) / (1 + permutations) (Phipson and Smyth 2010), so it is never 0; the
    interval is that of `paired_bootstrap`.

    Raises:
        UserError: lengths that differ, fewer than two values, or one that is not finite.
    """
    first, second = (side[0] for side in _pair(first_Q, second_Q))
    difference = first - second
    interval = paired_bootstrap(first, second, seed=seed, level=level)
    observed = abs(difference.sum())
    # Sums that are equal on paper may differ in the last digit.
    slack = 1e-12 * np.abs(difference).sum()
    rng = np.random.default_rng((seed, 2))
    extreme, left = 0, permutations
    while left:
        rows = min(left, max(1, _CHUNK // len(difference)))
        signs = rng.integers(0, 2, size=(rows, len(difference)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed - slack).sum())
        left -= rows
    p_value = (1 + extreme) / (1 + permutations)
    return PairedTest(
        interval.n, interval.mean, interval.low, interval.high, interval.level, p_value
    )


def _resamples(size: int, seed: int, number: int, width: int = 1) -> Iterator[NDArray[np.int64]]:
    """Indices (rows, size) with replacement, `number` rows in all, a chunk at a time."""
    rng = np.random.default_rng((seed, 0))
    rows = max(1, _CHUNK // (size * width))
    for start in range(0, number, rows):
        yield rng.integers(size, size=(min(rows, number - start), size))


def _percentiles(means_R: NDArray, level: float) -> tuple[float, float]:
    low, high = np.quantile(means_R, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


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
