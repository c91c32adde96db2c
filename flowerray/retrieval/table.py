"""What `evaluate`, `similar` and `search` print."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from numpy.typing import NDArray

from flowerray.retrieval.floor import gains, warning
from flowerray.retrieval.measure import Measurement
from flowerray.retrieval.pictures import Neighbour
from flowerray.show.columns import columns
from flowerray.show.interval import words
from flowerray.statistics import Interval, mean_interval
from flowerray.text import labelled

LABELS = {
    "recall_at_1": "R@1",
    "recall_at_5": "R@5",
    "recall_at_10": "R@10",
    "r_precision": "R-precision",
    "map_at_r": "MAP@R",
    "recall_at_1_per_class_mean": "R@1, mean of classes",
    "pair_auc": "pair AUC",
    "pair_auc_hard": "pair AUC, hard negatives",
    "pair_eer": "pair EER",
    "pair_accuracy": "pair accuracy",
}
PER_QUERY = {"recall_at_1": "hit", "r_precision": "r_precision", "map_at_r": "average_precision"}


def measurement(title: str, result: Measurement, hardened: bool = False) -> str:
    """The metrics of one evaluation, with 95 % intervals over queries where they are means of
    queries, and the frozen floor.

    Args:
        title: what was measured.
        hardened: it was trained against attacks.
    """
    m, known = result.metrics, intervals(result)
    rows = [[label, words(known.get(key, m[key]))] for key, label in LABELS.items() if key in m]
    lines = [
        title,
        f"{m['num_queries']} {m['split']} queries, gallery {m['gallery']} of {m['num_gallery']} "
        f"images, protocol {m['protocol']}",
        "",
        *columns(rows, "<<", indent=2),
    ]
    if m["num_queries_without_match"]:
        lines.append(
            f"  left out: {m['num_queries_without_match']} queries with none of their class to find"
        )
    return "\n".join([*lines, *over_floor(title, result, hardened)])


class Scored(Protocol):
    """Metrics and the scores of each query that they are means of."""

    @property
    def metrics(self) -> dict[str, Any]:
        """As `summarise` gives them."""

    @property
    def per_query(self) -> dict[str, NDArray]:
        """As `retrieval_per_query` gives them."""


def intervals(result: Scored) -> dict[str, Interval]:
    """The metrics that are means over queries, with their intervals."""
    counted = result.per_query["num_relevant"] > 0
    return {
        key: replace(
            mean_interval(result.per_query[name][counted].astype(float)),
            mean=result.metrics[key],
        )
        for key, name in PER_QUERY.items()
        if key in result.metrics
    }


def over_floor(name: str, result: Measurement, hardened: bool) -> list[str]:
    """The frozen features' R@1 and MAP@R, what the model has gained over them, and a warning where
    that may be nothing.
    """
    if result.frozen is None:
        return []
    found = gains(result.per_query, result.frozen)
    said = warning(name, found.get("recall_at_1"), hardened)
    frozen = result.frozen["metrics"]
    rows = [["same queries", *(LABELS[key] for key in frozen)]]
    rows.append(["frozen backbone", *(words(value) for value in frozen.values())])
    rows.append(["gain over it", *(words(found.get(key), "+.3f") for key in frozen)])
    lines = ["", *columns(rows, "<<<", indent=2)]
    return [*lines, "", labelled("warning", said)] if said else lines


def similar(result: dict[str, Any]) -> str:
    """Similarity of two photographs in one line."""
    verdict = "same class" if result["same"] else "different classes"
    return f"similarity {result['similarity']:.3f}, threshold {result['threshold']:.3f}: {verdict}"


def neighbours(found: Sequence[Neighbour]) -> str:
    """Ranks, similarities, classes and files."""
    rows = [["rank", "cosine", "class", "image"]]
    for rank, n in enumerate(found, start=1):
        path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(n.path))
        rows.append([str(rank), f"{n.similarity:.3f}", n.class_name, path])
    return "\n".join(columns(rows, ">><<"))
