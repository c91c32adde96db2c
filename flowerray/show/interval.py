"""An interval in words, the same everywhere, and read from JSON."""

import math
from collections.abc import Mapping
from typing import Any

from flowerray.statistics import Interval

MISSING = "–"
"""Stands for a number that is not known."""


def words(found: Interval | Mapping[str, Any] | float | None, spec: str = ".3f") -> str:
    """`0.612 [0.569, 0.654]`, or `0.612` where there are no bounds.

    Args:
        found: an interval, what `Interval.to_dict` made of one, or a number alone.
        spec: of each number; `+.3f` for differences.
    """
    if isinstance(found, Mapping):
        found = read(found)
    if found is None:
        return MISSING
    if not isinstance(found, Interval):
        return MISSING if math.isnan(found) else f"{found:{spec}}"
    if math.isnan(found.mean):
        return MISSING
    if math.isnan(found.low):
        return f"{found.mean:{spec}}"
    return f"{found.mean:{spec}} [{found.low:{spec}}, {found.high:{spec}}]"


def read(stored: Mapping[str, Any]) -> Interval:
    """The interval that `Interval.to_dict` stored; of older files without `n` it is 0."""
    mean, low, high = (_number(stored[key]) for key in ("mean", "low", "high"))
    return Interval(stored.get("n", 0), mean, low, high)


def read_score(score: Mapping[str, Any], name: str = "recall_at_1") -> Interval | None:
    """A figure of a score in robustness.json with its interval, where it has one: under
    `intervals`, in files of 0.1.0 R@1's as `ci`.
    """
    if name not in score:
        return None
    if name in score.get("intervals", {}):
        return read(score["intervals"][name])
    low, high = score.get("ci", (None, None)) if name == "recall_at_1" else (None, None)
    return Interval(score.get("n", 0), _number(score[name]), _number(low), _number(high))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
