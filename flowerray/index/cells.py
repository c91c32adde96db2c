"""Nearest of many vectors: exact, or approximate by an inverted file (Jegou et al. 2011,
doi:10.1109/TPAMI.2010.57, section IV-A, without the codes): the rows lie sorted by cells of a
k-means partition, and a query is compared with the rows of the cells nearest to it only.

Letters: N vectors, D dimensions, C cells, M rows that are looked at, K neighbours, Q queries.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from flowerray.retrieval.search import nearest

EXACT = 50_000
"""Rows up to which every one is looked at: a few milliseconds."""
WANTED = 0.995
"""Recall@10 on a sample for which as many cells as needed are looked at: 0.99 with a margin."""
NEIGHBOURS = 10
SAMPLE = 300
"""Vectors whose neighbours are sought to measure the recall."""
_ROWS_PER_CELL = 200
_PER_CENTROID = 30
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

    @cached_property
    def _squares(self) -> NDArray[np.float32]:
        found: NDArray[np.float32] = np.square(self.centroids_CD).sum(1)
        return found

    def spans(self, query_D: NDArray[np.float32]) -> Iterator[tuple[int, int]]:
        """First row and the one after the last of each cell to look into."""
        far_C = self._squares - self.centroids_CD @ (2 * query_D)
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


def partners(vectors_ND: NDArray[np.float32]) -> NDArray[np.int64]:
    """The nearest other row of each, N; above `EXACT` rows looked for in the nearest cells only,
    which finds all but a few.
    """
    if len(vectors_ND) <= EXACT:
        return nearest(vectors_ND, k=1)[:, 0]
    order_N, cells = arrange(vectors_ND)
    cells = replace(cells, probes=2 * cells.probes)  # seen from a centroid, not from each row
    rows_ND, found_N = vectors_ND[order_N], np.empty(len(vectors_ND), np.int64)
    start = 0
    for centroid_D, end in zip(cells.centroids_CD, cells.ends_C.tolist(), strict=True):
        near_M = np.concatenate([np.arange(a, b) for a, b in cells.spans(centroid_D)])
        cosine_BM = rows_ND[start:end] @ rows_ND[near_M].T
        cosine_BM[near_M == np.arange(start, end)[:, None]] = -np.inf
        found_N[order_N[start:end]] = order_N[near_M[cosine_BM.argmax(1)]]
        start = end
    return found_N


def arrange(vectors_ND: NDArray[np.float32]) -> tuple[NDArray[np.int64], Cells]:
    """The order in which rows lie by cell, and the cells."""
    centroids_CD = partition(vectors_ND)
    cell_N = cell_of(vectors_ND, centroids_CD)
    order_N = np.argsort(cell_N, kind="stable")
    ends_C = np.cumsum(np.bincount(cell_N, minlength=len(centroids_CD)))
    return order_N, enough(vectors_ND[order_N], Cells(centroids_CD, ends_C, 1))


def partition(vectors_ND: Rows, seed: int = 0) -> NDArray[np.float32]:
    """Centroids of the cells, learned by k-means on a sample of the rows."""
    from sklearn.cluster import KMeans

    cells = max(1, len(vectors_ND) // _ROWS_PER_CELL)
    rng = np.random.default_rng(seed)
    size = min(len(vectors_ND), cells * _PER_CENTROID)
    rows = np.sort(rng.choice(len(vectors_ND), size, replace=False))
    kmeans = KMeans(cells, init="random", n_init=1, max_iter=8, random_state=seed)
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
    for row, exact_K in zip(*_exact_sample(vectors_ND, seed), strict=True):
        rows, _ = nearest_rows(vectors_ND, vectors_ND[row], len(exact_K), cells, without=row)
        found.append(len(np.intersect1d(rows, exact_K)) / len(exact_K))
    return np.array(found)


def enough(vectors_ND: NDArray[np.float32], cells: Cells) -> Cells:
    """The cells with as few probes as reach the wanted recall on a sample."""
    rows_S, exact_SK = _exact_sample(vectors_ND, seed=1)
    far_SC = distances(vectors_ND[rows_S], cells.centroids_CD)
    rank_SC = far_SC.argsort(1, kind="stable").argsort(1)
    cell_SK = np.searchsorted(cells.ends_C, exact_SK, side="right")
    rank_SK = np.take_along_axis(rank_SC, cell_SK, axis=1)
    return replace(cells, probes=1 + int(np.quantile(rank_SK, WANTED, method="higher")))


def _exact_sample(
    vectors_ND: NDArray[np.float32], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A sample of S rows, and the nearest other rows of each, S x K."""
    rng = np.random.default_rng(seed)
    rows_S = rng.choice(len(vectors_ND), min(SAMPLE, len(vectors_ND)), replace=False)
    sample_SD = vectors_ND[rows_S]
    best_SK, found_SK = np.empty((len(rows_S), 0), np.float32), np.empty((len(rows_S), 0), int)
    for start in range(0, len(vectors_ND), _BLOCK):
        cosine_SB = sample_SD @ vectors_ND[start : start + _BLOCK].T
        inside = np.flatnonzero((rows_S >= start) & (rows_S < start + _BLOCK))
        cosine_SB[inside, rows_S[inside] - start] = -np.inf
        here_SB = np.broadcast_to(np.arange(start, start + cosine_SB.shape[1]), cosine_SB.shape)
        best_SK = np.concatenate([best_SK, cosine_SB], axis=1)
        found_SK = np.concatenate([found_SK, here_SB], axis=1)
        k = min(NEIGHBOURS, len(vectors_ND) - 1)
        top_SK = np.argpartition(best_SK, -k, axis=1)[:, -k:]
        best_SK = np.take_along_axis(best_SK, top_SK, axis=1)
        found_SK = np.take_along_axis(found_SK, top_SK, axis=1)
    return rows_S, found_SK
