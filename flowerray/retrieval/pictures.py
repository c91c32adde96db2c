"""Contact sheets of retrieval: each query with its neighbours, right and wrong ones told apart."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from flowerray.calibration import Reliability, calibration_error
from flowerray.errors import UserError
from flowerray.retrieval.measure import Measurement
from flowerray.show.charts import group_look
from flowerray.show.contact import Group, Tile, contact_sheet
from flowerray.show.style import GREY, legend_below, panels, plain_axes, save


@dataclass(frozen=True)
class Neighbour:
    """One image that was found."""

    path: Path
    class_name: str
    similarity: float
    """Cosine, -1..1."""
    probability: float | None = None
    """Of the query's class; None: not known."""


@dataclass(frozen=True)
class SheetRow:
    """A query and what was found for it, nearest first."""

    path: Path
    class_name: str | None
    """None where the query's class is not known: nothing is then right or wrong."""
    neighbours: tuple[Neighbour, ...]


def measurement_rows(
    measurement: Measurement, count: int = 8, top: int = 8, seed: int = 0
) -> list[SheetRow]:
    """A seeded draw of queries, half of them with a wrong nearest neighbour as far as there are."""
    hit = measurement.per_query["hit"]
    rng = np.random.default_rng(seed)
    counted = measurement.per_query["num_relevant"] > 0
    wrong = rng.permutation(np.flatnonzero(counted & ~hit))
    right = rng.permutation(np.flatnonzero(counted & hit))
    num_wrong = min(len(wrong), max(count // 2, count - len(right)))
    chosen = [*wrong[:num_wrong], *right[: count - num_wrong]]
    return [_measured_row(measurement, int(query), top) for query in chosen]


def _measured_row(measurement: Measurement, query: int, top: int) -> SheetRow:
    names, emb = measurement.classes, measurement.query_emb[query].astype(np.float64)
    found = []
    for index in measurement.per_query["nearest"][query, :top]:
        if index < 0:
            break
        other = measurement.gallery_emb[index].astype(np.float64)
        cosine = emb @ other / max(np.linalg.norm(emb) * np.linalg.norm(other), 1e-12)
        class_name = names[measurement.gallery_labels[index]]
        found.append(Neighbour(measurement.gallery_paths[index], class_name, float(cosine)))
    class_name = names[measurement.query_labels[query]]
    return SheetRow(measurement.query_paths[query], class_name, tuple(found))


def retrieval_sheet(rows: Sequence[SheetRow], out_png: Path) -> Path:
    """Writes one line a query: the query, then its neighbours with class, rank and cosine; those of
    the query's class and others are marked.

    Raises:
        UserError: no rows, or an image that cannot be read.
    """
    if not rows:
        raise UserError("There is nothing to draw: the retrieval sheet needs at least one query.")
    return contact_sheet([_row(row, first=n == 0) for n, row in enumerate(rows)], out_png)


def _row(row: SheetRow, first: bool) -> tuple[Group, Group]:
    neighbours = tuple(
        Tile(
            found.path,
            (found.class_name, f"{rank}: cosine {found.similarity:.3f}"),
            None if row.class_name is None else row.class_name == found.class_name,
        )
        for rank, found in enumerate(row.neighbours, start=1)
    )
    query = Tile(row.path, (row.class_name or "class unknown", row.path.name))
    headings = ("query", "nearest first") if first else ("", "")
    return Group(headings[0], (query,)), Group(headings[1], neighbours)


def draw_reliability(bins: Mapping[str, Sequence[Reliability]], out_png: Path) -> None:
    """The share of same pairs over the probability that was told, for random and for hard pairs."""
    figure, ((axes,),) = panels(4.6, 4.4)
    plain_axes(axes, "", "probability of one class that was told", "share that was of one class")
    axes.plot([0, 1], [0, 1], color=GREY, linewidth=0.9)
    for number, (name, parts) in enumerate(bins.items()):
        points = [(part.probability, part.same) for part in parts]
        label = f"{name} pairs, error {calibration_error(parts):.3f}"
        axes.plot(*zip(*points, strict=True), label=label, **group_look(number))
    axes.set_xlim(-0.02, 1.02)
    axes.set_ylim(-0.02, 1.02)
    legend_below(figure, 1)
    save(figure, out_png)
