"""One training from the driver's side: prepares the RUN, starts 0..N workers, shows progress, keeps
MLflow fed.
"""

import os
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from flowerray.cluster.session import own_signals, ray_session, slots
from flowerray.cluster.trainer import make_trainer
from flowerray.cluster.worker import (
    build_method,
    pick_device,
    refuse_changed,
    split_store,
    start_weights,
    work,
)
from flowerray.data.batches import PKSampler
from flowerray.data.source import open_dataset
from flowerray.errors import UserError
from flowerray.files import only_driver, refuse_unwritable
from flowerray.robustness.guard import alarms
from flowerray.tracking import sync
from flowerray.training.checkpoint import trained_on
from flowerray.training.curves import plot_training
from flowerray.training.progress import DivergedError
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, NewRecords, RunDir

USER_ERROR = "user_error"
"""Key under which a worker hands an error back that a retry would only repeat."""


def fit(
    run: Run, out: Path, resume: bool = False, quiet: bool = False, parent: Path | None = None
) -> dict[str, Any]:
    """Trains a run into the folder `out`; returns the worker's summary.

    Args:
        resume: `out` holds an interrupted run that goes on; otherwise `out` must not exist.
        quiet: no progress line.
        parent: the folder whose MLflow run this one is shown under.

    Raises:
        UserError: bad data, options, folder or cluster; a diverged loss; another process that
            trains this RUN. The RUN stays resumable.
        KeyboardInterrupt: the user's; the RUN stays resumable.
    """
    folder = RunDir(out)
    if not resume:
        folder.refuse_existing()
        refuse_unwritable(folder.path)
    tags, total_steps = prepare(run, quiet, resume)
    if resume:
        folder.read()
        if (saved := folder.checkpoint()) is not None:
            refuse_changed(trained_on(saved), tags, run.data.root)
    else:
        folder.create(run.to_dict())
    with only_driver(folder.path):
        return drive(run, folder, tags, total_steps, quiet, parent)


def drive(
    run: Run,
    folder: RunDir,
    tags: dict[str, str],
    total_steps: int,
    quiet: bool,
    parent: Path | None,
) -> dict[str, Any]:
    """Trains a prepared run and notes in MLflow how it ended; see `fit`."""
    params = run.to_dict()
    sync.start(folder.path, folder.path.name, params, tags, parent=parent)
    with sync.noted_end(folder.path):
        with sync.LiveTracking(folder.path), Progress(folder, total_steps, quiet):
            if run.resources.workers == 0:
                device = pick_device(run.resources.device)
                summary = work(run, FolderReporter(folder.path), device)
            else:
                if not quiet:
                    workers = run.resources.workers
                    print(f"starting Ray with {workers} training worker(s) ...", file=sys.stderr)
                summary = fit_on_ray(run, folder)
        plot_training(folder, folder.plots / "training.png")
    return summary


def prepare(run: Run, quiet: bool = False, resume: bool = False) -> tuple[dict[str, str], int]:
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
            "official run that it follows with --from RUN, or --threshold."
        )
    if "val" not in dataset.splits and run.train.patience:
        raise UserError(
            f"--train.patience watches val, and protocol {dataset.protocol} has no val split: "
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
    trained_classes, targets_N = np.unique(dataset.split_labels("train"), return_inverse=True)
    config = run.train
    sampler = PKSampler(targets_N, config.classes_per_batch, config.images_per_class, config.seed)
    workers = max(1, run.resources.workers)
    batch = config.classes_per_batch * config.images_per_class
    if batch % workers:
        raise UserError(
            f"a batch of P x K = {batch} images cannot be shared equally by {workers} workers: "
            "change --train.classes-per-batch, --train.images-per-class or --resources.workers."
        )
    # A cluster's GPUs need not be on the driver's machine.
    no_gpus = "RAY_ADDRESS" not in os.environ and not torch.cuda.is_available()
    if not run.embedder.freeze_bn and workers > 1 and (run.resources.device == "cpu" or no_gpus):
        raise UserError(
            "--embedder.no-freeze-bn with several workers needs GPUs, since torch synchronises "
            "BatchNorm only there: use one worker, or freeze it."
        )
    if run.resources.device == "cuda" and "RAY_ADDRESS" not in os.environ:
        # Ray would wait for GPUs that never come; a cluster's may still be starting.
        if torch.cuda.device_count() < workers:
            raise UserError(
                f"--resources.device cuda: this machine has {torch.cuda.device_count()} GPUs that "
                f"torch can use, for {workers} workers; choose cpu, or fewer workers."
            )
    method = build_method(run, len(trained_classes))
    if not resume:  # which has its own weights
        start_weights(run, method, dataset, trained_classes)
    for split in ("train", "val"):
        if split in dataset.splits:
            split_store(dataset, split, run.embedder.image_size, progress=not quiet)
    return dataset.tags, sampler.steps * run.harden.passes(config.epochs)


def fit_on_ray(run: Run, folder: RunDir) -> dict[str, Any]:
    """Runs the workers under Ray Train; a worker that dies is replaced and goes on from the last
    checkpoint.
    """
    workers = run.resources.workers
    with ray_session(min_cpus=workers * max(1, run.resources.cpus_per_worker)) as ray:
        resources = ray.cluster_resources()
        gpus = resources.get("GPU", 0)
        alone = "RAY_ADDRESS" not in os.environ
        if alone:  # Ray also counts those that torch cannot use
            gpus = min(gpus, torch.cuda.device_count())
        use_gpu = run.resources.device == "cuda" or (
            run.resources.device == "auto" and gpus >= workers
        )
        if gpus and not use_gpu and run.resources.device == "auto":
            tqdm.write(
                f"training on the CPU: {workers} workers cannot share {gpus:g} GPU(s); "
                f"--resources.workers {int(gpus)} uses them.",
                file=sys.stderr,
            )
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        cpus = run.resources.cpus_per_worker
        blind = run.resources.device == "auto" and not resources.get("CPU")
        if not cpus or blind:  # with no node up nothing says which device it will have
            cpus = cpus_of_a_worker(nodes, workers, use_gpu)
        config = {
            "run": run.to_dict(), "folder": str(folder.path), "threads": cpus, "alone": alone
        }  # fmt: skip
        trainer = make_trainer(
            ray_worker, config, folder, workers=workers, cpus=cpus, use_gpu=use_gpu, alone=alone
        )
        try:
            with own_signals():
                summary = trainer.fit().return_value
        except SystemExit:  # what Ray makes of Ctrl-C
            raise KeyboardInterrupt from None
        except Exception as error:
            said = f"the training workers failed: {innermost(error)}"
            whole = folder.path / "error.txt"
            with suppress(OSError):
                whole.write_text("\n".join(traceback.format_exception(error)))
                said += f" (all of it: {whole})"
            raise UserError(said) from error
    if summary and USER_ERROR in summary:
        raise UserError(summary[USER_ERROR])
    assert isinstance(summary, dict)
    return summary


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
        "needs: --resources.device cuda (or cpu) --resources.cpus-per-worker N."
    )


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on each worker."""
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    kind = FolderReporter if config["alone"] else RayReporter  # a Ray of our own has no dashboard
    reporter = kind(Path(config["folder"]), context.get_world_rank(), context.get_world_size())
    try:
        return work(Run.from_dict(config["run"]), reporter, get_device())
    except UserError as error:  # it would come again, so it is no failure that Ray should retry
        # Every rank sees the same loss; of another fault the others know nothing, and would wait.
        if isinstance(error, DivergedError) or reporter.world == 1:
            return {USER_ERROR: str(error)}
        raise


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


def innermost(error: BaseException) -> str:
    """One line of the worker's own error, out of Ray's wrappers."""
    failures = list(getattr(error, "worker_failures", {}).values())
    told = [_said(failure) for failure in failures or [error]]
    # Where one of several workers dies, the others lose their connection to it.
    return next((line for line in told if "onnection" not in line), told[0])


def _said(error: BaseException) -> str:
    """The first line of an error's message. Ray hands over the whole traceback as the message:
    there it is the line after the last frame, of which only the frames are indented.
    """
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    frames = [i for i, line in enumerate(lines) if line.startswith("  File ")]
    if frames:
        lines = [line for line in lines[frames[-1] :] if not line.startswith(" ")]
    return lines[0].strip() if lines else type(error).__name__


class Progress:
    """Shows a training's metrics.jsonl as it grows, alike wherever the workers run.

    On a terminal a live line; elsewhere, so that a log stays readable, one line an epoch.
    """

    def __init__(self, folder: RunDir, total_steps: int, quiet: bool) -> None:
        self.quiet = quiet
        live = sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=total_steps, unit="step", disable=not live, dynamic_ncols=True)
        self.new_records = NewRecords(folder)
        self.new_records()  # what an earlier sitting showed
        self.shown: dict[str, float] = {}
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self._follow, name="progress", daemon=True)

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *exception: object) -> None:
        self.stop.set()
        self.thread.join()
        self.bar.close()

    def _follow(self) -> None:
        while not self.stop.wait(1.0):
            self._show()
        self._show()

    def _show(self) -> None:
        for record in self.new_records():
            self.bar.n = record["step"]
            self.shown |= record["metrics"]
            for alarm in alarms(record["metrics"]):
                self.bar.write(f"warning: {alarm}", file=sys.stderr)
            if "epoch/seconds" in record["metrics"] and self.bar.disable and not self.quiet:
                line = brief_metrics(record["metrics"], "epoch/")
                print(f"epoch {record['epoch']}  {line}", file=sys.stderr, flush=True)
        if not self.bar.disable:
            self.bar.set_postfix_str(brief_metrics(self.shown, "train/"))


def brief_metrics(metrics: dict[str, float], kind: str) -> str:
    """The few numbers that tell how a training goes."""
    labels = {
        "loss": f"{kind}loss",
        "val MAP@R": "val/map_at_r",
        "val R@1": "val/recall_at_1",
        "adversarial": "val/adversarial_recall_at_1",
        "img/s": "train/images_per_second",
        "s": "epoch/seconds",
    }
    return ", ".join(f"{k} {metrics[name]:.3g}" for k, name in labels.items() if name in metrics)
