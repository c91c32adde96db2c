"""What commands print: tables that fit 80 columns, and JSON."""

import json
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowerray.evaluate.statistics import bootstrap_interval
from flowerray.text import typed

if TYPE_CHECKING:  # `flowerray methods` prints without loading timm
    from flowerray.evaluate.measure import Measurement
    from flowerray.evaluate.sheet import Neighbour
    from flowerray.methods import MethodFile

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


def as_json(content: dict[str, Any]) -> str:
    """One object; NaN, which JSON does not know, as null."""
    clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in content.items()}
    return json.dumps(clean, indent=2)


def measurement(title: str, result: "Measurement") -> str:
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


def interval(result: "Measurement", key: str) -> str:
    """`[low, high]` of a metric that is a mean over queries, else nothing."""
    if key not in PER_QUERY:
        return ""
    counted = result.per_query["num_relevant"] > 0
    ci = bootstrap_interval(result.per_query[PER_QUERY[key]][counted].astype(float))
    return f"[{ci.low:.3f}, {ci.high:.3f}]"


def compare(results: "dict[str, Measurement]") -> str:
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


def training(out: Path, summary: dict[str, Any]) -> str:
    """How a training ended and what to do next."""
    minutes, seconds = divmod(round(summary["seconds"]), 60)
    took = f"{minutes} min {seconds:02d} s"
    lines = [f"trained   {summary['epochs']} epochs, {summary['steps']} steps, {took}"]
    selected = {"val MAP@R": "val_map_at_r", "val adversarial R@1": "val_adversarial_recall_at_1"}
    for label, name in selected.items():
        if summary.get(name) is not None:
            value, epoch = summary[name], summary["best_epoch"]
            lines.append(f"best      {label} {value:.3f} after epoch {epoch}")
    following = typed(f"flowerray evaluate {out} --split test")
    lines += [f"model     {summary['model']}", f"next      {following}"]
    return "\n".join(lines)


def report(facts: dict[str, Any]) -> str:
    """Where the page is and what is on it."""
    return (
        f"page      {facts['page']} ({facts['bytes'] / 1e6:.1f} MB)\n"
        f"holds     runs {facts['runs']}, variants {facts['variants']}, data sets or splits "
        f"{facts['settings']}"
    )


def similar(result: dict[str, Any]) -> str:
    """Similarity of two photographs in one line."""
    verdict = "same class" if result["same"] else "different classes"
    return f"similarity {result['similarity']:.3f}, threshold {result['threshold']:.3f}: {verdict}"


def neighbours(found: "Sequence[Neighbour]") -> str:
    """Ranks, similarities, classes and files."""
    width = max([5, *(len(n.class_name) for n in found)])
    lines = [f"{'rank':>4}  {'cosine':>6}  {'class':<{width}}  image"]
    for rank, n in enumerate(found, start=1):
        path = "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(n.path))
        lines.append(f"{rank:>4}  {n.similarity:6.3f}  {n.class_name:<{width}}  {path}")
    return "\n".join(lines)


def summaries(files: "Sequence[MethodFile]") -> str:
    """One paragraph a method."""
    return "\n".join(
        textwrap.fill(
            file.summary, 80, initial_indent=f"  {file.name:<10}", subsequent_indent=" " * 12
        )
        for file in files
    )


def methods(files: "Sequence[MethodFile]") -> str:
    """Each method with its summary and search space."""
    lines: list[str] = []
    for file in files:
        lines.append(textwrap.fill(f"{file.name}: {file.summary}", 80, subsequent_indent="  "))
        for name, space in file.space.items():
            if "choices" in space:
                text = ", ".join(map(str, space["choices"]))
            else:
                text = f"{space['low']} to {space['high']}" + (", log" if space.get("log") else "")
            lines.append(f"    {name:<28}{text}")
    return "\n".join(lines)
