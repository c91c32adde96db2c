"""What `evaluate`, `similar` and `search` print."""

from collections.abc import Sequence
from typing import Any

from flowerray.retrieval.measure import Measurement
from flowerray.retrieval.pictures import Neighbour
from flowerray.statistics import bootstrap_interval

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


def measurement(title: str, result: Measurement) -> str:
    """The metrics of one evaluation, with 95 % bootstrap intervals over queries where they are
    means of queries.
    """
    m = result.metrics
    lines = [
        title,
        f"{m['num_queries']} {m['split']} queries, gallery {m['gallery']} of {m['num_gallery']} "
        f"images, protocol {m['protocol']}",
        "",
    ]
    for key, label in LABELS.items():
        if key in m:
            lines.append(f"  {label:<26}{m[key]:7.3f}  {interval(result, key)}".rstrip())
    if m["num_queries_without_match"]:
        lines.append(
            f"  left out: {m['num_queries_without_match']} queries with none of their class to find"
        )
    return "\n".join(lines)


def interval(result: Measurement, key: str) -> str:
    """`[low, high]` of a metric that is a mean over queries, else nothing."""
    if key not in PER_QUERY:
        return ""
    counted = result.per_query["num_relevant"] > 0
    ci = bootstrap_interval(result.per_query[PER_QUERY[key]][counted].astype(float))
    return f"[{ci.low:.3f}, {ci.high:.3f}]"


def compare(results: dict[str, Measurement]) -> str:
    """Several evaluations of the same queries side by side."""
    keys = [
        k
        for k in ("recall_at_1", "recall_at_5", "map_at_r")
        if all(k in r.metrics for r in results.values())
    ]
    head = f"  {'':<12}" + "".join(f"{LABELS[k]:<22}" for k in keys)
    lines = [head.rstrip()]
    for name, result in results.items():
        cells = "".join(f"{result.metrics[k]:.3f} {interval(result, k):<16}" for k in keys)
        lines.append(f"  {name:<12}{cells}".rstrip())
    return "\n".join(lines)


def similar(result: dict[str, Any]) -> str:
    """Similarity of two photographs in one line."""
    verdict = "same class" if result["same"] else "different classes"
    return f"similarity {result['similarity']:.3f}, threshold {result['threshold']:.3f}: {verdict}"


def neighbours(found: Sequence[Neighbour]) -> str:
    """Ranks, similarities, classes and files."""
    width = max([5, *(len(n.class_name) for n in found)])
    lines = [f"{'rank':>4}  {'cosine':>6}  {'class':<{width}}  image"]
    for rank, n in enumerate(found, start=1):
        path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(n.path))
        lines.append(f"{rank:>4}  {n.similarity:6.3f}  {n.class_name:<{width}}  {path}")
    return "\n".join(lines)
