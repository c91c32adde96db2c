"""What the commands on finished models do: evaluate, similar, search, demo; each returns plain data
to print.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from flowerray import checkpoint, tracking
from flowerray.cluster.worker import PAIR_SEED
from flowerray.data.dataset import Dataset
from flowerray.data.images import eval_image, resize_side
from flowerray.data.source import DataConfig, open_all, open_dataset
from flowerray.data.store import Store, build_store
from flowerray.errors import UserError
from flowerray.evaluate.embed import embed
from flowerray.evaluate.measure import (
    EvaluateConfig,
    Measurement,
    frozen_pairs,
    measure,
    split_names,
)
from flowerray.evaluate.pairs import Pairs, load_pairs, save_pairs
from flowerray.evaluate.sheet import Neighbour, SheetRow, measurement_rows, retrieval_sheet
from flowerray.model import Embedder, EmbedderConfig
from flowerray.run import Run
from flowerray.rundir import FolderReporter, RunDir


@dataclass(frozen=True)
class Model:
    """A trained model as the commands use it."""

    name: str
    """What the user called it."""
    folder: RunDir | None
    """Its RUN folder, where it is one."""
    run: Run
    embedder: Embedder
    threshold: float
    """Cosine from which two photographs count as the same class."""


def open_model(name: str, device: torch.device) -> Model:
    """A RUN folder, an exported file, `models:/...` or `runs:/...`.

    Raises:
        UserError: nothing there, or not a model.
    """
    path = tracking.resolve(name)
    content = checkpoint.load_export(path)
    return Model(
        name=name,
        folder=RunDir(path) if path.is_dir() and (path / "run.json").exists() else None,
        run=Run.from_dict(content["run"]),
        embedder=checkpoint.build_embedder(content).to(device),
        threshold=content["threshold"],
    )


# --- evaluate -------------------------------------------------------------------------------------


def evaluate_model(
    model: Model, data: DataConfig, whole: bool, config: EvaluateConfig, quiet: bool = False
) -> Measurement:
    """Measures a trained model.

    Args:
        data: the run's own data, or another set.
        whole: take every image of the set as query and gallery.
        quiet: no progress bars.
    """
    if whole:
        assert data.root is not None
        dataset = open_all(data.root)
    else:
        dataset = open_dataset(data, progress=not quiet)
    own = data == model.run.data and model.folder is not None
    pairs = (
        stored_pairs(model, dataset, config.split)
        if own
        else new_pairs(model.run, dataset, config.split)
    )
    measurement = run_measure(
        model.embedder, dataset, config, pairs=pairs, threshold=model.threshold, quiet=quiet
    )
    if own:
        keep(model, measurement)
    return measurement


def evaluate_frozen(
    embedder_config: EmbedderConfig,
    data: DataConfig,
    config: EvaluateConfig,
    device: torch.device,
    quiet: bool = False,
) -> Measurement:
    """Measures the pooled features of a backbone as it came: the floor that each method has to
    beat.
    """
    embedder = Embedder(embedder_config).to(device)
    dataset = open_dataset(data, progress=not quiet)
    return run_measure(embedder, dataset, config, frozen=True, quiet=quiet)


def run_measure(
    embedder: Embedder, dataset: Dataset, config: EvaluateConfig, quiet: bool, **more: Any
) -> Measurement:
    """`measure` with a progress bar where somebody looks at it."""
    with tqdm(unit="img", desc="embed", disable=quiet or None, dynamic_ncols=True) as bar:
        return measure(
            embedder, dataset, store_builder(embedder.image_size, quiet), config,
            progress=bar.update, **more,
        )  # fmt: skip


def store_builder(image_size: int, quiet: bool) -> Any:
    """What `measure` asks for: the decoded store of a list of files."""

    def build(paths: Sequence[Path]) -> Store:
        return build_store(paths, resize_side(image_size), progress=not quiet)

    return build


def new_pairs(run: Run, dataset: Dataset, split: str) -> Pairs | None:
    """Fresh pairs of a split, from the fixed seed and the untrained backbone; None where none can
    be formed.
    """
    labels_N = dataset.split_labels(split)
    if len(np.unique(labels_N)) < 2 or len(labels_N) == len(np.unique(labels_N)):
        return None
    paths = [dataset.paths[i] for i in dataset.splits[split]]
    store = build_store(paths, resize_side(run.embedder.image_size), progress=False)
    return frozen_pairs(
        Embedder(run.embedder, seed=run.train.seed), store, labels_N, seed=PAIR_SEED
    )


def stored_pairs(model: Model, dataset: Dataset, split: str) -> Pairs | None:
    """The run's pairs of a split; made and kept in RUN/pairs.json at the first evaluation of that
    split.
    """
    assert model.folder is not None
    path = model.folder.pairs
    kept = (
        {s: load_pairs(path, s, split_names(dataset, s)) for s in dataset.splits}
        if path.exists()
        else {}
    )
    if kept.get(split) is None:
        kept[split] = new_pairs(model.run, dataset, split)
        known: dict[str, tuple[Pairs, Sequence[str]]] = {
            s: (pairs, split_names(dataset, s)) for s, pairs in kept.items() if pairs is not None
        }
        save_pairs(path, known, seed=PAIR_SEED)
    return kept[split]


def keep(model: Model, measurement: Measurement) -> None:
    """Notes an evaluation of the run's own data in the RUN folder and in MLflow."""
    assert model.folder is not None
    split, folder = measurement.metrics["split"], model.folder
    numbers = {
        f"{split}/{k}": float(v) for k, v in measurement.metrics.items() if not isinstance(v, str)
    }
    last = folder.records()[-1] if folder.metrics.exists() else {"step": 0, "epoch": 0}
    FolderReporter(folder.path).report(last["step"], last["epoch"], numbers)
    retrieval_sheet(measurement_rows(measurement), folder.plots / f"retrieval_{split}.png")
    tracking.sync(folder.path)


# --- similar and search ---------------------------------------------------------------------------


def similar(model: Model, first: Path, second: Path) -> dict[str, Any]:
    """Cosine of two photographs, and whether that is above the frozen threshold."""
    a_D, b_D = embed_files(model.embedder, [first, second])
    cosine = float(a_D @ b_D)
    return {"similarity": cosine, "threshold": model.threshold, "same": cosine >= model.threshold}


def search(
    model: Model, query: Path, gallery: Path, top: int, sheet: Path | None, quiet: bool = False
) -> list[Neighbour]:
    """The `top` images of a folder (or of one folder a class) that are most like the query.

    Args:
        sheet: where a picture of query and neighbours is written.
    """
    dataset = gallery_of(gallery)
    store = build_store(dataset.paths, resize_side(model.embedder.image_size), progress=not quiet)
    with tqdm(total=len(store), unit="img", desc="embed", disable=quiet or None) as bar:
        gallery_GD = embed(model.embedder, store, progress=bar.update).astype(np.float64)
    query_D = embed_files(model.embedder, [query])[0]
    cosine_G = gallery_GD @ query_D
    itself = np.array([path.samefile(query) for path in dataset.paths])
    order = [g for g in np.argsort(-cosine_G, kind="stable") if not itself[g]][:top]
    found = [
        Neighbour(dataset.paths[g], dataset.classes[dataset.labels_N[g]], float(cosine_G[g]))
        for g in order
    ]
    if sheet is not None:
        retrieval_sheet([SheetRow(query, None, tuple(found))], sheet)
    return found


def gallery_of(folder: Path) -> Dataset:
    """Every image of a folder: Oxford's layout, one folder a class, or a flat folder of images."""
    if not folder.is_dir():
        raise UserError(f"--gallery {folder} is not a folder.")
    return open_all(folder)


def embed_files(embedder: Embedder, files: Sequence[Path]) -> NDArray[np.float64]:
    """Unit embeddings (N, D) of image files, with the evaluation transform.

    Raises:
        UserError: a file that is missing or not an image.
    """
    device = next(embedder.parameters()).device
    images = [torch.as_tensor(eval_image(file, embedder.image_size)) for file in files]
    with torch.inference_mode():
        emb_ND = embedder(torch.stack(images).to(device).float() / 255)
    return emb_ND.cpu().numpy().astype(np.float64)
