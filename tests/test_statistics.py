"""Intervals and tests against closed forms, and their coverage on seeded simulations."""

import numpy as np
import pytest
from scipy import stats

from flowerray.errors import UserError
from flowerray.statistics import (
    front,
    holm,
    mean_interval,
    pair_interval,
    paired_difference,
    t_interval,
)
from tests.benchmarks import coverage


def test_t_interval_equals_scipy() -> None:
    values = np.random.default_rng(0).normal(0.8, 0.02, size=5)
    ours = t_interval(values, level=0.9)
    low, high = stats.t.interval(0.9, 4, values.mean(), stats.sem(values))
    assert (ours.n, ours.mean) == (5, pytest.approx(values.mean()))
    assert (ours.low, ours.high) == (pytest.approx(low), pytest.approx(high))


def test_many_queries_have_the_normal_interval() -> None:
    hits = np.random.default_rng(1).random(2000) < 0.8
    found = mean_interval(hits)
    half = 1.96 * hits.std() / np.sqrt(2000)
    assert (found.n, found.mean) == (2000, hits.mean())
    assert found.low == pytest.approx(hits.mean() - half, abs=1e-3)
    assert found.high == pytest.approx(hits.mean() + half, abs=1e-3)
    wide = mean_interval(hits, level=0.99)
    assert wide.low < found.low < found.high < wide.high


@pytest.mark.parametrize("hits", [0, 1, 5, 505, 512])
def test_rare_hits_have_bounds_between_jeffreys_and_clopper_and_pearsons(hits: int) -> None:
    found = mean_interval(np.arange(512) < hits)
    exact = stats.binomtest(hits, 512).proportion_ci(0.95, method="exact")
    jeffreys = stats.beta(hits + 0.5, 512 - hits + 0.5).interval(0.95)
    assert exact.low - 1e-4 <= found.low < jeffreys[0] or hits == found.low == 0
    assert jeffreys[1] < found.high <= exact.high + 1e-4 or hits / 512 == found.high == 1
    back = mean_interval(np.arange(512) >= hits)
    assert (back.low, back.high) == pytest.approx((1 - found.high, 1 - found.low))


def test_pairs_that_share_members_are_fewer_than_they_seem() -> None:
    """The variance by a loop over pairs of pairs; pairs that share none have a share's interval."""
    rng = np.random.default_rng(5)
    ends, liked = rng.integers(30, size=(400, 2)), rng.normal(size=30)
    hits = liked[ends].sum(1) + rng.normal(size=400) > 1
    rest = hits - hits.mean()
    together = [[bool({*one} & {*other}) for other in ends.tolist()] for one in ends.tolist()]
    variance = rest @ np.array(together, float) @ rest / 400**2 * 30 / 29
    shared, none = pair_interval(hits, ends), pair_interval(hits, np.arange(800).reshape(400, 2))
    half = stats.t(29).ppf(0.975) * np.sqrt(variance)
    assert shared.high - shared.low == pytest.approx(2 * half, rel=0.1)
    assert none.high - none.low == pytest.approx(2 * 1.96 * hits.std() / 20, rel=0.02)
    assert none.high - none.low < 0.7 * (shared.high - shared.low)
    assert pair_interval(hits, ends, np.arange(800).reshape(400, 2)) == shared
    assert pair_interval(np.zeros(400), ends).high < 0.02


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("shape", [(2,), (24,), (3, 24)])
def test_scores_that_are_all_alike_leave_room_for_the_next_one(
    value: float, shape: tuple[int, ...]
) -> None:
    found = mean_interval(np.full(shape, value))
    assert found.mean == value and found.high - found.low > 1 / shape[-1]
    assert np.isnan(mean_interval([value]).low)


def test_the_variance_is_that_of_two_crossed_random_factors() -> None:
    """Against its closed form; with many seeds and queries the quantile is the normal one."""
    rng = np.random.default_rng(4)
    seeds, queries, trials = 60, 200, 60
    truth = 0.02**2 / seeds + 0.1**2 / queries + 0.1**2 / (seeds * queries)
    widths = []
    for _ in range(trials):
        scores = 0.5 + rng.normal(0, 0.02, (seeds, 1)) + rng.normal(0, 0.1, queries)
        found = mean_interval((scores + rng.normal(0, 0.1, (seeds, queries))).clip(0, 1))
        widths.append(found.high - found.low)
    assert np.mean(widths) == pytest.approx(2 * 1.97 * np.sqrt(truth), rel=0.03)


def test_the_interval_of_few_seeds_that_differ_is_students() -> None:
    """Where queries add next to nothing."""
    rng = np.random.default_rng(8)
    rates_S1 = np.array([[0.3], [0.5], [0.45]])
    scores = rates_S1 + rng.normal(0, 1e-3, (3, 400))
    ours, student = mean_interval(scores), t_interval(scores.mean(1))
    assert ours.high - ours.low == pytest.approx(student.high - student.low, rel=0.2)


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize(("queries", "rate"), [(10, 0.5), (64, 0.97), (500, 0.1), (1000, 0.8)])
@pytest.mark.parametrize("kind", coverage.KINDS)
def test_intervals_hold_the_truth_as_often_as_they_say(
    kind: str, queries: int, rate: float, seeds: int
) -> None:
    """150 draws: 0.95 less three standard errors; docs/statistics.md has the whole grid."""
    rng = np.random.default_rng((seeds, queries))
    spread = 0.02 if seeds > 1 else 0.0
    found = [coverage.KINDS[kind](rng, seeds, queries, spread, rate) for _ in range(150)]
    held, *false = np.mean(found, axis=0)
    assert held >= 0.95 - 3 * 0.0178
    assert all(share <= 0.05 + 3 * 0.0178 for share in false)


def test_too_narrow_bounds_would_be_seen() -> None:
    """Student's interval over two seeds' queries as if they were independent, the planted fault."""
    rng = np.random.default_rng(9)
    held = 0
    for _ in range(150):
        (hits_SQ,) = coverage.draw(rng, 3, 2000, 0.02, 0.8)
        found = mean_interval(hits_SQ.reshape(-1))
        held += found.low <= 0.8 <= found.high
    assert held / 150 < 0.95 - 3 * 0.0178


def test_pairs_show_what_the_unpaired_spread_hides() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.uniform(0.1, 0.8, 400)
    first = difficulty + 0.02 + rng.normal(0, 0.03, (3, 400))
    second = difficulty + rng.normal(0, 0.03, (3, 400))
    found = paired_difference(first, second)
    assert found.n == 400 and found.mean == pytest.approx((first - second).mean())
    assert 0.01 < found.low < 0.02 < found.high < 0.03 and found.p_value < 0.01
    back = paired_difference(second, first)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))
    assert back.p_value == pytest.approx(found.p_value, rel=1e-3)
    frozen = paired_difference(first, second[0])
    assert frozen == paired_difference(first, np.tile(second[0], (3, 1)))


def test_the_p_value_is_below_5_percent_where_the_interval_leaves_0_out() -> None:
    rng = np.random.default_rng(6)
    noise = rng.normal(0, 0.1, (4, 60))
    outside = []
    for shift in np.linspace(0, 0.1, 21):
        test = paired_difference(noise + shift, np.zeros(60))
        outside.append(test.low > 0)
        assert (test.p_value < 0.05) == (test.low > 0 or test.high < 0), shift
    assert 0 < sum(outside) < 21
    assert paired_difference(noise[0] + 0.5, np.zeros(60)).p_value == pytest.approx(1e-6)


@pytest.mark.parametrize("seeds", [1, 3])
def test_where_no_query_differs_one_of_the_next_still_may(seeds: int) -> None:
    hits = np.random.default_rng(2).random((seeds, 50)) < 0.7
    same = paired_difference(hits, hits)
    assert same.p_value == 1 and -0.1 < same.low < -1 / 50 and 1 / 50 < same.high < 0.1


def test_one_run_against_one_is_mcnemars_test() -> None:
    first = np.array([1] * 60 + [1] * 15 + [0] * 4 + [0] * 21)
    second = np.array([1] * 60 + [0] * 15 + [1] * 4 + [0] * 21)
    result = paired_difference(first, second)
    assert result.p_value == pytest.approx(2 * stats.binom.cdf(4, 19, 0.5))
    assert result.mean == pytest.approx(0.11) and 0 < result.low < 0.11 < result.high < 0.22
    assert paired_difference(first, second / 2).p_value < 0.01  # scores, not hits


def test_differences_beyond_1_have_students_interval() -> None:
    difference = np.random.default_rng(7).normal(0.3, 1, 30)
    found = paired_difference(difference, np.zeros(30))
    low, high = stats.t.interval(0.95, 29, difference.mean(), stats.sem(difference))
    assert (found.low, found.high) == pytest.approx((low, high), rel=0.1)


def test_holm_by_hand() -> None:
    adjusted = holm([0.04, 0.01, 0.03, 0.5])
    np.testing.assert_allclose(adjusted, [0.09, 0.04, 0.09, 0.5])
    np.testing.assert_allclose(holm([0.6, 0.9]), [1, 1])
    assert holm([0.02]) == [0.02]


BAD = {
    "empty": lambda: mean_interval([]),
    "nan": lambda: t_interval([0.1, np.nan]),
    "lengths": lambda: paired_difference(np.ones(3), np.ones(4)),
    "seeds": lambda: paired_difference(np.ones((3, 4)), np.ones((2, 4))),
    "one query": lambda: paired_difference([1.0], [0.0]),
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
