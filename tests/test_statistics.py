"""Intervals and tests against closed forms, and their coverage on seeded simulations."""

import numpy as np
import pytest
from scipy import stats

from flowerray.errors import UserError
from flowerray.statistics import (
    bootstrap_interval,
    front,
    holm,
    mcnemar,
    paired_bootstrap,
    permutation_test,
    t_interval,
)


def test_t_interval_equals_scipy() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.02, size=5)
    ours = t_interval(values, level=0.9)
    low, high = stats.t.interval(0.9, 4, values.mean(), stats.sem(values))
    assert (ours.n, ours.mean) == (5, pytest.approx(values.mean()))
    assert (ours.low, ours.high) == (pytest.approx(low), pytest.approx(high))


def test_bootstrap_is_near_the_normal_interval_and_seeded() -> None:
    hits = np.random.default_rng(1).random(2000) < 0.8
    ours = bootstrap_interval(hits)
    half = 1.96 * hits.std() / np.sqrt(2000)
    assert ours.low == pytest.approx(hits.mean() - half, abs=1.5e-3)
    assert ours.high == pytest.approx(hits.mean() + half, abs=1.5e-3)
    assert bootstrap_interval(hits) == ours
    assert bootstrap_interval(hits, seed=1) != ours
    wide = bootstrap_interval(hits, level=0.99)
    assert wide.low < ours.low < ours.high < wide.high


@pytest.mark.parametrize("value", [0.0, 1.0])
@pytest.mark.parametrize("queries", [2, 24, 512])
def test_scores_that_are_all_alike_leave_room_for_the_next_one(value: float, queries: int) -> None:
    found = bootstrap_interval(np.full(queries, value), level=0.9)
    expected = stats.binomtest(int(value) * queries, queries).proportion_ci(0.9, method="wilson")
    assert found.mean == value and found.n == queries
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert bootstrap_interval(np.full(queries, 0.5)).high == 0.5  # no hit rate


@pytest.mark.parametrize("hits", [1, 5, 9, 503, 511])
def test_rare_hits_and_misses_have_the_interval_of_wilson(hits: int) -> None:
    scores = np.arange(512) < hits
    found = bootstrap_interval(scores)
    expected = stats.binomtest(hits, 512).proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=1e-9)
    assert bootstrap_interval(np.zeros(512)).high < bootstrap_interval(np.arange(512) < 1).high


@pytest.mark.parametrize("skewed", [False, True])
def test_bootstrap_covers_the_truth_about_as_often_as_it_says(skewed: bool) -> None:
    rng = np.random.default_rng(2)
    covered = 0
    for trial in range(300):
        values = rng.exponential(1.0, 80) if skewed else rng.normal(1.0, 1.0, 80)
        interval = bootstrap_interval(values, seed=trial, resamples=500)
        covered += interval.low <= 1.0 <= interval.high
    assert 0.89 <= covered / 300 <= 0.98


def test_paired_bootstrap_sees_what_the_unpaired_spread_hides() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.normal(0, 1, 400)
    first = 0.05 + difficulty + rng.normal(0, 0.1, (3, 400))
    second = difficulty + rng.normal(0, 0.1, (3, 400))
    interval = paired_bootstrap(first, second)
    assert interval.n == 400
    assert interval.mean == pytest.approx((first - second).mean())
    assert 0.03 < interval.low < 0.05 < interval.high < 0.07
    back = paired_bootstrap(second, first)
    assert back.low == pytest.approx(-interval.high) and back.high == pytest.approx(-interval.low)
    assert interval.p_value == back.p_value == pytest.approx(2 / 10_001)


def test_the_p_value_of_the_bootstrap_goes_with_its_interval() -> None:
    """It falls below 0.05 exactly where the 95 % interval leaves 0 out; nothing differs: 1."""
    rng = np.random.default_rng(6)
    noise = rng.normal(0, 1, (4, 60))
    outside = []
    for shift in np.linspace(0, 0.5, 21):
        test = paired_bootstrap(noise + shift, np.zeros(60), resamples=999)
        outside.append(test.low > 0)
        assert (test.p_value < 0.05) == (test.low > 0 or test.high < 0), shift
    assert 0 < sum(outside) < 21
    assert paired_bootstrap(noise, noise).p_value == 1.0


def test_holm_by_hand() -> None:
    adjusted = holm([0.04, 0.01, 0.03, 0.5])
    np.testing.assert_allclose(adjusted, [0.09, 0.04, 0.09, 0.5])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1, 1])
    assert holm([0.02]) == [0.02]


def test_paired_bootstrap_counts_the_spread_between_seeds_and_of_shared_queries() -> None:
    """The variance of the resampled means against its closed form for crossed factors."""
    rng = np.random.default_rng(4)
    seeds, queries = 8, 200
    scores = rng.normal(0, 0.1, (seeds, 1)) + rng.normal(0, 1, queries) + rng.normal(0, 1, (8, 200))
    interval = paired_bootstrap(scores, np.zeros(queries))
    total = scores - scores.mean()
    per_seed, per_query = total.mean(1, keepdims=True), total.mean(0, keepdims=True)
    noise = ((total - per_seed - per_query) ** 2).mean()
    variance = (
        (per_seed**2).mean() / seeds + (per_query**2).mean() / queries + noise / (seeds * queries)
    )
    width = 2 * 1.96 * np.sqrt(variance)
    assert interval.high - interval.low == pytest.approx(width, rel=0.05)
    alone = paired_bootstrap(scores[0], np.zeros(queries))
    assert alone.n == queries and alone.low < alone.mean < alone.high


def test_paired_bootstrap_coverage_with_a_frozen_baseline() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for trial in range(200):
        frozen = rng.random(120) < 0.6
        gain = rng.normal(0.3, 0.02, (6, 1)) + rng.normal(0, 0.5, 120)
        runs = frozen + gain + rng.normal(0, 0.2, (6, 120))
        interval = paired_bootstrap(runs, frozen, seed=trial, resamples=400)
        covered += interval.low <= 0.3 <= interval.high
    assert 0.88 <= covered / 200 <= 0.99


def test_mcnemar_equals_the_binomial_test() -> None:
    first = np.array([1] * 60 + [1] * 15 + [0] * 4 + [0] * 21)
    second = np.array([1] * 60 + [0] * 15 + [1] * 4 + [0] * 21)
    result = mcnemar(first, second)
    assert result.p_value == pytest.approx(2 * stats.binom.cdf(4, 19, 0.5))
    assert result.mean == pytest.approx(0.11)
    assert 0 < result.low < 0.11 < result.high < 0.22
    same = mcnemar(first, first)
    assert same.p_value == 1.0 and same.low < 0 < same.high
    back = mcnemar(second, first)
    assert (back.mean, back.low) == pytest.approx((-result.mean, -result.high))


@pytest.mark.parametrize(
    ("wins", "losses", "queries"),
    [(0.374, 0.0, 512), (0.01, 0.0, 200), (0.15, 0.01, 512), (0.06, 0.05, 512), (0.0, 0.0, 50)],
)
def test_mcnemars_interval_holds_the_truth_as_often_as_it_says(
    wins: float, losses: float, queries: int
) -> None:
    """Also where one side wins always, as a robust model does against its standard twin."""
    rng = np.random.default_rng(11)
    covered = 0
    for _ in range(400):
        fate = rng.random(queries)
        first = fate < wins + 0.3
        second = (fate >= wins) & (fate < wins + 0.3 + losses)
        found = mcnemar(first, second)
        covered += found.low <= wins - losses <= found.high
    assert 0.92 <= covered / 400


def test_permutation_test_equals_full_enumeration() -> None:
    rng = np.random.default_rng(6)
    difference = rng.normal(0.4, 1.0, 10)
    signs = np.array(np.meshgrid(*[[-1, 1]] * 10)).reshape(10, -1).T
    exact = np.mean(np.abs(signs @ difference) >= abs(difference.sum()) - 1e-12)
    result = permutation_test(difference, np.zeros(10), permutations=40_000)
    assert 0.02 < exact < 0.98
    assert result.p_value == pytest.approx(exact, abs=0.01)
    assert permutation_test(difference, np.zeros(10)) == permutation_test(difference, np.zeros(10))


def test_permutation_p_values_are_even_where_nothing_differs_and_small_where_it_does() -> None:
    rng = np.random.default_rng(7)
    p_values = []
    for trial in range(200):
        first, second = rng.random((2, 60))
        result = permutation_test(first, second, seed=trial, permutations=300)
        p_values.append(result.p_value)
    assert stats.kstest(p_values, "uniform").pvalue > 0.01
    assert permutation_test(first + 0.5, second).p_value < 1e-3
    assert permutation_test(first, first).p_value == 1.0


BAD = {
    "empty": lambda: bootstrap_interval([]),
    "nan": lambda: t_interval([0.1, np.nan]),
    "lengths": lambda: paired_bootstrap(np.ones(3), np.ones(4)),
    "seeds": lambda: paired_bootstrap(np.ones((3, 4)), np.ones((2, 4))),
    "one query": lambda: paired_bootstrap([1.0], [0.0]),
    "not hits": lambda: mcnemar([0.5, 1], [0, 1]),
}


@pytest.mark.parametrize("call", BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(call: object) -> None:
    assert callable(call)
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_a_beaten_point_is_not_on_the_front() -> None:
    """(0.79, 0.46) is beaten by (0.8, 0.46), (0.5, 0.2) by all."""
    points = [(0.9, 0.44), (0.79, 0.46), (0.8, 0.46), (0.6, 0.50), (0.5, 0.2)]
    assert front(points) == [0, 2, 3]


def test_equal_points_do_not_beat_each_other() -> None:
    assert front([(0.5, 0.5), (0.5, 0.5)]) == [0, 1]
