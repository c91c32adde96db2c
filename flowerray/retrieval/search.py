"""Exact retrieval metrics that never hold more than one block of the similarity matrix.

Neighbours are found by a float32 product and `topk`; whatever lies closer together than that
product's rounding error is put in order by float64 distances, so that equal distances rank by
gallery index and no result depends on the block size, the thread count or the device.

Letters: Q queries, G gallery items, D embedding dimensions, B queries of a block, K neighbours,
E tied entries.
"""

from collections.abc import Iterator, Sequence
from numbers import Integral

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from flowerray.errors import UserError
from flowerray.model.modes import full_precision

_BLOCK_ELEMENTS = 2**24
"""Scores of one block: 64 MiB in float32."""
_GPU_BLOCKS = 8
"""Times as many on a GPU, which is idle between small blocks."""
_EXTRA = 16
"""Neighbours fetched beyond the last rank, so that a near-tie there seldom needs the whole row."""


def retrieval_metrics(
    query_QD: ArrayLike | Tensor,
    query_labels_Q: ArrayLike | Tensor,
    gallery_GD: ArrayLike | Tensor | None = None,
    gallery_labels_G: ArrayLike | Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Recall@K, R-precision and MAP@R (Musgrave et al. 2020, arXiv:2003.08505, section 3.2), exact.

    R is the number of gallery items of the query's class. Nearness is the Euclidean distance of
    the inputs as given; equal distances rank by gallery index. Without a gallery the queries are
    their own, each one excluded from its own ranking by its index.

    Args:
        query_QD: embeddings, torch or numpy; a CUDA tensor is searched on its device.
        query_labels_Q: one class a query, integers or strings.
        gallery_GD: embeddings to search in, or None for the queries themselves.
        gallery_labels_G: one class a gallery item; given exactly when `gallery_GD` is.
        ks: the K of each `recall_at_K`, the share of queries with an item of their class among the
            first K.

    Returns:
        `recall_at_{k}`, `r_precision`, `map_at_r` (means over the queries with R > 0),
        `recall_at_1_per_class_mean` (the mean of the classes' means), `num_queries` (those with R
        > 0), `num_queries_without_match`, `num_gallery`. Where no query has R > 0, the means are
        NaN.

    Raises:
        UserError: nothing to rank, shapes or lengths that do not fit, a value that is not finite.
    """
    result = retrieval_per_query(query_QD, query_labels_Q, gallery_GD, gallery_labels_G, ks=ks)
    return summarise(result, query_labels_Q, ks=ks)


def summarise(
    per_query: dict[str, NDArray],
    query_labels_Q: ArrayLike | Tensor,
    *,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """`retrieval_metrics` from the result of `retrieval_per_query` for the same `ks`."""
    counted_Q = per_query["num_relevant"] > 0
    first_hit = per_query["first_hit"][counted_Q]
    hit = per_query["hit"][counted_Q]
    metrics = {f"recall_at_{k}": _mean((first_hit > 0) & (first_hit <= k)) for k in ks}
    metrics["r_precision"] = _mean(per_query["r_precision"][counted_Q])
    metrics["map_at_r"] = _mean(per_query["average_precision"][counted_Q])
    labels = _labels("query", query_labels_Q)[counted_Q]
    _, class_of = np.unique(labels, return_inverse=True)
    means_C = np.bincount(class_of, weights=hit) / np.bincount(class_of) if len(hit) else hit
    metrics["recall_at_1_per_class_mean"] = _mean(means_C)
    metrics["num_queries"] = int(counted_Q.sum())
    metrics["num_queries_without_match"] = int((~counted_Q).sum())
    metrics["num_gallery"] = int(per_query["num_gallery"])
    return metrics


def retrieval_per_query(
    query_QD: ArrayLike | Tensor,
    query_labels_Q: ArrayLike | Tensor,
    gallery_GD: ArrayLike | Tensor | None = None,
    gallery_labels_G: ArrayLike | Tensor | None = None,
    *,
    ks: Sequence[int] = (1, 5, 10),
    block_size: int | None = None,
) -> dict[str, NDArray]:
    """What each query scores, for paired tests and contact sheets.

    Errors and the other arguments are those of `retrieval_metrics`.

    Args:
        block_size: queries ranked at a time; by default as many as make 64 MiB of scores. It
            changes no result.

    Returns:
        Arrays of length Q: `hit` (bool: the nearest item is of the query's class), `first_hit`
        (rank of the first item of the class, from 1; 0 where it lies beyond max(ks) and R),
        `average_precision` (at R), `r_precision`, `num_relevant` (R; the first four are 0 where it
        is 0), `nearest` (Q, max(ks); gallery indices, -1 where the gallery is smaller), and the
        scalar array `num_gallery`.
    """
    if not all(isinstance(k, Integral) and k >= 1 for k in ks) or not len(ks):
        raise UserError(f"Recall@K needs integers K of at least 1, but ks is {tuple(ks)}.")
    query, gallery = _embeddings(query_QD, gallery_GD)
    itself = gallery_GD is None
    query_labels = _labels("query", query_labels_Q, len(query))
    if itself and gallery_labels_G is not None:
        raise UserError("Gallery labels came without gallery embeddings: give both or neither.")
    if not itself and gallery_labels_G is None:
        raise UserError("Gallery embeddings came without gallery labels: give both or neither.")
    gallery_labels = query_labels if itself else _labels("gallery", gallery_labels_G, len(gallery))

    both, codes = np.unique(np.concatenate([query_labels, gallery_labels]), return_inverse=True)
    query_codes, gallery_codes = codes[: len(query)], codes[len(query) :]
    relevant_Q = np.bincount(gallery_codes, minlength=len(both))[query_codes] - int(itself)
    reach = min(max(*ks, int(relevant_Q.max())), len(gallery) - int(itself))
    shown = min(max(ks), reach)

    result: dict[str, NDArray] = {
        "hit": np.zeros(len(query), bool),
        "first_hit": np.zeros(len(query), np.int64),
        "average_precision": np.zeros(len(query)),
        "r_precision": np.zeros(len(query)),
        "num_relevant": relevant_Q,
        "nearest": np.full((len(query), max(ks)), -1, np.int64),
        "num_gallery": np.array(len(gallery)),
    }
    rank_K = np.arange(1, reach + 1)
    for start, index_BK in _neighbour_blocks(query, gallery, reach, itself, block_size):
        rows = slice(start, start + len(index_BK))
        same_BK = gallery_codes[index_BK] == query_codes[rows, None]
        relevant_B1 = np.maximum(relevant_Q[rows, None], 1)
        within_BK = same_BK & (rank_K <= relevant_B1)
        precision_BK = np.cumsum(within_BK, axis=1) / rank_K
        result["hit"][rows] = same_BK[:, 0]
        result["first_hit"][rows] = np.where(same_BK.any(1), same_BK.argmax(1) + 1, 0)
        result["average_precision"][rows] = (precision_BK * within_BK).sum(1) / relevant_B1[:, 0]
        result["r_precision"][rows] = within_BK.sum(1) / relevant_B1[:, 0]
        result["nearest"][rows, :shown] = index_BK[:, :shown]
    return result


def nearest(
    query_QD: ArrayLike | Tensor, gallery_GD: ArrayLike | Tensor | None = None, *, k: int = 10
) -> NDArray[np.int64]:
    """Gallery indices (Q, k) of the nearest items of each query, equal distances by index.

    Fewer columns where the gallery is smaller. Without a gallery the queries search each other.

    Raises:
        UserError: as `retrieval_metrics`, or k below 1.
    """
    if k < 1:
        raise UserError(f"The number of neighbours must be at least 1, but it is {k}.")
    query, gallery = _embeddings(query_QD, gallery_GD)
    itself = gallery_GD is None
    reach = min(k, len(gallery) - int(itself))
    return np.concatenate([rows for _, rows in _neighbour_blocks(query, gallery, reach, itself)])


def _mean(values: NDArray) -> float:
    return float(np.mean(values, dtype=np.float64)) if len(values) else float("nan")


def _labels(name: str, labels: ArrayLike | Tensor | None, expected: int | None = None) -> NDArray:
    array = labels.detach().cpu().numpy() if isinstance(labels, Tensor) else np.asarray(labels)
    if array.ndim != 1 or (expected is not None and len(array) != expected):
        raise UserError(
            f"The {name} labels have shape {array.shape}, but there are {expected} {name} "
            "embeddings: give one label a row."
        )
    for row, label in enumerate(array if array.dtype.kind in "fO" else ()):
        if label is None or label != label:  # NaN would be a class like another
            raise UserError(f"The {name} label of row {row} is {label}: give each row a class.")
    return array


def _embeddings(
    query: ArrayLike | Tensor, gallery: ArrayLike | Tensor | None
) -> tuple[Tensor, Tensor]:
    """Both sides, checked, on the queries' device; the same tensor twice without a gallery."""
    query_QD = _matrix("query", query)
    gallery_GD = query_QD if gallery is None else _matrix("gallery", gallery).to(query_QD.device)
    if query_QD.shape[1] != gallery_GD.shape[1]:
        raise UserError(
            f"Queries have {query_QD.shape[1]} dimensions and the gallery {gallery_GD.shape[1]}: "
            "embed both with the same model."
        )
    if gallery is None and len(query_QD) < 2:
        raise UserError(
            "A single image has no other to compare with: give a gallery or more images."
        )
    return query_QD, gallery_GD


def _matrix(name: str, values: ArrayLike | Tensor) -> Tensor:
    tensor = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values))
    if tensor.ndim != 2 or 0 in tensor.shape:
        raise UserError(
            f"The {name} embeddings have shape {tuple(tensor.shape)}: "
            "a matrix with one row an image is needed."
        )
    if not tensor.is_floating_point():
        tensor = tensor.double()
    finite_N = torch.isfinite(tensor).all(1)
    if not bool(finite_N.all()):
        row = int((~finite_N).nonzero()[0])
        raise UserError(
            f"{int((~finite_N).sum())} {name} embeddings are not finite (the first is row {row}): "
            "check the model that made them."
        )
    return tensor


def _neighbour_blocks(
    query_QD: Tensor, gallery_GD: Tensor, reach: int, itself: bool, block_size: int | None = None
) -> Iterator[tuple[int, NDArray[np.int64]]]:
    """Yields (first query, gallery indices (B, reach) in exact order) block after block.

    The score of a pair is q.g - |g|^2 / 2, which falls as the distance grows. Distances do not
    change when both sides are shifted and scaled alike, so both are centred on the gallery and
    shrunk to norms of at most 1: that keeps float32's error small against the differences that
    matter.
    """
    centre_D = gallery_GD.double().mean(0)
    shifted = [gallery_GD.double() - centre_D]
    if not itself:
        shifted.append(query_QD.double() - centre_D)
    scale = max(float(torch.linalg.vector_norm(side, dim=1).max()) for side in shifted) or 1.0
    small = [(side / scale).float() for side in shifted]
    del shifted
    small_gallery_GD, small_query_QD = small[0], small[-1]
    norm_G = torch.linalg.vector_norm(small_gallery_GD.double(), dim=1)
    norm_Q = torch.linalg.vector_norm(small_query_QD.double(), dim=1)
    bias_G = (-0.5 * norm_G**2).float()
    # Rounding of the inputs, of D products and sums, and of the bias, each at most 2^-24 relative;
    # a difference of two scores carries it twice.
    longest = float(norm_G.max())
    error = (query_QD.shape[1] + 8) * 2.0**-24
    tolerance_Q = (2 * error * longest * (norm_Q + longest) + 1e-30).float()

    gallery_size = len(gallery_GD)
    available = gallery_size - int(itself)
    fetched = min(reach + _EXTRA, available)
    elements = _BLOCK_ELEMENTS * (1 if query_QD.device.type == "cpu" else _GPU_BLOCKS)
    rows = block_size or max(1, elements // gallery_size)
    buffer = torch.empty(min(rows, len(query_QD)), gallery_size, device=query_QD.device)
    for start in range(0, len(query_QD), rows):
        block_BD = small_query_QD[start : start + rows]
        scores_BG = buffer[: len(block_BD)]
        # The precision is set around each product only: the caller's code runs between two blocks.
        with full_precision():  # the bound on rounding holds for no other products
            torch.addmm(bias_G, block_BD, small_gallery_GD.T, out=scores_BG)
        if itself:
            own_B = torch.arange(len(block_BD), device=query_QD.device)
            scores_BG[own_B, own_B + start] = -torch.inf
        top_BK, index_BK = torch.topk(scores_BG, fetched, dim=1)
        queries = query_QD[start : start + rows]
        tolerance_B = tolerance_Q[start : start + rows]
        near_BK = top_BK[:, :-1] - top_BK[:, 1:] <= tolerance_B[:, None]
        _order_ties(index_BK, near_BK, queries, gallery_GD)
        if fetched < available:
            # Ties that reach past what was fetched: every item that could be among the first.
            for row in near_BK[:, reach - 1 :].all(1).nonzero()[:, 0].tolist():
                least = top_BK[row, reach - 1] - tolerance_B[row]
                candidates_E = (scores_BG[row] >= least).nonzero()[:, 0]
                exact_E = _squared(queries[row], gallery_GD, candidates_E)
                order_E = torch.sort(exact_E, stable=True).indices
                index_BK[row, :reach] = candidates_E[order_E[:reach]]
        yield start, index_BK[:, :reach].cpu().numpy()


def _order_ties(index_BK: Tensor, near_BK: Tensor, query_BD: Tensor, gallery_GD: Tensor) -> None:
    """Puts runs of neighbours with scores too close to trust in exact order, in place."""
    no_B1 = near_BK.new_zeros(len(near_BK), 1)
    follows_BK = torch.cat([no_B1, near_BK], dim=1)
    tied_BK = follows_BK | torch.cat([near_BK, no_B1], dim=1)
    row_E, column_E = tied_BK.nonzero(as_tuple=True)
    if not len(row_E):
        return
    run_E = torch.cumsum(~follows_BK.flatten(), 0).view_as(tied_BK)[row_E, column_E]
    candidate_E = index_BK[row_E, column_E]
    # Runs lie one after the other in E, so sorted entries go back to the places they came from.
    chunk = max(1, _BLOCK_ELEMENTS // 4 // gallery_GD.shape[1])
    parts = zip(row_E.split(chunk), candidate_E.split(chunk), strict=True)
    exact_E = torch.cat([_squared(query_BD[r], gallery_GD, c) for r, c in parts])
    order_E = np.lexsort([key.cpu().numpy() for key in (candidate_E, exact_E, run_E)])
    index_BK[row_E, column_E] = candidate_E[torch.from_numpy(order_E).to(candidate_E.device)]


def _squared(query_ED: Tensor, gallery_GD: Tensor, index_E: Tensor) -> Tensor:
    """Squared distances in float64; equal inputs give equal results, whatever else is asked."""
    return (query_ED.double() - gallery_GD[index_E].double()).square().sum(1)
