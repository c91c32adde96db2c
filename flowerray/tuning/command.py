"""`flowerray tune` from the driver's side: Ray Tune with Optuna over one method, then the winner's
confirmation.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from pydantic import Field

from flowerray.cluster.fit import prepare
from flowerray.cluster.session import own_signals, ray_session, require_gpus, slots
from flowerray.cluster.worker import refuse_changed
from flowerray.config import Config
from flowerray.data.source import open_dataset
from flowerray.errors import UserError
from flowerray.files import only_driver
from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training.run import ResourcesConfig, Run
from flowerray.tuning.confirm import confirm
from flowerray.tuning.live import Lines, LiveStudy, finish_left
from flowerray.tuning.pictures import plot_study
from flowerray.tuning.searcher import make_scheduler, make_searcher
from flowerray.tuning.space import search_space
from flowerray.tuning.study import Study, StudyConfig, label, outcome
from flowerray.tuning.trial import trial, trial_of_workers

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

    def check(self) -> None:
        """Raises UserError where the workers cannot share what a trial gets."""
        workers, gpus = self.workers_per_trial, self.gpus_per_trial
        if workers > 1 and gpus % workers:
            raise UserError(
                f"--gpus-per-trial {gpus:g} cannot be shared by {workers} workers: give each a "
                "whole GPU, or none."
            )
        if gpus > workers:
            raise UserError(
                f"--gpus-per-trial {gpus:g}: a worker uses one GPU; give --workers-per-trial "
                f"{math.ceil(gpus)} too."
            )

    @property
    def of_a_run(self) -> ResourcesConfig:
        """The same for `Run.resources`."""
        workers = 0 if self.workers_per_trial == 1 else self.workers_per_trial
        return ResourcesConfig(
            workers=workers,
            cpus_per_worker=max(1, int(self.cpus_per_trial / self.workers_per_trial)),
            device="cuda" if self.gpus_per_trial else "cpu",
        )


class Choices(NamedTuple):
    """What the user said of the space."""

    fixed: frozenset[str] = frozenset()
    """Dotted fields given on the command line; they are not searched."""
    dim: bool = False
    """Search the embedding size."""
    more: dict[str, dict[str, Any]] | None = None
    """Further knobs (hardening's)."""


def new_study(
    run: Run, out: Path, config: StudyConfig, resources: TrialResources, choices: Choices
) -> Study:
    """The study of a new folder.

    Raises:
        UserError: the folder is there already; nothing to search; options that exclude each other;
            bad data, backbone, weights or batch. No folder is made then.
    """
    if config.objective == "pareto" and not run.harden.on:
        raise UserError(
            "--objective pareto needs trainings that are attacked on val: add --harden, or "
            "choose --harden.kind."
        )
    if config.objective == "pareto" and config.sampler == "cmaes":
        raise UserError("--sampler cmaes has one objective: use tpe or nsga2 with pareto.")
    dataset = open_dataset(run.data, progress=True)
    if "val" not in dataset.splits:
        raise UserError(f"a search needs a val split, and protocol {dataset.protocol} has none.")
    labels = dataset.split_labels("train")
    knobs = search_space(
        run,
        choices.fixed,
        len(np.unique(labels)),
        len(labels),
        workers=resources.workers_per_trial,
        dim=choices.dim,
        more=choices.more,
    )
    resources.check()
    tags, _ = prepare(run.model_copy(update={"resources": resources.of_a_run}))
    study = Study.create(out, run, config, knobs, resources.model_dump())
    study.tags = tags
    return study


def tune(study: Study, resources: TrialResources, quiet: bool = False) -> dict[str, Any]:
    """`run_study`, by the only driver of the study's folder."""
    with only_driver(study.folder):
        return run_study(study, resources, quiet)


def run_study(study: Study, resources: TrialResources, quiet: bool) -> dict[str, Any]:
    """Searches, or goes on searching, and confirms; returns what result.json holds.

    Args:
        study: `Study.create`'s, or `Study.read`'s of a folder to go on with.
        quiet: no lines.

    Raises:
        UserError: bad data, options or cluster; no trial came to its end. The study stays
            resumable.
        KeyboardInterrupt: the user's; the study stays resumable.
    """
    resources.check()
    refuse_unequal_shares(study, resources.workers_per_trial)
    require_gpus(resources.gpus_per_trial, "--gpus-per-trial")
    study.base = study.base.model_copy(update={"resources": resources.of_a_run})
    if not study.tags:  # a resumed one
        study.tags, _ = prepare(study.base, quiet)
        known = State.read(study.folder).tags.get("dataset/fingerprint")
        refuse_changed(known, study.tags, study.base.data.root)
    params = {"study": study.config.model_dump(), "space": study.knobs, **study.base.to_dict()}
    sync.start(study.folder, study.folder.name, params, {**study.tags, "kind": "study"})
    with sync.noted_end(study.folder):
        search(study, resources, quiet)
        optuna_study = study.open_optuna()
        finish_left(study, study.ended(optuna_study))
        refuse_faults(study, optuna_study)
        draw(study)
        # One worker trains as several do, with what one of them gets.
        gpus = min(1.0, resources.gpus_per_trial)
        cpus = resources.cpus_per_trial / resources.workers_per_trial
        return confirm(study, cpus, gpus, quiet)


def search(study: Study, resources: TrialResources, quiet: bool) -> None:
    """Makes the trials that are missing."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    optuna_study = study.open_optuna()
    missing = study.requeue(optuna_study)
    if missing == 0 or study.searched:
        return
    ended = study.ended(optuna_study)
    values = [t.values[0] for t in ended if outcome(t) == "complete"]
    lines = Lines(study, max(values, default=None), len(ended), quiet)
    lines.say(f"starting Ray for {missing} trials ...")
    workers = resources.workers_per_trial
    with (
        LiveStudy(study.folder) as live,
        ray_session(math.ceil(resources.cpus_per_trial), frees_workers=workers > 1) as ray,
    ):
        from ray import tune as ray_tune

        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        concurrent = resources.max_concurrent or room(nodes, resources)
        config = {
            "objectives": study.config.objectives,
            "cpus": resources.cpus_per_trial,
            "gpus": resources.gpus_per_trial,
            "workers": workers,
        }
        share = (
            {"cpu": resources.cpus_per_trial, "gpu": resources.gpus_per_trial}
            if workers == 1
            # The trial's own process only waits for its workers, and stays on the head.
            else {"cpu": 0, "node:__internal_head__": 0.001}
        )
        function = trial if workers == 1 else trial_of_workers

        def want_room(trials: int) -> None:
            if resources.max_concurrent:
                ask_for_nodes(resources, min(concurrent, trials))

        seconds = resources.time_limit * 60 if resources.time_limit else None
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(function, share),
            param_space=config,
            tune_config=ray_tune.TuneConfig(
                search_alg=make_searcher(study, optuna_study, live, lines, missing, want_room),
                scheduler=make_scheduler(study, ended),
                num_samples=missing,
                max_concurrent_trials=min(concurrent, missing),
                reuse_actors=workers == 1,
                time_budget_s=seconds,
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
    if resources.time_limit and not study.cut_off(optuna_study):
        study.searched = True  # a --resume goes on with the confirmation
        study.write()


def refuse_unequal_shares(study: Study, workers: int) -> None:
    """Raises UserError where a batch that the study may try cannot be shared by the workers."""

    def values(name: str) -> list[int]:
        knob = study.knobs.get(f"train.{name}", {"choices": [getattr(study.base.train, name)]})
        return list(knob["choices"])

    for p, k in product(values("classes_per_batch"), values("images_per_class")):
        if p * k % workers:
            raise UserError(
                f"--workers-per-trial {workers}: the study tries batches of P x K = {p} x {k} "
                "images, which so many workers cannot share equally."
            )


def refuse_faults(study: Study, optuna_study: Any) -> None:
    """Raises UserError where trials could not be trained for a reason outside of them."""
    reasons = [trial.user_attrs.get("reason") for trial in study.cut_off(optuna_study)]
    if any(reasons):
        ended = len(study.ended(optuna_study))
        without = f", and --resume with --trials {ended} goes on without them" if ended else ""
        raise UserError(
            f"{len(reasons)} of {study.config.trials} trials could not be trained "
            f"({next(filter(None, reasons))}): --resume tries them again{without}."
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


def draw(study: Study) -> None:
    """Draws the study's pictures."""
    rows = study.rows(study.ended(study.open_optuna()))
    labels = [label(name) for name in study.config.objectives]
    plot_study(rows, study.distributions, labels, study.folder / "plots")


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
            "itself, set --max-concurrent."
        )
    return trials
