"""The numbers behind the report's tables: means over seeds with intervals, and paired tests.

Letters: S seeds, Q queries.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.report.gather import Setting, Variant, asked
from flowerray.retrieval.floor import SCORES
from flowerray.statistics import (
    Interval,
    PairedTest,
    holm,
    mean_interval,
    paired_difference,
    t_interval,
)

FROZEN = "frozen features"

Record = dict[str, Any]
"""An evaluation, as RUN/evaluation/<split>.json holds it."""


@dataclass(frozen=True)
class Evaluations:
    """Evaluations with the same queries and the same gallery."""

    split: str
    num_queries: int
    num_gallery: int
    records: dict[str, list[Record]]
    """Variant (or frozen backbone) -> one a seed, by seed."""

    @property
    def title(self) -> str:
        """What was searched for in what."""
        return f"{self.num_queries:,} {self.split} queries, {self.num_gallery:,} gallery images"


@dataclass(frozen=True)
class Comparison:
    """Two rows of a table, query by query."""

    first: str
    second: str
    recall: PairedTest
    """Of the difference in R@1, first - second."""
    average_precision: PairedTest | None
    """The same of MAP@R, where it is known for each query."""
    p_holm: float = 1.0
    """The p-value of R@1, corrected for all comparisons of the table."""


def evaluations(setting: Setting) -> list[Evaluations]:
    """The setting's evaluations by queries and gallery."""
    found: dict[tuple[str, int, int], dict[str, list[Record]]] = {}

    def add(label: str, record: Record) -> None:
        found.setdefault(asked(record), {}).setdefault(label, []).append(record)

    several = len({run.floor for v in setting.variants for run in v.runs}) > 1
    for (floor, *_), record in setting.frozen.items():
        add(f"{FROZEN} ({floor})" if several else FROZEN, record)
    for variant in setting.variants:
        for run in variant.runs:
            for record in run.evaluations.values():
                add(variant.label, {**record, "seed": run.seed})
    kept = {key: rows for key, rows in found.items() if any(FROZEN not in name for name in rows)}
    return [Evaluations(*key, rows) for key, rows in kept.items()]


def summary(records: Sequence[Record], metric: str) -> Interval | None:
    """A metric's mean with its interval over queries and seeds; where the seeds were not asked the
    same queries, or their scores are not known, Student's over seeds, within 0..1. None where no
    evaluation has it.
    """
    values = [r["metrics"][metric] for r in records if metric in r["metrics"]]
    if not values:
        return None
    known = metric in SCORES and all("per_query" in r for r in records)
    if known and len({tuple(r["queries"]) for r in records}) == 1:
        return mean_interval(scores(records, metric))
    return over_seeds(values)


def over_seeds(values_S: Sequence[float]) -> Interval:
    """Student's interval of a share, within 0..1; no bounds for one seed."""
    found = t_interval(values_S)
    return replace(found, low=max(found.low, 0.0), high=min(found.high, 1.0))


def scores(records: Sequence[Record], metric: str) -> NDArray[np.float64]:
    """(S, Q) score of each query that has something to find."""
    counted = np.array(records[0]["per_query"]["num_relevant"]) > 0
    return np.array([r["per_query"][SCORES[metric]] for r in records], float)[:, counted]


def comparisons(setting: Setting, table: Evaluations) -> list[Comparison]:
    """Of the shown variants every one against its frozen features, every robust one against the
    standard ones of its method, and the standard ones among each other.
    """
    rows = _known(table)
    found = [compare(a, rows[a], b, rows[b]) for a, b in _pairs(setting.shown, rows)]
    return corrected([compared for compared in found if compared is not None])


def over_floor(setting: Setting, table: Evaluations) -> list[tuple[Variant, Comparison]]:
    """Every variant against its frozen features, where these are known."""
    rows, found = _known(table), []
    for variant in setting.variants:
        for floor in _floors(variant, rows):
            compared = compare(variant.label, rows[variant.label], floor, rows[floor])
            found += [(variant, compared)] if compared else []
    return found


def _known(table: Evaluations) -> dict[str, list[Record]]:
    """The rows with the scores of their queries."""
    rows = {name: [r for r in found if "per_query" in r] for name, found in table.records.items()}
    return {name: found for name, found in rows.items() if found}


def _floors(variant: Variant, rows: Mapping[str, object]) -> list[str]:
    """The rows of a variant's frozen features; none where it has no row itself."""
    names = (FROZEN, f"{FROZEN} ({variant.runs[0].floor})")
    return [name for name in names if name in rows and variant.label in rows]


def compare(
    first: str, first_records: Sequence[Record], second: str, second_records: Sequence[Record]
) -> Comparison | None:
    """Two rows; None where they were not asked the same queries.

    Of trained rows the seeds that both have are paired; frozen features, which have none, are
    paired with every seed of the other.
    """
    if len({tuple(r["queries"]) for r in (*first_records, *second_records)}) > 1:
        return None
    if not second.startswith(FROZEN):
        one, two = ({r.get("seed", 0): r for r in rows} for rows in (first_records, second_records))
        both = sorted(one.keys() & two.keys())
        if not both:
            return None
        first_records, second_records = [one[s] for s in both], [two[s] for s in both]
    hits, precision = (
        [scores(records, metric) for records in (first_records, second_records)]
        for metric in SCORES
    )
    if hits[0].shape[1] < 2:
        return None
    return Comparison(first, second, paired_difference(*hits), paired_difference(*precision))


def corrected(found: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons with p-values that hold for all of them together."""
    if not found:
        return []
    adjusted = holm([c.recall.p_value for c in found])
    return [replace(c, p_holm=float(p)) for c, p in zip(found, adjusted, strict=True)]


def _pairs(
    variants: Sequence[Variant], rows: Mapping[str, Sequence[Record]]
) -> list[tuple[str, str]]:
    known = [v for v in variants if v.label in rows]
    pairs = [(variant.label, name) for variant in known for name in _floors(variant, rows)]
    standard = [v for v in known if not v.robust]
    for variant in known:
        if variant.robust:
            pairs += [(variant.label, s.label) for s in standard if s.method == variant.method]
    pairs += [(a.label, b.label) for i, a in enumerate(standard) for b in standard[i + 1 :]]
    return pairs
