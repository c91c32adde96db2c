"""Nearest of many unit vectors: exact ones, or approximate ones by faiss' inverted file (Douze et
al. 2024, arXiv:2401.08281): a query is compared with the rows of the nearest cells of a k-means
partition only.

Letters: N vectors, D dimensions, C cells, K neighbours, S sampled rows.
"""

import os
import sys
from typing import Any

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
_ROUNDING = 2e-5
"""Of a float32 cosine, generously: what lies closer together is put in order in float64."""


def library() -> Any:
    """faiss. On macOS it and torch each bring an OpenMP, of which only one may have threads."""
    if sys.platform == "darwin":
        os.environ.setdefault("KMP_DUPLICATE_LIB_OK", "TRUE")
    import faiss

    if sys.platform == "darwin":
        faiss.omp_set_num_threads(1)
    return faiss


def nearest_rows(
    vectors_ND: NDArray[np.float32], query_D: NDArray[np.floating], k: int, cells: Any = None
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The `k` rows nearest to a query, nearest first, equal ones by row, and their cosines.

    Args:
        cells: of these rows (see `filled`); None looks at every row.
    """
    query_32 = query_D.astype(np.float32)
    k = min(k, len(vectors_ND))
    if k < 1:
        return np.empty(0, np.int64), np.empty(0)
    if cells is not None:
        (cosine_K,), (row_K,) = cells.search(query_32[None], k)
        order_K = np.lexsort((row_K, -cosine_K))[: (row_K >= 0).sum()]  # fewer lie in the cells
        return row_K[order_K], cosine_K[order_K].astype(np.float64)
    cosine_N = vectors_ND @ query_32
    rows = np.flatnonzero(cosine_N >= np.partition(cosine_N, -k)[-k] - _ROUNDING)
    near, exact_D = vectors_ND[rows].astype(np.float64), query_D.astype(np.float64)
    order_K = np.lexsort((rows, np.square(near - exact_D).sum(1)))[:k]
    return rows[order_K], near[order_K] @ exact_D


def partition(vectors_ND: NDArray[np.float32]) -> NDArray[np.float32]:
    """Centroids of the cells, C x D, learned by k-means from a sample of the rows."""
    faiss = library()
    count, dim = vectors_ND.shape
    kmeans = faiss.Kmeans(
        dim, max(1, count // _ROWS_PER_CELL), niter=8, spherical=True,
        min_points_per_centroid=1, max_points_per_centroid=_PER_CENTROID,
    )  # fmt: skip
    kmeans.train(vectors_ND)
    found: NDArray[np.float32] = kmeans.centroids
    return found


def cell_of(vectors_ND: NDArray[np.float32], centroids_CD: NDArray[np.float32]) -> NDArray:
    """The nearest centroid of each vector, N."""
    faiss = library()
    found: NDArray[np.int64] = faiss.knn(
        vectors_ND, centroids_CD, 1, metric=faiss.METRIC_INNER_PRODUCT
    )[1][:, 0]
    return found


def filled(
    vectors_ND: NDArray[np.float32],
    centroids_CD: NDArray[np.float32],
    cell_N: NDArray[np.int64],
    probes: int = 0,
) -> Any:
    """A faiss.IndexIVFFlat that holds the vectors.

    Args:
        probes: cells that a query looks into; 0: as few as reach the wanted recall on a sample.
    """
    faiss = library()
    dim, metric = vectors_ND.shape[1], faiss.METRIC_INNER_PRODUCT
    centres = faiss.IndexFlatIP(dim)
    centres.add(centroids_CD)
    cells = faiss.IndexIVFFlat(centres, dim, len(centroids_CD), metric)
    for cell, size in enumerate(np.bincount(cell_N, minlength=len(centroids_CD)).tolist()):
        cells.invlists.resize(cell, size)  # which makes the room at once,
        cells.invlists.resize(cell, 0)  # and keeps it
    rows, where_N = np.ascontiguousarray(vectors_ND, np.float32), cell_N.astype(np.int64)
    cells.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(where_N))
    cells.nprobe = min(max(1, probes), cells.nlist)
    truth = None if probes else _truth(rows, seed=1)
    while truth and cells.nprobe < cells.nlist and _share(cells, *truth).mean() < WANTED:
        cells.nprobe += -(-cells.nprobe // 4)
    return cells


def recall(vectors_ND: NDArray[np.float32], cells: Any, seed: int = 0) -> NDArray[np.float64]:
    """Share of the 10 nearest other rows that the search finds, for each of a sample of rows; rows
    as near as the tenth count like it.
    """
    if cells is None:
        return np.ones(min(SAMPLE, len(vectors_ND)))
    return _share(cells, *_truth(vectors_ND, seed))


def _truth(
    vectors_ND: NDArray[np.float32], seed: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """A sample of rows, S x D, and their cosines to the nearest of all, S x K, themselves first."""
    faiss, count = library(), len(vectors_ND)
    rows_S = np.random.default_rng(seed).choice(count, min(SAMPLE, count), replace=False)
    k, metric = min(NEIGHBOURS + 1, count), faiss.METRIC_INNER_PRODUCT
    return vectors_ND[rows_S], faiss.knn(vectors_ND[rows_S], vectors_ND, k, metric=metric)[0]


def _share(
    cells: Any, sample_SD: NDArray[np.float32], cosine_SK: NDArray[np.float32]
) -> NDArray[np.float64]:
    found_SK = cells.search(sample_SD, cosine_SK.shape[1])[0]
    hit_SK: NDArray[np.bool_] = found_SK[:, 1:] >= cosine_SK[:, -1:] - _ROUNDING
    return hit_SK.mean(1)


def partners(vectors_ND: NDArray[np.floating]) -> NDArray[np.int64]:
    """The nearest other row of each, N; above `EXACT` rows looked for in the nearest cells only,
    which finds all but a few.
    """
    if len(vectors_ND) <= EXACT:
        return nearest(vectors_ND, k=1)[:, 0]
    from faiss.contrib.big_batch_search import big_batch_search

    rows = np.ascontiguousarray(vectors_ND, np.float32)
    centroids_CD = partition(rows)
    cells = filled(rows, centroids_CD, cell_of(rows, centroids_CD))
    found_N2 = big_batch_search(cells, rows, 2)[1]
    return np.where(found_N2[:, 0] == np.arange(len(rows)), found_N2[:, 1], found_N2[:, 0])
