"""What an attack is about: a model, the queries of a split, and the gallery."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from flowerray.commands.models import Model
from flowerray.data.dataset import Dataset
from flowerray.data.images import resize_side
from flowerray.data.store import Store, build_store
from flowerray.errors import UserError
from flowerray.evaluate.arena import Arena, frozen_copy
from flowerray.evaluate.attack_config import AttackConfig
from flowerray.evaluate.measure import EvaluateConfig, Measurement, default_gallery, measure
from flowerray.evaluate.robustness import choose_queries


@dataclass(frozen=True)
class Subject:
    """One model with the queries and the gallery that it is attacked on."""

    model: Model
    arena: Arena
    measurement: Measurement
    """Of the clean queries."""
    gallery: str
    """As `evaluate` names it."""


def prepare(
    model: Model, dataset: Dataset, chosen_Q: NDArray[np.int64], config: AttackConfig, quiet: bool
) -> Subject:
    """Embeds the gallery, once, and the queries."""
    size = resize_side(model.embedder.image_size)
    paths = [dataset.paths[i] for i in dataset.splits[config.split]]
    store = build_store(paths, size, progress=not quiet)
    narrowed, queries, gallery = _narrowed(dataset, chosen_Q, config)
    query_paths = [paths[i] for i in chosen_Q]

    def build(files: Sequence[Path]) -> Any:
        if list(files) == query_paths:
            return _Chosen(store, chosen_Q)
        return build_store(files, size, progress=not quiet)

    embedder = frozen_copy(model.embedder)
    evaluate = EvaluateConfig(split=queries, gallery=gallery, batch_size=config.batch_size)
    with tqdm(unit="img", desc="embed", disable=quiet or None, dynamic_ncols=True) as bar:
        clean = measure(embedder, narrowed, build, evaluate, progress=bar.update)
    if clean.metrics["num_queries_without_match"]:
        raise UserError(
            f"{clean.metrics['num_queries_without_match']} queries have no image of their class in "
            f"the gallery {gallery_name(dataset, config)}: choose another gallery."
        )
    arena = Arena(
        embedder, store, chosen_Q, clean.query_labels, clean.query_emb, clean.gallery_emb,
        clean.gallery_labels,
    )  # fmt: skip
    return Subject(model, arena, clean, gallery_name(dataset, config))


def attacked_queries(dataset: Dataset, config: AttackConfig) -> NDArray[np.int64]:
    """Places in the split of the queries that are attacked."""
    if config.split not in dataset.splits or not len(dataset.splits[config.split]):
        raise UserError(
            f"Protocol {dataset.protocol} of {dataset.root} has no {config.split} split: "
            f"choose one of {', '.join(dataset.splits)}."
        )
    # A query cannot be searched for among attacked queries: half of each class stays the gallery.
    share = 0.5 if gallery_name(dataset, config) == "self" else 1.0
    labels_N = dataset.split_labels(config.split)
    chosen_Q = choose_queries(labels_N, config.max_queries, config.seed, share)
    if not len(chosen_Q):
        raise UserError(
            f"No class of {dataset.root} has two {config.split} images, of which one could be "
            "attacked and the other found: use another gallery."
        )
    return chosen_Q


def gallery_name(dataset: Dataset, config: AttackConfig) -> str:
    """The gallery that is asked for, `self` also where its own split is named."""
    name = config.gallery or default_gallery(dataset, config.split)
    return "self" if name == "train" == config.split else name


def _narrowed(
    dataset: Dataset, chosen_Q: NDArray[np.int64], config: AttackConfig
) -> tuple[Dataset, Literal["train", "val", "test"], str]:
    """A dataset with the attacked queries alone in one split, the name of that split, and the
    gallery to search; the gallery `self` becomes a train split of all other images.
    """
    all_N = dataset.splits[config.split]
    gallery = gallery_name(dataset, config)
    if gallery == "self":
        rest = np.setdiff1d(np.arange(len(all_N)), chosen_Q)
        splits = {"train": all_N[rest], "test": all_N[chosen_Q]}
        return replace(dataset, splits=splits), "test", "train"
    splits = {**dataset.splits, config.split: all_N[chosen_Q]}
    return replace(dataset, splits=splits), config.split, gallery


class _Chosen:
    """Some images of a store."""

    def __init__(self, store: Store, chosen_Q: NDArray[np.int64]) -> None:
        self.store, self.chosen_Q = store, chosen_Q

    def __len__(self) -> int:
        return len(self.chosen_Q)

    def centre(self, indices: NDArray[np.int64], size: int) -> Tensor:
        """See `Store.centre`."""
        return self.store.centre(self.chosen_Q[indices], size)
