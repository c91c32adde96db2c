"""A trial of a study, from the worker's side: the training of `flowerray train` in a RUN folder,
with a reporter that also tells Ray Tune. The driver wrote its run.json; a trial that starts again
goes on from its checkpoint.
"""

import gc
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowerray.cluster.trainer import innermost, train_on_workers
from flowerray.cluster.worker import pick_device, train_worker
from flowerray.training.loop import images_a_step
from flowerray.training.progress import DivergedError, merit
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, Record, RunDir

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


class Story(NamedTuple):
    """What a trial's RUN folder tells of it."""

    images: int
    """Drawn, repeats included."""
    standings: list[dict[str, Any]]
    """After each epoch, see `history`; none where an objective was not reported."""
    finished: bool


def story(folder: RunDir, objectives: Sequence[str]) -> Story:
    """Reads a trial's RUN folder."""
    run = Run.from_dict(folder.read())
    images = max((drawn(record, run) for record in folder.records()), default=0)
    try:
        standings = history(folder, objectives)
    except DivergedError:
        standings = []
    return Story(images, standings, folder.finished)


def history(folder: RunDir, objectives: Sequence[str]) -> list[dict[str, Any]]:
    """Where a trial stood after each epoch: `epoch`, `images` drawn, and the objectives of its best
    checkpoint so far, which is the one that a RUN exports.

    Raises:
        DivergedError: the training does not report an objective, or not a finite one.
    """
    run = Run.from_dict(folder.read())
    selection = run.harden.selection
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
        standings.append({"epoch": record["epoch"], "images": drawn(record, run), **values})
    return standings


def drawn(record: Record, run: Run) -> int:
    """Images that a training had drawn at a record, repeats included; older records do not say."""
    metrics = record["metrics"]
    known = metrics.get("train/images", metrics.get("epoch/images"))
    return int(record["step"] * images_a_step(run.train, run.harden) if known is None else known)


class TrialReporter(FolderReporter):
    """Writes the RUN folder and tells where the trial stands after each epoch but the last, which
    counts once the model is exported.
    """

    def __init__(self, config: dict[str, Any], tell: Tell, rank: int = 0, world: int = 1) -> None:
        """Of `trial`'s configuration."""
        super().__init__(Path(config["folder"]), rank, world)
        self.config, self.tell = config, tell
        self.told_seconds = 0.0
        """Spent so far in telling."""

    def restore(self) -> Path | None:
        """See `FolderReporter.restore`; what follows in the loop is the first step, so a fresh
        trial notes what it cost to come here.
        """
        checkpoint = super().restore()
        if checkpoint is None:
            self.rewind(-1)  # an earlier try that was cut off before its first checkpoint
            super().report(0, 0, {"trial/start_seconds": time.time() - self.config["scheduled"]})
        return checkpoint

    def report(
        self, step: int, epoch: int, metrics: dict[str, float], *args: Any, **more: Any
    ) -> None:
        """See `FolderReporter.report`."""
        ends_epoch = "epoch/seconds" in metrics
        if ends_epoch:
            metrics = {**metrics, "trial/report_seconds": self.told_seconds}
        super().report(step, epoch, metrics, *args, **more)
        if ends_epoch and epoch < self.config["epochs"]:
            started = time.perf_counter()
            objectives = self.config["objectives"]
            self.tell(history(self.dir, objectives)[-1] if self.rank == 0 else {})
            self.told_seconds += time.perf_counter() - started


def trial(config: dict[str, Any]) -> None:
    """The function that Ray Tune runs for a trial.

    Args:
        config: `folder` of the RUN, `objectives`, `epochs` of the whole training, `cpus` and `gpus`
            of all workers together, their number (`workers`), and when it was `scheduled`, in
            seconds since 1970.
    """
    from ray import tune

    folder, workers = RunDir(Path(config["folder"])), config["workers"]
    reporter = partial(TrialReporter, config, _tell_train if workers > 1 else tune.report)

    def training() -> None:
        run = Run.from_dict(folder.read())
        if workers > 1:
            from ray.tune.integration.ray_train import TuneReportCallback

            resources = run.resources.model_copy(update={"workers": workers})
            run = run.model_copy(update={"resources": resources})
            train_on_workers(
                run, folder, reporter, cpus=config["cpus"] / workers,
                use_gpu=bool(config["gpus"]), callbacks=(TuneReportCallback(),),
            )  # fmt: skip
            return
        torch.set_num_threads(max(1, int(config["cpus"])))
        train_worker(run, reporter(0, 1), pick_device("cuda" if config["gpus"] else "cpu"))

    result = outcome_of(folder, config["objectives"], training)
    gc.collect()  # the next trial uses this process
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    tune.report(result)


def _tell_train(standing: dict[str, Any]) -> None:
    import ray.train

    ray.train.report(standing)


def outcome_of(
    folder: RunDir, objectives: Sequence[str], training: Callable[[], object]
) -> dict[str, Any]:
    """Trains, unless that is done, and gives the result; a failure of any kind is the worst value
    with its reason, since the search goes on, and a fault where the configuration is not to blame.
    """
    try:
        if not folder.finished:
            training()
        for _, spread in folder.series("epoch/spread")[-1:]:
            refuse_collapse(spread)
        return history(folder, objectives)[-1]
    except Exception as error:
        records = folder.records()
        counted = [r["metrics"].get(f"{n}/images", 0) for r in records for n in ("train", "epoch")]
        result = {
            "epoch": records[-1]["epoch"] if records else 0,
            "images": max(counted, default=0),
            **dict.fromkeys(objectives, WORST),
            FAILED: reason_of(error),
        }
        if not isinstance(error, DivergedError) and result[FAILED] != OUT_OF_MEMORY:
            result[FAULT] = True
        return result


def refuse_collapse(spread: float) -> None:
    """Raises DivergedError where a training ended with all embeddings in one place."""
    if spread < COLLAPSED:
        raise DivergedError(
            f"the embeddings collapsed: their spread ended at {spread:.3f} (0 = one point)"
        )


def reason_of(error: Exception) -> str:
    """One line for MLflow."""
    reason = innermost(error).rstrip(".")
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return OUT_OF_MEMORY
    known = ("not enough memory", "out of memory")  # of torch on the CPU; of a worker of several
    return OUT_OF_MEMORY if any(text in f"{error} {reason}" for text in known) else reason
