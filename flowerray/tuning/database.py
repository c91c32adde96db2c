"""Optuna's side of a study: who proposes, what a trial's record says, a damaged database."""

import sqlite3
import warnings
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from flowerray.tracking.state import State
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir
from flowerray.tuning.config import StudyConfig
from flowerray.tuning.space import value_of
from flowerray.tuning.trial import MAP_AT_R, WORST

if TYPE_CHECKING:
    from flowerray.tuning.study import Study

STOPPED = "stopped early"
"""How the reason of a trial begins that the pruner ended."""
LOCK_SECONDS = 60.0
"""That a call waits for a locked optuna.db, in each of `TRIES`."""


def make_sampler(config: StudyConfig, asked: int) -> Any:
    """The sampler; after `asked` trials it draws what was not drawn yet."""
    import optuna

    seed = int(np.random.SeedSequence((config.seed, asked)).generate_state(1)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        if config.sampler == "random":
            return optuna.samplers.RandomSampler(seed=seed)
        if config.sampler == "nsga2":
            population = max(4, min(50, config.trials // 4))
            return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
        if config.sampler == "cmaes":
            return optuna.samplers.CmaEsSampler(
                seed=seed, warn_independent_sampling=False, consider_pruned_trials=True
            )
        startup = max(4, min(10, config.trials // 4))
        return optuna.samplers.TPESampler(
            seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup
        )


def read_back(owner: "Study", study: Any) -> None:
    """Tells a new optuna.db of the trials whose folders are there: those that ended as they
    did, the others as asked for.
    """
    from optuna.trial import TrialState, create_trial

    for path in sorted((owner.folder / "trials").glob("*/run.json")):
        folder, run = RunDir(path.parent), Run.from_dict(RunDir(path.parent).read())
        params = {name: value_of(run, name) for name in owner.knobs}
        told, (images, known, finished) = State.read(folder.path), owner.story(folder)
        note: dict[str, Any] = {"folder": folder.path.name, "images": images}
        values: list[float] | None = None
        single = len(owner.config.objectives) == 1
        if finished and known:
            state, values = TrialState.COMPLETE, [known[-1][n] for n in owner.config.objectives]
        elif told.finished == "KILLED" and (told.reason or "").startswith(STOPPED):
            state, note["reason"] = TrialState.PRUNED, told.reason
            values = [known[-1][MAP_AT_R]] if single and known else None
        elif told.finished == "FAILED" and told.reason:
            state, note["reason"] = TrialState.COMPLETE, told.reason
            values = [WORST] * len(owner.config.objectives)
        else:
            study.enqueue_trial(params, user_attrs={"folder": folder.path.name})
            continue
        study.add_trial(
            create_trial(
                state=state,
                params=params,
                distributions=owner.distributions,
                values=values,
                user_attrs=note,
                intermediate_values={k["epoch"]: k[MAP_AT_R] for k in known} if single else {},
            )
        )


def damage(file: Path) -> str | None:
    """What is wrong with a database of Optuna's, if anything; a lock is nothing wrong."""
    try:
        with closing(sqlite3.connect(file, timeout=LOCK_SECONDS)) as connection:
            found = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
            connection.execute("SELECT count(*) FROM trials")
        return None if found == "ok" else found.splitlines()[0]
    except sqlite3.DatabaseError as error:
        return None if "locked" in str(error) else str(error)


def folder_name(trial: Any) -> str:
    """Of an Optuna trial's RUN folder; a trial that is asked for again keeps it."""
    return str(trial.user_attrs.get("folder", f"{trial.number:04d}"))


def outcome(trial: Any) -> Literal["complete", "stopped", "failed"]:
    """How an Optuna trial that ended did so."""
    if trial.state.name == "PRUNED":
        return "stopped"
    return "failed" if "reason" in trial.user_attrs else "complete"
