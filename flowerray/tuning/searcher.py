"""Who proposes a study's trials and who stops them, as Ray Tune takes them: Optuna, and ASHA."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flowerray.training.rundir import RunDir
from flowerray.tuning.live import Lines, LiveStudy
from flowerray.tuning.study import Study
from flowerray.tuning.trial import FAULT

REDUCTION = 3
"""ASHA lets the best third go on."""


def make_searcher(
    study: Study,
    optuna_study: Any,
    live: LiveStudy,
    lines: Lines,
    missing: int,
    want_room: Callable[[int], None],
) -> Any:
    """Ray's OptunaSearch, which opens a RUN folder for each trial that it proposes and keeps the
    study's books.

    Args:
        missing: trials that it will propose.
        want_room: called with the number of trials that have not ended, whenever one ends.
    """
    from ray.tune.search.optuna import OptunaSearch

    class Searcher(OptunaSearch):
        def suggest(self, trial_id: str) -> dict[str, Any]:
            super().suggest(trial_id)
            folder = study.open_trial(self._ot_trials[trial_id])
            live.open(folder.path)
            return {"folder": str(folder.path), "scheduled": time.time()}

        def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
            lines.epoch(study.trial_dir(self._ot_trials[trial_id]), result)

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            if trial_id in self._completed_trials:
                return
            self._completed_trials.add(trial_id)
            trial = self._ot_trials[trial_id]
            folder = study.trial_dir(trial)
            closed = study.close_trial(self._ot_study, trial, None if error else result)
            lines.end(folder, result, closed)
            live.close(closed)
            want_room(missing - len(self._completed_trials))

        # Optuna's database has it all, so Tune's own snapshots hold nothing.
        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()

    objectives = study.config.objectives
    single = len(objectives) == 1
    return Searcher(
        study.distributions,
        metric=objectives[0] if single else objectives,
        mode="max" if single else ["max"] * len(objectives),
        sampler=optuna_study.sampler,
        storage=optuna_study._storage,
        study_name=study.name,
    )


def make_scheduler(study: Study, ended: list[Any]) -> Any:
    """ASHA, which knows again what the ended trials of a resumed study reached; or none. Of two
    objectives it goes by their sum: by clean accuracy alone it would stop the robust trials.

    Li et al. 2020, "A System for Massively Parallel Hyperparameter Tuning", arXiv:1810.05934.
    """
    from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

    if study.config.pruner == "none":
        return FIFOScheduler()
    objectives = study.config.objectives

    def summed(result: dict[str, Any]) -> dict[str, Any]:
        if not all(name in result for name in objectives):
            return result
        return {**result, objectives[0]: sum(result[name] for name in objectives)}

    class Scheduler(ASHAScheduler):
        def on_trial_result(self, controller: Any, trial: Any, result: dict[str, Any]) -> str:
            if FAULT in result:  # it says nothing of the configuration
                return self.CONTINUE
            decision: str = super().on_trial_result(controller, trial, summed(result))
            return decision

        def on_trial_complete(self, controller: Any, trial: Any, result: dict[str, Any]) -> None:
            if FAULT not in result:
                super().on_trial_complete(controller, trial, summed(result))

        def on_trial_add(self, controller: Any, trial: Any) -> None:
            """Takes in what a trial that was cut off had reached before it goes on."""
            super().on_trial_add(controller, trial)
            for standing in study.history(RunDir(Path(trial.config["folder"]))):
                self.on_trial_result(controller, trial, standing)

    scheduler = Scheduler(
        time_attr="epoch",
        metric=objectives[0],
        mode="max",
        max_t=study.epochs + 1,  # at max_t itself every trial would be stopped
        grace_period=min(study.epochs, 1 + math.ceil(study.base.train.warmup_epochs)),
        reduction_factor=REDUCTION,
    )
    for known in ended:
        folder = str(study.trial_dir(known).path)
        one = SimpleNamespace(trial_id=f"ended-{known.number}", config={"folder": folder})
        scheduler.on_trial_add(None, one)
    return scheduler
