"""Which gallery is searched, and what comes out beside the ranking."""

from pathlib import Path

import numpy as np
import pytest

from flowerray.data.dataset import Dataset
from flowerray.errors import UserError
from flowerray.retrieval import measure as module
from flowerray.retrieval.embed import embed
from flowerray.retrieval.measure import (
    EvaluateConfig,
    default_gallery,
    frozen_pairs,
    measure,
    split_names,
    validation_metrics,
)
from flowerray.retrieval.pairs import fit_threshold, pair_cosines, pair_metrics
from flowerray.retrieval.search import retrieval_metrics
from tests.robustness.fakes import coloured_store, tiny_embedder

ROOT = Path("/nowhere/flowers")


def dataset(
    protocol: str = "official",
    splits: tuple[str, ...] = ("train", "val", "test"),
    root: Path = ROOT,
) -> Dataset:
    """Six classes of nine images, three in each split."""
    classes = tuple("abcdef")
    names = [f"{name}_{number}.jpg" for name in classes for number in range(9)]
    number_N = np.arange(54) % 9
    groups = {"train": number_N < 3, "val": (number_N >= 3) & (number_N < 6), "test": number_N >= 6}
    if splits == ("test",):
        groups = {"test": number_N >= 0}
    return Dataset(
        root,
        "folder",
        protocol,
        tuple(root / name for name in names),
        np.repeat(np.arange(6), 9),
        classes,
        {split: np.flatnonzero(groups[split]) for split in splits},
    )


def emb_of(data: Dataset, *splits: str) -> tuple[np.ndarray, np.ndarray]:
    index = np.concatenate([data.splits[split] for split in splits])
    store = coloured_store([data.paths[i] for i in index])
    return embed(tiny_embedder(), store), data.labels_N[index]


GALLERIES = [
    ("official", "test", None, "train", ("train",)),
    ("official", "val", None, "train", ("train",)),
    ("official", "train", None, "self", None),
    ("official", "train", "train", "train", None),
    ("official", "test", "trainval", "trainval", ("train", "val")),
    ("official", "test", "self", "self", None),
    ("disjoint", "test", None, "self", None),
    ("disjoint", "val", None, "self", None),
]


@pytest.mark.parametrize(("protocol", "split", "gallery", "name", "searched"), GALLERIES)
def test_gallery(
    protocol: str, split: str, gallery: str | None, name: str, searched: tuple[str, ...] | None
) -> None:
    data = dataset(protocol)
    config = EvaluateConfig(split=split, gallery=gallery)
    result = measure(tiny_embedder(), data, coloured_store, config)
    query = emb_of(data, split)
    expected = retrieval_metrics(*query, *(emb_of(data, *searched) if searched else ()))
    assert {key: result.metrics[key] for key in expected} == pytest.approx(expected)
    facts = {"protocol": protocol, "split": split, "gallery": name}
    assert {key: result.metrics[key] for key in result.metrics if key not in expected} == facts
    assert 0.1 < result.metrics["map_at_r"] < 1.0, "the case says nothing"
    assert len(result.gallery_paths) == result.metrics["num_gallery"]
    hits = result.per_query["hit"]
    found = result.gallery_labels[result.per_query["nearest"][:, 0]] == result.query_labels
    assert np.array_equal(hits, found)


def test_trainval_protocol_searches_its_training_set() -> None:
    data = dataset("trainval", ("train", "test"))
    assert default_gallery(data, "test") == "train"
    default = measure(tiny_embedder(), data, coloured_store).metrics
    config = EvaluateConfig(gallery="trainval")
    named = measure(tiny_embedder(), data, coloured_store, config).metrics
    assert default | {"gallery": "trainval"} == named


def test_a_folder_read_whole_is_its_own_gallery() -> None:
    result = measure(tiny_embedder(), dataset(splits=("test",)), coloured_store).metrics
    assert result["gallery"] == "self"
    assert result["num_queries"] == result["num_gallery"] == 54


def test_a_folder_as_gallery_is_matched_by_class_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = Dataset(
        tmp_path,
        "folder",
        "official",
        tuple(tmp_path / f"{name}_9{i}.jpg" for name in ("f", "b", "z") for i in range(4)),
        np.repeat([0, 1, 2], 4),
        ("f", "b", "z"),
        {"test": np.arange(12)},
    )
    monkeypatch.setattr(module, "open_all", lambda root: other)
    config = EvaluateConfig(gallery=str(tmp_path))
    result = measure(tiny_embedder(), dataset(), coloured_store, config)
    assert result.metrics["num_queries"] == 6, "three of f, three of b"
    assert result.metrics["num_queries_without_match"] == 12
    assert result.metrics["gallery"] == str(tmp_path)
    assert result.classes == (*"abcdef", "z")
    assert result.gallery_labels.tolist() == [5] * 4 + [1] * 4 + [6] * 4
    assert result.metrics["recall_at_5"] > 0.5, "colours of one name are alike"


def test_a_folder_that_holds_the_queries_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(module, "open_all", lambda root: dataset(root=tmp_path, splits=("test",)))
    config = EvaluateConfig(gallery=str(tmp_path))
    with pytest.raises(UserError, match="holds 18 of the query images"):
        measure(tiny_embedder(), dataset(root=tmp_path), coloured_store, config)


def test_pairs_and_frozen_threshold() -> None:
    data, embedder = dataset(), tiny_embedder()
    val = frozen_pairs(
        embedder,
        coloured_store([data.paths[i] for i in data.splits["val"]]),
        data.split_labels("val"),
        num_per_kind=15,
    )
    threshold = fit_threshold(pair_cosines(emb_of(data, "val")[0], val), val.same)
    test = frozen_pairs(
        embedder,
        coloured_store([data.paths[i] for i in data.splits["test"]]),
        data.split_labels("test"),
        num_per_kind=15,
    )
    result = measure(embedder, data, coloured_store, pairs=test, threshold=threshold).metrics
    expected = pair_metrics(emb_of(data, "test")[0], test, threshold)
    assert {name: result[name] for name in expected} == pytest.approx(expected)
    assert set(expected) == {"pair_auc", "pair_eer", "pair_auc_hard", "pair_accuracy"}
    assert "pair_auc" not in measure(embedder, data, coloured_store).metrics


def test_frozen_measures_the_backbone() -> None:
    data, embedder = dataset(), tiny_embedder()
    result = measure(embedder, data, coloured_store, frozen=True)
    assert result.query_emb.shape[1] == 8, "features, not the projection's 4"
    assert result.gallery_emb.shape[1] == 8


@pytest.mark.parametrize("self_gallery", [False, True])
def test_validation_metrics(self_gallery: bool) -> None:
    data = dataset()
    (query, labels), gallery = emb_of(data, "val"), emb_of(data, "train")
    result = validation_metrics(query, labels, None if self_gallery else gallery)
    expected = retrieval_metrics(query, labels, *(() if self_gallery else gallery))
    assert result == pytest.approx({f"val/{name}": value for name, value in expected.items()})
    with pytest.raises(UserError, match="None of the 18 queries"):
        validation_metrics(query, labels, (gallery[0], gallery[1] + 10))


def test_names_are_relative() -> None:
    assert split_names(dataset(), "val")[:4] == ["a_3.jpg", "a_4.jpg", "a_5.jpg", "b_3.jpg"]


BAD = {
    "no split": (dataset("trainval", ("train", "test")), {"split": "val"}, "no val split"),
    "queries in gallery": (
        dataset(),
        {"split": "val", "gallery": "trainval"},
        "queries themselves",
    ),
    "no train": (dataset(splits=("test",)), {"gallery": "train"}, "without a train split"),
    "no folder": (
        dataset(),
        {"gallery": "/nowhere/at all"},
        "nor a folder of images that is there",
    ),
}


@pytest.mark.parametrize(("data", "options", "message"), BAD.values(), ids=BAD)
def test_bad_choices_are_one_sentence(data: Dataset, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        measure(tiny_embedder(), data, coloured_store, EvaluateConfig(**options))
