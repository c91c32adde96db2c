"""What an attack is about: a model, its gallery, and the queries whose pixels may be changed.

Letters: N images of a split, Q attacked queries, M queries of one batch, C H W an image, G gallery
images, D embedding dimensions.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from flowerray.data.dataset import Dataset
from flowerray.data.images import resize_side
from flowerray.data.store import Store, build_store
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.opening import Model
from flowerray.retrieval.embed import Images
from flowerray.retrieval.measure import EvaluateConfig, Measurement, default_gallery, measure
from flowerray.retrieval.search import retrieval_per_query
from flowerray.robustness.config import AttackConfig


@dataclass(frozen=True)
class Arena:
    """What the attacker faces: a model, its gallery, and the queries that may be changed."""

    embedder: Embedder
    """In eval mode, its parameters without gradients: see `frozen_copy`."""
    store: Images
    """The N photographs of the split."""
    chosen_Q: NDArray[np.int64]
    """Positions in the split of the attacked queries, ascending."""
    labels_Q: NDArray[np.int64]
    """Their classes."""
    emb_QD: NDArray[np.float32]
    """Unit embeddings of their photographs."""
    gallery_GD: NDArray[np.float32]
    """Unit embeddings."""
    gallery_labels_G: NDArray[np.int64]

    @property
    def device(self) -> torch.device:
        """Where the embedder is."""
        return next(self.embedder.parameters()).device

    def images(self, positions_M: NDArray[np.int64]) -> Tensor:
        """Photographs of the split as float MCHW in [0,1], channels last, on the device."""
        images_MCHW = self.store.centre(positions_M, self.embedder.image_size).to(self.device)
        return (images_MCHW.float() / 255).contiguous(memory_format=torch.channels_last)

    def gallery(self) -> tuple[Tensor, Tensor]:
        """Embeddings and labels as tensors on the device."""
        labels_G = torch.from_numpy(self.gallery_labels_G).to(self.device)
        return torch.from_numpy(self.gallery_GD).to(self.device), labels_G

    def chance(self) -> float:
        """R@1 of a gallery in random order."""
        share_C = np.bincount(self.gallery_labels_G, minlength=int(self.labels_Q.max()) + 1)
        return float(share_C[self.labels_Q].mean() / len(self.gallery_labels_G))


def frozen_copy(embedder: Embedder) -> Embedder:
    """A copy in eval mode without parameter gradients: an attack leaves no trace on the original,
    and autograd keeps only what the gradient of the pixels needs.
    """
    return copy.deepcopy(embedder).eval().requires_grad_(False)


def narrow(arena: Arena, number: int, seed: int) -> tuple[Arena, NDArray[np.int64]]:
    """The arena with a seeded draw of its queries, and their places among them."""
    size = len(arena.chosen_Q)
    rows = np.sort(np.random.default_rng((seed, 4)).permutation(size)[:number])
    return (
        replace(
            arena,
            chosen_Q=arena.chosen_Q[rows],
            labels_Q=arena.labels_Q[rows],
            emb_QD=arena.emb_QD[rows],
        ),
        rows,
    )


def embed_images(arena: Arena, images_MCHW: Tensor) -> NDArray[np.float32]:
    """(M, D) unit embeddings."""
    with torch.inference_mode():
        return arena.embedder(images_MCHW).float().cpu().numpy()


def rank(arena: Arena, emb_MD: NDArray, labels_M: NDArray) -> dict[str, NDArray]:
    """`retrieval_per_query` in the arena's gallery: the judge of every attack."""
    return retrieval_per_query(emb_MD, labels_M, arena.gallery_GD, arena.gallery_labels_G)


def choose_queries(
    labels_N: ArrayLike, number: int, seed: int, share: float = 1.0
) -> NDArray[np.int64]:
    """Positions of `number` images, spread evenly over the classes, ascending; a pure function.

    Args:
        share: of each class at most this part, rounded down.
    """
    labels = np.asarray(labels_N)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(labels))
    shuffled = shuffled[np.argsort(labels[shuffled], kind="stable")]
    _, starts, counts = np.unique(labels[shuffled], return_index=True, return_counts=True)
    turn_N = np.arange(len(labels)) - np.repeat(starts, counts)
    allowed_N = turn_N < np.repeat(np.floor(share * counts + 1e-9), counts)
    class_turn_N = np.repeat(rng.permutation(len(counts)), counts)
    order = np.lexsort([class_turn_N, turn_N])
    order = order[allowed_N[order]]
    return np.sort(shuffled[order[:number]])


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
