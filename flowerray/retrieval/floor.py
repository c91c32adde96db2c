"""The floor under a trained model: its backbone's features as they came, on the same queries."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from flowerray.retrieval.measure import Floor, Measurement
from flowerray.show.interval import words
from flowerray.statistics import PairedTest, paired_difference

SCORES = {"recall_at_1": "hit", "map_at_r": "average_precision"}
"""Metrics that are compared, and the scores of each query that they are means of."""


def as_floor(frozen: Measurement) -> Floor:
    """What is kept of the frozen features' measurement beside a model's."""
    names = (*SCORES.values(), "num_relevant")
    scores = {name: frozen.per_query[name].astype(float).tolist() for name in names}
    return {"metrics": frozen.metrics, "per_query": scores}


def gains(per_query: Mapping[str, Any], floor: Floor | None) -> dict[str, PairedTest]:
    """Model - floor, by metric; nothing where there is no floor, or fewer than two queries count.

    Args:
        per_query: the model's scores, as `Measurement` or a record of RUN/evaluation has them.
    """
    counted_Q = np.asarray(per_query["num_relevant"]) > 0
    if floor is None or counted_Q.sum() < 2:
        return {}
    found = {}
    for metric, score in SCORES.items():
        sides = (np.asarray(scores[score], float) for scores in (per_query, floor["per_query"]))
        found[metric] = paired_difference(*(side_Q[counted_Q] for side_Q in sides))
    return found


def warning(name: str, gain: PairedTest | None, hardened: bool = False) -> str | None:
    """A sentence about a model that its backbone's features do as well without; None of another."""
    if gain is None or gain.low > 0:
        return None
    how = "is worse than" if gain.high < 0 else "is not shown to be better than"
    advice = "a lower learning rate, or a head alone, keeps more of it"
    if hardened:
        advice = "hardening costs clean accuracy"
    return f"{name} {how} its frozen backbone: R@1 {words(gain, '+.3f')}; {advice}."


def as_facts(name: str, result: Measurement, hardened: bool) -> dict[str, Any] | None:
    """For JSON: the floor's metrics, the gains over it, and `warning`."""
    if result.frozen is None:
        return None
    found = gains(result.per_query, result.frozen)
    shown = {key: {**gain.to_dict(), "p_value": gain.p_value} for key, gain in found.items()}
    said = warning(name, found.get("recall_at_1"), hardened)
    metrics = {key: result.frozen["metrics"][key] for key in SCORES}
    return {**metrics, "gain": shown, "warning": said}


def as_numbers(result: Measurement) -> dict[str, float]:
    """For MLflow, flat: `frozen_recall_at_1`, `gain_recall_at_1` and its bounds."""
    if result.frozen is None:
        return {}
    numbers = {f"frozen_{key}": result.frozen["metrics"][key] for key in SCORES}
    for key, gain in gains(result.per_query, result.frozen).items():
        bounds = {f"gain_{key}_low": gain.low, f"gain_{key}_high": gain.high}
        numbers |= {f"gain_{key}": gain.mean, **bounds}
    return numbers
