"""A study's folder and its books: study.json, Optuna's database, a RUN folder for each trial.

    study.json  optuna.db  trials/0000/ ...  confirm/  result.json  plots/  ray/

Optuna's database is the truth about which trials were asked for and how they ended; a trial that
was running when the driver died is asked for again, with its parameters and its RUN folder.
"""

import math
import shutil
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NotRequired

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from flowerray.cluster.watch import Ending
from flowerray.description import VERSION
from flowerray.errors import UserError
from flowerray.files import only_driver, read_json, sqlite_url, write_json, writing
from flowerray.tracking.state import Status
from flowerray.training.loop import images_a_step, total_steps
from flowerray.training.loop import make_sampler as make_batches
from flowerray.training.run import Run, differences
from flowerray.training.rundir import FolderReporter, RunDir
from flowerray.tuning.config import StudyConfig, label
from flowerray.tuning.database import (
    LOCK_SECONDS,
    STOPPED,
    damage,
    folder_name,
    make_sampler,
    outcome,
    read_back,
)
from flowerray.tuning.pictures import Row
from flowerray.tuning.space import Knobs, defaults, distributions, with_params
from flowerray.tuning.trial import FAILED, FAULT, MAP_AT_R, WORST, Story, story

STATUSES: dict[str, Status] = {"complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}
"""What MLflow calls the outcomes."""
TRIES = 4


class Stored(TypedDict):
    """What study.json holds at least."""

    name: str
    study: dict[str, Any]
    space: dict[str, Any]
    run: dict[str, Any]
    resources: NotRequired[dict[str, Any]]
    searched: NotRequired[bool]


@dataclass(eq=False)
class Study:
    """One study, open in its driver."""

    folder: Path
    name: str
    """Of the study in optuna.db."""
    base: Run
    """The default configuration, which the knobs change."""
    config: StudyConfig
    knobs: Knobs
    resources: dict[str, Any] = field(default_factory=dict)
    """What a trial gets, for a command that resumes without saying it."""
    searched: bool = False
    """The time limit ended the search, though trials are missing."""
    tags: dict[str, str] = field(default_factory=dict)
    """Of the data set, for the trials' MLflow runs."""
    grace: int = 0
    """Images that every trial may draw before the pruner looks at it."""
    fault: UserError | None = None
    """What keeps optuna.db from being written."""

    @classmethod
    def create(
        cls,
        folder: Path,
        base: Run,
        config: StudyConfig,
        knobs: Knobs,
        resources: dict[str, Any] | None = None,
    ) -> "Study":
        """Makes the folder.

        Raises:
            UserError: it cannot be made.
        """
        name = f"{folder.name}-{uuid.uuid4().hex[:8]}"
        study = cls(folder, name, base, config, knobs, resources or {})
        with writing(folder):
            folder.mkdir(parents=True)
            study.write()
        return study

    @classmethod
    def read(cls, folder: Path) -> "Study":
        """The study of a folder.

        Raises:
            UserError: the folder holds none.
        """
        missing = f"{folder} is not a study: it has no study.json."
        content = read_json(folder / "study.json", Stored, missing=missing)
        return cls(
            folder,
            content["name"],
            Run.from_dict(content["run"]),
            StudyConfig(**content["study"]),
            content["space"],
            content.get("resources", {}),
            content.get("searched", False),
        )

    @cached_property
    def distributions(self) -> dict[str, Any]:
        """Optuna's, by knob."""
        return distributions(self.knobs)

    def write(self) -> None:
        """Writes study.json."""
        content = {
            "flowerray": VERSION,
            "name": self.name,
            "study": self.config.model_dump(mode="json"),
            "space": self.knobs,
            "run": self.base.to_dict(),
            "resources": self.resources,
            "searched": self.searched,
        }
        write_json(self.folder / "study.json", content)

    def resume_with(self, base: Run, config: StudyConfig) -> None:
        """Takes the options of a resuming command; only `trials` and `then_all` may have changed.

        Raises:
            UserError: other options differ from study.json; another process is at work here.
        """
        old, new = self.config.model_dump(), config.model_dump()
        free = ("trials", "then_all")
        changed = [name for name in old if name not in free and old[name] != new[name]]
        changed += differences(self.base, base)
        if changed:
            raise UserError(
                f"{self.folder} cannot be resumed with other options: {', '.join(changed)} differ "
                "from its study.json."
            )
        self.config = config
        self.base = base
        with only_driver(self.folder):
            self.write()

    def see(self, tags: dict[str, str], targets_N: NDArray[np.int64]) -> None:
        """Takes in the data set that it trains on: its tags, and the training images' classes."""
        self.tags, self.targets_N = tags, targets_N
        train, harden = self.base.train, self.base.harden
        sampler = make_batches(train, targets_N)
        steps = sampler.steps * (1 + math.ceil(train.warmup_epochs))
        steps = min(total_steps(train, harden, sampler), steps)
        self.grace = steps * images_a_step(train, harden)

    @property
    def of_heads(self) -> bool:
        """Trials train the projection alone: see tuning/heads.py."""
        return self.base.embedder.train == "head"

    def epochs(self, run: Run) -> int:
        """Of a whole trial with this configuration; the last one may be a part of one."""
        sampler = make_batches(run.train, self.targets_N)
        return math.ceil(total_steps(run.train, run.harden, sampler) / sampler.steps)

    # ---- Optuna

    @property
    def database(self) -> str:
        """The address for optuna-dashboard."""
        return sqlite_url(self.folder / "optuna.db")

    @cached_property
    def optuna(self) -> Any:
        """Optuna's study; made, with the default configuration to begin with, where there is none.
        A damaged one is put aside, and made anew from the trials' RUN folders.

        Raises:
            UserError: see `book`; a damaged one of heads, which have no RUN folders.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        file = self.folder / "optuna.db"
        lost = file.exists() and damage(file)
        if lost and self.of_heads:
            raise UserError(f"{file}, which alone has the trials, is damaged ({lost}): begin anew.")
        if lost:
            aside = file.with_name(f"optuna.db.damaged-{time.time_ns()}")
            file.rename(aside)
            print(
                f"{file} is damaged ({lost}): put aside as {aside.name}; what the trials' RUN "
                "folders hold is read back.",
                file=sys.stderr,
            )
        study = self.book(self._open)
        study.sampler = make_sampler(self.config, len(study.get_trials(deepcopy=False)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([label(name) for name in self.config.objectives])
        if lost:
            read_back(self, study)
        if not (study.get_trials(deepcopy=False) or self.of_heads):
            study.enqueue_trial(defaults(self.base, self.knobs))
        return study

    def _open(self) -> Any:
        import optuna

        storage = optuna.storages.RDBStorage(
            self.database, engine_kwargs={"connect_args": {"timeout": LOCK_SECONDS}}
        )
        return optuna.create_study(
            storage=storage,
            study_name=self.name,
            directions=["maximize"] * len(self.config.objectives),
            load_if_exists=True,
        )

    def book(self, call: Callable[[], Any]) -> Any:
        """What a call of Optuna's gives; where optuna.db is locked, it is tried again.

        Raises:
            UserError: it stays locked, or cannot be used; the same from then on.
        """
        import optuna
        import sqlalchemy.exc

        for attempt in range(TRIES):
            if self.fault is not None:
                break
            try:
                return call()
            except (
                sqlalchemy.exc.DatabaseError, optuna.exceptions.StorageInternalError
            ) as error:  # fmt: skip
                why = str(error.__cause__ or error).splitlines()[0]
                if "locked" not in why or attempt == TRIES - 1:
                    self.fault = UserError(
                        f"{self.folder / 'optuna.db'} cannot be used ({why}): end what else uses "
                        "it, then `resume` the study; its trainings are kept."
                    )
        assert self.fault is not None
        raise self.fault

    def requeue(self) -> int:
        """Asks again for the trials that have no outcome: those that were running when the driver
        ended, and those that a fault of a machine ended. Returns how many trials the search still
        has to make.
        """
        from optuna.trial import TrialState

        def again() -> int:
            for trial in self.optuna.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
                self.optuna.tell(trial.number, state=TrialState.FAIL)
            for trial in self.cut_off():
                self.optuna.enqueue_trial(trial.params, user_attrs={"folder": folder_name(trial)})
            return max(0, self.config.trials - len(self.ended()))

        missing: int = self.book(again)
        return missing

    def cut_off(self) -> list[Any]:
        """Optuna's trials in the state FAIL, which have no outcome and were not asked for again."""
        from optuna.trial import TrialState

        trials = self.optuna.get_trials(deepcopy=False)
        carried = {folder_name(t) for t in trials if t.state != TrialState.FAIL}
        failed = [t for t in trials if t.state == TrialState.FAIL]
        return list({name: t for t in failed if (name := folder_name(t)) not in carried}.values())

    def ended(self) -> list[Any]:
        """Optuna's trials that have an outcome, in the order of their numbers."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return list(self.optuna.get_trials(deepcopy=False, states=states))

    def complete(self) -> list[Any]:
        """Those that came to their end."""
        return [trial for trial in self.ended() if outcome(trial) == "complete"]

    # ---- trials

    def trial_dir(self, trial: Any) -> RunDir:
        """The RUN folder of an Optuna trial."""
        return RunDir(self.folder / "trials" / folder_name(trial))

    def open_trial(self) -> tuple[Any, RunDir, Run]:
        """Asks for a trial and makes its RUN folder, unless it is there already.

        Raises:
            UserError: see `book`.
        """

        def ask() -> Any:
            trial = self.optuna.ask(self.distributions)
            trial.set_user_attr("folder", folder_name(trial))
            return trial

        trial = self.book(ask)
        folder, run = self.trial_dir(trial), with_params(self.base, trial.params)
        if not folder.run_json.exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.run_json, run.to_dict())
        return trial, folder, run

    def report(self, trials: int, metrics: dict[str, float]) -> None:
        """Metrics of the study's own, after so many trials."""
        FolderReporter(self.folder).report(trials, 0, metrics)

    def story(self, folder: RunDir) -> Story:
        """See `trial.story`."""
        return story(folder, self.config.objectives)

    def rows(self) -> list[Row]:
        """The trials that ended, as the pictures take them."""
        rows = []
        for trial in self.ended():
            if len(self.config.objectives) == 1:
                curve = tuple(sorted(trial.intermediate_values.items()))
                values = [value for _, value in curve[-1:]]
            else:  # Optuna knows no curves of several
                known = self.story(self.trial_dir(trial)).standings
                values = [known[-1][name] for name in self.config.objectives] if known else []
                curve = tuple((k["epoch"], k[MAP_AT_R]) for k in known)
            number = int(folder_name(trial))  # a trial that was asked for again keeps its first one
            rows.append(Row(number, outcome(trial), dict(trial.params), tuple(values), curve))
        return rows

    def close_trial(self, trial: Any, result: dict[str, Any] | None) -> Ending:
        """Tells Optuna how a trial ended, and drops the checkpoints of one that is over.

        Args:
            result: its last report, or None where its process died too often.

        Returns:
            What MLflow is told.

        Raises:
            UserError: see `book`.
        """
        folder = self.trial_dir(trial)
        told = self.book(lambda: self._tell(trial, folder, result))
        if told is None:
            assert result is not None
            return Ending(folder.path, "FAILED", result[FAILED])
        shutil.rmtree(folder.path / "checkpoints", ignore_errors=True)
        return self.ending(told)

    def _tell(self, trial: Any, folder: RunDir, result: dict[str, Any] | None) -> Any:
        """Optuna's record of the trial; None where it will be tried again."""
        from optuna.trial import TrialState

        images, known, finished = self.story(folder)
        trial.set_user_attr("images", images)
        if len(self.config.objectives) == 1:  # Optuna knows no curves of several
            for standing in known:
                trial.report(standing[MAP_AT_R], standing["epoch"])
        failure = "its worker died again and again" if result is None else result.get(FAILED)
        values, state = None, None
        if result is not None and result.get(FAULT):
            state = TrialState.FAIL
        elif failure is not None:
            values = [WORST] * len(self.config.objectives)
        elif not finished:
            assert result is not None
            failure = f"{STOPPED} after epoch {result['epoch']}"
            state = TrialState.PRUNED
        else:
            values = [known[-1][name] for name in self.config.objectives]
        if failure is not None:
            trial.set_user_attr("reason", failure)
        told = self.optuna.tell(trial, values, state=state, skip_if_finished=True)
        return None if state == TrialState.FAIL else told

    def ending(self, trial: Any) -> Ending:
        """What MLflow is told of an Optuna trial that ended."""
        status: Status = STATUSES[outcome(trial)]
        return Ending(self.trial_dir(trial).path, status, trial.user_attrs.get("reason"))
