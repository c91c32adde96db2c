"""What one training worker does: assembles the parts of a Run, trains, and (rank 0) exports the
result.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from timm.layers import convert_sync_batchnorm
from tqdm import tqdm

from flowerray import methods
from flowerray.data.dataset import Dataset
from flowerray.data.images import resize_side
from flowerray.data.resident import resident
from flowerray.data.source import open_dataset
from flowerray.data.store import Store, build_store
from flowerray.errors import UserError
from flowerray.files import write_json
from flowerray.gpu import check, fault, why_none
from flowerray.memory import keep_freed_memory
from flowerray.methods._base import Method
from flowerray.model.embedder import Embedder, Head, projected, start_from_pca
from flowerray.model.modes import deterministic, own_draws
from flowerray.retrieval.embed import embed, embed_together, kept_embeddings
from flowerray.retrieval.measure import frozen_pairs, split_names, validation_metrics
from flowerray.retrieval.pairs import (
    PAIR_SEED,
    calibrate,
    fit_threshold,
    pair_cosines,
    save_pairs,
)
from flowerray.retrieval.views import Views, kept_views
from flowerray.robustness.guard import guard
from flowerray.training import checkpoint
from flowerray.training.loop import Data, Result, train
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir

TOLD = ("epochs", "steps", "images", "seconds", "val_map_at_r", "precision")
"""Of a summary, what thresholds.json keeps of the training."""


def split_store(dataset: Dataset, split: str, image_size: int, progress: bool = False) -> Store:
    """The decoded store of a split, built on this node if it is not there."""
    paths = [dataset.paths[i] for i in dataset.splits[split]]
    return build_store(paths, resize_side(image_size), progress=progress)


def split_stores(run: Run, dataset: Dataset, progress: bool = False) -> dict[str, Store]:
    """Those that a run trains on: train and, where there is one, val."""
    splits = [split for split in ("train", "val") if split in dataset.splits]
    return {s: split_store(dataset, s, run.embedder.image_size, progress) for s in splits}


def trained_classes(dataset: Dataset) -> tuple[tuple[str, ...], NDArray[np.int64]]:
    """Names of the classes that are trained, and (N,) the training images' places among them."""
    classes_C, targets_N = np.unique(dataset.split_labels("train"), return_inverse=True)
    return tuple(dataset.classes[c] for c in classes_C), targets_N


def build_method(
    run: Run, num_classes: int, embedder: Embedder | None = None
) -> tuple[Method, Embedder]:
    """The module that trains, from the run's seed, and its embedder, of which it may hold the head
    alone; with an `embedder` that was built of the same run, that one.
    """
    file = methods.get(run.method_name)
    with own_draws():
        torch.default_generator.manual_seed(run.train.seed)  # the loss's own parameters
        embedder = embedder or Embedder(run.embedder, seed=run.train.seed)
        own = Head(embedder) if run.embedder.train == "head" else embedder
        return file.method(run.method, own, num_classes), embedder


def noted(run: Run, dataset: Dataset) -> dict[str, Any]:
    """What checkpoints and exports say of their training: its options, and what it was trained
    on.
    """
    return {**run.to_dict(), "dataset": dataset.tags["dataset/fingerprint"]}


def refuse_changed(known: str | None, tags: Mapping[str, str], root: Path | None) -> None:
    """Refuses to go on with another data set than the one that a training began with.

    Args:
        known: that one's fingerprint; None: nothing was trained yet.
        tags: of the data set as it is now.
        root: where it lies; None: the rendered set.

    Raises:
        UserError: its files, labels or splits are others; images that trained could validate.
    """
    if known not in (None, tags["dataset/fingerprint"]):
        raise UserError(
            f"{root or 'The rendered set'} holds other files, classes or splits than when this "
            "training began: images that trained would now validate or test. Put back what was "
            "there, or begin anew."
        )


def tell_replaced(saved: Path, run: Run) -> None:
    """Says where photographs have other content than when the training of a checkpoint began."""
    dataset = open_dataset(run.data, progress=False)
    now = [store.fingerprint for store in split_stores(run, dataset).values()]
    if checkpoint.noted(saved).get("photographs", now) != now:
        print(
            f"photographs in {dataset.root} were replaced under their old names since this "
            "training began: it goes on with those that are there now, and does not end as if it "
            "had been left alone.",
            file=sys.stderr,
        )


def train_worker(run: Run, reporter: FolderReporter, device: torch.device) -> dict[str, Any]:
    """Trains one run as one of `reporter.world` workers; returns a summary as plain data.

    Every draw is seeded by the run, and the global generators of this process (torch's on CPU and
    GPUs, NumPy's, Python's) are afterwards as they were: a training in somebody's own program.

    Raises:
        UserError: see `train.train`; bad data.
    """
    keep_freed_memory()
    check(device)
    try:
        return _train(run, reporter, device)
    except torch.OutOfMemoryError as error:
        raise UserError(fault(error, too_large(run)) or "") from error
    finally:
        reporter.wait()


def _train(run: Run, reporter: FolderReporter, device: torch.device) -> dict[str, Any]:
    saved, head = reporter.restore(), run.embedder.train == "head"
    dataset = open_dataset(run.data, progress=False)
    classes, targets_N = trained_classes(dataset)
    stores = split_stores(run, dataset)
    seen = np.unique(np.concatenate([store.checks_N for store in stores.values()]))
    photographs = [store.fingerprint for store in stores.values()]
    method, embedder = build_method(run, len(classes))
    if run.init is not None and (saved is None or head):  # a head's checkpoint has no backbone
        checkpoint.initialise(method, embedder, run.init, classes)
    if saved is not None:
        refuse_changed(checkpoint.trained_on(saved), dataset.tags, dataset.root)
    method, embedder = method.to(device), embedder.to(device)
    kept = None
    if head:
        kept = keep_features(run, embedder, dataset)
        if run.embedder.start == "pca" and saved is None:
            start_from_pca(embedder.projection, torch.from_numpy(kept.views_NVF[:, 0]))
        data = head_data(kept, embedder)
    else:
        stores = {split: resident(store, device) for split, store in stores.items()}
        data = Data(stores["train"], targets_N, validation(run, dataset, stores))
        if not run.embedder.freeze_bn and reporter.world > 1:
            method = convert_sync_batchnorm(method)
    facts = noted(run, dataset) | {"photographs": photographs}
    with deterministic(run.train.deterministic):
        result = train(run.train, run.augment, run.harden, method, data, reporter, facts)
    if reporter.rank != 0:
        return {}
    return finish(
        run, reporter.dir, method, embedder, dataset, stores.get("val"), kept and kept.val_QF,
        result, seen,
    )  # fmt: skip


def too_large(run: Run) -> str:
    """What to do where a GPU does not hold a training's step."""
    train, size = run.train, run.embedder.image_size
    p, k = train.classes_per_batch, train.images_per_class
    return (
        f"a batch of P x K = {p} x {k} = {p * k} images of {size} px with {run.embedder.backbone} "
        "does not fit; lower `train.classes_per_batch` or `train.images_per_class`, or choose "
        "`train.precision` bf16, a smaller `embedder.image_size` or another backbone"
    )


Embedded = tuple[NDArray[np.float32], NDArray[np.int64]]
"""Embeddings, and their classes."""


def searched(
    dataset: Dataset, embed_split: Callable[[str], NDArray[np.float32]]
) -> tuple[NDArray[np.float32], NDArray[np.int64], Embedded | None]:
    """Val's embeddings and classes, and the gallery that it is searched in; None: val itself."""
    gallery = None
    if dataset.protocol != "disjoint":
        gallery = embed_split("train"), dataset.split_labels("train")
    return embed_split("val"), dataset.split_labels("val"), gallery


def validation(
    run: Run, dataset: Dataset, stores: Mapping[str, Store]
) -> Callable[[Embedder], dict[str, float]] | None:
    """What measures an embedder on val after each epoch; None where there is no val."""
    if "val" not in stores:
        return None

    def validate(embedder: Embedder) -> dict[str, float]:
        found = searched(dataset, lambda split: embed_together(embedder, stores[split]))
        metrics = validation_metrics(*found)
        if run.harden.on:
            metrics |= guard(run.harden, embedder, stores["val"], *found)
        return metrics

    return validate


class Kept(NamedTuple):
    """What a head is trained on and validated by: features of the embedder's backbone."""

    dataset: Dataset
    views_NVF: NDArray[np.float32]
    """Of the training images; the first view is the centre crop."""
    val_QF: NDArray[np.float32] | None
    """None where there is no val."""


def keep_features(run: Run, embedder: Embedder, dataset: Dataset, progress: bool = False) -> Kept:
    """What a head is trained on, computed where it is not kept yet.

    Args:
        embedder: on its device.
        progress: show how far it is.
    """
    stores, views = split_stores(run, dataset), run.data.views
    total = len(stores["train"]) * (1 + views) + len(stores.get("val", ()))
    bar = tqdm(total=total, unit="img", desc="features", disable=None if progress else True)
    with bar:
        views_NVF = kept_views(embedder, stores["train"], run.augment, views, progress=bar.update)
        val_QF = None
        if "val" in stores:
            val_QF = kept_embeddings(embedder, stores["val"], frozen=True, progress=bar.update)
    return Kept(dataset, views_NVF, val_QF)


def head_data(kept: Kept, embedder: Embedder) -> Data:
    """What the loop trains and validates a head with, on the projection's device."""
    device, dataset = embedder.projection.weight.device, kept.dataset
    validate = None
    if kept.val_QF is not None:
        features = {"train": kept.views_NVF[:, 0], "val": kept.val_QF}
        there = {split: torch.tensor(found, device=device) for split, found in features.items()}

        @torch.no_grad()
        def validate(head: Head) -> dict[str, float]:
            found = searched(dataset, lambda split: head(there[split]).float().cpu().numpy())
            return validation_metrics(*found)

    views = Views(kept.views_NVF, device)
    return Data(views, trained_classes(dataset)[1], validate, views.view)


def finish(
    run: Run,
    folder: RunDir,
    method: Method,
    embedder: Embedder,
    dataset: Dataset,
    val_store: Store | None,
    known_QF: NDArray[np.float32] | None,
    result: Result,
    seen: NDArray[np.uint32],
) -> dict[str, Any]:
    """Fits threshold and calibration on val, writes pairs.json and thresholds.json, exports the
    model; returns a summary.

    Args:
        known_QF: features of val, where they are kept.
        seen: checksums of the images of train and val, see `Store.checks_N`.
    """
    device = next(method.parameters()).device
    source = folder.newest(folder.best) if val_store is not None else folder.checkpoint()
    assert source is not None, "a finished training has saved a checkpoint"
    state = checkpoint.load_state(source, device)
    method.load_state_dict(state["method"])
    trained = state["average"] or checkpoint.split_state(method)[0]
    embedder.load_state_dict({**embedder.state_dict(), **trained})

    threshold, calibration = run.threshold, None
    if val_store is not None:
        untrained = Embedder(run.embedder, seed=run.train.seed).to(device)
        pairs = frozen_pairs(untrained, val_store, dataset.split_labels("val"))
        save_pairs(folder.pairs, {"val": (pairs, split_names(dataset, "val"))}, seed=PAIR_SEED)
        if known_QF is None:
            emb_ND = embed(embedder, val_store)
        else:
            features_QF = torch.from_numpy(known_QF).to(device)
            emb_ND = projected(embedder.projection, features_QF).detach().cpu().numpy()
        if threshold is None:
            threshold = fit_threshold(pair_cosines(emb_ND, pairs), pairs.same)
        calibration = calibrate(emb_ND, dataset.split_labels("val")).model_dump(mode="json")
    assert threshold is not None, "the driver refuses a run with neither val nor threshold"

    file = methods.get(run.method_name)
    kind = "robust" if run.harden.on else "best"
    model = folder.path / f"{kind}_model_{file.export_name}.pth"
    classes, _ = trained_classes(dataset)
    used = run.train.model_copy(update={"precision": result.precision})  # what auto came to
    facts = noted(run.model_copy(update={"train": used}), dataset)
    facts["calibration"], facts["seen"] = calibration, seen.astype(">u4").tobytes().hex()
    checkpoint.export(model, method, embedder.state_dict(), facts, threshold, classes)
    best = result.best if val_store is not None else None
    summary = {
        **result._asdict(),
        "model": str(model),
        "threshold": threshold,
        "best_epoch": result.best_epoch or result.epochs,
        "val_map_at_r": None if run.harden.on else best,
        "val_adversarial_recall_at_1": best if run.harden.on else None,
    }
    write_json(
        folder.thresholds,
        {
            "threshold": threshold,
            "fitted_on": "val" if run.threshold is None else "given",
            "calibration": calibration,
            "best_epoch": summary["best_epoch"],
            "training": {name: summary[name] for name in TOLD},
        },
    )
    return summary


def pick_device(device: str) -> torch.device:
    """The device of a training in this process.

    Raises:
        UserError: a GPU was asked for and there is none; this torch cannot use the one there is.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "`resources.device` cuda: this machine has no GPU that torch can use "
            f"({why_none()}); choose cpu."
        )
    use_gpu = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda:0" if use_gpu else "cpu")
    check(place)
    return place
