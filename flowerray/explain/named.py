"""`flowerray explain RUN --concept-folders DIR`: does likeness depend on concepts that the user
shows by example?
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from flowerray.data.folder import read_all
from flowerray.data.images import resize_side
from flowerray.data.store import build_store, floats
from flowerray.errors import UserError
from flowerray.explain.examples import draw_images, make_subjects
from flowerray.explain.pair import explanations, pick_layer
from flowerray.explain.tcav import TcavConfig, tcav
from flowerray.files import write_json
from flowerray.model.modes import full_precision
from flowerray.opening import Model
from flowerray.tracking import sync

POOL = 200
"""Training images that random sets are drawn from."""


@full_precision()
def explain_concepts(
    model: Model,
    folders: Path,
    *,
    class_name: str | None,
    layer: str | None,
    split: str,
    max_images: int,
    seed: int,
    out: Path | None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Scores the concepts in `folders` and notes them in explanations/tcav.json.

    Args:
        folders: one folder of example images a concept.
        class_name: whose images are tested; None = all of the split's, each against the prototype
            of its own class.
        layer: where concepts are directions; the default of `find_layers` where None.

    Raises:
        UserError: no such class or layer, folders without images; see `tcav`.
    """
    folder = explanations(model, out)
    dataset = model.own_dataset(quiet)
    size = model.embedder.image_size
    chosen = pick_layer(model.embedder, layer)
    examples = read_all(folders)
    concepts = {
        name: _images([examples.paths[i] for i in np.flatnonzero(examples.labels_N == c)], size)
        for c, name in enumerate(examples.classes)
    }
    positions = draw_images(dataset, split, len(dataset.splits.get(split, ())), 0, seed)[1]
    if class_name is not None:
        if class_name not in dataset.classes:
            raise UserError(f"`concept_class` {class_name} is no class of {dataset.root}.")
        wanted = dataset.classes.index(class_name)
        positions = positions[dataset.split_labels(split)[positions] == wanted]
        if not len(positions):
            raise UserError(f"{class_name} has no {split} images: choose another `split`.")
    positions = np.sort(np.random.default_rng((seed, 3)).permutation(positions)[:max_images])
    subjects = make_subjects(model, dataset, split, positions, quiet)
    train = dataset.splits["train" if "train" in dataset.splits else split]
    pool = np.random.default_rng((seed, 2)).permutation(train)[:POOL]
    with tqdm(total=len(concepts), unit="concept", desc="tcav", disable=quiet or None) as bar:
        scores = tcav(
            model.embedder, chosen, concepts, _images([dataset.paths[i] for i in pool], size),
            floats(subjects.images_NCHW), torch.from_numpy(subjects.reference_ND),
            TcavConfig(seed=seed), bar.update,
        )  # fmt: skip
    result = {
        "run": model.name,
        "split": split,
        "class": class_name,
        "images": len(subjects),
        "layer": chosen.name,
        "concepts": [asdict(score) for score in scores],
    }
    write_json(folder / "tcav.json", result)
    if model.folder is not None and out is None:
        sync.send(model.folder.path)
    return result


def _images(paths: list[Path], size: int) -> Tensor:
    store = build_store(paths, resize_side(size), progress=False)
    return floats(store.centre(np.arange(len(store)), size))
