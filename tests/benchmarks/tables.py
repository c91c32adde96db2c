"""The tables of README and docs from the figures in docs/results.

    uv run python -m tests.benchmarks.tables

A table stands between `<!-- table NAME -->` (`<!-- table NAME brief -->`) and `<!-- end -->`, NAME
a file of docs/results without its ending; the command writes each anew.
"""

import json
import re
from typing import Any

import numpy as np

from flowerray.show.interval import words
from flowerray.statistics import mean_interval, paired_difference, t_interval
from tests.benchmarks.flowers import RESULTS, unpacked

PAGES = (RESULTS.parents[1] / "README.md", *sorted(RESULTS.parent.glob("*.md")))
BLOCK = re.compile(r"(<!-- table (\S+)( brief)? -->\n).*?(<!-- end -->)", re.DOTALL)
LABELS = {
    "frozen": "frozen features",
    "center:method.center-weight=0": "cross-entropy",
}
COLUMNS = {
    "R@5": "recall_at_5",
    "R@10": "recall_at_10",
    "R-precision": "r_precision",
    "per class": "recall_at_1_per_class_mean",
    "pair AUC": "pair_auc",
    "hard": "pair_auc_hard",
}
"""Means over seeds."""


def main() -> None:
    """Writes every table."""
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


def with_tables(text: str) -> str:
    """A page with its tables as the figures have them."""

    def block(found: re.Match[str]) -> str:
        content = json.loads((RESULTS / f"{found[2]}.json").read_text())
        return f"{found[1]}{table(content, brief=bool(found[3]))}\n{found[4]}"

    return BLOCK.sub(block, text)


def typed(row: str) -> str:
    """`METHOD:option=value,...` as the command line has it."""
    method, _, changes = row.partition(":")
    return " ".join(
        [method, *(f"--{c.replace('=', ' ')}" for c in filter(None, changes.split(",")))]
    )


def table(content: dict[str, Any], brief: bool = False) -> str:
    """One results file in Markdown; `brief` leaves most of the means out."""
    columns = {} if brief else COLUMNS
    in_order = sorted(content["rows"].items(), key=lambda row: (row[0] != "frozen", row[0]))
    rows = {row: seeds for row, seeds in in_order if seeds}
    floor = hits(rows["frozen"])[0] if "frozen" in rows else None
    head = ["", "seeds", "R@1", "gain over frozen", "MAP@R", *columns, "probe"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row, seeds in rows.items():
        ran, hits_SQ = list(seeds.values()), hits(seeds)
        gain = "" if floor is None or row == "frozen" else words(
            paired_difference(hits_SQ, floor), "+.3f"
        )  # fmt: skip
        maps = [one["metrics"]["map_at_r"] for one in ran]
        cells = [
            LABELS.get(row, f"`{typed(row)}`"),
            "–" if row == "frozen" else str(len(ran)),
            words(mean_interval(hits_SQ)),
            gain,
            words(t_interval(maps) if len(maps) > 1 else maps[0]),
            *(mean([one["metrics"].get(key) for one in ran]) for key in columns.values()),
            mean([one["probe_accuracy"] for one in ran]),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def hits(seeds: dict[str, Any]) -> np.ndarray:
    """Who was right, (S, Q)."""
    return np.stack(
        [unpacked(one["hits"], one["metrics"]["num_queries"]) for one in seeds.values()]
    )


def mean(values: list[float | None]) -> str:
    """Of those that are there."""
    known = [value for value in values if value is not None]
    return words(float(np.mean(known)) if known else None)


if __name__ == "__main__":
    main()
