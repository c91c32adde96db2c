"""One training from the driver's side: prepares the RUN, starts 0..N workers, and watches them."""

import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowerray.cluster.session import nodes_of, on_cluster, own_signals, ray_session, slots
from flowerray.cluster.trainer import innermost, train_on_workers
from flowerray.cluster.watch import Watcher
from flowerray.cluster.worker import (
    build_method,
    keep_features,
    pick_device,
    refuse_changed,
    split_stores,
    tell_replaced,
    train_worker,
    trained_classes,
)
from flowerray.data.source import open_dataset, refuse_inside
from flowerray.errors import UserError
from flowerray.files import only_driver, refuse_unwritable
from flowerray.training import checkpoint
from flowerray.training.config import TrainConfig
from flowerray.training.curves import plot_training
from flowerray.training.loop import make_sampler, total_steps
from flowerray.training.optimizer import layer_shares
from flowerray.training.run import HEAD, Run, differences, own_defaults
from flowerray.training.rundir import FolderReporter, RunDir

MANY_REPEATS = 5
"""Times K that an epoch may show an image without a warning."""


def train_run(run: Run, out: Path, resume: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Trains a run into the folder `out`; returns the worker's summary.

    Args:
        resume: `out` holds an interrupted run that goes on; otherwise `out` must not exist.
        quiet: no progress line.

    Raises:
        UserError: bad data, options, folder or cluster; a diverged loss; another process that
            trains this RUN. The RUN stays resumable.
        KeyboardInterrupt: the user's; the RUN stays resumable.
    """
    folder = RunDir(out)
    if not resume:
        folder.refuse_existing()
        refuse_unwritable(folder.path)
        refuse_inside(folder.path, run.data.root)
    tags, steps = check_run(run, quiet, resume)
    if resume:
        folder.read()
        if (saved := folder.checkpoint()) is not None:
            refuse_changed(checkpoint.trained_on(saved), tags, run.data.root)
            tell_replaced(saved, run)
    else:
        folder.create(run.to_dict())
    with only_driver(folder.path), Watcher(quiet) as watcher:
        with watcher.running(folder, run.to_dict(), tags, steps=steps):
            # One worker gains nothing from a Ray of its own that takes longer than its training.
            head = run.embedder.train == "head" and run.resources.workers == 1
            if run.resources.workers == 0 or (head and not on_cluster()):
                device = pick_device(run.resources.device)
                summary = train_worker(run, FolderReporter(folder.path), device)
            else:
                workers = run.resources.workers
                watcher.say(f"starting Ray with {workers} training worker(s) ...")
                summary = train_on_ray(run, folder, watcher)
            plot_training(folder, folder.plots / "training.png")
    return summary


def head_first(run: Run, out: Path, resume: bool = False, quiet: bool = False) -> Run:
    """Where `init` is "head": the run that begins at a head of its method, data, batches and seed,
    trained beside `out` unless it is there.

    Raises:
        UserError: see `train_run`; a head of other options is there, or `run` is a head itself.
    """
    if run.init != HEAD:
        return run
    if run.embedder.train == "head":
        raise UserError("`init` head comes before a training of `all`: leave it out for a head.")
    if not resume:
        RunDir(out).refuse_existing()
    embedder, asked = run.embedder.model_copy(update={"train": "head"}), run.train
    batches = TrainConfig(
        seed=asked.seed, classes_per_batch=asked.classes_per_batch,
        images_per_class=asked.images_per_class,
    )  # fmt: skip
    head = Run(
        method=run.method, data=run.data, embedder=embedder, augment=run.augment,
        train=own_defaults(batches, run.method_name, embedder), threshold=run.threshold,
        resources=run.resources,
    )  # fmt: skip
    folder = RunDir(out.with_name(f"{out.name}-head"))
    begun = folder.run_json.exists()
    if begun and (changed := differences(Run.from_dict(folder.read()), head)):
        raise UserError(
            f"{folder.path} is a head of other options ({', '.join(changed)}): remove it, or "
            "choose another `out`."
        )
    if not folder.finished:
        train_run(head, folder.path, resume=begun, quiet=quiet)
    return run.model_copy(update={"init": folder.path})


def check_run(run: Run, quiet: bool = False, resume: bool = False) -> tuple[dict[str, str], int]:
    """Builds the decoded stores on this node and finds the configuration's faults before a cluster
    starts.

    Returns:
        The data set's tags and the number of steps of the whole run.

    Raises:
        UserError: bad data, backbone, weights, or a batch that does not fit.
    """
    dataset = open_dataset(run.data, progress=not quiet)
    if "val" not in dataset.splits and run.threshold is None:
        raise UserError(
            f"protocol {dataset.protocol} has no val split to fit the pair threshold on: give the "
            "official run that it follows with `from` RUN, or `threshold`."
        )
    if "val" not in dataset.splits and run.train.patience:
        raise UserError(
            f"`train.patience` watches val, and protocol {dataset.protocol} has no val split: "
            "leave it out."
        )
    if "val" in dataset.splits and np.bincount(dataset.split_labels("val")).max() < 2:
        raise UserError(
            f"the val split of {dataset.root} has one image of each class, so no pair of the same "
            "class can be formed to fit the threshold: give it two or more."
        )
    if "val" in dataset.splits and len(np.unique(dataset.split_labels("val"))) < 2:
        raise UserError(
            f"the val split of {dataset.root} has a single class, in which every search is right: "
            f"protocol {dataset.protocol} needs more classes (disjoint 8)."
        )
    classes, targets_N = trained_classes(dataset)
    config = run.train
    sampler = make_sampler(config, targets_N)
    if sampler.repeats > MANY_REPEATS * config.images_per_class and not quiet:
        print(
            "warning: the classes are very unequal: an epoch shows each image of some class about "
            f"{sampler.repeats:.0f} times, to fill batches of {sampler.p} classes; "
            "--train.max-repeats 20 bounds that.",
            file=sys.stderr,
        )
    workers = max(1, run.resources.workers)
    batch = config.classes_per_batch * config.images_per_class
    if batch % workers:
        raise UserError(
            f"a batch of P x K = {batch} images cannot be shared equally by {workers} workers: "
            "change `train.classes_per_batch`, `train.images_per_class` or `resources.workers`."
        )
    # A cluster's GPUs need not be on the driver's machine.
    no_gpus = not on_cluster() and not torch.cuda.is_available()
    if not run.embedder.freeze_bn and workers > 1 and (run.resources.device == "cpu" or no_gpus):
        raise UserError(
            "`embedder.freeze_bn` off with several workers needs GPUs, since torch synchronises "
            "BatchNorm only there: use one worker, or freeze it."
        )
    if run.resources.device == "cuda" and not on_cluster():
        # Ray would wait for GPUs that never come; a cluster's may still be starting.
        if torch.cuda.device_count() < workers:
            raise UserError(
                f"`resources.device` cuda: this machine has {torch.cuda.device_count()} GPUs that "
                f"torch can use, for {workers} workers; choose cpu, or fewer workers."
            )
    if run.embedder.train == "head" and run.harden.on:
        raise UserError(
            "`harden` changes pixels, and `embedder.train` head trains on kept features alone: "
            "train all of the embedder, with `init` where there is a head already."
        )
    if run.embedder.start == "pca" and run.embedder.train != "head":
        raise UserError("`embedder.start` pca needs the features that `embedder.train` head keeps.")
    if run.embedder.start == "pca" and run.init is not None:
        raise UserError("`init` brings a projection: leave `embedder.start` pca out.")
    method, embedder = build_method(run, len(classes))
    layer_shares(method.embedder, config.layer_decay)
    if run.init is not None and not resume:  # which has its own weights
        checkpoint.initialise(method, embedder, run.init, classes)
    split_stores(run, dataset, progress=not quiet)
    alone = run.resources.workers <= 1 and not on_cluster()
    if run.embedder.train == "head" and alone:
        keep_features(run, embedder.to(pick_device(run.resources.device)), dataset, not quiet)
    return dataset.tags, total_steps(config, run.harden, sampler)


def train_on_ray(run: Run, folder: RunDir, watcher: Watcher) -> dict[str, Any]:
    """Trains a run on workers of a Ray that is joined or started."""
    workers, asked = run.resources.workers, run.resources
    with ray_session(min_cpus=workers * max(1, asked.cpus_per_worker)) as ray:
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0)
        alone = not on_cluster()
        if alone:  # Ray also counts those that torch cannot use
            gpus = min(gpus, torch.cuda.device_count())
        use_gpu = asked.device == "cuda" or (asked.device == "auto" and gpus >= workers)
        if gpus and not use_gpu and asked.device == "auto":
            watcher.say(
                f"training on the CPU: {workers} workers cannot share {gpus:g} GPU(s); "
                f"--resources.workers {int(gpus)} uses them."
            )
        cpus = asked.cpus_per_worker
        blind = asked.device == "auto" and not resources.get("CPU")
        if not cpus or blind:  # with no node up nothing says which device it will have
            cpus = cpus_of_a_worker(nodes_of(ray), workers, use_gpu)
        kind = FolderReporter if alone else RayReporter  # a Ray of our own has no dashboard
        try:
            with own_signals():
                return train_on_workers(
                    run, folder, partial(kind, folder.path), cpus=cpus, use_gpu=use_gpu, alone=alone
                )
        except SystemExit:  # what Ray makes of Ctrl-C
            raise KeyboardInterrupt from None
        except UserError:
            raise
        except Exception as error:
            said = f"the training workers failed: {innermost(error)}"
            whole = folder.path / "error.txt"
            with suppress(OSError):
                whole.write_text("\n".join(traceback.format_exception(error)))
                said += f" (all of it: {whole})"
            raise UserError(said) from error


def cpus_of_a_worker(nodes: Sequence[Mapping[str, float]], workers: int, use_gpu: bool) -> int:
    """The most CPU cores that each of equal workers can have; none spans two nodes.

    Args:
        nodes: resources of those that are up.
        use_gpu: each worker takes a GPU too.

    Raises:
        UserError: the workers do not fit.
    """

    most = max((int(node.get("CPU", 0)) for node in nodes), default=0)
    for cpus in range(most, 0, -1):
        if slots(nodes, cpus, int(use_gpu)) >= workers:
            return cpus
    what = f"{workers} worker(s)" + (" with a GPU each" if use_gpu else "")
    raise UserError(
        f"the cluster has no room for {what} now; where it grows by itself, say what a worker "
        "needs: `resources.device` cuda (or cpu) `resources.cpus_per_worker` N."
    )


class RayReporter(FolderReporter):
    """Writes the RUN folder and tells Ray Train of each epoch, for its dashboard."""

    def report(
        self, step: int, epoch: int, metrics: dict[str, float], *args: Any, **more: Any
    ) -> None:
        """See `FolderReporter.report`."""
        super().report(step, epoch, metrics, *args, **more)
        if any(name.startswith("epoch/") for name in metrics):
            import ray.train

            ray.train.report({"step": step, "epoch": epoch, **metrics})
