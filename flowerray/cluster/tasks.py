"""Several trainings at a time, each one worker: tasks of a Ray, or one after the other without it.

Every training is a RUN folder of its own; the driver prepares them, follows their metrics and
keeps MLflow fed.
"""

import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from flowerray import methods
from flowerray.cluster.fit import brief_metrics, fit, innermost, prepare
from flowerray.cluster.session import ray_session, require_gpus, slots
from flowerray.cluster.worker import pick_device, work
from flowerray.errors import UserError
from flowerray.pool import cores
from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training import checkpoint
from flowerray.training.curves import plot_training
from flowerray.training.progress import DivergedError
from flowerray.training.run import ResourcesConfig, Run, differences
from flowerray.training.rundir import FolderReporter, NewRecords, RunDir

POLL = 1.0
"""Seconds between two looks at what the trainings wrote."""
SYNC = 5.0
"""Seconds between two sendings to MLflow; six times as many after a failure."""


class Training(NamedTuple):
    """One of the trainings."""

    run: Run
    folder: RunDir
    steps: int
    """Of the whole training."""


class DivergedTrainingsError(UserError):
    """Some trainings diverged, as they would again; the others are finished."""

    def __init__(self, text: str, reasons: dict[Path, str]) -> None:
        super().__init__(text)
        self.reasons = reasons
        """By folder."""


def train_many(
    runs: Sequence[tuple[Run, Path]],
    *,
    cpus: float,
    gpus: float = 0,
    quiet: bool = False,
    parent: Path | None = None,
    in_process: bool = False,
) -> list[dict[str, Any]]:
    """Trains each run into its folder, as many at a time as the cluster has room for.

    A folder that holds the finished run is left alone, an unfinished one is continued. Without a
    cluster in `RAY_ADDRESS`, a single training, or trainings that need all cores each, run in this
    process one after the other.

    Args:
        runs: each run, and its RUN folder; `Run.resources` is replaced.
        cpus: cores (and threads) of each training; less than 1 shares a core.
        gpus: GPUs of each, in fractions where several share one; 0 = trains on the CPU.
        quiet: no progress.
        parent: the folder whose MLflow run the trainings are shown under.
        in_process: never start Ray.

    Returns:
        For each run, in the order given: `folder`, `model` (file), `threshold`, `best_epoch`,
        `val_map_at_r` (None without val), `epochs`, `steps`, `images` (trained), `seconds`,
        `precision`.

    Raises:
        DivergedTrainingsError: at the end, where trainings diverged and none failed otherwise.
        UserError: at the end, where trainings failed: their folders and reasons; before, where a
            folder holds another run or there are too few GPUs. Whatever else was asked for is
            finished then.
        KeyboardInterrupt: the user's; every RUN stays resumable.
    """
    threads = max(1, int(cpus))
    device = "cuda" if gpus else "cpu"
    resources = ResourcesConfig(workers=0, cpus_per_worker=threads, device=device)
    todo: list[tuple[Run, RunDir]] = []
    folders = [RunDir(path) for _, path in runs]
    assert len({folder.path for folder in folders}) == len(folders), "a folder for each run"
    for (run, _), folder in zip(runs, folders, strict=True):
        refuse_another(run, folder)
        if not folder.finished:
            todo.append((run.model_copy(update={"resources": resources}), folder))
        elif State.read(folder.path).finished != "FINISHED":
            close(folder)  # it was trained, and the driver died before it could say so
    if todo:
        require_gpus(gpus)
    if len(todo) < len(runs) and not quiet:
        print(f"{len(runs) - len(todo)} of {len(runs)} trainings are finished", file=sys.stderr)

    local = "RAY_ADDRESS" not in os.environ
    if in_process or (local and (len(todo) <= 1 or cpus >= cores())):
        failures = one_by_one(todo, threads, quiet, parent)
    else:
        failures = on_ray(todo, cpus, gpus, quiet, parent)
    reasons = {path: innermost(error) for path, error in failures.items()}
    if failures:
        text = (
            f"{len(failures)} of {len(runs)} trainings failed, and the command with --resume tries "
            f"them again: {reasons_of(reasons)}."
        )
        if all(isinstance(error, DivergedError) for error in failures.values()):
            raise DivergedTrainingsError(text, reasons)
        raise UserError(text)
    return [summary(run, folder) for (run, _), folder in zip(runs, folders, strict=True)]


def reasons_of(reasons: dict[Path, str]) -> str:
    """Each reason once, with the first of its folders and how many more there are."""
    by_reason: dict[str, list[Path]] = {}
    for path, why in reasons.items():
        by_reason.setdefault(why.rstrip("."), []).append(path)
    return "; ".join(
        f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)} ({why})"
        for why, paths in by_reason.items()
    )


def refuse_another(run: Run, folder: RunDir) -> None:
    """Raises UserError where the folder is there and is no RUN, or one with other options."""
    if not folder.path.exists():
        return
    changed = differences(Run.from_dict(folder.read()), run)
    if changed:
        raise UserError(
            f"{folder.path} holds a run with other options ({', '.join(changed)} differ): "
            "choose another --out."
        )


def close(folder: RunDir) -> None:
    """Draws the curves of a finished training and ends it in MLflow."""
    plot_training(folder, folder.plots / "training.png")
    sync.finish(folder.path)


def summary(run: Run, folder: RunDir) -> dict[str, Any]:
    """What a finished RUN says of its training; see `train_many`."""
    last = folder.checkpoint()
    assert last is not None, "a finished training has saved a checkpoint"
    state = checkpoint.load_state(last, torch.device("cpu"))
    progress = state["progress"]
    map_at_r = progress["best_map_at_r"]
    found = folder.outcome()
    name = methods.get(run.method_name).export_name
    return {
        "folder": str(folder.path),
        "model": str(next(folder.path.glob(f"*_model_{name}.pth"))),
        "threshold": found["threshold"],
        "best_epoch": found["best_epoch"],
        "val_map_at_r": map_at_r if math.isfinite(map_at_r) else None,
        "epochs": progress["epoch"],
        "steps": progress["step"],
        "images": progress["step"] * run.train.classes_per_batch * run.train.images_per_class,
        "seconds": progress["seconds"],
        "precision": state.get("precision"),
    }


def one_by_one(
    todo: Sequence[tuple[Run, RunDir]], threads: int, quiet: bool, parent: Path | None
) -> dict[Path, Exception]:
    """Trains in this process; returns each failure by folder."""
    failures: dict[Path, Exception] = {}
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for number, (run, folder) in enumerate(todo, start=1):
            if not quiet:
                print(f"training {number} of {len(todo)}: {folder.path}", file=sys.stderr)
            try:
                fit(run, folder.path, resume=folder.path.exists(), quiet=quiet, parent=parent)
            except Exception as error:  # of any kind: the others are trained all the same
                failures[folder.path] = error
    finally:
        torch.set_num_threads(before)
    return failures


def on_ray(
    todo: Sequence[tuple[Run, RunDir]], cpus: float, gpus: float, quiet: bool, parent: Path | None
) -> dict[Path, Exception]:
    """Trains as tasks of a Ray; returns each failure by folder."""
    failures: dict[Path, Exception] = {}
    trainings: list[Training] = []
    for run, folder in todo:
        try:
            tags, steps = prepare(run, quiet)
        except UserError as error:
            failures[folder.path] = error
            continue
        if not folder.path.exists():
            folder.create(run.to_dict())
        sync.start(folder.path, folder.path.name, run.to_dict(), tags, parent=parent)
        trainings.append(Training(run, folder, steps))
    if not trainings:
        return failures
    if not quiet:
        print(
            f"starting Ray for {len(trainings)} trainings of {cpus:g} CPUs and {gpus:g} GPUs each",
            file=sys.stderr,
        )
    sync.prepare(trainings[0].folder.path)
    board = Board(trainings, quiet)
    with ray_session(min_cpus=math.ceil(cpus)) as ray:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if not quiet and not slots(nodes, cpus, gpus):
            print("no node that is up has so much: waiting for the cluster to grow ...",
                  file=sys.stderr)  # fmt: skip
        task = ray.remote(train_one).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)
        running = {
            task.remote(t.run.to_dict(), str(t.folder.path), t.run.resources.cpus_per_worker): t
            for t in trainings
        }
        try:
            while running:
                done, _ = ray.wait(list(running), timeout=POLL)
                for reference in done:
                    training, why = running[reference], None
                    try:
                        ray.get(reference)
                        close(training.folder)
                    except Exception as error:  # of any kind: the others go on
                        failures[training.folder.path], why = error, innermost(error)
                        sync.finish(training.folder.path, "FAILED", why)
                    del running[reference]
                    board.ended(training, why)
                board.look()
        finally:
            board.close()
            for reference in running:
                ray.cancel(reference, force=True)
            for training in running.values():
                if training.folder.metrics.exists():
                    sync.finish(training.folder.path, "KILLED", "interrupted")
    return failures


def train_one(content: dict[str, Any], folder: str, threads: int) -> None:
    """The task: one training, continued where an earlier try of it stopped."""
    torch.set_num_threads(threads)
    run = Run.from_dict(content)
    work(run, FolderReporter(Path(folder)), pick_device(run.resources.device))


class Board:
    """Shows how far the trainings are and sends their metrics to MLflow.

    On a terminal one live line; elsewhere a line for each training that ends.
    """

    def __init__(self, trainings: Sequence[Training], quiet: bool) -> None:
        self.trainings = trainings
        self.quiet = quiet
        self.going = {t.folder.path: t for t in trainings}
        self.new_records = {t.folder.path: NewRecords(t.folder) for t in trainings}
        self.steps: dict[Path, int] = {}
        self.steps_ended = 0
        self.sizes: dict[Path, int] = {}
        self.next_sync = 0.0
        live = sys.stderr.isatty() and not quiet
        total = sum(t.steps for t in trainings)
        self.bar = tqdm(total=total, unit="step", disable=not live, dynamic_ncols=True)

    def look(self) -> None:
        """Moves the bar; from time to time sends what is new."""
        if not self.bar.disable:
            for path in self.going:
                for record in self.new_records[path]():
                    self.steps[path] = record["step"]
            self.bar.n = self.steps_ended + sum(self.steps.get(path, 0) for path in self.going)
            over = len(self.trainings) - len(self.going)
            self.bar.set_postfix_str(f"{over} of {len(self.trainings)} trainings ended")
        if time.monotonic() >= self.next_sync:
            sent = [sync.send(path) for path in self._grown()]
            self.next_sync = time.monotonic() + (SYNC if all(sent) else 6 * SYNC)

    def ended(self, training: Training, failure: str | None) -> None:
        """Notes that a training is over."""
        del self.going[training.folder.path]
        self.steps_ended += training.steps
        if self.bar.disable and not self.quiet:
            metrics: dict[str, float] = {}
            for record in training.folder.records():
                metrics |= record["metrics"]
            number = f"{len(self.trainings) - len(self.going)} of {len(self.trainings)}"
            reached = {n: v for n, v in metrics.items() if n.startswith("val/")} or metrics
            text = f"failed: {failure}" if failure else brief_metrics(reached, "epoch/")
            print(f"{number}  {training.folder.path.name}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leaves the last line standing."""
        self.bar.close()

    def _grown(self) -> list[Path]:
        """Folders whose metrics grew since the last look; one that waits has none."""
        grown = []
        for path, training in self.going.items():
            metrics = training.folder.metrics
            size = metrics.stat().st_size if metrics.exists() else 0
            if size != self.sizes.get(path, 0):
                self.sizes[path] = size
                grown.append(path)
        return grown
