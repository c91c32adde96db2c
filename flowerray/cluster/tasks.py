"""Calls as tasks of a Ray, several at a time, or one after the other without it; and trainings as
such calls, each a RUN folder of its own.
"""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from textwrap import fill
from typing import Any

import torch

from flowerray import methods
from flowerray.cluster.driver import check_run
from flowerray.cluster.session import on_cluster, ray_session, require_gpus
from flowerray.cluster.trainer import innermost
from flowerray.cluster.watch import Ending, Watcher, brief
from flowerray.cluster.worker import pick_device, train_worker
from flowerray.errors import UserError
from flowerray.files import only_driver
from flowerray.pool import cores
from flowerray.text import WIDTH
from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training import checkpoint
from flowerray.training.curves import plot_training
from flowerray.training.loop import images_a_step
from flowerray.training.progress import DivergedError
from flowerray.training.run import ResourcesConfig, Run, differences
from flowerray.training.rundir import FolderReporter, RunDir


def run_tasks(
    function: Callable[..., Any],
    calls: Mapping[Any, tuple[Any, ...]],
    ended: Callable[[Any, Any], None],
    *,
    cpus: float,
    gpus: float = 0,
    in_process: bool = False,
) -> None:
    """Calls a function several times, as many at a time as there is room for.

    Without a cluster in `RAY_ADDRESS`, a single call, or calls that need all cores each, run in
    this process one after the other. Where this stops early (Ctrl-C), so do the calls.

    Args:
        function: gets its `cpus` of a call as its last argument: whole threads.
        calls: each call's other arguments, by its key.
        ended: called here with key and result, or with the Exception, as each call ends.
        cpus: cores of each; less than 1 shares a core.
        gpus: GPUs of each, in fractions where several share one.
        in_process: never start Ray.

    Raises:
        UserError: Ray cannot be had.
    """
    threads = max(1, int(cpus))
    local = not on_cluster()
    if in_process or (local and (len(calls) <= 1 or cpus >= cores())):
        before = torch.get_num_threads()
        try:
            for key, arguments in calls.items():
                ended(key, _outcome(partial(function, *arguments, threads)))
        finally:
            torch.set_num_threads(before)
        return
    with ray_session(min_cpus=math.ceil(cpus)) as ray:
        task = ray.remote(function).options(num_cpus=cpus, num_gpus=gpus, max_retries=2)
        running = {task.remote(*given, threads): key for key, given in calls.items()}
        try:
            while running:
                (done,), _ = ray.wait(list(running), num_returns=1)
                key = running.pop(done)
                ended(key, _outcome(partial(ray.get, done)))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # of any kind: the other calls go on
        return error


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
    """Trains each run into its folder, as many at a time as the cluster has room for; see
    `run_tasks`.

    A folder that holds the finished run is left alone, an unfinished one is continued.

    Args:
        runs: each run, and its RUN folder; `Run.resources` is replaced.
        cpus: cores (and threads) of each training; less than 1 shares a core.
        gpus: GPUs of each, in fractions where several share one; 0 = trains on the CPU.
        quiet: no progress.
        parent: the folder whose MLflow run the trainings are shown under.
        in_process: never start Ray.

    Returns:
        For each run, in the order given: `folder`, `model` (file), `threshold`, `best_epoch`,
        `val_map_at_r` (None without val), `epochs`, `steps`, `images` (drawn), `seconds`,
        `precision`.

    Raises:
        DivergedTrainingsError: at the end, where trainings diverged and none failed otherwise.
        UserError: at the end, where trainings failed: their folders and reasons; before, where a
            folder holds another run or there are too few GPUs. Whatever else was asked for is
            finished then.
        KeyboardInterrupt: the user's; every RUN stays resumable.
    """
    device = "cuda" if gpus else "cpu"
    resources = ResourcesConfig(workers=0, cpus_per_worker=max(1, int(cpus)), device=device)
    folders = [RunDir(path) for _, path in runs]
    assert len({folder.path for folder in folders}) == len(folders), "a folder for each run"
    todo: list[tuple[Run, RunDir]] = []
    for (run, _), folder in zip(runs, folders, strict=True):
        refuse_another(run, folder)
        if not folder.finished:
            todo.append((run.model_copy(update={"resources": resources}), folder))
        elif State.read(folder.path).finished != "FINISHED":
            # It was trained, and the driver died before it could say so.
            plot_training(folder, folder.plots / "training.png")
            sync.finish(folder.path)
    if len(todo) < len(runs) and not quiet:
        print(f"{len(runs) - len(todo)} of {len(runs)} trainings are finished", file=sys.stderr)
    if todo:
        require_gpus(gpus)
        errors = train_unfinished(todo, cpus, gpus, quiet, parent, in_process)
        refuse_failed(errors, len(runs))
    return [summary(run, folder) for (run, _), folder in zip(runs, folders, strict=True)]


def train_unfinished(
    todo: Sequence[tuple[Run, RunDir]],
    cpus: float,
    gpus: float,
    quiet: bool,
    parent: Path | None,
    in_process: bool,
) -> dict[Path, Exception]:
    """Trains, and returns each failure by folder."""
    failures: dict[Path, Exception] = {}
    with Watcher(quiet, line=None) as watcher:
        calls: dict[RunDir, tuple[Any, ...]] = {}
        for run, folder in todo:
            try:
                tags, steps = check_run(run, quiet)
            except UserError as error:
                failures[folder.path] = error
                continue
            if not folder.path.exists():
                folder.create(run.to_dict())
            watcher.open(folder, run.to_dict(), tags, steps=steps, parent=parent)
            calls[folder] = (run.to_dict(), folder.path)
        if calls:
            watcher.say(f"{len(calls)} trainings of {cpus:g} CPUs and {gpus:g} GPUs each")

        def ended(folder: RunDir, outcome: object) -> None:
            if isinstance(outcome, Exception):
                failures[folder.path] = outcome
                said = f"failed: {innermost(outcome)}"
                watcher.close(Ending(folder.path, "FAILED", innermost(outcome)))
            else:
                plot_training(folder, folder.plots / "training.png")
                said = brief(folder.records()[-1]["metrics"])
                watcher.close(Ending(folder.path))
            over = watcher.opened - len(watcher.going)
            line = f"{over} of {watcher.opened}  {folder.path.name}  {said}"
            watcher.say(fill(line, WIDTH, subsequent_indent="  ", break_on_hyphens=False))

        if calls:
            run_tasks(train_one, calls, ended, cpus=cpus, gpus=gpus, in_process=in_process)
    return failures


def train_one(content: dict[str, Any], folder: Path, threads: int) -> None:
    """One training, continued where an earlier try of it stopped."""
    torch.set_num_threads(threads)
    run = Run.from_dict(content)
    with only_driver(folder):
        train_worker(run, FolderReporter(folder), pick_device(run.resources.device))


def refuse_failed(failures: dict[Path, Exception], count: int) -> None:
    """Raises UserError, or DivergedTrainingsError, where trainings of so many failed."""
    if not failures:
        return
    reasons = {path: innermost(error) for path, error in failures.items()}
    text = (
        f"{len(failures)} of {count} trainings failed, and the command with `resume` tries them "
        f"again: {reasons_of(reasons)}."
    )
    if all(isinstance(error, DivergedError) for error in failures.values()):
        raise DivergedTrainingsError(text, reasons)
    raise UserError(text)


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
            "choose another `out`."
        )


def summary(run: Run, folder: RunDir) -> dict[str, Any]:
    """What a finished RUN says of its training; see `train_many`."""
    found: dict[str, Any] = dict(folder.outcome())
    name = methods.get(run.method_name).export_name
    return {
        "folder": str(folder.path),
        "model": str(next(folder.path.glob(f"*_model_{name}.pth"))),
        "threshold": found["threshold"],
        "best_epoch": found["best_epoch"],
        **(found.get("training") or counted(run, folder)),
    }


def counted(run: Run, folder: RunDir) -> dict[str, Any]:
    """What the last checkpoint says of a training whose thresholds.json, an older one, does not."""
    last = folder.checkpoint()
    assert last is not None, "a finished training has saved a checkpoint"
    state = checkpoint.load_state(last, torch.device("cpu"))
    progress = state["progress"]
    map_at_r = progress["best_map_at_r"]
    return {
        "epochs": progress["epoch"],
        "steps": progress["step"],
        "images": progress["step"] * images_a_step(run.train, run.harden),
        "seconds": progress["seconds"],
        "val_map_at_r": map_at_r if math.isfinite(map_at_r) else None,
        "precision": state.get("precision"),
    }
