"""A study of heads: their features are kept once for all trials, and a trial takes about a second.
It is a task of Ray's without a RUN, checkpoint or MLflow run of its own. The driver asks Optuna and
tells it; ASHA's cutoffs as they stand go along with each trial, which stops itself below them.
"""

import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from flowerray.cluster.trainer import innermost
from flowerray.cluster.watch import Watcher
from flowerray.cluster.worker import (
    Kept,
    build_method,
    head_data,
    keep_features,
    pick_device,
    trained_classes,
)
from flowerray.data.source import open_dataset
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder, start_from_pca
from flowerray.training import checkpoint
from flowerray.training.loop import images_a_step, make_sampler, train
from flowerray.training.progress import DivergedError
from flowerray.training.run import Run
from flowerray.tuning.database import STOPPED
from flowerray.tuning.searcher import REDUCTION
from flowerray.tuning.space import defaults, with_params
from flowerray.tuning.study import Study
from flowerray.tuning.trial import MAP_AT_R, OUT_OF_MEMORY, WORST, reason_of, refuse_collapse

SAID_EVERY = 20
"""Trials between two lines, where none was better."""


# ---- a trial, in a worker


class Told(NamedTuple):
    """How a trial ended."""

    standings: list[dict[str, Any]]
    """After each epoch: `epoch`, `images` drawn, and the best val MAP@R so far."""
    reason: str | None
    """Why it did not come to its end."""
    seconds: float


class StoppedError(Exception):
    """ASHA's."""


class Standings:
    """What the loop reports of a head: kept in memory."""

    rank, world = 0, 1

    def __init__(self, images: int, cutoffs: Mapping[int, float]) -> None:
        self.images, self.cutoffs = images, cutoffs
        self.known: list[dict[str, Any]] = []
        self.spread = 1.0

    def restore(self) -> None:
        """A trial of a second begins anew."""

    def rewind(self, step: int) -> None:
        """Nothing was written."""

    def wait(self) -> None:
        """Nothing is being written."""

    def report(
        self, step: int, epoch: int, metrics: dict[str, float], *_: object, **__: object
    ) -> None:
        """Takes an epoch's end.

        Raises:
            StoppedError: it is below a cutoff, and not at its end.
            DivergedError: no finite val MAP@R.
        """
        if "epoch/seconds" not in metrics:
            return
        value, self.spread = metrics[MAP_AT_R], metrics["epoch/spread"]
        if not math.isfinite(value):
            raise DivergedError(f"val MAP@R became {value} in epoch {epoch}.")
        best = max([value, *(known[MAP_AT_R] for known in self.known[-1:])])
        images = int(metrics["epoch/images"])
        self.known.append({"epoch": epoch, "images": images, MAP_AT_R: best})
        below = any(best < least for rung, least in self.cutoffs.items() if images >= rung)
        if below and images < self.images:
            raise StoppedError


def train_head(
    kept: Kept, content: dict[str, Any], cutoffs: dict[int, float], threads: int
) -> Told:
    """One trial: the training of `flowerray train` from the same start, without its files."""
    torch.set_num_threads(threads)
    began, run = time.perf_counter(), Run.from_dict(content)
    classes, _ = trained_classes(kept.dataset)
    standings, reason = Standings(run.train.images, cutoffs), None
    try:
        method, embedder = build_method(run, len(classes), embedder_of(kept, run))
        if run.init is not None:
            checkpoint.initialise(method, embedder, run.init, classes)
        method.to(pick_device(run.resources.device))
        quiet = run.train.model_copy(update={"log_every_steps": 2**31})
        train(quiet, run.augment, run.harden, method, head_data(kept, embedder), standings, {})
        refuse_collapse(standings.spread)
    except StoppedError:
        reason = f"{STOPPED} after epoch {standings.known[-1]['epoch']}"
    except Exception as error:
        reason = reason_of(error)
        if not isinstance(error, DivergedError) and reason != OUT_OF_MEMORY:
            raise
    return Told(standings.known, reason, time.perf_counter() - began)


_embedders: dict[tuple[str, ...], tuple[Embedder, Tensor]] = {}
"""This process's, with the start of their projection."""


def embedder_of(kept: Kept, run: Run) -> Embedder:
    """The embedder as a training begins with it, on the CPU; built once for many trials."""
    fingerprint = kept.dataset.tags["dataset/fingerprint"]
    key = fingerprint, run.embedder.model_dump_json(), str(run.train.seed)
    if key not in _embedders:
        embedder = Embedder(run.embedder, seed=run.train.seed)
        if run.embedder.start == "pca":
            start_from_pca(embedder.projection, torch.tensor(kept.views_NVF[:, 0]))
        _embedders[key] = embedder, embedder.projection.weight.detach().clone()
    embedder, start_DF = _embedders[key]
    embedder.cpu().projection.weight.data.copy_(start_DF)
    return embedder


# ---- the search, in the driver


class Rungs:
    """ASHA's books: what trials reached after `grace` images, and after each three times more.

    Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", arXiv:1810.05934.
    """

    def __init__(self, grace: int, images: int) -> None:
        """Rungs below `images`."""
        self.values: dict[int, list[float]] = {}
        while grace < images:
            self.values[grace] = []
            grace *= REDUCTION

    def add(self, curve: Mapping[int, float]) -> None:
        """Takes in a trial: its best value so far after so many images."""
        for rung, values in self.values.items():
            if reached := [value for images, value in sorted(curve.items()) if images >= rung]:
                values.append(reached[0])

    def cutoffs(self) -> dict[int, float]:
        """What a trial has to reach at each rung that others were at."""
        share = 100 * (1 - 1 / REDUCTION)
        return {r: float(np.percentile(v, share)) for r, v in self.values.items() if v}


def features(study: Study) -> Kept:
    """What every trial of a study is trained on; computed where it is not kept yet."""
    run = study.base
    dataset = open_dataset(run.data, progress=False)
    embedder = Embedder(run.embedder, seed=run.train.seed)
    if run.init is not None:
        embedder.load_state_dict(checkpoint.load_export(run.init)["embedder"])
    return keep_features(run, embedder.to(pick_device(run.resources.device)), dataset)


def tell(study: Study, asked: Any, trial: Any, told: Told) -> Any:
    """Tells of a trial that ended: the Optuna study that was asked for it, and then, all at once,
    optuna.db; gives the record.

    Raises:
        UserError: see `Study.book`.
    """
    from optuna.trial import TrialState

    value: float | None = WORST
    state = TrialState.COMPLETE
    for known in told.standings:
        trial.report(value := known[MAP_AT_R], known["epoch"])
    trial.set_user_attr("images", told.standings[-1]["images"] if told.standings else 0)
    if told.reason is not None:
        trial.set_user_attr("reason", told.reason)
        stopped = told.reason.startswith(STOPPED)
        value, state = (None, TrialState.PRUNED) if stopped else (WORST, state)
    record = asked.tell(trial, value, state)
    study.book(lambda: study.optuna.add_trial(record))
    return record


def curve(study: Study, trial: Any) -> dict[int, float]:
    """A trial's best val MAP@R so far, by images drawn."""
    train = with_params(study.base, trial.params).train
    images = make_sampler(train, study.targets_N).steps * images_a_step(train, study.base.harden)
    known = trial.intermediate_values.items()
    return {min(epoch * images, train.images): value for epoch, value in known}


def search_heads(
    study: Study, share: Mapping[str, float], concurrent: int, time_limit: float | None,
    missing: int, watcher: Watcher,
) -> None:  # fmt: skip
    """Makes the trials that are missing; Ray is up.

    Optuna proposes from its memory, and optuna.db is told of each trial once it has ended.

    Args:
        share: `cpu` and `gpu` of a trial.
        concurrent: trials at a time.
        time_limit: minutes.

    Raises:
        UserError: a trial could not be trained through no fault of its own; optuna.db cannot be
            used. The study stays resumable.
    """
    import optuna
    import ray

    ended, began = study.ended(), time.monotonic()
    asked = optuna.create_study(direction="maximize", sampler=study.optuna.sampler)
    asked.add_trials(ended)
    if not ended:
        asked.enqueue_trial(defaults(study.base, study.knobs))
    rungs = Rungs(study.grace, study.base.train.images)
    if study.config.pruner == "none":
        rungs.values = {}
    for trial in ended:
        rungs.add(curve(study, trial))
    task = ray.remote(train_head).options(
        num_cpus=share["cpu"], num_gpus=share["gpu"], max_retries=2
    )
    kept, threads = ray.put(features(study)), max(1, int(share["cpu"]))
    running: dict[Any, Any] = {}
    best, seconds, over = max((t.value for t in study.complete()), default=-math.inf), 0.0, 0
    try:
        while True:
            left = 60 * (time_limit or math.inf) - (time.monotonic() - began)
            while left > 0 and len(running) < concurrent and over + len(running) < missing:
                trial = asked.ask(study.distributions)
                run = with_params(study.base, trial.params)
                reference = task.remote(kept, run.to_dict(), rungs.cutoffs(), threads)
                running[reference] = trial
            if not running or left <= 0:
                break
            done, _ = ray.wait(list(running), timeout=None if left == math.inf else left)
            for reference in done:
                trial = running.pop(reference)
                told: Told = ray.get(reference)
                record = tell(study, asked, trial, told)
                rungs.add(curve(study, record))
                over, seconds = over + 1, seconds + told.seconds
                if better := told.reason is None and record.value > best:
                    best = record.value
                if better or over % SAID_EVERY == 0 or over == missing:
                    number = len(ended) + over
                    study.report(number, {"study/best_val_map_at_r": best})
                    of = f"{number} of {study.config.trials} trials"
                    watcher.say(f"{of}; best val MAP@R so far {best:.3f}")
    except ray.exceptions.RayError as error:
        raise UserError(
            f"a trial could not be trained ({innermost(error)}): `resume` goes on."
        ) from error
    finally:
        for reference in running:
            ray.cancel(reference, force=True)
    wall = time.monotonic() - began
    study.report(len(ended) + over, {"study/seconds": wall, "study/training_seconds": seconds})
