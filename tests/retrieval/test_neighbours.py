"""The nearest of many vectors: exact ones as retrieval ranks them, approximate ones by cells."""

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from flowerray.retrieval import neighbours
from flowerray.retrieval.neighbours import (
    cell_of,
    filled,
    nearest_rows,
    partition,
    partners,
    recall,
)
from flowerray.retrieval.search import nearest


def unit(rows: int, dim: int = 12, seed: int = 0, classes: int = 40) -> NDArray[np.float32]:
    """Unit vectors of overlapping classes."""
    rng = np.random.default_rng(seed)
    means_CD = np.random.default_rng(99).normal(size=(classes, dim))
    emb_ND = means_CD[rng.integers(classes, size=rows)] + 0.7 * rng.normal(size=(rows, dim))
    return (emb_ND / np.linalg.norm(emb_ND, axis=1, keepdims=True)).astype(np.float32)


def in_cells(emb_ND: NDArray[np.float32], probes: int = 0) -> Any:
    centroids_CD = partition(emb_ND)
    return filled(emb_ND, centroids_CD, cell_of(emb_ND, centroids_CD), probes)


def test_exact_search_ranks_as_retrieval_does_ties_included() -> None:
    gallery_GD, query_QD = unit(300), unit(20, seed=1)
    gallery_GD = np.concatenate([gallery_GD, gallery_GD[::3], gallery_GD[::7]])
    query_QD = np.concatenate([query_QD, gallery_GD[:5]])
    expected = nearest(query_QD.astype(np.float64), gallery_GD.astype(np.float64), k=15)
    for query_D, expected_K in zip(query_QD, expected, strict=True):
        rows_K, cosine_K = nearest_rows(gallery_GD, query_D, 15)
        assert rows_K.tolist() == expected_K.tolist()
        exact_K = gallery_GD[rows_K].astype(np.float64) @ query_D.astype(np.float64)
        np.testing.assert_allclose(cosine_K, exact_K, atol=1e-12)


@pytest.mark.parametrize("rows", [0, 2])
def test_fewer_rows_than_asked_for(rows: int) -> None:
    rows_K, cosine_K = nearest_rows(unit(2)[:rows], unit(1, seed=1)[0], 3)
    assert len(rows_K) == len(cosine_K) == rows
    vectors_ND = np.eye(12, dtype=np.float32)
    one_each = filled(vectors_ND, vectors_ND, np.arange(12), probes=2)
    assert nearest_rows(vectors_ND, vectors_ND[3], 3, one_each)[0].tolist()[0] == 3
    assert len(nearest_rows(vectors_ND, vectors_ND[3], 3, one_each)[0]) == 2


def test_cells_find_what_the_exact_search_finds() -> None:
    rows_ND = unit(6000)
    cells = in_cells(rows_ND)
    assert cells.nlist == 30 and 1 < cells.nprobe < 30
    assert recall(rows_ND, cells).mean() >= 0.98
    assert recall(rows_ND, in_cells(rows_ND, probes=1)).mean() < 0.95  # the measure can fail
    hits = [
        len(np.intersect1d(nearest_rows(rows_ND, q, 10)[0], nearest_rows(rows_ND, q, 10, cells)[0]))
        for q in unit(200, seed=1)
    ]
    assert np.mean(hits) / 10 >= 0.98


def test_every_cell_is_an_exact_search() -> None:
    rows_ND = unit(3000)
    rows_ND[1::2] = rows_ND[::2]  # each stands twice
    whole = in_cells(rows_ND, probes=1000)
    for query_D in unit(20, seed=1):
        exact, probed = (
            nearest_rows(rows_ND, query_D, 10),
            nearest_rows(rows_ND, query_D, 10, whole),
        )
        assert exact[0].tolist() == probed[0].tolist()
    assert recall(rows_ND, whole).min() == 1


def test_partners_of_many_rows_are_found_in_their_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    emb_ND = unit(3000)
    exact_N = partners(emb_ND)
    assert exact_N.tolist() == nearest(emb_ND, k=1)[:, 0].tolist()
    monkeypatch.setattr(neighbours, "EXACT", 1000)
    found_N = partners(emb_ND.astype(np.float64))
    assert 0.97 < (found_N == exact_N).mean() <= 1 and not (found_N == np.arange(3000)).any()


def test_faiss_and_torch_share_a_process() -> None:
    """Each brings an OpenMP of its own."""
    faiss = neighbours.library()
    emb_ND = unit(3000, dim=64)
    before = torch.get_num_threads(), faiss.omp_get_max_threads()
    torch.set_num_threads(2)
    faiss.omp_set_num_threads(2)
    for _ in range(3):
        found_N2 = faiss.knn(emb_ND, emb_ND, 2)[1]
        assert found_N2[:, 1].tolist() == nearest(emb_ND, k=1)[:, 0].tolist()
    torch.set_num_threads(before[0])
    faiss.omp_set_num_threads(before[1])
