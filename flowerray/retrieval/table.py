"""What `evaluate`, `similar` and `search` print."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from numpy.typing import NDArray

from flowerray.calibration import PRIOR
from flowerray.retrieval.decisions import RATES, UNKNOWN, Decisions
from flowerray.retrieval.floor import SCORES, gains, warning
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
    "recall_at_1_parent": "R@1 by parent",
    "pair_auc": "pair AUC",
    "pair_auc_hard": "pair AUC, hard negatives",
    "pair_eer": "pair EER",
    "pair_accuracy": "pair accuracy",
}
PER_QUERY = {"recall_at_1": "hit", "r_precision": "r_precision", "map_at_r": "average_precision"}


def measurement(title: str, result: Measurement, hardened: bool = False) -> str:
    """The metrics of one evaluation, with 95 % intervals over queries where they are means of
    queries, and the frozen floor.
    """
    m, known = result.metrics, intervals(result.metrics, result.per_query)
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
    return "\n".join([*lines, *over_floor(title, result, hardened), *decisions(result.decisions)])


def decisions(found: Decisions) -> list[str]:
    """Same or different by the cosine, on random and on hard pairs, and known or unknown."""
    m, known = found.metrics, found.intervals
    rows = [["", "random pairs", "from", "hard pairs", "from"]]
    for name, label in (
        *((f"at_far_{rate:g}", f"TAR at FAR {rate:g}") for rate in RATES),
        ("far_at_threshold", "FAR at threshold"),
        ("calibration_error", "calibration error"),
    ):
        row = [label]
        for suffix in ("", "_hard"):
            told: Interval | float | None = known.get(f"tar_{name}{suffix}")
            told = told or known.get(f"{name}{suffix}") or m.get(f"{name}{suffix}")
            cosine = m.get(f"cosine_{name}{suffix}")
            row += ["" if told is None else words(told), "" if cosine is None else f"{cosine:.3f}"]
        rows += [row] if any(row[1:]) else []
    lines = ["", *columns(rows, "<<<<<", indent=2)] if len(rows) > 1 else []
    if "unknown_auroc" in m:
        title = f"unknown classes by the best cosine: AUROC {m['unknown_auroc']:.3f}"
        rows = [["", "known found", "unknown accepted"]]
        strict = f"from {m['open_set_cosine']:.3f}, for {UNKNOWN:.0%} of unknown"
        for end, name in (("", "at the threshold"), ("_strict", strict)):
            shares = (known[f"{share}{end}"] for share in ("known_found", "unknown_accepted"))
            rows.append([name, *map(words, shares)])
        lines += ["", f"  {title}", *columns(rows, "<<<", indent=2)]
    return lines


def intervals(metrics: dict[str, Any], per_query: dict[str, NDArray]) -> dict[str, Interval]:
    """The metrics that are means over queries, with their intervals; see `retrieval_per_query`."""
    counted = per_query["num_relevant"] > 0
    return {
        key: replace(mean_interval(per_query[name][counted].astype(float)), mean=metrics[key])
        for key, name in PER_QUERY.items()
        if key in metrics
    }


def over_floor(name: str, result: Measurement, hardened: bool) -> list[str]:
    """The frozen features' R@1 and MAP@R, what the model has gained over them, and a warning where
    that may be nothing.
    """
    if result.frozen is None:
        return []
    found = gains(result.per_query, result.frozen)
    said = warning(name, found.get("recall_at_1"), hardened)
    rows = [["same queries", *(LABELS[key] for key in SCORES)]]
    rows.append(["frozen backbone", *(words(result.frozen["metrics"][key]) for key in SCORES)])
    rows.append(["gain over it", *(words(found.get(key), "+.3f") for key in SCORES)])
    lines = ["", *columns(rows, "<<<", indent=2)]
    return [*lines, "", labelled("warning", said)] if said else lines


def similar(result: dict[str, Any]) -> str:
    """Similarity of two photographs, and the probability where it is known."""
    verdict = "same class" if result["same"] else "different classes"
    line = f"similarity {result['similarity']:.3f}, threshold {result['threshold']:.3f}: {verdict}"
    if (at := result.get("far")) is not None:
        line += f"\nfalse-match rate of that threshold {at['far']:g}, "
        line += f"95 % interval {at['low']:.2g} to {at['high']:.2g}"
    if (told := result.get("probability")) is not None:
        line += f"\nprobability of one class {told:.3f}, at {result['prior']:g} beforehand"
    return line


def neighbours(found: Sequence[Neighbour], prior: float | None = None) -> str:
    """Ranks, similarities, probabilities where they are known, classes and files."""
    told = any(n.probability is not None for n in found)
    rows = [["rank", "cosine", *(["probability"] if told else []), "class", "image"]]
    for rank, n in enumerate(found, start=1):
        path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(n.path))
        chance = [] if n.probability is None else [f"{n.probability:.3f}"]
        rows.append([str(rank), f"{n.similarity:.3f}", *chance, n.class_name, path])
    lines = columns(rows, ">>><<" if told else ">><<")
    if told:
        lines.append(f"probability of the query's class, at {prior or PRIOR:g} beforehand")
    return "\n".join(lines)
