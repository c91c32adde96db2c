"""One model, one split, one gallery: everything that `flowerray evaluate` prints.

Letters: Q queries, G gallery images, D embedding dimensions, N images of a split.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NotRequired

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pydantic import Field
from typing_extensions import TypedDict

from flowerray.config import Config
from flowerray.data.dataset import Dataset
from flowerray.data.listing import is_listing
from flowerray.data.source import open_all
from flowerray.data.store import Store
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.retrieval.decisions import Decisions, unit
from flowerray.retrieval.embed import embed, kept_embeddings
from flowerray.retrieval.pairs import PAIR_SEED, PAIRS_PER_KIND, Pairs, make_pairs, pair_metrics
from flowerray.retrieval.search import retrieval_metrics, retrieval_per_query, summarise

BuildStore = Callable[[Sequence[Path]], Store]
"""Gives the decoded store of a list of files, for the embedder's image size."""


class Floor(TypedDict):
    """How the backbone's features as they came do on the queries of a trained model."""

    metrics: dict[str, Any]
    per_query: dict[str, list[float]]
    """`hit`, `average_precision` and `num_relevant`, in the order of the model's."""


class Evaluation(TypedDict):
    """What every reader of RUN/evaluation/<split>.json relies on."""

    metrics: dict[str, Any]
    split: str
    gallery: str
    per_query: dict[str, list[Any]]
    queries: list[str]
    """Image files."""
    frozen: NotRequired[Floor | None]
    """Of 0.1.0 missing; None where it could not be had."""


class EvaluateConfig(Config):
    """What is searched for in what."""

    split: Literal["train", "val", "test"] = "test"
    """Queries: the images of this split."""
    gallery: str | None = None
    """Where neighbours are searched: `train`, `trainval`, `self` (the queries, each without itself)
    or a folder or table of images; by default a table's `gallery`, else `train`, for protocol
    `disjoint` and a whole folder `self`."""
    batch_size: int = Field(64, ge=1)
    """Images embedded at a time; changes speed and memory only."""
    far: float | None = Field(None, gt=0, lt=1)
    """Judge the threshold with this false-match rate on the validation pairs of the training, in
    place of the fitted one."""


@dataclass(frozen=True)
class Measurement:
    """The numbers of one evaluation, and what they were made from."""

    metrics: dict[str, Any]
    """Flat: the keys of `retrieval_metrics` and `pair_metrics`, `protocol`, `split`, `gallery`."""
    per_query: dict[str, NDArray]
    """As `retrieval_per_query` returns it: paired tests compare these."""
    query_paths: tuple[Path, ...]
    """Q files."""
    query_labels: NDArray[np.int64]
    """(Q,)"""
    query_emb: NDArray[np.float32]
    """(Q, D)"""
    gallery_paths: tuple[Path, ...]
    """G files; the queries' own for `self`."""
    gallery_labels: NDArray[np.int64]
    """(G,), in the numbering of the queries' labels."""
    gallery_emb: NDArray[np.float32]
    """(G, D)"""
    classes: tuple[str, ...]
    """Name of each label, the gallery's own classes at the end."""
    frozen: Floor | None = None
    """Of a trained model, where it can be had."""
    decisions: Decisions = field(default_factory=Decisions)
    """Its metrics stand in `metrics` too."""


def measure(
    embedder: Embedder,
    dataset: Dataset,
    build_store: BuildStore,
    config: EvaluateConfig | None = None,
    *,
    pairs: Pairs | None = None,
    threshold: float | None = None,
    frozen: bool = False,
    progress: Callable[[int], object] | None = None,
) -> Measurement:
    """Embeds queries and gallery, then ranks them and scores the verification pairs.

    Args:
        dataset: holds the queries' split; a folder read whole is its own gallery.
        build_store: see `BuildStore`.
        pairs: fixed pairs of that split; None: no pair metrics.
        threshold: the run's, fitted on val when it was trained; None: no pair accuracy.
        frozen: measure the frozen backbone's features instead: the floor.

    Raises:
        UserError: no such split or gallery; a gallery with the queries or without their classes.
    """
    config = config or EvaluateConfig()

    def emb(paths: Sequence[Path]) -> NDArray[np.float32]:
        store, size = build_store(paths), config.batch_size
        if frozen:
            return kept_embeddings(embedder, store, frozen=True, batch_size=size, progress=progress)
        return embed(embedder, store, batch_size=size, progress=progress)

    query_paths, query_labels = split_images(dataset, config.split)
    gallery_name = config.gallery
    if gallery_name is None:
        gallery_name = default_gallery(dataset, config.split)
    # The gallery is checked before anything is embedded.
    parts, classes = gallery_images(dataset, config.split, gallery_name, query_paths)
    query_emb = emb(query_paths)
    if parts:
        gallery_paths = tuple(path for paths, _ in parts for path in paths)
        gallery_labels = np.concatenate([labels for _, labels in parts])
        gallery_emb = np.concatenate([emb(paths) for paths, _ in parts])
        per_query = retrieval_per_query(query_emb, query_labels, gallery_emb, gallery_labels)
    else:
        gallery_paths, gallery_labels, gallery_emb = query_paths, query_labels, query_emb
        per_query = retrieval_per_query(query_emb, query_labels)

    metrics: dict[str, Any] = _with_queries(summarise(per_query, query_labels), gallery_name)
    if dataset.parents is not None and classes == dataset.classes:
        parents_C = np.array(dataset.parents)
        nearest_Q = gallery_labels[per_query["nearest"][:, 0]]
        metrics["recall_at_1_parent"] = float(
            (parents_C[nearest_Q] == parents_C[query_labels])[per_query["num_relevant"] > 0].mean()
        )
    if pairs is not None:
        metrics |= pair_metrics(query_emb, pairs, threshold)
    metrics |= {"protocol": dataset.protocol, "split": config.split, "gallery": gallery_name}
    return Measurement(
        metrics,
        per_query,
        query_paths,
        query_labels,
        query_emb,
        gallery_paths,
        gallery_labels,
        gallery_emb,
        classes,
    )


def as_record(measurement: Measurement, root: Path, seconds: float) -> dict[str, Any]:
    """RUN/evaluation/<split>.json: the metrics, and what they were for each query, in one order, so
    that runs can be compared query by query.

    Args:
        root: image files below it are named relative to it.
    """
    per_query, m = measurement.per_query, measurement
    nearest = per_query["nearest"][:, 0]
    emb = [unit(x.astype(np.float64)) for x in (m.query_emb, m.gallery_emb[nearest])]

    def name(path: Path) -> str:
        return path.relative_to(root).as_posix() if path.is_relative_to(root) else str(path)

    return {
        "metrics": m.metrics,
        **{key: m.metrics[key] for key in ("protocol", "split", "gallery")},
        "root": str(root),
        "per_query": {
            "hit": per_query["hit"].astype(int).tolist(),
            "average_precision": per_query["average_precision"].tolist(),
            "num_relevant": per_query["num_relevant"].tolist(),
            "class": [m.classes[label] for label in m.query_labels],
            "nearest": [name(m.gallery_paths[g]) for g in nearest],
            "nearest_class": [m.classes[m.gallery_labels[g]] for g in nearest],
            "similarity": (emb[0] * emb[1]).sum(1).tolist(),
        },
        "queries": [name(path) for path in m.query_paths],
        "frozen": m.frozen,
        "intervals": {name: told.to_dict() for name, told in m.decisions.intervals.items()},
        "seconds": seconds,
    }


def validation_metrics(
    query_emb: NDArray[np.float32],
    val_labels_Q: ArrayLike,
    gallery: tuple[NDArray[np.float32], ArrayLike] | None,
) -> dict[str, float]:
    """The retrieval metrics after an epoch, `val/map_at_r` and so on; `gallery` is None where val
    searches itself (`disjoint`: its classes are not in train).

    Raises:
        UserError: embeddings that are not finite; no val image with another of its class to find.
    """
    metrics = _with_queries(
        retrieval_metrics(query_emb, val_labels_Q, *(gallery or ())), "train" if gallery else "val"
    )
    return {f"val/{name}": float(value) for name, value in metrics.items()}


def frozen_pairs(
    embedder: Embedder, store: Store, labels_N: ArrayLike, num_per_kind: int = PAIRS_PER_KIND
) -> Pairs:
    """`make_pairs` with hard negatives by the features of an embedder that is untrained, as its
    backbone came, so that the pairs favour no method.
    """
    features_ND = kept_embeddings(embedder, store, frozen=True)
    return make_pairs(labels_N, PAIR_SEED, num_per_kind, features_ND)


def split_names(dataset: Dataset, split: str) -> list[str]:
    """A split's files relative to the root, with forward slashes: the names in pairs.json."""
    return [dataset.paths[i].relative_to(dataset.root).as_posix() for i in dataset.splits[split]]


def default_gallery(dataset: Dataset, split: str) -> str:
    """`gallery` where a table has one; `train`; `self` where classes are disjoint, train is
    missing, or it is what is queried.
    """
    if "gallery" in dataset.splits and split == "test":
        return "gallery"
    if dataset.protocol == "disjoint" or "train" not in dataset.splits or split == "train":
        return "self"
    return "train"


def split_images(dataset: Dataset, split: str) -> tuple[tuple[Path, ...], NDArray[np.int64]]:
    """Files and labels of a split.

    Raises:
        UserError: the data has no such split.
    """
    if split not in dataset.splits or not len(dataset.splits[split]):
        raise UserError(
            f"Protocol {dataset.protocol} of {dataset.root} has no {split} split: "
            f"choose one of {', '.join(dataset.splits)}."
        )
    return tuple(dataset.paths[i] for i in dataset.splits[split]), dataset.split_labels(split)


def gallery_images(
    dataset: Dataset, split: str, gallery: str, query_paths: Sequence[Path]
) -> tuple[list[tuple[tuple[Path, ...], NDArray[np.int64]]], tuple[str, ...]]:
    """The gallery as lists of files with labels (none for `self`), and the name of every label.

    Raises:
        UserError: no such gallery, or one with the queries in it.
    """
    if gallery == "self" or (gallery == "train" and split == "train"):
        return [], dataset.classes
    if gallery == "gallery" and gallery in dataset.splits:
        return [split_images(dataset, gallery)], dataset.classes
    if gallery in ("train", "trainval"):
        splits = [name for name in ("train", "val") if name in dataset.splits]
        splits = splits[:1] if gallery == "train" else splits
        if "train" not in splits:
            raise UserError(
                f"{dataset.root} is read without a train split, so there is no {gallery} gallery: "
                "use `gallery` self, a folder, or `data.train_per_class` N."
            )
        if split in splits:
            raise UserError(
                f"The {gallery} gallery holds the {split} queries themselves: use `gallery` self."
            )
        return [split_images(dataset, name) for name in splits], dataset.classes
    return _folder_gallery(dataset, Path(gallery), query_paths)


def _folder_gallery(
    dataset: Dataset, folder: Path, query_paths: Sequence[Path]
) -> tuple[list[tuple[tuple[Path, ...], NDArray[np.int64]]], tuple[str, ...]]:
    """Every image of a folder, its classes matched with the queries' by name."""
    if not (folder.is_dir() or is_listing(folder)):
        raise UserError(
            f"The gallery {folder} is neither train, trainval or self nor a folder of images that "
            "is there: give one of them."
        )
    other = open_all(folder)
    queries = {path.resolve() for path in query_paths}
    shared = sum(path.resolve() in queries for path in other.paths)
    if shared:
        raise UserError(
            f"The gallery {folder} holds {shared} of the query images themselves: "
            "use `gallery` self or another folder."
        )
    added = [name for name in other.classes if name not in dataset.classes]
    classes = (*dataset.classes, *added)
    number = {name: i for i, name in enumerate(classes)}
    translate = np.array([number[name] for name in other.classes], np.int64)
    return [(other.paths, translate[other.labels_N])], classes


def _with_queries(metrics: dict[str, float], gallery: str) -> dict[str, float]:
    if not metrics["num_queries"]:
        raise UserError(
            f"None of the {metrics['num_queries_without_match']} queries has an image of its class "
            f"in the gallery {gallery}: use another gallery, or check the class names."
        )
    return metrics
