"""How well a cosine decides: true matches at a false-match rate, probabilities, unknown classes.

Letters: Q queries, G gallery images, D embedding dimensions, P pairs, B queries of a block.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.calibration import (
    Calibration,
    FalseMatch,
    Reliability,
    calibration_error,
    false_matches,
    reliability,
    share_above,
)
from flowerray.retrieval.pairs import Pairs, pair_cosines, random_pairs
from flowerray.statistics import Interval, mean_interval

RATES = (0.1, 0.01, 0.001)
UNKNOWN = 0.1
"""Share of queries of unknown classes that may be taken for known ones."""
UNFIT = 0.05
"""Calibration error from which probabilities do not fit the data."""
_BLOCK = 2**22
"""Cosines held at a time."""


@dataclass(frozen=True)
class Decisions:
    """Figures of decisions by cosine; names end in `_hard` against hard negatives alone."""

    metrics: dict[str, float] = field(default_factory=dict)
    """`tar_at_far_<rate>` and `cosine_at_far_<rate>`, `far_at_threshold`, `calibration_error`, and
    of the open set `unknown_auroc`, `known_found`, `unknown_accepted` and both at a stricter
    threshold."""
    intervals: dict[str, Interval] = field(default_factory=dict)
    reliability: dict[str, list[Reliability]] = field(default_factory=dict)
    """`random` and `hard`: what the probabilities came to."""

    def joined(self, other: "Decisions") -> "Decisions":
        """Both together."""
        return Decisions(
            self.metrics | other.metrics,
            self.intervals | other.intervals,
            self.reliability | other.reliability,
        )

    def to_dict(self) -> dict[str, Any]:
        """The reliability, for JSON; metrics and intervals stand with the others."""
        return {name: [b.model_dump() for b in bins] for name, bins in self.reliability.items()}


def judge(
    emb_QD: NDArray,
    labels_Q: NDArray[np.int64],
    pairs: Pairs | None,
    threshold: float,
    calibration: Calibration | None,
) -> Decisions:
    """Judges the cosine on pairs of a split: random ones, and the hard ones among `pairs`.

    Raises:
        UserError: no two images of one class, or no two classes.
    """
    found = Decisions()
    for suffix, drawn in (("", random_pairs(labels_Q)), ("_hard", pairs)):
        if drawn is None or (suffix and not (drawn.kind == 2).any()):
            continue
        kept = drawn.kind != 1 if suffix else drawn.kind != 2
        cosine_P, same_P, images_P2 = pair_cosines(emb_QD, drawn), drawn.same, drawn.index
        same = cosine_P[same_P], images_P2[same_P]
        other = cosine_P[kept & ~same_P], images_P2[kept & ~same_P]
        for at in false_matches(*other, labels_Q, RATES):
            name = f"at_far_{at.far:g}{suffix}"
            found.intervals[f"tar_{name}"] = _true_matches(at, *same, other[0], labels_Q)
            found.metrics[f"cosine_{name}"] = at.cosine
        name = f"far_at_threshold{suffix}"
        found.intervals[name] = share_above(other[0], threshold, other[1], labels_Q)
        if calibration is not None:
            bins = reliability(calibration, cosine_P[kept], same_P[kept])
            found.reliability["hard" if suffix else "random"] = bins
            found.metrics[f"calibration_error{suffix}"] = calibration_error(bins)
    found.metrics.update({name: told.mean for name, told in found.intervals.items()})
    return found


def _true_matches(
    at: FalseMatch, same_P: NDArray, images_P2: NDArray, other_P: NDArray, labels_Q: NDArray
) -> Interval:
    """Share of same pairs that reach a threshold, its interval widened by that of the threshold,
    which other images would place where the rate is one of its bounds (MOVER).
    """
    told = share_above(same_P, at.cosine, images_P2, labels_Q)
    low, high = (
        float((same_P >= np.quantile(other_P, 1 - rate)).mean()) for rate in (at.low, at.high)
    )
    low = told.mean - float(np.hypot(told.mean - told.low, told.mean - min(low, told.mean)))
    high = told.mean + float(np.hypot(told.high - told.mean, max(high, told.mean) - told.mean))
    return Interval(told.n, told.mean, max(low, 0.0), min(high, 1.0))


def open_set(
    query_QD: NDArray,
    query_labels_Q: NDArray[np.int64],
    gallery: tuple[NDArray, NDArray[np.int64]] | None,
    threshold: float,
) -> Decisions:
    """How well "none of the gallery's classes" is told by the best cosine.

    Each query is asked twice: of the whole gallery, and without the images of its class, as an
    unknown one. A known query is found where its best cosine reaches the threshold and is of its
    class (detection and identification rate of ISO/IEC 19795-1).

    Args:
        gallery: embeddings and labels; None: the queries, each without itself.
    """
    from sklearn.metrics import roc_auc_score

    known_Q, other_Q = best_cosines(query_QD, query_labels_Q, gallery)
    asked = np.isfinite(known_Q) & np.isfinite(other_Q)
    if not asked.any():
        return Decisions()
    known, other = known_Q[asked], other_Q[asked]
    best = np.maximum(known, other)
    told = np.concatenate([best, other])
    strict = float(np.quantile(other, 1 - UNKNOWN))
    found = Decisions({
        "unknown_auroc": float(roc_auc_score(np.arange(len(told)) < len(best), told)),
        "open_set_cosine": strict,
    })  # fmt: skip
    for suffix, cosine in (("", threshold), ("_strict", strict)):
        right = (known > other) & (known >= cosine)
        found.intervals[f"known_found{suffix}"] = mean_interval(right.astype(float))
        passed = (other >= cosine).astype(float)
        found.intervals[f"unknown_accepted{suffix}"] = mean_interval(passed)
    found.metrics.update({name: told.mean for name, told in found.intervals.items()})
    return found


def best_cosines(
    query_QD: NDArray,
    query_labels_Q: NDArray[np.int64],
    gallery: tuple[NDArray, NDArray[np.int64]] | None,
) -> tuple[NDArray, NDArray]:
    """Of each query the best cosine within its class and outside it; -inf where there is none."""
    query_QD = unit(query_QD)
    gallery_GD, gallery_labels_G = (
        (query_QD, query_labels_Q) if gallery is None else (unit(gallery[0]), gallery[1])
    )
    rows = max(1, _BLOCK // len(gallery_GD))
    parts = []
    for start in range(0, len(query_QD), rows):
        cosine_BG = query_QD[start : start + rows] @ gallery_GD.T
        if gallery is None:
            own_B = np.arange(len(cosine_BG))
            cosine_BG[own_B, own_B + start] = -np.inf
        same_BG = query_labels_Q[start : start + rows, None] == gallery_labels_G
        parts.append([np.where(kept, cosine_BG, -np.inf).max(1) for kept in (same_BG, ~same_BG)])
    known_Q, other_Q = (np.concatenate(side) for side in zip(*parts, strict=True))
    return known_Q, other_Q


def unit(emb_ND: NDArray) -> NDArray:
    """Vectors at unit length."""
    return emb_ND / np.maximum(np.linalg.norm(emb_ND, axis=1, keepdims=True), 1e-12)


def misfit(found: Decisions, threshold: float, calibration: Calibration | None) -> str | None:
    """A sentence where threshold or probabilities do not fit the data that they were used on."""
    rate = found.intervals.get("far_at_threshold")
    if calibration is None or rate is None or not calibration.false_match:
        return None
    fitted, error = calibration.rate(threshold), found.metrics["calibration_error"]
    apart = rate.low > fitted.high or rate.high < fitted.low
    if error <= UNFIT and not (apart and abs(np.log2((rate.mean + 1e-4) / fitted.far)) > 0.6):
        return None
    return (
        f"the threshold {threshold:.3f} does not fit these photographs: {rate.mean:.1%} of "
        f"different pairs reach it, {fitted.far:.1%} did on the validation pairs of the training, "
        f"and probabilities are {error:.2f} off; take a cosine at a rate of yours from the table."
    )
