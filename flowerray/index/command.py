"""`flowerray index build`, `add`, `remove`, `rebuild`, `search` and `check`, as plain data."""

import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from flowerray.calibration import PRIOR
from flowerray.data.images import decode, decoding_map, eval_crop, read_image
from flowerray.data.listing import is_listing
from flowerray.errors import UserError
from flowerray.index import contents
from flowerray.index.contents import Index, Photograph, open_index
from flowerray.model.embedder import Embedder
from flowerray.opening import Model, open_model
from flowerray.retrieval.command import gallery_of
from flowerray.retrieval.embed import embed_crops
from flowerray.retrieval.neighbours import recall
from flowerray.statistics import mean_interval
from flowerray.tracking.registry import resolve
from flowerray.training.checkpoint import export_file

BATCH = 64
FEWEST = 2000
"""Photographs after which what is embedded is written; of a large INDEX a quarter of its size."""
COPIES = 8
"""Of the photograph that is looked for, which may be left out."""


def build(model: Model, gallery: Path, out: Path, quiet: bool = False) -> dict[str, Any]:
    """Makes an INDEX of a folder's photographs; see `add`."""
    if not (gallery.is_dir() or is_listing(gallery)):
        raise UserError(f"{gallery} is not a folder of photographs.")
    photographs(gallery)  # an INDEX without any would be in the way of the next call
    file = export_file(resolve(model.name))
    contents.create(out, file, model.name, model.embedder.dim)
    return add(out, [gallery], model.embedder, quiet)


def add(
    folder: Path, places: Sequence[Path], by: Embedder | torch.device, quiet: bool = False
) -> dict[str, Any]:
    """Adds photographs, or every one of a folder or table; those whose path and content are known
    stay, but take the class that a table says; a known path with another content is embedded again.

    What is embedded is written now and then: after a kill the same call goes on.

    Args:
        by: the INDEX's own model, or the device on which it is opened.
    """
    index = open_index(folder)
    labels: dict[Path, str] = {}
    stated: set[Path] = set()
    for place in places:
        labels |= (found := photographs(place))
        stated |= found.keys() if is_listing(place) else set()
    embedder = model_of(index, by).embedder if isinstance(by, torch.device) else by
    return _add(index, labels, embedder, quiet, stated)


def rebuild(folder: Path, model: Model, quiet: bool = False) -> dict[str, Any]:
    """Embeds every photograph of an INDEX again, by another model; until all are, searches go on
    with the old one. After a kill the same call goes on.
    """
    file = export_file(resolve(model.name))
    beside = contents.begin_beside(folder, file, model.name, model.embedder.dim)
    if beside is None:
        return {"index": str(folder), "model": model.name, "photographs": len(open_index(folder))}
    while True:  # photographs may be added meanwhile
        index = open_index(folder)
        labels = {index.path(row): index.label(row) or "" for row in range(len(index))}
        found = _add(open_index(beside), labels, model.embedder, quiet)
        if contents.exchange(folder, beside, [Path(path) for path in found["unreadable"]]):
            count = len(open_index(folder))
            return {
                "index": str(folder), "model": model.name, "embedded": count,
                "unreadable": found["unreadable"], "photographs": count,
            }  # fmt: skip


def _add(
    index: Index,
    labels: Mapping[Path, str],
    embedder: Embedder,
    quiet: bool,
    stated: Collection[Path] = (),
) -> dict[str, Any]:
    """See `add`; the classes of `stated` are right also where they are known as another."""
    folder, old = index.folder, index
    known = {path: row for row, path in enumerate(old.paths())}
    pending: list[Photograph] = []
    counts = {"added": 0, "replaced": 0, "relabelled": 0, "known": 0}
    unreadable: dict[str, str] = {}
    with tqdm(total=len(labels), unit="img", desc="embed", disable=quiet or None) as bar:
        for batch in batches(list(labels), embedder.image_size):
            new: list[tuple[Path, bytes, NDArray[np.uint8]]] = []
            for path, digest, crop in batch:
                row = known.get(os.fsencode(path))
                if isinstance(crop, str):
                    stays = "" if row is None else "; what it was when it was added stays"
                    unreadable[str(path)] = crop + stays
                elif row is None or old.digest(row) != digest:
                    counts["added" if row is None else "replaced"] += 1
                    new.append((path, digest, crop))
                elif path in stated and old.label(row) != labels[path]:
                    counts["relabelled"] += 1
                    pending.append(Photograph(path, digest, labels[path], old.vectors_ND[row]))
                else:
                    counts["known"] += 1
            emb_BD = embed_crops(embedder, [crop for _, _, crop in new])
            pending += [
                Photograph(path, digest, labels[path], emb_D)
                for (path, digest, _), emb_D in zip(new, emb_BD, strict=True)
            ]
            bar.update(len(batch))
            if len(pending) >= max(FEWEST, len(index) // 4):
                index, _ = contents.change(folder, pending)
                pending = []
    index, _ = contents.change(folder, pending)
    return {"index": str(folder), **counts, "unreadable": unreadable, "photographs": len(index)}


def photographs(place: Path) -> dict[Path, str]:
    """Absolute path and class of one photograph, or of each in a folder; see `gallery_of`."""
    if not (place.is_dir() or is_listing(place)):
        path = Path(os.path.abspath(place))
        if not path.is_file():
            raise UserError(f"{place} is not there: give photographs, or folders of them.")
        return {path: path.parent.name}
    found = gallery_of(place)
    return {
        Path(os.path.abspath(path)): found.classes[label]
        for path, label in zip(found.paths, found.labels_N, strict=True)
    }


def batches(
    paths: Sequence[Path], size: int
) -> Iterator[list[tuple[Path, bytes, NDArray[np.uint8] | str]]]:
    """Photographs with the hashes of their files and their crops, HWC, or why there is none."""
    with decoding_map(len(paths)) as run:
        found = zip(paths, run(partial(_read, size=size), paths), strict=True)
        while batch := [(path, *read) for path, read in islice(found, BATCH)]:
            yield batch


def _read(path: Path, size: int) -> tuple[bytes, NDArray[np.uint8] | str]:
    digest, image = read_image(path)
    return bytes.fromhex(digest), image if isinstance(image, str) else eval_crop(image, size)


def model_of(index: Index, device: torch.device) -> Model:
    """The model that made an INDEX, out of its own file."""
    return open_model(str(contents.model_file(index.folder, index.manifest)), device)


def remove(folder: Path, places: Sequence[Path]) -> dict[str, Any]:
    """Takes photographs, or all of a folder, out of an INDEX; the files stay.

    Raises:
        UserError: one of them is not in the INDEX.
    """
    names = [os.fsencode(os.path.abspath(place)) for place in places]
    known = open_index(folder).paths()
    for place, name in zip(places, names, strict=True):
        if not any(path == name or path.startswith(name + b"/") for path in known):
            raise UserError(f"{folder} holds no photograph {place}.")
    exact, below = set(names), tuple(name + b"/" for name in names)
    index, gone = contents.change(folder, gone=lambda path: path in exact or path.startswith(below))
    return {"index": str(folder), "removed": gone, "photographs": len(index)}


def search(index: Index, model: Model, photo: Path, k: int, prior: float = PRIOR) -> dict[str, Any]:
    """The `k` nearest of an INDEX to a photograph, the chance that each is of its class, and
    whether none is near enough to be; the photograph itself, told by its content, is left out.

    Args:
        prior: that chance before the images are seen.
    """
    digest, crop = _read(photo, model.embedder.image_size)
    if isinstance(crop, str):
        decode(photo)  # which says why
        raise AssertionError(crop)
    emb_D = embed_crops(model.embedder, [crop])[0]
    return {"query": str(photo), **neighbours(index, model, emb_D, k, prior, digest)}


def neighbours(
    index: Index,
    model: Model,
    emb_D: NDArray[np.float32],
    k: int,
    prior: float = PRIOR,
    without: bytes = b"",
) -> dict[str, Any]:
    """What `search` answers of an embedding.

    Args:
        without: hash of a file that is left out, up to `COPIES` times.
    """
    found = [
        (int(row), float(cosine))
        for row, cosine in zip(*index.nearest(emb_D, k + COPIES), strict=True)
        if index.digest(row) != without
    ][:k]
    known = model.calibration
    return {
        "neighbours": [
            {
                "image": str(index.path(row)),
                "label": index.label(row),
                "similarity": cosine,
                "probability": None if known is None else float(known.probability(cosine, prior)),
                "id": index.digest(row).hex(),
            }
            for row, cosine in found
        ],
        "unknown": not found or found[0][1] < model.threshold,
    }


def check(folder: Path) -> dict[str, Any]:
    """Compares the files of an INDEX with their checksums, measures the recall of its search
    against the exact one, and notes that in the INDEX.

    Raises:
        UserError: a file that is not as it was written.
    """
    index = open_index(folder)
    manifest = index.manifest
    contents.model_file(folder, manifest)
    for name, known in manifest["checksums"].items():
        if contents.checksum(folder / manifest["parts"] / name) != known:
            raise UserError(
                f"{folder / manifest['parts'] / name} is not as it was written (a failing disk?): "
                f"{contents.AGAIN}."
            )
    found = None
    if len(index) > 1:
        found = mean_interval(recall(index.vectors_ND, index.cells)).to_dict()
        contents.note(folder, recall=found)
    return {
        "index": str(folder),
        "model": manifest["model"]["name"],
        "photographs": len(index),
        "classes": len(np.setdiff1d(index.entries_N["label"], [-1])),  # some may be removed
        "exact": index.cells is None,
        "recall_at_10": found,
    }
