"""`evaluate`, `similar` and `search`; each returns plain data to print."""

import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flowerray.calibration import PRIOR
from flowerray.data.dataset import Dataset
from flowerray.data.folder import images
from flowerray.data.images import resize_side
from flowerray.data.listing import is_listing
from flowerray.data.source import DataConfig, open_all, open_dataset
from flowerray.data.store import build_store
from flowerray.errors import UserError
from flowerray.files import locked, write_json
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.opening import Model, embed, store_builder
from flowerray.retrieval.decisions import Decisions, judge, misfit, open_set
from flowerray.retrieval.embed import kept_embeddings
from flowerray.retrieval.floor import as_floor, as_numbers
from flowerray.retrieval.measure import (
    EvaluateConfig,
    Floor,
    Measurement,
    as_record,
    default_gallery,
    frozen_pairs,
    measure,
    split_names,
)
from flowerray.retrieval.neighbours import nearest_rows
from flowerray.retrieval.pairs import PAIR_SEED, Pairs, load_pairs, save_pairs
from flowerray.retrieval.pictures import (
    Neighbour,
    SheetRow,
    draw_reliability,
    measurement_rows,
    retrieval_sheet,
)
from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training.run import Run

MOST_DRAWN = 50
"""Neighbours in a picture."""


def evaluate_model(
    model: Model, data: DataConfig, whole: bool, config: EvaluateConfig, quiet: bool = False
) -> Measurement:
    """Measures a trained model, and its frozen floor on the same queries.

    Args:
        data: the run's own data, or another set.
        whole: take every image of the set as query and gallery.
    """
    if data == model.run.data:
        dataset, same = model.own_dataset(quiet, compared=True), True
    else:
        dataset = open_whole_or_split(data, whole, config.gallery, quiet)
        own_root = model.run.data.root
        moved = data == model.run.data.model_copy(update={"root": data.root})
        moved = moved and not whole and own_root is not None and not own_root.exists()
        same = moved and model.dataset == dataset.tags["dataset/fingerprint"]
        if not (whole or same):
            refuse_trained(model, data.root, dataset, config.split)
    own = same and model.folder is not None
    pairs = (stored_pairs if own else new_pairs)(model, dataset, config.split)
    threshold = model.threshold
    if config.far is not None:
        threshold = model.calibrated().threshold(config.far).cosine
    started = time.perf_counter()
    measurement = run_measure(
        model.embedder, dataset, config, pairs=pairs, threshold=threshold, quiet=quiet
    )
    measurement = replace(measurement, frozen=floor_of(model, dataset, config, quiet))
    measurement = with_decisions(measurement, model, pairs, threshold)
    if not same:
        measurement = with_seen(measurement, model)
    usual = config.gallery in (None, default_gallery(dataset, config.split))
    if own and usual and config.far is None:
        try:
            keep(model, measurement, dataset.root, time.perf_counter() - started)
        except (OSError, UserError) as error:  # a full disk, somebody else's RUN
            not_kept(model.name, error)
    return measurement


def with_decisions(
    measurement: Measurement, model: Model, pairs: Pairs | None, threshold: float
) -> Measurement:
    """A measurement with its decisions, and a warning where threshold or calibration do not fit."""
    emb, labels = measurement.query_emb, measurement.query_labels
    found = Decisions()
    with suppress(UserError):  # classes of one image have no pairs
        found = judge(emb, labels, pairs, threshold, model.calibration)
    if measurement.metrics["protocol"] == "disjoint":  # else no class is unknown to the model
        itself = measurement.gallery_paths is measurement.query_paths
        gallery = None if itself else (measurement.gallery_emb, measurement.gallery_labels)
        found = found.joined(open_set(emb, labels, gallery, threshold))
    if warning := misfit(found, threshold, model.calibration):
        print(warning, file=sys.stderr)
    metrics = measurement.metrics | found.metrics | ({"warning": warning} if warning else {})
    return replace(measurement, metrics=metrics, decisions=found)


def with_seen(measurement: Measurement, model: Model) -> Measurement:
    """A measurement on another set than the model's own, with the number of its queries that are
    images of the training all the same, and a warning of them.
    """
    if model.seen is None:
        return measurement
    store = store_builder(model.embedder.image_size, quiet=True)(measurement.query_paths)
    if seen := int(np.isin(store.checks_N, model.seen).sum()):
        print(
            f"{seen} of the {len(store)} queries are images that {model.name} was trained or "
            "chosen on, so that the figures are too good: take them out.",
            file=sys.stderr,
        )
    return replace(measurement, metrics=measurement.metrics | {"queries_seen_in_training": seen})


def not_kept(name: str, error: Exception) -> None:
    """Says that a result could not be written into the RUN; it is printed all the same."""
    cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
    print(f"measured, but not kept in {name}: {cause}", file=sys.stderr)


def refuse_trained(
    model: Model,
    root: Path | None,
    dataset: Dataset,
    split: str,
    advice: str = "leave out the --data options, which are the run's own then",
) -> None:
    """Refuses queries that the model was trained or chosen on, as other split options make them of
    its own set.

    Raises:
        UserError: how many there are.
    """
    if split not in dataset.splits or is_another_set(model, root):
        return
    if root is None or (model.run.data.root and root.resolve() == model.run.data.root.resolve()):
        model.own_dataset(quiet=True)  # its splits of today need not be those of its training
    own = open_dataset(model.run.data.model_copy(update={"root": dataset.given}))
    seen = {own.paths[i] for name in ("train", "val") for i in own.splits.get(name, ())}
    queries = dataset.splits[split]
    known = sum(dataset.paths[i] in seen for i in queries)
    if known:
        raise UserError(
            f"{known} of the {len(queries)} {split} queries are images that {model.name} was "
            f"trained or chosen on: {advice}."
        )


def floor_of(model: Model, dataset: Dataset, config: EvaluateConfig, quiet: bool) -> Floor | None:
    """What the model's backbone did before it was trained; None, with a line on standard error,
    where its first weights cannot be had or were random. The features are kept for the next model.
    """
    try:
        embedder = untrained(model.run).to(next(model.embedder.parameters()).device)
    except UserError as error:
        print(f"no frozen floor to compare with: {error}", file=sys.stderr)
        return None
    return as_floor(run_measure(embedder, dataset, config, quiet, frozen=True))


def untrained(run: Run) -> Embedder:
    """The run's backbone as it came, whatever the run started from.

    Raises:
        UserError: its weights cannot be had, or were random.
    """
    if run.embedder.weights == "none":
        raise UserError("its backbone began with random weights.")
    return Embedder(run.embedder, seed=run.train.seed)


def evaluate_frozen(
    embedder_config: EmbedderConfig,
    data: DataConfig,
    config: EvaluateConfig,
    device: torch.device,
    quiet: bool = False,
    whole: bool = False,
) -> Measurement:
    """Measures the pooled features of a backbone as it came: the floor that each method has to
    beat; `whole` as for `evaluate_model`.
    """
    embedder = Embedder(embedder_config).to(device)
    dataset = open_whole_or_split(data, whole, config.gallery, quiet)
    return run_measure(embedder, dataset, config, frozen=True, quiet=quiet)


def open_whole_or_split(data: DataConfig, whole: bool, gallery: str | None, quiet: bool) -> Dataset:
    """Every image of the set as one split, or the splits of its protocol.

    Raises:
        UserError: a whole set of one class that is searched in itself; see also the readers.
    """
    if not whole:
        return open_dataset(data, progress=not quiet)
    assert data.root is not None
    dataset = open_all(data.root)
    if dataset.kind == "folder" and (left := len(set(images(data.root)) - set(dataset.paths))):
        print(
            f"{left} images beside the class folders of {data.root} are left out", file=sys.stderr
        )
    if len(dataset.classes) == 1 and gallery in (None, "self"):
        raise UserError(
            f"{data.root} holds images of one class, so that any neighbour would be right: give "
            "the folder that holds one folder a class, or another `gallery`."
        )
    return dataset


def run_measure(
    embedder: Embedder, dataset: Dataset, config: EvaluateConfig, quiet: bool, **more: Any
) -> Measurement:
    """`measure` with a progress bar where somebody looks at it."""
    with tqdm(unit="img", desc="embed", disable=quiet or None, dynamic_ncols=True) as bar:
        return measure(
            embedder, dataset, store_builder(embedder.image_size, quiet), config,
            progress=bar.update, **more,
        )  # fmt: skip


def new_pairs(model: Model, dataset: Dataset, split: str) -> Pairs | None:
    """Fresh pairs of a split, from the fixed seed and the untrained backbone; None where none can
    be formed, or, with a warning, where that backbone's weights cannot be had.
    """
    if split not in dataset.splits:
        return None  # `measure` says so
    labels_N = dataset.split_labels(split)
    if len(np.unique(labels_N)) < 2 or len(labels_N) == len(np.unique(labels_N)):
        return None
    run = model.run
    try:
        untrained = Embedder(run.embedder, seed=run.train.seed)
    except UserError as error:
        print(f"no pair metrics: the untrained backbone picks the pairs. {error}", file=sys.stderr)
        return None
    paths = [dataset.paths[i] for i in dataset.splits[split]]
    store = build_store(paths, resize_side(run.embedder.image_size), progress=False)
    device = next(model.embedder.parameters()).device
    return frozen_pairs(untrained.to(device), store, labels_N)


def stored_pairs(model: Model, dataset: Dataset, split: str) -> Pairs | None:
    """The run's pairs of a split; made and kept in RUN/pairs.json at the first evaluation of that
    split.
    """
    assert model.folder is not None
    path = model.folder.pairs
    with locked(path):
        names = {s: split_names(dataset, s) for s in dataset.splits}
        kept = {s: load_pairs(path, s, names[s]) for s in names} if path.exists() else {}
        if kept.get(split) is None:
            kept[split] = new_pairs(model, dataset, split)
            known = {s: (pairs, names[s]) for s, pairs in kept.items() if pairs is not None}
            with suppress(OSError, UserError):  # `keep` says that the RUN cannot be written
                save_pairs(path, known, PAIR_SEED)
    return kept[split]


def keep(model: Model, measurement: Measurement, root: Path, seconds: float) -> None:
    """Notes an evaluation of the run's own data in the RUN folder and in MLflow."""
    assert model.folder is not None
    split, folder = measurement.metrics["split"], model.folder
    numbers = {
        f"{split}/{k}": float(v) for k, v in measurement.metrics.items() if not isinstance(v, str)
    }
    numbers |= {f"{split}/{name}": value for name, value in as_numbers(measurement).items()}
    record = as_record(measurement, root, seconds)
    write_json(folder.path / "evaluation" / f"{split}.json", record, indent=None)
    folder.note(numbers)
    retrieval_sheet(measurement_rows(measurement), folder.plots / f"retrieval_{split}.png")
    if bins := measurement.decisions.reliability:
        draw_reliability(bins, folder.plots / f"reliability_{split}.png")
    sync.send(folder.path)


def similar(
    model: Model,
    first: Path,
    second: Path,
    prior: float | None = None,
    far: float | None = None,
) -> dict[str, Any]:
    """Cosine of two photographs, whether it reaches the threshold, and the probability that they
    show one class.

    Args:
        prior: chance of one class beforehand; None: `PRIOR`.
        far: false-match rate of the threshold; None: the fitted threshold.

    Raises:
        UserError: `prior` or `far` for a model without calibration, or beyond what it tells.
    """
    at = None if far is None else model.calibrated().threshold(far)
    threshold = model.threshold if at is None else at.cosine
    model.probability(0.0, prior)  # refused before anything is embedded
    a_D, b_D = embed(model.embedder, [first, second]).double().numpy()
    cosine = float(a_D @ b_D)
    return {
        "similarity": cosine,
        "threshold": threshold,
        "same": cosine >= threshold,
        "probability": model.probability(cosine, prior),
        "prior": PRIOR if prior is None else prior,
        "far": None if at is None else at.model_dump(),
    }


def is_another_set(model: Model, root: Path | None) -> bool:
    """Whether a folder holds other photographs than the model was trained on: of those every image
    may be a query. The set of the training, given by another path or moved, is told by its files,
    labels and splits; where nothing says what those were, it is taken for that set.
    """
    own = model.run.data
    if root is None or (own.root is not None and root.resolve() == own.root.resolve()):
        return False
    known = model.dataset
    if known is None and model.folder is not None:
        known = State.read(model.folder.path).tags.get("dataset/fingerprint")
    try:
        if known is None and own.root is not None and own.root.exists():
            known = open_dataset(own).tags["dataset/fingerprint"]
        found = open_dataset(own.model_copy(update={"root": root})).tags
    except UserError:
        return True
    if known is None:
        return own.root is None and "dataset/synthetic" not in found
    return found["dataset/fingerprint"] != known


def search(
    model: Model,
    query: Path,
    gallery: Path,
    top: int,
    quiet: bool = False,
    prior: float | None = None,
) -> list[Neighbour]:
    """The `top` images of a folder (or of one folder a class) that are most like the query; `prior`
    as for `similar`.
    """
    model.probability(0.0, prior)  # refused before a gallery is embedded
    dataset = gallery_of(gallery)
    query_D = embed(model.embedder, [query])[0].double().numpy()  # first: a gallery takes its time
    store = build_store(dataset.paths, resize_side(model.embedder.image_size), progress=not quiet)
    with tqdm(total=len(store), unit="img", desc="embed", disable=quiet or None) as bar:
        gallery_GD = kept_embeddings(model.embedder, store, progress=bar.update)
    others = np.array([g for g, path in enumerate(dataset.paths) if not path.samefile(query)], int)
    rows, cosines = nearest_rows(gallery_GD[others], query_D, top)
    names, label_N = dataset.classes, dataset.labels_N
    return [
        Neighbour(dataset.paths[g], names[label_N[g]], c, model.probability(c, prior))
        for g, c in zip(others[rows].tolist(), cosines.tolist(), strict=True)
    ]


def draw_neighbours(query: Path, found: Sequence[Neighbour], sheet: Path) -> None:
    """Draws a query and its nearest neighbours, `MOST_DRAWN` at most."""
    retrieval_sheet([SheetRow(query, None, tuple(found[:MOST_DRAWN]))], sheet)


def gallery_of(folder: Path) -> Dataset:
    """Every image of a folder: Oxford's layout, one folder a class, or a flat folder of images; or
    of a table.
    """
    if not (folder.is_dir() or is_listing(folder)):
        raise UserError(f"`gallery` {folder} is neither a folder nor a table.")
    return open_all(folder, beside=True)
