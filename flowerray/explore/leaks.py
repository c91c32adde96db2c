"""What near-duplicates do to a measured Recall@1.

Letters: N images, D embedding dimensions, Q queries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowerray.data.dataset import Dataset
from flowerray.explore.duplicates import DuplicatePair
from flowerray.retrieval.measure import default_gallery
from flowerray.retrieval.search import retrieval_per_query
from flowerray.statistics import Interval, mean_interval


@dataclass(frozen=True)
class Effect:
    """Recall@1 of the test split with and without its queries that have a near-duplicate in the
    gallery.
    """

    gallery: str
    """`train`, or `self` where the test images search each other."""
    every: Interval
    """All queries that have an image of their class in the gallery."""
    clean: Interval | None
    """Those without a near-duplicate there; None where none is left."""

    @property
    def removed(self) -> int:
        """Queries that were left out."""
        return self.every.n - (self.clean.n if self.clean else 0)


def recall_effect(
    dataset: Dataset, emb_ND: NDArray[np.floating], pairs: Sequence[DuplicatePair]
) -> Effect | None:
    """Test queries against the default gallery of the protocol; None where nothing can be searched.

    Args:
        dataset: N images.
        emb_ND: their unit vectors.
        pairs: near-duplicates.
    """
    query = dataset.splits.get("test", np.empty(0, np.int64))
    gallery_name = default_gallery(dataset, "test")
    itself = gallery_name == "self"
    gallery = query if itself else dataset.splits["train"]
    if len(query) < 1 + itself or not len(gallery):
        return None
    query_labels = dataset.labels_N[query]
    if itself:
        result = retrieval_per_query(emb_ND[query], query_labels, ks=(1,))
    else:
        result = retrieval_per_query(
            emb_ND[query], query_labels, emb_ND[gallery], dataset.labels_N[gallery], ks=(1,)
        )
    counted_Q = result["num_relevant"] > 0
    if not counted_Q.any():
        return None
    tainted_Q = np.isin(query, list(_with_partner(pairs, set(gallery.tolist()))))
    hit_Q = result["hit"].astype(float)
    clean_Q = counted_Q & ~tainted_Q
    return Effect(
        gallery=gallery_name,
        every=mean_interval(hit_Q[counted_Q]),
        clean=mean_interval(hit_Q[clean_Q]) if clean_Q.any() else None,
    )


def _with_partner(pairs: Sequence[DuplicatePair], gallery: set[int]) -> set[int]:
    """Images with a near-duplicate in the gallery."""
    return {a for p in pairs for a, b in ((p.first, p.second), (p.second, p.first)) if b in gallery}
