"""Retrieval metrics against pytorch-metric-learning, a hand loop, ties and bad input."""

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN

from flowerray.errors import UserError
from flowerray.retrieval import search as retrieval
from flowerray.retrieval.search import nearest, retrieval_metrics, retrieval_per_query

Pair = tuple[NDArray[np.float32], NDArray[np.int64]]


def draw(seed: int, sizes: list[int], dim: int = 16, noise: float = 1.5) -> Pair:
    """Overlapping classes of the given sizes, shuffled, unit norm; the seed moves no class."""
    means = np.random.default_rng(99).normal(size=(len(sizes), dim))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(len(sizes)), sizes))
    emb = means[labels] + noise * rng.normal(size=(len(labels), dim))
    emb /= np.linalg.norm(emb, axis=1, keepdims=True)
    return emb.astype(np.float32), labels


def reference(query: Pair, gallery: Pair | None) -> dict[str, float]:
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=CustomKNN(LpDistance(normalize_embeddings=False)),
        device=torch.device("cpu"),
    )
    parts = query if gallery is None else (*query, *gallery)
    result: dict[str, float] = calculator.get_accuracy(*(torch.as_tensor(part) for part in parts))
    return result


def by_hand(query: Pair, gallery: Pair | None) -> dict[str, float]:
    """Every definition once more, in plain Python and float64, with ties by index."""
    (emb, labels), (others, other_labels) = query, query if gallery is None else gallery
    recalls: dict[int, list[float]] = {k: [] for k in (1, 5, 10)}
    precisions, averages, skipped = [], [], 0
    per_class: dict[int, list[float]] = {}
    for i in range(len(emb)):
        ranked = []
        for j in range(len(others)):
            if gallery is not None or i != j:
                pairs = zip(emb[i], others[j], strict=True)
                ranked.append((sum((float(a) - float(b)) ** 2 for a, b in pairs), j))
        same = [other_labels[j] == labels[i] for _, j in sorted(ranked)]
        relevant = sum(same)
        if relevant == 0:
            skipped += 1
            continue
        for k in recalls:
            recalls[k].append(float(any(same[:k])))
        per_class.setdefault(int(labels[i]), []).append(float(same[0]))
        precisions.append(sum(same[:relevant]) / relevant)
        averages.append(
            sum(sum(same[: n + 1]) / (n + 1) for n in range(relevant) if same[n]) / relevant
        )
    return {f"recall_at_{k}": float(np.mean(v)) for k, v in recalls.items()} | {
        "r_precision": float(np.mean(precisions)),
        "map_at_r": float(np.mean(averages)),
        "recall_at_1_per_class_mean": float(np.mean([np.mean(v) for v in per_class.values()])),
        "num_queries": len(averages),
        "num_queries_without_match": skipped,
        "num_gallery": len(others),
    }


def exact_order(query: NDArray, gallery: NDArray) -> NDArray[np.int64]:
    distance = ((query[:, None].astype(np.float64) - gallery[None]) ** 2).sum(2)
    return np.argsort(distance, axis=1, kind="stable")


CASES = {
    "balanced": [10] * 12,
    "imbalanced": [2, 3, 5, 8, 13, 21, 34, 55],
    "lone labels": [1, 1, 1, 20, 30, 2],
}


@pytest.mark.parametrize("sizes", CASES.values(), ids=CASES)
@pytest.mark.parametrize("with_gallery", [False, True])
def test_equals_pytorch_metric_learning_and_the_hand_loop(
    sizes: list[int], with_gallery: bool
) -> None:
    query = draw(1, sizes)
    gallery = None
    if with_gallery:
        gallery = draw(2, list(reversed(sizes)))
        kept = gallery[1] != 3  # the queries of class 3 have no relevant item
        gallery = gallery[0][kept], gallery[1][kept]
    ours = retrieval_metrics(*query, *(gallery or (None, None)))
    theirs = reference(query, gallery)
    assert ours["recall_at_1"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours["r_precision"] == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert ours["map_at_r"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)
    assert ours == pytest.approx(by_hand(query, gallery), abs=1e-12)
    assert 0.05 < ours["map_at_r"] < 0.95, "the case says nothing"


def test_torch_numpy_and_dtypes_agree() -> None:
    emb, labels = draw(3, [7] * 9)
    expected = retrieval_metrics(emb, labels)
    assert retrieval_metrics(torch.as_tensor(emb), torch.as_tensor(labels)) == expected
    assert retrieval_metrics(emb.astype(np.float64), labels.astype(str)) == expected
    assert retrieval_metrics(emb.tolist(), labels.tolist()) == expected


def test_inputs_are_not_normalised() -> None:
    query, gallery = np.array([[1.0, 0.0]]), np.array([[10.0, 0.0], [0.0, 1.0]])
    result = retrieval_metrics(query, [0], gallery, [1, 0], ks=(1,))
    assert result["recall_at_1"] == 1.0, "by angle the first item would be nearer"


def test_equal_distances_rank_by_gallery_index() -> None:
    rng = np.random.default_rng(4)
    few = rng.integers(-1, 2, size=(6, 5)).astype(np.float32)
    gallery = few[rng.integers(0, 6, size=200)]
    query = few[rng.integers(0, 6, size=30)]
    expected = exact_order(query, gallery)
    assert (nearest(query, gallery, k=25) == expected[:, :25]).all()
    assert (nearest(query, gallery, k=500) == expected).all()


def test_near_ties_rank_by_exact_distance_far_from_the_origin() -> None:
    """float32 products lose these differences altogether; the inputs do not."""
    rng = np.random.default_rng(5)
    gallery = (1000 + 1e-3 * rng.normal(size=(300, 8))).astype(np.float32)
    query = (1000 + 1e-3 * rng.normal(size=(40, 8))).astype(np.float32)
    assert (nearest(query, gallery, k=30) == exact_order(query, gallery)[:, :30]).all()
    one_cloud = np.concatenate([query, -query])  # and where the centre cannot help
    far = np.concatenate([gallery, -gallery])
    assert (nearest(one_cloud, far, k=30) == exact_order(one_cloud, far)[:, :30]).all()


def test_duplicates_of_any_length_keep_their_order() -> None:
    """More duplicates than are fetched, at many positions, of vectors whose sums round."""
    rng = np.random.default_rng(10)
    few = rng.normal(size=(5, 37)).astype(np.float32)
    which = rng.integers(0, 5, size=700)
    query = rng.normal(size=(20, 37)).astype(np.float32)
    found = nearest(query, few[which], k=300)
    assert (found == exact_order(query, few[which])[:, :300]).all()
    for row in found:
        kinds = which[row]
        changes = (kinds[1:] != kinds[:-1]).sum()
        assert changes < 5 and (np.diff(row)[kinds[1:] == kinds[:-1]] > 0).all()


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_scale_does_not_matter(scale: float) -> None:
    emb, labels = draw(6, [5, 9, 14])
    expected = retrieval_metrics(emb, labels)
    assert retrieval_metrics(emb.astype(np.float64) * scale, labels) == pytest.approx(expected)


def test_collapsed_embeddings_are_ranked_by_index_without_themselves() -> None:
    emb, labels = np.ones((60, 4), np.float32), np.arange(60) % 3
    found = nearest(emb, k=4)
    assert found[0].tolist() == [1, 2, 3, 4]
    assert found[2].tolist() == [0, 1, 3, 4]
    assert retrieval_metrics(emb, labels) == pytest.approx(by_hand((emb, labels), None), abs=1e-12)


def test_a_duplicate_of_the_query_counts_and_the_query_itself_does_not() -> None:
    """Self is excluded by index; dropping the first neighbour would drop item 1's duplicate."""
    emb = np.array([[0.0], [0.0], [5.0], [5.1]])
    assert nearest(emb, k=1)[:, 0].tolist() == [1, 0, 3, 2]
    assert retrieval_metrics(emb, [0, 1, 1, 0], ks=(1,))["recall_at_1"] == 0.0


@pytest.mark.parametrize("block_size", [1, 7, 64, 1000])
def test_block_size_changes_nothing(block_size: int) -> None:
    emb, labels = draw(7, [3, 30, 60, 40])
    emb[50:80] = emb[49]
    expected = retrieval_per_query(emb, labels)
    for name, values in retrieval_per_query(emb, labels, block_size=block_size).items():
        assert np.array_equal(values, expected[name]), name


def test_only_one_block_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []
    topk = torch.topk

    def spy(scores: torch.Tensor, k: int, dim: int) -> object:
        shapes.append(scores.shape)
        return topk(scores, k, dim=dim)

    monkeypatch.setattr(torch, "topk", spy)
    monkeypatch.setattr(retrieval, "_BLOCK_ELEMENTS", 1000)
    emb, labels = draw(8, [20] * 10)
    retrieval_metrics(emb, labels)
    assert max(rows * columns for rows, columns in shapes) <= 1000 and len(shapes) == 40


def test_reduced_matmul_precision_is_not_used_and_is_restored() -> None:
    emb, labels = draw(9, [10] * 10, dim=64)
    expected = retrieval_per_query(emb, labels)
    torch.set_float32_matmul_precision("medium")
    try:
        found = retrieval_per_query(emb, labels)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert np.array_equal(found["nearest"], expected["nearest"])


def test_per_query_arrays() -> None:
    gallery = np.array([[0.0], [1.0], [2.0], [3.0]])
    query, labels = [[-1.0], [4.0], [9.0]], [0, 0, 7]
    result = retrieval_per_query(query, labels, gallery, [1, 0, 0, 1], ks=(1, 6))
    assert result["hit"].tolist() == [False, False, False]
    assert result["first_hit"].tolist() == [2, 2, 0]
    assert result["num_relevant"].tolist() == [2, 2, 0]
    assert result["r_precision"].tolist() == [0.5, 0.5, 0.0]
    assert result["average_precision"].tolist() == [0.25, 0.25, 0.0]
    assert result["nearest"].tolist() == [[0, 1, 2, 3, -1, -1], [3, 2, 1, 0, -1, -1]] + [
        [3, 2, 1, 0, -1, -1]
    ]


def test_no_query_with_a_relevant_item() -> None:
    result = retrieval_metrics(np.eye(3), [0, 1, 2])
    assert math.isnan(result["map_at_r"]) and math.isnan(result["recall_at_1_per_class_mean"])
    assert (result["num_queries"], result["num_queries_without_match"]) == (0, 3)


NAN = np.array([[0.0, 1.0], [np.nan, 0.0]])
BAD = {
    "nan": ((NAN, [0, 1]), {}, "first is row 1"),
    "inf in the gallery": ((np.eye(2), [0, 1], np.full((2, 2), np.inf), [0, 1]), {}, "not finite"),
    "empty": ((np.zeros((0, 3)), []), {}, "shape"),
    "flat": ((np.zeros(3), [0, 0, 0]), {}, "shape"),
    "labels": ((np.eye(2), [0, 1, 1]), {}, "one label a row"),
    "gallery labels": ((np.eye(2), [0, 1], np.eye(2), [0]), {}, "one label a row"),
    "dimensions": ((np.eye(2), [0, 1], np.eye(3), [0, 1, 1]), {}, "same model"),
    "no gallery labels": ((np.eye(2), [0, 1], np.eye(2)), {}, "give both"),
    "no gallery": ((np.eye(2), [0, 1], None, [0, 1]), {}, "give both"),
    "one image": ((np.eye(1), [0]), {}, "single image"),
    "k": ((np.eye(2), [0, 1]), {"ks": (0,)}, "at least 1"),
    "no k": ((np.eye(2), [0, 1]), {"ks": ()}, "at least 1"),
}


@pytest.mark.parametrize(("args", "options", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence(args: tuple, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        retrieval_metrics(*args, **options)
    assert "\n" not in str(caught.value)
