"""The images that an explanation is about, and the prototypes that they are compared with."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from flowerray.data.dataset import Dataset
from flowerray.data.images import resize_side
from flowerray.data.store import build_store
from flowerray.errors import UserError
from flowerray.explain.cam import prototypes
from flowerray.explain.judge import Subjects
from flowerray.explain.localise import read_masks
from flowerray.opening import Model
from flowerray.retrieval.embed import kept_embeddings
from flowerray.retrieval.measure import default_gallery


def draw_images(
    dataset: Dataset, split: str, max_images: int, choose_images: int, seed: int
) -> tuple[NDArray[np.int64] | None, NDArray[np.int64]]:
    """Positions within val to choose on (None: there is no val), and within the split to judge on;
    they never overlap. Images that stand alone in their class are not drawn.

    Raises:
        UserError: the split is missing or too small.
    """
    if split not in dataset.splits or len(_comparable(dataset, split)) < 2:
        raise UserError(
            f"Protocol {dataset.protocol} of {dataset.root} has no {split} images to explain "
            f"(two of a class at the least): choose one of {', '.join(dataset.splits)}."
        )
    rng = np.random.default_rng((seed, 0))
    chosen_on = None
    if "val" in dataset.splits:
        order = rng.permutation(_comparable(dataset, "val"))
        most = len(order) // 2 if split == "val" else len(order)
        chosen_on, rest = np.split(order, [min(choose_images, most)])
        if split == "val":
            return np.sort(chosen_on), np.sort(rest[:max_images])
        chosen_on = np.sort(chosen_on) if len(chosen_on) else None
    judged = rng.permutation(_comparable(dataset, split))[:max_images]
    return chosen_on, np.sort(judged)


def _comparable(dataset: Dataset, split: str) -> NDArray[np.int64]:
    """Positions within the split of the images whose class has another image in the gallery."""
    labels = dataset.split_labels(split)
    if default_gallery(dataset, split) == "self":
        return np.flatnonzero(np.bincount(labels)[labels] > 1)
    return np.flatnonzero(np.isin(labels, dataset.split_labels("train")))


def make_subjects(
    model: Model,
    dataset: Dataset,
    split: str,
    positions: NDArray[np.int64],
    quiet: bool,
) -> Subjects:
    """Images of a split with the prototypes of their classes: from the train gallery, or, where
    classes are disjoint, from the split itself without the image.
    """
    embedder, size = model.embedder, model.embedder.image_size
    own = default_gallery(dataset, split) == "self"
    gallery_split = split if own else "train"
    indices = dataset.splits[split][positions]
    store = build_store([dataset.paths[i] for i in indices], resize_side(size), progress=not quiet)
    gallery_paths = [dataset.paths[i] for i in dataset.splits[gallery_split]]
    gallery_store = build_store(gallery_paths, resize_side(size), progress=not quiet)
    with progress_bar(len(gallery_store), "prototypes", quiet) as bar:
        gallery_GD = kept_embeddings(embedder, gallery_store, progress=bar.update)
    labels_N = dataset.labels_N[indices]
    gallery_labels = dataset.split_labels(gallery_split)
    reference = prototypes(
        gallery_GD, gallery_labels, labels_N, positions.tolist() if own else None
    )
    masks = None
    if dataset.masks is not None:
        masks = read_masks([dataset.masks[i] for i in indices], size)
    images = store.centre(np.arange(len(store)), size)
    paths = tuple(dataset.paths[i] for i in indices)
    return Subjects(images, reference, masks, paths, labels_N)


def progress_bar(total: int, name: str, quiet: bool) -> Any:
    """A bar over images, where somebody looks at it."""
    return tqdm(total=total, unit="img", desc=name, disable=quiet or None, dynamic_ncols=True)
