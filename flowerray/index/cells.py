"""Nearest of many vectors: exact, or approximate by an inverted file (Jegou et al. 2011,
doi:10.1109/TPAMI.2010.57, section IV-A, without the codes): the rows lie sorted by cells of a
k-means partition, and a query is compared with the rows of the cells nearest to it only.

Letters: N vectors, D dimensions, C cells, M rows that are looked at, K neighbours, Q queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

EXACT = 50_000
"""Rows up to which every one is looked at: a few milliseconds."""
WANTED = 0.995
"""Recall@10 on a sample for which as many cells as needed are looked at: 0.99 with a margin."""
NEIGHBOURS = 10
SAMPLE = 400
"""Vectors whose neighbours are sought to measure the recall."""
_ROWS_PER_CELL = 500
_PER_CENTROID = 50
"""Rows from which a centroid is learned."""
_BLOCK = 8192
_ROUNDING = 2e-5
"""Of a float32 cosine, generously: what lies closer together is put in order in float64."""


class Rows(Protocol):
    """Vectors that may be more than the memory holds."""

    def __len__(self) -> int: ...
    def __getitem__(self, which: Any, /) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Cells:
    """Where the rows of each cell end."""

    centroids_CD: NDArray[np.float32]
    ends_C: NDArray[np.int64]
    probes: int
    """Cells that a query looks into."""

    def spans(self, query_D: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
        """First row and the one after the last of each cell to look into."""
        far_C = distances(query_D[None], self.centroids_CD)[0]
        probes = min(self.probes, len(far_C))
        for c in np.sort(np.argpartition(far_C, probes - 1)[:probes]).tolist():
            yield int(self.ends_C[c - 1]) if c else 0, int(self.ends_C[c])


def nearest_rows(
    vectors_ND: NDArray[np.float32],
    query_D: NDArray[np.floating],
    k: int,
    cells: Cells | None = None,
    without: int = -1,
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The `k` rows nearest to a query, nearest first, equal ones by row, and their cosines.

    Args:
        vectors_ND: unit vectors; with `cells` in their order.
        cells: None looks at every row.
        without: a row that is left out.
    """
    query_32 = query_D.astype(np.float32)
    spans = [(0, len(vectors_ND))] if cells is None else list(cells.spans(query_32))
    cosine_M = np.concatenate([vectors_ND[start:end] @ query_32 for start, end in spans])
    row_M = np.concatenate([np.arange(start, end) for start, end in spans])
    cosine_M[row_M == without] = -np.inf
    k = min(k, len(row_M) - int(without in row_M))
    if k < 1:
        return np.empty(0, np.int64), np.empty(0)
    least = np.partition(cosine_M, -k)[-k]
    row_M = row_M[cosine_M >= least - _ROUNDING]
    near_MD, exact_D = vectors_ND[row_M].astype(np.float64), query_D.astype(np.float64)
    order_K = np.lexsort((row_M, np.square(near_MD - exact_D).sum(1)))[:k]
    return row_M[order_K], near_MD[order_K] @ exact_D


def partition(vectors_ND: Rows, seed: int = 0) -> NDArray[np.float32]:
    """Centroids of the cells, learned by k-means on a sample of the rows."""
    from sklearn.cluster import KMeans

    cells = max(1, len(vectors_ND) // _ROWS_PER_CELL)
    rng = np.random.default_rng(seed)
    size = min(len(vectors_ND), cells * _PER_CENTROID)
    rows = np.sort(rng.choice(len(vectors_ND), size, replace=False))
    kmeans = KMeans(cells, init="random", n_init=1, max_iter=10, random_state=seed)
    found: NDArray[np.float32] = kmeans.fit(vectors_ND[rows]).cluster_centers_
    return found


def cell_of(vectors_ND: Rows, centroids_CD: NDArray[np.float32]) -> NDArray:
    """The nearest centroid of each vector, N."""
    blocks = range(0, len(vectors_ND), _BLOCK)
    found = [distances(vectors_ND[b : b + _BLOCK], centroids_CD).argmin(1) for b in blocks]
    return np.concatenate([np.empty(0, np.int64), *found])


def distances(
    query_QD: NDArray[np.float32], centroids_CD: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Squared distances, less what is the same for all centroids, QC."""
    found: NDArray[np.float32] = np.square(centroids_CD).sum(1) - 2 * query_QD @ centroids_CD.T
    return found


def recall(
    vectors_ND: NDArray[np.float32], cells: Cells | None, seed: int = 0
) -> NDArray[np.float64]:
    """Share of the 10 nearest other rows that the search finds, for each of a sample of rows."""
    if cells is None:
        return np.ones(min(SAMPLE, len(vectors_ND)))
    found = []
    for row, exact_K in _exact_sample(vectors_ND, seed):
        rows, _ = nearest_rows(vectors_ND, vectors_ND[row], NEIGHBOURS, cells, without=row)
        found.append(len(np.intersect1d(rows, exact_K)) / len(exact_K))
    return np.array(found)


def enough(vectors_ND: NDArray[np.float32], cells: Cells) -> Cells:
    """The cells with as few probes as reach the wanted recall on a sample."""
    probes = np.zeros(0, np.int64)
    for row, exact_K in _exact_sample(vectors_ND, seed=1):
        far_C = distances(vectors_ND[row][None], cells.centroids_CD)[0]
        rank_C = np.argsort(np.argsort(far_C, kind="stable"))
        cell_K = np.searchsorted(cells.ends_C, exact_K, side="right")
        probes = np.append(probes, rank_C[cell_K] + 1)
    return replace(cells, probes=int(np.quantile(probes, WANTED, method="higher")))


def _exact_sample(
    vectors_ND: NDArray[np.float32], seed: int
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Rows of a sample, each with its nearest other rows."""
    rng = np.random.default_rng(seed)
    rows = rng.choice(len(vectors_ND), min(SAMPLE, len(vectors_ND)), replace=False)
    for row in rows.tolist():
        yield row, nearest_rows(vectors_ND, vectors_ND[row], NEIGHBOURS, without=row)[0]
