"""A study's folder and its books: study.json, Optuna's database, a RUN folder for each trial.

    study.json  optuna.db  trials/0000/ ...  confirm/  result.json  plots/  ray/

Optuna's database is the truth about which trials were asked for and how they ended; a trial that
was running when the driver died is asked for again, with its parameters and its RUN folder.
"""

import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from flowerray.config import Config
from flowerray.description import VERSION
from flowerray.errors import UserError
from flowerray.files import only_driver, read_json, sqlite_url, write_json, writing
from flowerray.tracking import sync
from flowerray.tracking.state import Status
from flowerray.training.run import Run, differences
from flowerray.training.rundir import RunDir
from flowerray.tuning.pictures import Row
from flowerray.tuning.space import Knobs, defaults, distributions, with_params
from flowerray.tuning.trial import ADVERSARIAL, FAILED, FAULT, MAP_AT_R, WORST, history


class StudyConfig(Config):
    """How a study searches."""

    trials: int = Field(32, ge=1)
    """Trials of the search, the failed ones too; may differ when a study is resumed."""
    sampler: Literal["tpe", "random", "nsga2", "cmaes"] = "tpe"
    """Who proposes: tpe = multivariate tree-structured Parzen estimator, nsga2 = evolution, cmaes =
    covariance matrix adaptation (numbers only; choices are drawn)."""
    pruner: Literal["asha", "none"] = "asha"
    """asha = a trial goes on past an epoch of 2, 6, 18 ... only among the best third there (by the
    sum of the objectives); none = every trial is trained to its end. nsga2 learns from trials that
    came to their end alone, so none is its default."""
    objective: Literal["map", "pareto"] = "map"
    """map = val MAP@R; pareto = val MAP@R and adversarial R@1, for hardened trainings."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Of the sampler; each trial trains with --train.seed."""
    confirm_seeds: int = Field(3, ge=0, le=100)
    """Seeds that the search never used, with which the best configuration and the default are
    trained again; 0 = the best trial is taken as it is."""

    @property
    def objectives(self) -> list[str]:
        """Names of the metrics that are maximised."""
        return [MAP_AT_R] if self.objective == "map" else [MAP_AT_R, ADVERSARIAL]


class Closed(NamedTuple):
    """A trial that ended, for the thread that tells MLflow."""

    folder: Path
    status: Status
    reason: str | None
    final: bool = True
    """Nothing goes on from its checkpoint any more."""


class Stored(TypedDict):
    """What study.json holds at least."""

    name: str
    study: dict[str, Any]
    space: dict[str, Any]
    run: dict[str, Any]
    resources: NotRequired[dict[str, Any]]
    searched: NotRequired[bool]


class Study:
    """One study, open in its driver."""

    def __init__(self, folder: Path, name: str, base: Run, config: StudyConfig, knobs: Knobs):
        self.folder = folder
        self.name = name
        """Of the study in optuna.db."""
        self.base = base
        """The default configuration, which the knobs change."""
        self.config = config
        self.knobs = knobs
        self.distributions = distributions(knobs)
        self.tags: dict[str, str] = {}
        """Of the data set, for the trials' MLflow runs."""
        self.resources: dict[str, Any] = {}
        """What a trial gets, for a command that resumes without saying it."""
        self.searched = False
        """The time limit ended the search, though trials are missing."""

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
            UserError: something is there already, or the place cannot be written.
        """
        if folder.exists():
            raise UserError(
                f"{folder} exists already: choose another --out, or continue it with "
                f"--resume {folder}."
            )
        study = cls(folder, f"{folder.name}-{uuid.uuid4().hex[:8]}", base, config, knobs)
        study.resources = resources or {}
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
        run, config = Run.from_dict(content["run"]), StudyConfig(**content["study"])
        study = cls(folder, content["name"], run, config, content["space"])
        study.resources = content.get("resources", {})
        study.searched = content.get("searched", False)
        return study

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
        """Takes the options of a resuming command; only the number of trials may have changed.

        Raises:
            UserError: other options differ from study.json; another process is at work here.
        """
        old, new = self.config.model_dump(), config.model_dump()
        changed = [name for name in old if name != "trials" and old[name] != new[name]]
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

    @property
    def epochs(self) -> int:
        """Of a whole trial."""
        return self.base.harden.passes(self.base.train.epochs)

    # ---- Optuna

    @property
    def database(self) -> str:
        """The address for optuna-dashboard."""
        return sqlite_url(self.folder / "optuna.db")

    def open_optuna(self) -> Any:
        """Optuna's study; makes it, with the default configuration to begin with."""
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        study = optuna.create_study(
            storage=optuna.storages.RDBStorage(
                self.database, engine_kwargs={"connect_args": {"timeout": 60}}
            ),
            study_name=self.name,
            directions=["maximize"] * len(self.config.objectives),
            load_if_exists=True,
        )
        asked = len(study.get_trials(deepcopy=False))
        study.sampler = self.sampler(asked)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            study.set_metric_names([label(name) for name in self.config.objectives])
        if asked == 0:
            study.enqueue_trial(defaults(self.base, self.knobs))
        return study

    def sampler(self, asked: int) -> Any:
        """The sampler; after `asked` trials it draws what was not drawn yet."""
        import numpy as np
        import optuna

        seed = int(np.random.SeedSequence((self.config.seed, asked)).generate_state(1)[0])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            if self.config.sampler == "random":
                return optuna.samplers.RandomSampler(seed=seed)
            if self.config.sampler == "nsga2":
                population = max(4, min(50, self.config.trials // 4))
                return optuna.samplers.NSGAIISampler(seed=seed, population_size=population)
            if self.config.sampler == "cmaes":
                return optuna.samplers.CmaEsSampler(
                    seed=seed, warn_independent_sampling=False, consider_pruned_trials=True
                )
            startup = max(4, min(10, self.config.trials // 4))
            return optuna.samplers.TPESampler(
                seed=seed, multivariate=True, constant_liar=True, n_startup_trials=startup
            )

    def requeue(self, study: Any) -> int:
        """Asks again for the trials that have no outcome: those that were running when the driver
        ended, and those that a fault of a machine ended. Returns how many trials the search still
        has to make.
        """
        from optuna.trial import TrialState

        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            study.tell(trial.number, state=TrialState.FAIL)
        for trial in self.cut_off(study):
            study.enqueue_trial(trial.params, user_attrs={"folder": folder_name(trial)})
        return max(0, self.config.trials - len(self.ended(study)))

    def cut_off(self, study: Any) -> list[Any]:
        """Optuna's trials in the state FAIL, which have no outcome and were not asked for again."""
        from optuna.trial import TrialState

        trials = study.get_trials(deepcopy=False)
        carried = {folder_name(t) for t in trials if t.state != TrialState.FAIL}
        failed = [t for t in trials if t.state == TrialState.FAIL]
        return list({name: t for t in failed if (name := folder_name(t)) not in carried}.values())

    def ended(self, study: Any) -> list[Any]:
        """Optuna's trials that have an outcome, in the order of their numbers."""
        from optuna.trial import TrialState

        states = (TrialState.COMPLETE, TrialState.PRUNED)
        return list(study.get_trials(deepcopy=False, states=states))

    # ---- trials

    def trial_dir(self, trial: Any) -> RunDir:
        """The RUN folder of an Optuna trial."""
        return RunDir(self.folder / "trials" / folder_name(trial))

    def open_trial(self, trial: Any) -> RunDir:
        """Makes the RUN folder of a trial that was just asked for, unless it is there already."""
        trial.set_user_attr("folder", folder_name(trial))
        folder = self.trial_dir(trial)
        run = with_params(self.base, trial.params)
        if not folder.run_json.exists():
            folder.path.mkdir(parents=True, exist_ok=True)
            write_json(folder.run_json, run.to_dict())
        tags = {**self.tags, "kind": "trial"}
        name = f"trial-{folder.path.name}"
        sync.start(folder.path, name, run.to_dict(), tags, parent=self.folder)
        return folder

    def history(self, folder: RunDir) -> list[dict[str, Any]]:
        """See `trial.history`; nothing where the training reported no value."""
        try:
            return history(folder, self.config.objectives)
        except UserError:
            return []

    def rows(self, ended: Sequence[Any]) -> list[Row]:
        """The trials that ended, as the pictures take them."""
        rows = []
        for trial in ended:
            known = self.history(self.trial_dir(trial))
            values = [known[-1][name] for name in self.config.objectives] if known else []
            curve = tuple((k["epoch"], k[MAP_AT_R]) for k in known)
            number = int(folder_name(trial))  # a trial that was asked for again keeps its first one
            rows.append(Row(number, outcome(trial), dict(trial.params), tuple(values), curve))
        return rows

    def close_trial(self, study: Any, trial: Any, result: dict[str, Any] | None) -> Closed:
        """Tells Optuna how a trial ended.

        Args:
            result: its last report, or None where its process died too often.
        """
        from optuna.trial import TrialState

        folder = self.trial_dir(trial)
        trial.set_user_attr("images", images_trained(folder))
        if len(self.config.objectives) == 1:  # Optuna knows no curves of several
            for standing in self.history(folder):
                trial.report(standing[MAP_AT_R], standing["epoch"])
        failure = "its worker died again and again" if result is None else result.get(FAILED)
        if result is not None and result.get(FAULT):
            trial.set_user_attr("reason", failure)
            study.tell(trial, state=TrialState.FAIL)
            return Closed(folder.path, "FAILED", failure, final=False)
        if failure is not None:
            trial.set_user_attr("reason", failure)
            told = study.tell(trial, [WORST] * len(self.config.objectives))
        elif not folder.finished:
            assert result is not None
            reason = f"stopped early after epoch {result['epoch']} of {self.epochs}"
            trial.set_user_attr("reason", reason)
            told = study.tell(trial, state=TrialState.PRUNED)
        else:
            last = self.history(folder)[-1]
            told = study.tell(trial, [last[name] for name in self.config.objectives])
        return self.ending(told)

    def ending(self, trial: Any) -> Closed:
        """What MLflow is told of an Optuna trial that ended."""
        statuses: dict[str, Status] = {
            "complete": "FINISHED", "stopped": "KILLED", "failed": "FAILED",
        }  # fmt: skip
        status = statuses[outcome(trial)]
        return Closed(self.trial_dir(trial).path, status, trial.user_attrs.get("reason"))


def folder_name(trial: Any) -> str:
    """Of an Optuna trial's RUN folder; a trial that is asked for again keeps it."""
    return str(trial.user_attrs.get("folder", f"{trial.number:04d}"))


def images_trained(folder: RunDir) -> int:
    """Images that a RUN's training has seen."""
    records = folder.records()
    train = Run.from_dict(folder.read()).train
    step = max((r["step"] for r in records), default=0)
    return int(step * train.classes_per_batch * train.images_per_class)


def outcome(trial: Any) -> Literal["complete", "stopped", "failed"]:
    """How an Optuna trial that ended did so."""
    if trial.state.name == "PRUNED":
        return "stopped"
    return "failed" if "reason" in trial.user_attrs else "complete"


def label(objective: str) -> str:
    """An objective's name in lines and tables."""
    return {MAP_AT_R: "val MAP@R", ADVERSARIAL: "adversarial R@1"}.get(objective, objective)
