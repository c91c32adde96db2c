"""A trial of a study, from the worker's side: the training of `flowerray train` in a RUN folder,
with a reporter that also tells Ray Tune. The driver wrote its run.json; a trial that starts again
goes on from its checkpoint.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from flowerray.cluster.fit import USER_ERROR, innermost
from flowerray.cluster.trainer import make_trainer
from flowerray.cluster.worker import pick_device, work
from flowerray.training.progress import DivergedError, merit
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir, Save

MAP_AT_R = "val/map_at_r"
ADVERSARIAL = "val/adversarial_recall_at_1"
WORST = 0.0
"""What a failed trial is told to have reached in each objective: finite, and below any other."""
FAILED = "failed"
"""Key of the reason in a failed trial's last report."""
FAULT = "fault"
"""Key that is True in the last report of a trial that failed through no fault of its configuration:
a full disk, a node without the shared folder, a hub that cannot be reached."""
OUT_OF_MEMORY = "out of memory"
COLLAPSED = 0.05
"""A training whose last epoch's `spread` (0..1) is below this has all embeddings in one place."""

Tell = Callable[[dict[str, Any]], None]
"""Takes a trial's standing: `epoch` and the objectives, or the reason of its failure."""


def history(folder: RunDir, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Where a trial stood after each epoch: `epoch`, and the objectives of its best checkpoint so
    far, which is the one that a RUN exports.

    Raises:
        DivergedError: the training does not report an objective, or not a finite one.
    """
    selection = Run.from_dict(folder.read()).harden.selection
    standings: list[dict[str, Any]] = []
    best: dict[str, float] | None = None
    for record in folder.records():
        metrics = record["metrics"]
        if "epoch/seconds" not in metrics:
            continue
        for name in objectives:
            if not math.isfinite(metrics.get(name, math.nan)):
                raise DivergedError(f"{folder.path} reports no finite {name}.")
        if best is None or merit(metrics, selection) > merit(best, selection):
            best = metrics
        values = {name: best[name] for name in objectives}
        standings.append({"epoch": record["epoch"], **values})
    return standings


class TrialReporter(FolderReporter):
    """Writes the RUN folder and tells where the trial stands after each epoch but the last, which
    counts once the model is exported.
    """

    def __init__(
        self,
        path: Path,
        tell: Tell,
        objectives: Sequence[str],
        epochs: int,
        scheduled: float,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        super().__init__(path, rank, world)
        self.tell = tell
        self.objectives = objectives
        self.epochs = epochs
        self.scheduled = scheduled
        """When the trial was scheduled, in seconds since 1970."""
        self.told_seconds = 0.0
        """Spent so far in telling."""

    def restore(self) -> Path | None:
        """See `FolderReporter.restore`; what follows in the loop is the first step, so a fresh
        trial notes what it cost to come here.
        """
        checkpoint = super().restore()
        if checkpoint is None:
            self.rewind(-1)  # an earlier try that was cut off before its first checkpoint
            super().report(0, 0, {"trial/start_seconds": time.time() - self.scheduled})
        return checkpoint

    def report(
        self,
        step: int,
        epoch: int,
        metrics: dict[str, float],
        save: Save | None = None,
        best: bool = False,
    ) -> None:
        """See `FolderReporter.report`."""
        ends_epoch = "epoch/seconds" in metrics
        if ends_epoch:
            metrics = {**metrics, "trial/report_seconds": self.told_seconds}
        super().report(step, epoch, metrics, save, best)
        if ends_epoch and epoch < self.epochs:
            started = time.perf_counter()
            self.tell(history(self.dir, self.objectives)[-1] if self.rank == 0 else {})
            self.told_seconds += time.perf_counter() - started


def trial(config: dict[str, Any]) -> None:
    """The function that Ray Tune runs for a trial of one worker.

    Args:
        config: `folder` of the RUN, `objectives`, `cpus`, `gpus`, and when it was `scheduled`.
    """
    from ray import tune

    folder = RunDir(Path(config["folder"]))

    def training() -> None:
        torch.set_num_threads(max(1, int(config["cpus"])))
        run = Run.from_dict(folder.read())
        reporter = TrialReporter(
            folder.path,
            tune.report,
            config["objectives"],
            run.harden.passes(run.train.epochs),
            config["scheduled"],
        )
        work(run, reporter, pick_device("cuda" if config["gpus"] else "cpu"))

    guarded(folder, config["objectives"], tune.report, training)


def guarded(
    folder: RunDir, objectives: Sequence[str], tell: Tell, training: Callable[[], object]
) -> None:
    """Trains, unless that is done, and tells the result; a failure of any kind is told as the worst
    value with its reason, since the search goes on, and as a fault where the configuration is not
    to blame.
    """
    try:
        if not folder.finished:
            training()
        refuse_collapse(folder)
        result = history(folder, objectives)[-1]
    except Exception as error:
        records = folder.records()
        epoch = records[-1]["epoch"] if records else 0
        result = {"epoch": epoch, **dict.fromkeys(objectives, WORST), FAILED: reason_of(error)}
        if not isinstance(error, DivergedError) and result[FAILED] != OUT_OF_MEMORY:
            result[FAULT] = True
    gc.collect()  # the next trial uses this process
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tell(result)


def refuse_collapse(folder: RunDir) -> None:
    """Raises DivergedError where a finished training ended with all embeddings in one place."""
    spread = folder.series("epoch/spread")
    if spread and spread[-1][1] < COLLAPSED:
        raise DivergedError(
            f"the embeddings collapsed: their spread ended at {spread[-1][1]:.3f} (0 = one point)"
        )


def reason_of(error: Exception) -> str:
    """One line for MLflow."""
    reason = innermost(error).rstrip(".")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OUT_OF_MEMORY
    known = ("not enough memory", "out of memory")  # of torch on the CPU; of a worker of several
    return OUT_OF_MEMORY if any(text in f"{error} {reason}" for text in known) else reason


def trial_of_workers(config: dict[str, Any]) -> None:
    """The function that Ray Tune runs for a trial of several workers: a Ray Train of its own.

    Args:
        config: as for `trial`, and the number of `workers`; `cpus` and `gpus` are of all together.
    """
    from ray import tune
    from ray.tune.integration.ray_train import TuneReportCallback

    folder = RunDir(Path(config["folder"]))
    workers = config["workers"]

    def training() -> None:
        trainer = make_trainer(
            trial_worker,
            config,
            folder,
            workers=workers,
            cpus=config["cpus"] / workers,
            use_gpu=bool(config["gpus"]),
            callbacks=(TuneReportCallback(),),
        )
        summary = trainer.fit().return_value
        if summary and USER_ERROR in summary:
            raise DivergedError(summary[USER_ERROR])

    guarded(folder, config["objectives"], tune.report, training)


def trial_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on each worker of a trial."""
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(max(1, int(config["cpus"] / config["workers"])))
    context = ray.train.get_context()
    run = Run.from_dict(RunDir(Path(config["folder"])).read())
    reporter = TrialReporter(
        Path(config["folder"]),
        ray.train.report,
        config["objectives"],
        run.harden.passes(run.train.epochs),
        config["scheduled"],
        context.get_world_rank(),
        context.get_world_size(),
    )
    try:
        return work(run, reporter, get_device())
    except DivergedError as error:  # every rank sees the same loss, so every rank returns
        return {USER_ERROR: str(error)}
