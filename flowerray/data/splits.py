"""The named split protocols, and the facts about a data set that are logged beside a run.

Letters: N images, C classes.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import blake2b
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flowerray.data.dataset import Dataset
from flowerray.errors import UserError

Protocol = Literal["official", "trainval", "disjoint", "notebooks"]

SPLITS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""What a split that is given may be called -> its name."""
_HELD_OUT = 0.2
"""Share of the training classes that `disjoint` validates on: 10 of Oxford's 51."""


def arrange(
    protocol: Protocol,
    parts: Mapping[str, NDArray[np.int64]],
    labels_N: NDArray[np.int64],
    seed: int,
) -> dict[str, NDArray[np.int64]]:
    """Turns a set's own parts into the splits of a protocol.

    official: the parts as they are. trainval: train and val together train, no val. disjoint: the
    first half of the classes trains, about a fifth of them (of four and more at least two, since a
    single class finds only itself), drawn from `seed`, held out as val; the
    second half tests; every image of a class is used. notebooks: train and test exchanged, for
    comparison with tables that were made so.

    Args:
        parts: "train", "val", "test" -> indices of images.
        labels_N: 0-based class of each image, each of 0..C-1 present.

    Returns:
        split -> ascending indices.

    Raises:
        UserError: `disjoint` with fewer than 4 classes.
    """
    train, val, test = (np.sort(parts[name]) for name in ("train", "val", "test"))
    if protocol == "official":
        return {"train": train, "val": val, "test": test}
    if protocol == "trainval":
        return {"train": np.union1d(train, val), "test": test}
    if protocol == "notebooks":
        return {"train": test, "val": val, "test": train}
    num_classes = int(labels_N.max()) + 1
    if num_classes < 4:
        raise UserError(
            f"The protocol disjoint needs at least 4 classes and this set has {num_classes}; "
            "choose official."
        )
    half = num_classes // 2
    held = max(2 if half >= 4 else 1, round(_HELD_OUT * half))
    held_out = np.random.default_rng(seed).permutation(half)[:held]
    is_val_N = np.isin(labels_N, held_out)
    return {
        "train": np.flatnonzero((labels_N < half) & ~is_val_N),
        "val": np.flatnonzero(is_val_N),
        "test": np.flatnonzero(labels_N >= half),
    }


def stratified(
    labels_N: NDArray[np.int64],
    train_per_class: int,
    val_per_class: int,
    seed: int,
    groups_N: NDArray[np.int64] | None = None,
) -> dict[str, NDArray[np.int64]]:
    """Draws train, val and test from each class; groups, which are of one class, stay whole, so
    that a split may have more images than were asked for.
    """
    groups_N = np.arange(len(labels_N)) if groups_N is None else groups_N
    parts: dict[str, list[int]] = {"train": [], "val": [], "test": []}
    for c in range(int(labels_N.max()) + 1):
        members: dict[int, list[int]] = {}
        for image in np.flatnonzero(labels_N == c).tolist():
            members.setdefault(int(groups_N[image]), []).append(image)
        first = np.array([group[0] for group in members.values()])
        drawn = [
            members[int(groups_N[image])]
            for image in np.random.default_rng((seed, c)).permutation(first)
        ]
        count = np.cumsum([0, *map(len, drawn)])
        trained = int(np.searchsorted(count, train_per_class))
        enough = count[min(trained, len(drawn))] + val_per_class
        ends = [0, trained, int(np.searchsorted(count, enough)), len(drawn)]
        for name, low, high in zip(parts, ends[:-1], ends[1:], strict=True):
            parts[name] += [image for group in drawn[low:high] for image in group]
    return {name: np.array(part, np.int64) for name, part in parts.items()}


def tagged(dataset: Dataset, facts: Mapping[str, str] | None = None) -> Dataset:
    """A data set with what identifies it, as MLflow tags `dataset/...`.

    The fingerprint covers relative paths, labels, splits and `facts`, not the pixels (a store's
    fingerprint does).
    """
    facts, splits = facts or {}, dataset.splits
    content = [
        [path.relative_to(dataset.root).as_posix() for path in dataset.paths],
        dataset.labels_N.tolist(),
        {name: indices.tolist() for name, indices in splits.items()},
        # A .mat file holds the time when it was written; a set rendered again is the same.
        {k: v for k, v in facts.items() if dataset.kind != "synthetic" or k != "setid_md5"},
    ]
    fingerprint = blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
    values = {
        "fingerprint": fingerprint,
        "kind": dataset.kind,
        "protocol": dataset.protocol,
        "images": str(len(dataset.paths)),
        "classes": str(len(np.unique(dataset.labels_N))),
        **{name: str(len(indices)) for name, indices in splits.items()},
        **facts,
    }
    return replace(dataset, tags={f"dataset/{name}": value for name, value in values.items()})
