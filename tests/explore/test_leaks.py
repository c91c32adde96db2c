"""Recall@1 with and without queries that have a near-duplicate in the gallery."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from flowerray.data.dataset import Dataset
from flowerray.explore.duplicates import DuplicatePair
from flowerray.explore.leaks import recall_effect

EMB = np.array([[1, 0], [0, 1], [0.9, 0.1], [0.2, 0.8], [0.8, 0.3], [0.4, 0.9]], np.float32)
EMB /= np.linalg.norm(EMB, axis=1, keepdims=True)
SET = Dataset(
    root=Path("/set"),
    kind="folder",
    protocol="official",
    paths=tuple(Path(f"/set/{i}.jpg") for i in range(6)),
    labels_N=np.array([0, 1, 0, 0, 1, 1]),
    classes=("a", "b"),
    splits={"train": np.array([0, 1]), "test": np.array([2, 3, 4, 5])},
)


def pair(first: int, second: int) -> DuplicatePair:
    return DuplicatePair(first, second, 1.0, False, 0.0, 1.0)


def test_train_gallery() -> None:
    found = recall_effect(SET, EMB, [pair(0, 2), pair(3, 4)])  # 3 and 4 are both queries: no leak
    assert found is not None and (found["gallery"], found["removed"]) == ("train", 1)
    assert (found["every"]["n"], found["every"]["mean"]) == (4, 0.5)  # 2 and 5 hit
    assert (found["clean"]["n"], found["clean"]["mean"]) == (3, 1 / 3)


def test_self_gallery() -> None:
    whole = replace(SET, splits={"test": np.arange(6)})
    found = recall_effect(whole, EMB, [pair(0, 2)])
    assert found is not None and (found["gallery"], found["removed"]) == ("self", 2)
    assert (found["every"]["n"], found["clean"]["n"]) == (6, 4)


def test_all_are_duplicates() -> None:
    found = recall_effect(SET, EMB, [pair(0, q) for q in (2, 3, 4, 5)])
    assert found is not None and found["clean"] is None and found["removed"] == 4


def test_nothing_to_search() -> None:
    alone = replace(SET, splits={"test": np.array([2])})
    assert recall_effect(alone, EMB, []) is None
    assert recall_effect(replace(SET, splits={"train": np.arange(6)}), EMB, []) is None
    strangers = replace(SET, splits={"train": np.array([0]), "test": np.array([4, 5])})
    assert recall_effect(strangers, EMB, []) is None
