"""An interval is said and read in one way."""

import math

import pytest

from flowerray.show.interval import MISSING, read, read_score, words
from flowerray.statistics import Interval, t_interval


def test_words() -> None:
    found = Interval(100, 0.81249, 0.8, 0.824)
    assert words(found) == words(found.to_dict()) == "0.812 [0.800, 0.824]"
    assert words(found, "+.2f") == "+0.81 [+0.80, +0.82]"
    assert words(t_interval([0.5])) == words(0.5) == "0.500"
    assert words(None) == words(math.nan) == words(Interval(0, math.nan, 0, 1)) == MISSING


def test_what_was_stored_is_read_again() -> None:
    for found in (Interval(9, 0.5, 0.4, 0.6), t_interval([0.5])):
        again = read(found.to_dict())
        assert (again.n, again.mean) == (found.n, found.mean)
        assert again.low == pytest.approx(found.low, nan_ok=True)
        assert again.high == pytest.approx(found.high, nan_ok=True)


def test_scores_of_every_version_are_read() -> None:
    interval = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    now = {"recall_at_1": 0.5, "n": 9, "intervals": {"recall_at_1": interval}, "map_at_r": 0.3}
    before = {"recall_at_1": 0.5, "n": 9, "ci": [0.4, 0.6], "map_at_r": 0.3}
    for score in (now, before):
        assert read_score(score) == Interval(9, 0.5, 0.4, 0.6)
        assert words(read_score(score, "map_at_r")) == "0.300"
        assert read_score(score, "pair_auc") is None
    assert words(read_score({"recall_at_1": 0.5, "ci": [None, None]})) == "0.500"
