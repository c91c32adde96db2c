"""A comparison of methods: from the evaluations of its runs to plain numbers, a table, a picture.

An evaluation is a record as RUN/evaluation/<split>.json holds it. Letters: S seeds, Q queries.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from tqdm import tqdm

from flowerray.files import atomic_file
from flowerray.report.numbers import Record, scores
from flowerray.show.style import BLUE, GRID, INK, ORANGE
from flowerray.statistics import bootstrap_interval, holm, paired_bootstrap, t_interval
from flowerray.text import labelled

METRICS = {"recall_at_1": "R@1", "map_at_r": "MAP@R"}
FROZEN = "frozen"
"""The row of the backbone as it came: one record, and no training."""
RESAMPLES = 5000
"""Of each bootstrap."""


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
            values_S = values_SQ.mean(1)
            # One model without seeds: what could have been others are the queries.
            ci = (
                bootstrap_interval(values_SQ[0], resamples=RESAMPLES)
                if row == FROZEN
                else t_interval(values_S)
            )
            rows[row][metric] = {**ci.to_dict(), "values": values_S.tolist()}
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
            test = paired_bootstrap(*sides, resamples=RESAMPLES)
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
            f"{'':<15}{'R@1':<22}{'MAP@R':<22}{'images':>8}{'s':>7}",
        ]
        for name, row in found["rows"].items():
            cells = "".join(f"{interval(row[metric]):<22}" for metric in METRICS)
            cost = f"{row['images']:>8,}{row['seconds']:>7.0f}" if row["images"] else ""
            lines.append(f"{name:<15}{cells}{cost}".rstrip())
        lines += ["", f"{'difference':<27}{'R@1':<27}{'p':>8}{'Holm p':>9}"]
        for pair in found["pairs"]:
            test = pair["recall_at_1"]
            names = f"{pair['first']} - {pair['second']}"
            numbers = f"{test['p_value']:>8.2g}{test['p_holm']:>9.2g}"
            lines.append(f"{names:<27}{interval(test, '+'):<27}{numbers}")
    lines += ["", "Rows: mean and 95 % t interval over seeds (frozen: bootstrap over queries);"]
    lines += ["images and seconds of one training. Differences: paired bootstrap over the same"]
    lines += ["queries x seeds; Holm p holds for all differences of a protocol together."]
    return "\n".join([*lines, *(labelled("note", text) for text in content["notes"])])


def interval(found: dict[str, Any], sign: str = "") -> str:
    """`0.812 [0.800, 0.824]`; without bounds where one seed allows none."""
    text = f"{found['mean']:{sign}.3f}"
    if found["low"] is None:
        return text
    return f"{text} [{found['low']:{sign}.3f}, {found['high']:{sign}.3f}]"


def plot_comparison(content: dict[str, Any], out_png: Path) -> Path:
    """Mean and interval of each row, its seeds as faint points: a column a protocol, a line a
    metric.
    """
    from matplotlib.figure import Figure

    protocols = content["protocols"]
    size = (4.2 * len(protocols) + 1.2, 4.6)
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    panels = figure.subplots(len(METRICS), len(protocols), squeeze=False, sharey=True)
    for column, (protocol, found) in enumerate(protocols.items()):
        for axes, (metric, label) in zip(panels[:, column], METRICS.items(), strict=True):
            names = list(found["rows"])
            for place, (name, row) in enumerate(found["rows"].items()):
                one, colour = row[metric], ORANGE if name == FROZEN else BLUE
                axes.plot(one["values"], [place] * len(one["values"]), "o", color=colour, alpha=0.3)
                if one["low"] is not None:
                    axes.plot([one["low"], one["high"]], [place, place], color=colour, linewidth=2)
                axes.plot(one["mean"], place, "|", color=colour, markersize=14, markeredgewidth=2.5)
            axes.set_yticks(range(len(names)), names)
            axes.set_title(f"{label}, {protocol}", fontsize=11, color=INK)
            axes.grid(color=GRID, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[:, 0]:
        axes.set_ylim(len(names) - 0.5, -0.5)
    with atomic_file(out_png) as temporary:
        figure.savefig(temporary, format="png")
    return out_png
