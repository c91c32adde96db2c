"""Who proposes a study's trials and who stops them, as Ray Tune takes them: Optuna, and ASHA."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flowerray.cluster.watch import Watcher
from flowerray.errors import UserError
from flowerray.training.rundir import RunDir
from flowerray.tuning.study import Study
from flowerray.tuning.trial import FAULT

REDUCTION = 3
"""ASHA lets the best third go on."""


def make_searcher(
    study: Study, watcher: Watcher, missing: int, want_room: Callable[[int], None]
) -> Any:
    """A searcher of Ray Tune's that asks the study for trials, and tells it how they ended.

    Where optuna.db cannot be used (`Study.fault`), no further trial is proposed.

    Args:
        missing: trials that it will propose.
        want_room: called with the number of trials that have not ended, whenever one ends.
    """
    from ray.tune.search import Searcher

    class StudySearcher(Searcher):
        def __init__(self) -> None:
            super().__init__(metric=study.config.objectives[0], mode="max")
            self.open: dict[str, Any] = {}
            self.over = 0

        def suggest(self, trial_id: str) -> Any:
            try:
                trial, folder, run = study.open_trial()
            except UserError:
                return Searcher.FINISHED
            self.open[trial_id] = trial
            name, tags = f"trial-{folder.path.name}", {**study.tags, "kind": "trial"}
            watcher.open(folder, run.to_dict(), tags, name=name, parent=study.folder)
            return {
                "folder": str(folder.path), "epochs": study.epochs(run), "scheduled": time.time()
            }  # fmt: skip

        def on_trial_complete(
            self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
        ) -> None:
            trial = self.open.pop(trial_id, None)
            if trial is None:
                return
            try:
                ending = study.close_trial(trial, None if error else result)
            except UserError:
                return  # its RUN is whole: a --resume tells of it
            watcher.close(ending)
            watcher.say(end_line(study, trial))
            self.over += 1
            want_room(missing - self.over)

        # Optuna's database has it all, so Tune's own snapshots hold nothing.
        def save(self, checkpoint_path: str) -> None:
            Path(checkpoint_path).touch()

        def restore(self, checkpoint_path: str) -> None:
            raise AssertionError("a study is resumed from its own folder")

        def __reduce__(self) -> tuple[type, tuple[()]]:
            return object, ()

    return StudySearcher()


def end_line(study: Study, trial: Any) -> str:
    """What is said of a trial that ended; notes the best so far among the study's own metrics."""
    name = study.trial_dir(trial).path.name
    trial = study.optuna.trials[trial.number]
    reason = trial.user_attrs.get("reason")
    if trial.state.name == "FAIL":
        return f"trial {name}  could not be trained: {reason}"
    ended, complete = len(study.ended()), study.complete()
    best = max((trial.values[0] for trial in complete), default=None)
    so_far = "" if best is None else f"; best val MAP@R so far {best:.3f}"
    if best is not None:
        study.report(ended, {"study/best_val_map_at_r": best})
    what = reason or "complete"
    if reason and trial.state.name != "PRUNED":
        what = f"failed: {reason}"
    return f"trial {name}  {what} ({ended} of {study.config.trials}{so_far})"


def make_scheduler(study: Study) -> Any:
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
            for standing in study.story(RunDir(Path(trial.config["folder"]))).standings:
                self.on_trial_result(controller, trial, standing)

    scheduler = Scheduler(
        time_attr="images",
        metric=objectives[0],
        mode="max",
        max_t=2**40,  # at max_t itself every trial would be stopped
        grace_period=study.grace,
        reduction_factor=REDUCTION,
    )
    for known in study.ended():
        folder = str(study.trial_dir(known).path)
        one = SimpleNamespace(trial_id=f"ended-{known.number}", config={"folder": folder})
        scheduler.on_trial_add(None, one)
    return scheduler
