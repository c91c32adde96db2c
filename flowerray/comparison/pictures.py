"""A comparison of methods: from the evaluations of its runs to plain numbers, a table, a picture.

An evaluation is a record as RUN/evaluation/<split>.json holds it. Letters: S seeds, Q queries.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowerray.report.numbers import Record, scores
from flowerray.show.charts import forest
from flowerray.show.columns import columns
from flowerray.show.interval import read, words
from flowerray.show.style import BLUE, ORANGE, save
from flowerray.statistics import holm, mean_interval, paired_difference
from flowerray.text import labelled

METRICS = {"recall_at_1": "R@1", "map_at_r": "MAP@R"}
FROZEN = "frozen"
"""The row of the backbone as it came: one record, and no training."""


def rows_of(
    records: Mapping[str, Sequence[Record]], costs: Mapping[str, Sequence[Mapping[str, Any]]]
) -> dict[str, dict[str, Any]]:
    """Mean, interval and values of each metric, and what one training cost.

    Args:
        records: evaluations of each row, one a seed.
        costs: `images`, `epochs` and `seconds` of the same trainings; nothing for `FROZEN`.
    """
    rows: dict[str, dict[str, Any]] = {}
    for row, found in records.items():
        paid = costs.get(row, [{"images": 0, "epochs": 0, "seconds": 0.0}])
        seconds = sum(cost["seconds"] for cost in paid) / len(paid)
        rows[row] = {"images": paid[0]["images"], "epochs": paid[0]["epochs"], "seconds": seconds}
        for metric in METRICS:
            values_SQ = scores(found, metric)
            found_mean = mean_interval(values_SQ).to_dict()
            rows[row][metric] = {**found_mean, "values": values_SQ.mean(1).tolist()}
    return rows


def pairs_of(records: Mapping[str, Sequence[Record]], quiet: bool = False) -> list[dict[str, Any]]:
    """Every two rows, the later minus the earlier: the difference in each metric on the same
    queries, its p-value, and that value adjusted for all pairs (Holm).
    """
    pairs: list[dict[str, Any]] = []
    every = list(combinations(records, 2))
    for second, first in tqdm(every, desc="tests", disable=quiet or None, leave=False):
        pair: dict[str, Any] = {"first": first, "second": second}
        for metric in METRICS:
            sides = (scores(records[row], metric) for row in (first, second))
            test = paired_difference(*sides)
            pair[metric] = {**test.to_dict(), "p_value": test.p_value}
        pairs.append(pair)
    for metric in METRICS:
        adjusted = holm([pair[metric]["p_value"] for pair in pairs])
        for pair, value in zip(pairs, adjusted, strict=True):
            pair[metric]["p_holm"] = float(value)
    return pairs


def comparison_table(content: dict[str, Any]) -> str:
    """Everything in 80 columns: per protocol the rows, then the pairs."""
    budget = content["budget"]
    tuned = f"tuned in {budget['trials']} trials each" if budget["trials"] else "defaults, untuned"
    lines = [
        f"{budget['backbone']}, {budget['image_size']} px, dim {budget['dim']}, {tuned},",
        f"{budget['images']:,} images asked for a training, {budget['seeds']} seeds",
    ]
    for protocol, found in content["protocols"].items():
        lines += [
            "",
            f"{protocol}: {found['queries']:,} test queries, gallery {found['gallery']}",
        ]
        table = [["", *METRICS.values(), "images", "s"]]
        for name, row in found["rows"].items():
            cost = [f"{row['images']:,}", f"{row['seconds']:.0f}"] if row["images"] else ["", ""]
            table.append([name, *(words(row[metric]) for metric in METRICS), *cost])
        lines += [*columns(table, "<<<>>"), ""]
        table = [["difference", "R@1", "p", "Holm p"]]
        for pair in found["pairs"]:
            test = pair["recall_at_1"]
            p_values = [f"{test[name]:.2g}" for name in ("p_value", "p_holm")]
            names = f"{pair['first']} - {pair['second']}"
            table.append([names, words(test, "+.3f"), *p_values])
        lines += columns(table, "<<>>")
    lines += ["", "Mean and 95 % interval over queries and seeds (frozen: queries alone); images"]
    lines += ["and seconds of one training. Differences on the same queries; Holm p holds for"]
    lines += ["all differences of a protocol together."]
    return "\n".join([*lines, *(labelled("note", text) for text in content["notes"])])


def plot_comparison(content: dict[str, Any], out_png: Path) -> Path:
    """Mean and interval of each row, its seeds as faint points: a column a protocol, a line a
    metric.
    """
    shown = {
        f"{label}, {protocol}": {name: row[metric] for name, row in found["rows"].items()}
        for metric, label in METRICS.items()
        for protocol, found in content["protocols"].items()
    }
    rows = {name for panel in shown.values() for name in panel}
    figure = forest(
        {title: {name: read(one) for name, one in panel.items()} for title, panel in shown.items()},
        {name: ORANGE if name == FROZEN else BLUE for name in rows},
        len(content["protocols"]),
        {title: {n: one["values"] for n, one in panel.items()} for title, panel in shown.items()},
    )
    return save(figure, out_png)
