"""Counts by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from flowerray.data.dataset import Dataset
from flowerray.explore import counts
from flowerray.explore.scan import Survey


def survey(
    labels: list[int], splits: dict[str, list[int]], digests: str = "", side: int = 10
) -> Survey:
    count = len(labels)
    rng = np.random.default_rng(0)
    return Survey(
        dataset=Dataset(
            root=Path("/set"),
            kind="folder",
            protocol="official",
            paths=tuple(Path(f"/set/{i}.jpg") for i in range(count)),
            labels_N=np.array(labels),
            classes=("a", "b", "c"),
            splits={name: np.array(indices) for name, indices in splits.items()},
        ),
        unreadable=(),
        digests=tuple(digests or map(str, range(count))),
        emb_ND=np.eye(count, dtype=np.float32),
        keypoints=(),
        size_N2=np.array([(2 * side, side)] * count),
        grey_NPP=rng.integers(0, 256, (count, 64, 64), np.uint8),
        colour_NSS3=rng.integers(0, 256, (count, 32, 32, 3), np.uint8),
        brightness_N=np.arange(count) / count,
        contrast_N=np.zeros(count),
        saturation_N=np.ones(count),
        hue_N=np.array([350.0, 30.0, *[np.nan] * (count - 2)]),
    )


def test_imbalance_against_the_definition() -> None:
    sizes = np.random.default_rng(1).integers(1, 50, 9)
    found = counts.imbalance([*sizes, 0])
    pairs = np.abs(sizes[:, None] - sizes[None, :]).sum()
    assert found["gini"] == pytest.approx(pairs / (2 * len(sizes) * sizes.sum()))
    assert found["ratio"] == sizes.max() / sizes.min() and found["classes"] == 9
    assert (found["smallest"], found["largest"]) == (sizes.min(), sizes.max())


def test_imbalance_of_equal_classes_and_of_one() -> None:
    equal = counts.imbalance([7, 7, 7])
    assert (equal["ratio"], equal["gini"]) == (1, pytest.approx(0))
    assert equal["effective_classes"] == pytest.approx(3)
    assert list(counts.imbalance([4]).values()) == [1, 4, 4, 1.0, 0.0, 1.0]


def test_splits_and_what_they_share() -> None:
    found = survey([0, 0, 1, 1, 2, 0], {"train": [0, 2], "test": [1, 2, 3, 5]}, digests="abcadb")
    assert [tuple(row.values()) for row in counts.split_table(found.dataset)] == [
        ("train", 2, 2, 1, 1),
        ("test", 4, 2, 2, 2),
    ]
    (both,) = counts.overlaps(found)
    assert (both["files"], both["contents"], both["classes"]) == (
        1,
        2,
        2,
    )  # image 2; 2 and 3 by content


def test_class_table_and_sizes() -> None:
    found = survey([0, 0, 2, 2], {"test": [0, 1, 2, 3]})
    first, last = counts.class_table(found)
    assert (first.name, last.name, first.images) == ("a", "c", 2)
    assert first.hue == pytest.approx(10) and math.isnan(last.hue)
    assert last.brightness == pytest.approx((0.5 + 0.75) / 2)
    assert first.colour == pytest.approx(
        tuple(found.colour_NSS3[:2, 8:24, 8:24].mean(axis=(0, 1, 2)) / 255)
    )
    sizes = counts.sizes(found)
    assert sizes["aspect"] == [2.0] * 5 and sizes["most_frequent"] == [["20 x 10", 4]]


def test_between_classes() -> None:
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(50), 2)
    apart = labels + rng.normal(0, 0.01, 100)
    assert counts.between_classes(apart, labels) > 0.99
    # Two images a class: the plain share would be about a half.
    assert counts.between_classes(rng.normal(size=100), labels) < 0.25
    assert math.isnan(counts.between_classes(np.ones(4), [0, 0, 1, 1]))
    assert math.isnan(counts.between_classes([1.0, 2.0], [0, 0]))
    assert math.isnan(counts.between_classes([1.0, 2.0], [0, 1]))


def test_counts_by_class_are_sorted() -> None:
    assert list(counts.counts_by_class(np.array([2, 2, 0]), ("x", "b", "a")).items()) == [
        ("a", 2),
        ("x", 1),
        ("b", 0),
    ]
