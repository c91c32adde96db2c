"""`flowerray tune` from the driver's side: Ray Tune with Optuna over one method, then the winner's
confirmation.
"""

import math
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from flowerray.cluster.driver import check_run
from flowerray.cluster.session import nodes_of, own_signals, ray_session, require_gpus, slots
from flowerray.cluster.watch import Ending, Watcher
from flowerray.cluster.worker import refuse_changed
from flowerray.config import Config
from flowerray.data.source import open_dataset, refuse_inside
from flowerray.errors import UserError
from flowerray.files import only_driver, refuse_existing, refuse_unwritable
from flowerray.tracking.state import State
from flowerray.training.loop import images_a_step
from flowerray.training.run import ResourcesConfig, Run
from flowerray.training.rundir import Record, RunDir
from flowerray.tuning.config import StudyConfig, label
from flowerray.tuning.confirm import confirm
from flowerray.tuning.heads import search_heads
from flowerray.tuning.pictures import plot_study, write_rows
from flowerray.tuning.searcher import make_scheduler, make_searcher
from flowerray.tuning.space import Knobs, search_space
from flowerray.tuning.study import Study
from flowerray.tuning.trial import trial

ENVIRONMENT = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # the RUN folders hold the results
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # or Ctrl-C waits for the running trials
    "TUNE_MAX_PENDING_TRIALS_PG": "1",  # a trial that only waits would be proposed too early
    "TUNE_GLOBAL_CHECKPOINT_S": "3600",  # Tune's own state is not used: the study's folder is whole
    "TUNE_WARN_THRESHOLD_S": "30",
    "RAY_AIR_NEW_OUTPUT": "0",  # the new one prints a box also where it should be silent
}


class TrialResources(Config):
    """What a trial gets. It may differ when a study is resumed."""

    cpus_per_trial: float = Field(1.0, gt=0)
    """CPU cores (and threads) of a trial, over all its workers."""
    gpus_per_trial: float = Field(0.0, ge=0)
    """GPUs of a trial, over all its workers; a fraction shares one GPU among trials; 0 trains on
    the CPU. The command gives each worker one where this machine has as many."""
    workers_per_trial: int = Field(1, ge=1, le=1024)
    """Workers of a trial; more than one costs about half a minute for each trial to start."""
    max_concurrent: int = Field(0, ge=0)
    """Trials at a time, for which an autoscaling cluster grows; 0 = as many as the cluster has room
    for now."""
    time_limit: float | None = Field(None, gt=0)
    """Minutes after which the search ends, and the confirmation begins."""

    @property
    def of_a_run(self) -> ResourcesConfig:
        """The same for `Run.resources`."""
        workers = 0 if self.workers_per_trial == 1 else self.workers_per_trial
        return ResourcesConfig(
            workers=workers,
            cpus_per_worker=max(1, int(self.cpus_per_trial / self.workers_per_trial)),
            device="cuda" if self.gpus_per_trial else "cpu",
        )


def new_study(
    run: Run,
    out: Path,
    config: StudyConfig,
    resources: TrialResources,
    fixed: Iterable[str] = (),
    more: Knobs | None = None,
) -> Study:
    """The study of a new folder.

    Args:
        fixed, more: see `search_space`.

    Raises:
        UserError: the folder is there already; nothing to search; options that exclude each other;
            bad data, backbone, weights or batch. No folder is made then.
    """
    refuse_existing(out)
    refuse_unwritable(out)
    refuse_inside(out, run.data.root)
    check_resources(run, resources)
    if config.then_all and run.embedder.train != "head":
        raise UserError("`then_all` follows a search of heads: add `embedder.train` head.")
    if config.objective == "pareto" and not run.harden.on:
        raise UserError(
            "`objective` pareto needs trainings that are attacked on val: add `harden`, or "
            "choose `harden.kind`."
        )
    if config.objective == "pareto" and config.sampler == "cmaes":
        raise UserError("`sampler` cmaes has one objective: use tpe or nsga2 with pareto.")
    if run.train.validate_every > 1:
        raise UserError("a search compares trials by each epoch: leave out `train.validate_every`.")
    dataset = open_dataset(run.data, progress=True)
    if "val" not in dataset.splits:
        raise UserError(f"a search needs a val split, and protocol {dataset.protocol} has none.")
    labels = dataset.split_labels("train")
    classes, workers = len(np.unique(labels)), resources.workers_per_trial
    knobs = search_space(run, fixed, classes, len(labels), workers=workers, more=more)
    run = run.model_copy(update={"resources": resources.of_a_run})
    tags, steps = check_run(run)
    # Trials of other batches draw as many images, and so does the default that they are held to.
    images = run.train.images or steps * images_a_step(run.train, run.harden)
    run = run.model_copy(update={"train": run.train.model_copy(update={"images": images})})
    study = Study.create(out, run, config, knobs, resources.model_dump())
    study.see(tags, labels)
    return study


def resume_study(study: Study, resources: TrialResources, quiet: bool = False) -> None:
    """Opens what a study that goes on works with.

    Raises:
        UserError: other resources than it can use; its photographs have changed.
    """
    check_resources(study.base, resources)
    refuse_unequal_shares(study, resources.workers_per_trial)
    study.base = study.base.model_copy(update={"resources": resources.of_a_run})
    tags, _ = check_run(study.base, quiet)
    known = State.read(study.folder).tags.get("dataset/fingerprint")
    refuse_changed(known, tags, study.base.data.root)
    study.see(tags, open_dataset(study.base.data, progress=False).split_labels("train"))


def check_resources(run: Run, resources: TrialResources) -> None:
    """Raises UserError where a trial of this run cannot get or use its resources."""
    workers, gpus = resources.workers_per_trial, resources.gpus_per_trial
    if workers > 1 and gpus % workers:
        raise UserError(
            f"`gpus_per_trial` {gpus:g} cannot be shared by {workers} workers: give each a "
            "whole GPU, or none."
        )
    if gpus > workers:
        raise UserError(
            f"`gpus_per_trial` {gpus:g}: a worker uses one GPU; give `workers_per_trial` "
            f"{math.ceil(gpus)} too."
        )
    require_gpus(gpus, "`gpus_per_trial`")
    if workers > 1 and run.embedder.train == "head":
        raise UserError(
            f"`workers_per_trial` {workers}: a trial of a head takes a second of one worker; leave "
            "it out."
        )


def tune(study: Study, resources: TrialResources, quiet: bool = False) -> dict[str, Any]:
    """Searches, or goes on searching, and confirms; returns what result.json holds.

    Args:
        study: `new_study`'s, or one that `resume_study` opened.
        quiet: no lines.

    Raises:
        UserError: no cluster; no trial came to its end; another process is at work on the study. It
            stays resumable.
        KeyboardInterrupt: the user's; the study stays resumable.
    """

    def line(folder: RunDir, record: Record) -> str:
        values = [f"{label(n)} {record['metrics'][n]:.3f}" for n in study.config.objectives]
        return f"trial {folder.path.name}  epoch {record['epoch']:>2}  {'  '.join(values)}"

    params = {"study": study.config.model_dump(), "space": study.knobs, **study.base.to_dict()}
    with only_driver(study.folder), Watcher(quiet, line, bar=False) as watcher:
        with watcher.running(RunDir(study.folder), params, {**study.tags, "kind": "study"}):
            search(study, resources, watcher)
            end_left(study, watcher)
            refuse_faults(study)
            labels = [label(name) for name in study.config.objectives]
            rows = study.rows()
            plot_study(rows, study.distributions, labels, study.folder / "plots")
            write_rows(rows, labels, study.folder / "trials.csv")
            # One worker trains as several do, with what one of them gets.
            gpus = min(1.0, resources.gpus_per_trial)
            cpus = resources.cpus_per_trial / resources.workers_per_trial
            return confirm(study, watcher, cpus, gpus)


def search(study: Study, resources: TrialResources, watcher: Watcher) -> None:
    """Makes the trials that are missing.

    Raises:
        UserError: see `tune`; optuna.db could not be written.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    missing = study.requeue()
    if missing == 0 or study.searched:
        return
    watcher.say(f"starting Ray for {missing} trials ...")
    workers = resources.workers_per_trial
    with ray_session(math.ceil(resources.cpus_per_trial), frees_workers=workers > 1) as ray:
        from ray import tune as ray_tune

        concurrent = resources.max_concurrent or room(nodes_of(ray), resources)
        share = {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
        if study.of_heads:
            search_heads(study, share, concurrent, resources.time_limit, missing, watcher)
            if resources.time_limit:
                study.searched = True
                study.write()
            return
        if workers > 1:  # the trial's own process only waits for its workers, and stays on the head
            share = {"cpu": 0, "node:__internal_head__": 0.001}

        def want_room(trials: int) -> None:
            if resources.max_concurrent:
                ask_for_nodes(resources, min(concurrent, trials))

        tuner = ray_tune.Tuner(
            ray_tune.with_resources(trial, share),
            param_space={
                "objectives": study.config.objectives,
                "cpus": resources.cpus_per_trial,
                "gpus": resources.gpus_per_trial,
                "workers": workers,
            },
            tune_config=ray_tune.TuneConfig(
                search_alg=make_searcher(study, watcher, missing, want_room),
                scheduler=make_scheduler(study),
                num_samples=missing,
                max_concurrent_trials=min(concurrent, missing),
                reuse_actors=workers == 1,
                time_budget_s=resources.time_limit * 60 if resources.time_limit else None,
            ),
            run_config=ray_tune.RunConfig(
                name=f"search-{time.time_ns()}",
                storage_path=str(study.folder / "ray"),
                failure_config=ray_tune.FailureConfig(max_failures=3),
                verbose=0,
            ),
        )
        want_room(missing)
        try:
            with own_signals():
                tuner.fit()
        except SystemExit:  # what Ray makes of Ctrl-C
            raise KeyboardInterrupt from None
        finally:
            want_room(0)
    if study.fault is not None:
        raise study.fault
    if resources.time_limit and not study.cut_off():
        study.searched = True  # a --resume goes on with the confirmation
        study.write()


def end_left(study: Study, watcher: Watcher) -> None:
    """Ends the MLflow runs of trials that ended just before their driver was killed, and of those
    that the search, with fewer trials now, leaves out.
    """
    endings = [study.ending(t) for t in study.ended() if study.trial_dir(t).path.exists()]
    known = {ending.folder for ending in endings}
    left_out = sorted(set((study.folder / "trials").glob("*")) - known)
    endings += [Ending(path, "KILLED", "left out") for path in left_out]
    for ending in endings:
        state = State.read(ending.folder)
        if not (state.closed or (ending.folder in left_out and state.finished)):
            watcher.close(ending)


def refuse_unequal_shares(study: Study, workers: int) -> None:
    """Raises UserError where a batch that the study may try cannot be shared by the workers."""

    def values(name: str) -> list[int]:
        knob = study.knobs.get(f"train.{name}", {"choices": [getattr(study.base.train, name)]})
        return list(knob["choices"])

    for p, k in product(values("classes_per_batch"), values("images_per_class")):
        if p * k % workers:
            raise UserError(
                f"`workers_per_trial` {workers}: the study tries batches of P x K = {p} x {k} "
                "images, which so many workers cannot share equally."
            )


def refuse_faults(study: Study) -> None:
    """Raises UserError where trials could not be trained for a reason outside of them."""
    reasons = [trial.user_attrs.get("reason") for trial in study.cut_off()]
    if any(reasons):
        ended = len(study.ended())
        without = f", and `resume` with `trials` {ended} goes on without them" if ended else ""
        raise UserError(
            f"{len(reasons)} of {study.config.trials} trials could not be trained "
            f"({next(filter(None, reasons))}): `resume` tries them again{without}."
        )


def ask_for_nodes(resources: TrialResources, trials: int) -> None:
    """Asks an autoscaling cluster to have room for so many trials; 0 lets it shrink.

    Tune lets only one trial wait, so the cluster would see the need for one more trial at a time.
    """
    from ray.autoscaler.sdk import request_resources

    workers = resources.workers_per_trial
    share = {"CPU": resources.cpus_per_trial, "GPU": resources.gpus_per_trial}
    bundle = {name: amount / workers for name, amount in share.items() if amount}
    request_resources(bundles=[bundle] * workers * trials)


def room(nodes: Sequence[Mapping[str, float]], resources: TrialResources) -> int:
    """Trials that a cluster holds at a time; no worker spans two nodes.

    Args:
        nodes: resources of those that are up.

    Raises:
        UserError: not one.
    """
    workers = resources.workers_per_trial
    trials = slots(nodes, resources.cpus_per_trial / workers, resources.gpus_per_trial / workers)
    trials //= workers
    if trials < 1:
        most = {name: max((n.get(name, 0) for n in nodes), default=0) for name in ("CPU", "GPU")}
        raise UserError(
            f"a trial of {resources.cpus_per_trial:g} CPUs and {resources.gpus_per_trial:g} GPUs "
            f"({workers} worker(s)) does not fit this cluster of {len(nodes)} node(s) with up to "
            f"{most['CPU']:g} CPUs and {most['GPU']:g} GPUs: ask for less, or, where it grows by "
            "itself, set `max_concurrent`."
        )
    return trials
