"""What is attacked: a model, the queries whose pixels may be changed, and its gallery.

Letters: N images of a split, Q attacked queries, M queries of one batch, C H W an image, G gallery
images, D embedding dimensions.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from tqdm import tqdm

from flowerray.attacks import bank
from flowerray.attacks.pgd import Objective, PGDConfig, pgd
from flowerray.data.dataset import Dataset
from flowerray.data.store import floats
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.opening import Model, store_builder
from flowerray.retrieval.embed import Images, Rows, embed
from flowerray.retrieval.measure import default_gallery, gallery_images, split_images
from flowerray.retrieval.search import retrieval_per_query
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.journal import Found, Journal


@dataclass(frozen=True)
class Victim:
    """A model under attack, with everything open that an attack needs."""

    model: Model
    """Its embedder is a copy in eval mode, the parameters without gradients, so that an attack
    leaves no trace and autograd keeps only what the gradient of the pixels needs."""
    config: AttackConfig
    """What the attacker may do."""
    store: Images
    """The N photographs of the split."""
    chosen_Q: NDArray[np.int64]
    """Positions in the split of the attacked queries, ascending."""
    query_paths: tuple[Path, ...]
    labels_Q: NDArray[np.int64]
    emb_QD: NDArray[np.float32]
    """Unit embeddings of their photographs."""
    protocol: str
    """Of the data."""
    gallery_name: str
    """As `evaluate` names it."""
    gallery_store: Images
    gallery_paths: tuple[Path, ...]
    gallery_labels_G: NDArray[np.int64]
    gallery_GD: NDArray[np.float32]
    """Unit embeddings."""
    classes: tuple[str, ...]
    """Name of each label."""
    journal: Journal = field(default_factory=Journal)
    """What attacks on it have found so far."""

    @property
    def embedder(self) -> Embedder:
        """Of the model."""
        return self.model.embedder

    @property
    def device(self) -> torch.device:
        """Where the embedder is."""
        return next(self.embedder.parameters()).device

    def images(self, positions_M: NDArray[np.int64], store: Images | None = None) -> Tensor:
        """Photographs of the split (or of another store) as float MCHW in [0,1], channels last, on
        the device.
        """
        store = self.store if store is None else store
        images_MCHW = store.centre(positions_M, self.embedder.image_size).to(self.device)
        return floats(images_MCHW)

    def queries(self, rows_M: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Photographs and labels of some of the Q queries."""
        labels_M = torch.from_numpy(self.labels_Q[rows_M]).to(self.device)
        return self.images(self.chosen_Q[rows_M]), labels_M

    def gallery(self) -> tuple[Tensor, Tensor]:
        """Embeddings and labels as tensors on the device."""
        labels_G = torch.from_numpy(self.gallery_labels_G).to(self.device)
        return torch.from_numpy(self.gallery_GD).to(self.device), labels_G

    def chance(self) -> float:
        """R@1 of a gallery in random order."""
        share_C = np.bincount(self.gallery_labels_G, minlength=int(self.labels_Q.max()) + 1)
        return float(share_C[self.labels_Q].mean() / len(self.gallery_labels_G))

    def embed(self, images_MCHW: Tensor) -> NDArray[np.float32]:
        """(M, D) unit embeddings."""
        with torch.inference_mode():
            return self.embedder(images_MCHW).float().cpu().numpy()

    def rank(self, emb_MD: NDArray, labels_M: NDArray) -> dict[str, NDArray]:
        """`retrieval_per_query` in the gallery: the judge of every attack."""
        return retrieval_per_query(emb_MD, labels_M, self.gallery_GD, self.gallery_labels_G)

    def batches(self, rows_N: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """The rows, as many at a time as are attacked together."""
        size = self.config.batch_size
        return (rows_N[start : start + size] for start in range(0, len(rows_N), size))

    def moved(
        self,
        name: str,
        objective: Objective,
        images: Callable[[NDArray[np.int64]], Tensor],
        config: PGDConfig,
        stream: tuple[int, ...] = (),
        progress: Callable[[int], object] | None = None,
    ) -> NDArray[np.float32]:
        """(N, D): embeddings of N images after PGD; the journal keeps each batch.

        Args:
            name: what the journal calls it.
            objective: of all N.
            images: those at some of the places 0..N-1, by which random starts are drawn.
            config: the search.
            stream: keeps the starts apart from those of the configuration's seed alone.
            progress: called with a number of images that are done, N in all.
        """
        parts = []
        for rows_M in self.batches(np.arange(len(objective.rows[0]))):

            def move(rows_M: NDArray[np.int64] = rows_M) -> Found:
                some = objective.take(torch.from_numpy(rows_M).to(self.device))
                seed = (self.config.seed, *stream)
                found = pgd(some, images(rows_M), config, seed=seed, positions=rows_M.tolist())
                return {"emb": self.embed(found.images_BCHW)}

            parts.append(self.journal.once(f"{name} {rows_M[0]}", move)["emb"])
            if progress is not None:
                progress(len(rows_M))
        return np.concatenate(parts)

    def narrow(self, number: int) -> tuple["Victim", NDArray[np.int64]]:
        """The same with a seeded draw of its queries, and their places among them."""
        rng = np.random.default_rng((self.config.seed, 4))
        rows = np.sort(rng.permutation(len(self.chosen_Q))[:number])
        some = {name: getattr(self, name)[rows] for name in ("chosen_Q", "labels_Q", "emb_QD")}
        return replace(self, **some, query_paths=tuple(self.query_paths[i] for i in rows)), rows


def open_victim(model: Model, dataset: Dataset, config: AttackConfig, quiet: bool) -> Victim:
    """Chooses the queries, a function of the data and the configuration, and embeds them and the
    gallery.

    Raises:
        UserError: no such split or gallery; queries without an image of their class in it; attacks
            were named that need more classes.
    """
    split, gallery = config.split, config.gallery or default_gallery(dataset, config.split)
    own = gallery == "self" or gallery == "train" == split
    paths, labels_N = split_images(dataset, split)
    # A query cannot be searched for among attacked queries: half of each class stays the gallery.
    chosen_Q = choose_queries(labels_N, config.max_queries, config.seed, 0.5 if own else 1.0)
    if not len(chosen_Q):
        raise UserError(
            f"No class of {dataset.root} has two {split} images, of which one could be "
            "attacked and the other found: use another gallery."
        )
    query_paths, labels_Q = tuple(paths[i] for i in chosen_Q), labels_N[chosen_Q]
    rest = np.setdiff1d(np.arange(len(paths)), chosen_Q)
    parts, classes = [(tuple(paths[i] for i in rest), labels_N[rest])], dataset.classes
    if not own:
        parts, classes = gallery_images(dataset, split, gallery, query_paths)
    labels_G = np.concatenate([labels for _, labels in parts])
    if lost := int((~np.isin(labels_Q, labels_G)).sum()):
        raise UserError(
            f"{lost} of the {len(labels_Q)} queries have no image of their class in the gallery "
            f"{gallery}: choose another gallery."
        )
    config = _possible(config, len(np.unique(labels_G)))
    embedder = copy.deepcopy(model.embedder).eval().requires_grad_(False)
    build = store_builder(embedder.image_size, quiet)
    store = build(paths)
    gallery_paths = tuple(path for some, _ in parts for path in some)
    gallery_store = Rows(store, rest) if own else build(gallery_paths)
    with tqdm(unit="img", desc="embed", disable=quiet or None, dynamic_ncols=True) as bar:
        emb_QD, gallery_GD = (
            embed(embedder, images, batch_size=config.batch_size, progress=bar.update)
            for images in (Rows(store, chosen_Q), gallery_store)
        )
    return Victim(
        model=replace(model, embedder=embedder),
        config=config,
        store=store,
        chosen_Q=chosen_Q,
        query_paths=query_paths,
        labels_Q=labels_Q,
        emb_QD=emb_QD,
        protocol=dataset.protocol,
        gallery_name="self" if own else gallery,
        gallery_store=gallery_store,
        gallery_paths=gallery_paths,
        gallery_labels_G=labels_G,
        gallery_GD=gallery_GD,
        classes=classes,
    )


def _possible(config: AttackConfig, classes: int) -> AttackConfig:
    """The configuration without those of the default attacks that need more classes.

    Raises:
        UserError: attacks were named, and one of them does.
    """
    fits = tuple(name for name in config.attacks if bank.least_classes(name) <= classes)
    if fits == config.attacks:
        return config
    left = ", ".join(name for name in config.attacks if name not in fits)
    why = f"it compares more classes than the {classes} of the gallery"
    if config.attacks != AttackConfig().attacks:
        raise UserError(f"`attacks`: leave {left} out, since {why}.")
    print(f"{left} is left out: {why}.", file=sys.stderr)
    return config.model_copy(update={"attacks": fits})


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
