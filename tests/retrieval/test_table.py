"""What `evaluate`, `similar` and `search` print."""

from pathlib import Path

import numpy as np

from flowerray.retrieval import table
from flowerray.retrieval.measure import Floor, Measurement
from flowerray.retrieval.pictures import Neighbour

HITS = np.array([1.0, 0.0, 1.0, 1.0, 0.0])


def make_measurement(frozen: Floor | None = None, **metrics: object) -> Measurement:
    """Five queries, of which the last has nothing to find."""
    numbers = {
        "recall_at_1": 0.75, "map_at_r": 0.5, "num_queries": 4, "num_queries_without_match": 1,
        "num_gallery": 9, "protocol": "official", "split": "test", "gallery": "train",
    }  # fmt: skip
    none = np.zeros((0, 2), np.float32)
    return Measurement(
        metrics={**numbers, **metrics},
        per_query={
            "hit": HITS.astype(bool), "average_precision": HITS / 2, "r_precision": HITS,
            "num_relevant": np.array([3, 3, 3, 3, 0]),
        },
        query_paths=(), query_labels=np.zeros(0, np.int64), query_emb=none,
        gallery_paths=(), gallery_labels=np.zeros(0, np.int64), gallery_emb=none, classes=(),
        frozen=frozen,
    )  # fmt: skip


def test_a_measurement_shows_its_metrics_and_their_intervals() -> None:
    text = table.measurement("my run", make_measurement(pair_auc=0.9))
    assert text.splitlines()[0] == "my run"
    assert "4 test queries, gallery train of 9 images, protocol official" in text
    assert "pair AUC" in text and "R@5" not in text and "left out: 1 queries" in text
    line = next(line for line in text.splitlines() if "R@1" in line)
    low, high = (float(v) for v in line.split("[")[1].rstrip("]").split(","))
    assert 0.0 <= low < 0.75 < high <= 1.0  # the query without a match does not count
    made = make_measurement()
    found = table.intervals(made.metrics, made.per_query)
    assert set(found) == {"recall_at_1", "map_at_r"} and found["recall_at_1"].n == 4
    assert f"{found['recall_at_1'].low:.3f}" == f"{low:.3f}"
    assert max(map(len, text.splitlines())) <= 80


def test_the_floor_is_shown_with_the_gain_over_it() -> None:
    """Of the four queries that count frozen features miss one that the model hits, then all."""
    one = {"hit": [1.0, 0.0, 1.0, 0.0, 1.0], "average_precision": [0.5, 0.0, 0.5, 0.0, 0.5]}
    metrics = {"recall_at_1": 0.5, "map_at_r": 0.25}
    result = make_measurement(frozen={"metrics": metrics, "per_query": one})
    text = table.measurement("runs/a", result)
    assert "frozen backbone  0.500" in text and "+0.250 [" in text and "+0.125 [" in text
    said = " ".join(text.split())
    assert "runs/a is not shown to be better than its frozen backbone: R@1 +0.250 [" in said
    assert max(map(len, text.splitlines())) <= 80


def test_similarity_and_neighbours() -> None:
    result = {"similarity": 0.51234, "threshold": 0.4, "same": True}
    assert table.similar(result) == "similarity 0.512, threshold 0.400: same class"
    assert table.similar({**result, "same": False}).endswith("different classes")
    found = [Neighbour(Path("a.jpg"), "bird of paradise", 0.9), Neighbour(Path("b"), "rose", -0.1)]
    head, first, second = table.neighbours(found).splitlines()
    assert head.split() == ["rank", "cosine", "class", "image"]
    assert first.split() == ["1", "0.900", "bird", "of", "paradise", "a.jpg"]
    assert second.index("b") == first.index("a.jpg")
    assert table.neighbours([]).split() == head.split()
