"""What near-duplicates do to a measured Recall@1.

Letters: N images, D embedding dimensions, Q queries.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.data.dataset import Dataset
from flowerray.explore.duplicates import DuplicatePair
from flowerray.retrieval.measure import default_gallery
from flowerray.retrieval.search import retrieval_per_query
from flowerray.statistics import mean_interval


def recall_effect(
    dataset: Dataset, emb_ND: NDArray[np.floating], pairs: Sequence[DuplicatePair]
) -> dict[str, Any] | None:
    """Recall@1 of the test split in the protocol's default gallery, with and without the queries
    that have a near-duplicate there.

    Args:
        emb_ND: unit vectors of the set's images.

    Returns:
        `gallery` (`train`, or `self` where the test images search each other), the intervals
        `every` (of all queries that have an image of their class in the gallery) and `clean` (of
        those without a near-duplicate there; None where none is left), and `removed`, how many
        those are fewer. None where nothing can be searched.
    """
    query = dataset.splits.get("test", np.empty(0, np.int64))
    gallery_name = default_gallery(dataset, "test")
    itself = gallery_name == "self"
    gallery = query if itself else dataset.splits["train"]
    if len(query) < 1 + itself or not len(gallery):
        return None
    query_labels = dataset.labels_N[query]
    others = () if itself else (emb_ND[gallery], dataset.labels_N[gallery])
    result = retrieval_per_query(emb_ND[query], query_labels, *others, ks=(1,))
    counted_Q = result["num_relevant"] > 0
    if not counted_Q.any():
        return None
    tainted_Q = np.isin(query, list(_with_partner(pairs, set(gallery.tolist()))))
    hit_Q = result["hit"].astype(float)
    clean_Q = counted_Q & ~tainted_Q
    return {
        "gallery": gallery_name,
        "every": mean_interval(hit_Q[counted_Q]).to_dict(),
        "clean": mean_interval(hit_Q[clean_Q]).to_dict() if clean_Q.any() else None,
        "removed": int((counted_Q & tainted_Q).sum()),
    }


def _with_partner(pairs: Sequence[DuplicatePair], gallery: set[int]) -> set[int]:
    """Images with a near-duplicate in the gallery."""
    return {a for p in pairs for a, b in ((p.first, p.second), (p.second, p.first)) if b in gallery}
