"""The end of a study: the best trial against the default on fresh seeds, and the champion.

The best of many trials is also the luckiest; trained again with seeds that the search never used,
it has to be better than the default to win, and than its frozen backbone to be registered.
"""

from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NotRequired

from typing_extensions import TypedDict

from flowerray.cluster.session import on_cluster
from flowerray.cluster.tasks import DivergedTrainingsError, train_many
from flowerray.cluster.watch import Watcher
from flowerray.cluster.worker import pick_device
from flowerray.errors import UserError
from flowerray.files import read_json, write_json
from flowerray.opening import open_model
from flowerray.retrieval.command import evaluate_model
from flowerray.retrieval.floor import as_facts
from flowerray.retrieval.measure import EvaluateConfig
from flowerray.statistics import Interval, front, t_interval
from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training.config import TrainConfig
from flowerray.training.run import Run, own_defaults
from flowerray.training.rundir import RunDir
from flowerray.tuning.database import outcome
from flowerray.tuning.space import value_of, with_params
from flowerray.tuning.study import Study
from flowerray.tuning.trial import MAP_AT_R, WORST

NEAR_FRONT = 0.9
"""A pareto study's champion keeps this share of the front's best adversarial R@1."""
HEADS = 3
"""So many of the best heads become RUNs, at least."""
FIRST_SEED = 1000
"""The confirmation's seeds begin so far after the search's one."""


class Registered(TypedDict):
    """What is needed of an earlier result.json."""

    champion: NotRequired[str]
    registered: NotRequired[dict[str, Any]]


def confirm(study: Study, watcher: Watcher, cpus: float, gpus: float) -> dict[str, Any]:
    """Picks the best trial, trains it and the default again, registers the winner.

    Args:
        cpus, gpus: of each training.

    Returns:
        The study's result, as result.json holds it.

    Raises:
        UserError: no trial came to its end; a training failed, other than by diverging, or all of
            the winner's did. Nothing is lost by then.
    """
    ended = study.ended()
    best = champion(ended)
    winner, then_all = study.trial_dir(best), study.config.then_all
    share: dict[str, Any] = {"cpus": cpus, "gpus": gpus, "quiet": watcher.quiet}
    if study.of_heads:
        heads = best_heads(study)
        jobs = [(with_params(study.base, t.params), study.trial_dir(t).path) for t in heads]
        train(study, jobs, **share)
        if then_all:
            best, winner = train_all(study, heads[:then_all], **share)
    tag_best(study, watcher, best)
    objectives = study.config.objectives
    result: dict[str, Any] = {
        "method": study.base.method_name,
        "study": str(study.folder),
        "database": study.database,
        "objectives": objectives,
        "trials": count(ended),
        "images": sum(t.user_attrs["images"] for t in ended),
        "best_trial": study.trial_dir(best).path.name,
        "best": {name: best.params[name] for name in study.knobs},
        "default": {name: value_of(study.base, name) for name in study.knobs},
        "searched": dict(zip(objectives, best.values, strict=True)),
    }
    if then_all:
        result["then_all"] = then_all
    is_default = result["best"] == result["default"] and not then_all
    result["winner"] = "default" if is_default else "tuned"
    if study.config.confirm_seeds:
        tuned = with_params(study.base, best.params)
        sides = {"default": study.base} if is_default else {"tuned": tuned, "default": study.base}
        folders, diverged = retrain(study, sides, winner.path.name, **share)
        found = measured(study, folders)
        result["confirmed"] = {"seeds": seeds(study), "diverged": diverged, **found}
        if not is_default:
            gains = {n: gain(found["tuned"][n], found["default"][n]) for n in objectives}
            result["confirmed"]["gain"] = {n: interval.to_dict() for n, interval in gains.items()}
            means = [[mean(found[side][n]) for n in objectives] for side in ("default", "tuned")]
            result["winner"] = ("default", "tuned")[pick(means)]
        by_seed = zip(*(found[result["winner"]][n] for n in objectives), strict=True)
        winner = folders[result["winner"]][pick(list(by_seed))]
        if not winner.finished:
            raise UserError(
                "every training with a fresh seed diverged, so there is no champion: search lower "
                "learning rates in another study."
            )
        note(study, result)
    name = f"flowerray-{study.base.method_name}"
    result["champion"] = str(winner.path)
    result["frozen"] = over_floor(winner, gpus, watcher.quiet)
    result["registered"] = {"name": name, "alias": "champion", "version": None, "withheld": None}
    told = (result["frozen"] or {}).get("warning")
    if told and not (study.base.harden.on or was_registered(study, winner)):
        result["registered"]["withheld"] = told
    else:
        version = watcher.later(sync.register, winner.path, name, "champion").result()
        result["registered"]["version"] = version
    write_json(study.folder / "result.json", result)
    return result


def was_registered(study: Study, winner: RunDir) -> bool:
    """The study had ended before with this champion, maybe of a version without a floor."""
    file = study.folder / "result.json"
    before = read_json(file, Registered) if file.exists() else Registered()
    registered = before.get("registered", {}).get("version") is not None
    return registered and Path(before.get("champion", "")).name == winner.path.name


def over_floor(winner: RunDir, gpus: float, quiet: bool) -> dict[str, Any] | None:
    """What a training has gained over its frozen backbone on val: `floor.as_facts`."""
    model = open_model(str(winner.path), pick_device("auto" if gpus else "cpu"))
    config = EvaluateConfig(split="val")
    found = evaluate_model(model, model.run.data, False, config, quiet)
    return as_facts(winner.path.name, found, model.run.harden.on)


def champion(ended: Sequence[Any]) -> Any:
    """The best of Optuna's complete trials, by `pick`.

    Raises:
        UserError: no trial is complete.
    """
    complete = [trial for trial in ended if outcome(trial) == "complete"]
    if not complete:
        reasons = [t.user_attrs["reason"] for t in ended if outcome(t) == "failed"]
        why = f" (the first failed: {reasons[0]})" if reasons else ""
        raise UserError(
            f"none of {len(ended)} trials came to its end{why}: give more trials or time, and "
            "`resume` the study."
        )
    return complete[pick([trial.values for trial in complete])]


def pick(points: Sequence[Sequence[float]]) -> int:
    """Which point wins: the highest value, or, with two objectives, the highest first value among
    the front's points within 90 % of the front's best second. The earlier one where two are equal.
    """
    chosen = front(points)
    if len(points[0]) > 1:
        least = NEAR_FRONT * max(points[i][1] for i in chosen)
        chosen = [i for i in chosen if points[i][1] >= least]
    return max(chosen, key=lambda i: points[i][0])


def count(ended: Sequence[Any]) -> dict[str, int]:
    """Trials by outcome."""
    names = [outcome(trial) for trial in ended]
    return {name: names.count(name) for name in ("complete", "stopped", "failed")}


def seeds(study: Study) -> list[int]:
    """The confirmation's: the search trains with `train.seed` alone."""
    first = study.base.train.seed + FIRST_SEED
    return [(first + i) % 2**31 for i in range(study.config.confirm_seeds)]


def retrain(
    study: Study, sides: dict[str, Run], best_name: str, **share: Any
) -> tuple[dict[str, list[RunDir]], dict[str, str]]:
    """Trains each side with each seed, below DIR/confirm; what is there already stays. Where heads
    are followed by full trainings, the tuned side is both, and the default a full training alone.

    Returns:
        Each side's folders, a seed each; and of those that diverged, name and reason.
    """
    heads: list[tuple[Run, Path]] = []
    jobs: list[tuple[Run, Path]] = []
    folders: dict[str, list[RunDir]] = {}
    for side, run in sides.items():
        label = f"trial-{best_name}" if side == "tuned" else side
        for seed in seeds(study):
            path = study.folder / "confirm" / f"{label}-seed-{seed}"
            train_config = run.train.model_copy(update={"seed": seed})
            job = run.model_copy(update={"train": train_config})
            if study.config.then_all:
                head = path.with_name(f"{label}-head-seed-{seed}") if side == "tuned" else None
                heads += [(job, head)] if head else []
                job = whole(job, head)
            jobs.append((job, path))
            folders.setdefault(side, []).append(RunDir(path))
    try:
        train(study, heads, **share)
        train(study, jobs, **share)
    except DivergedTrainingsError as error:  # it would again: a fault of the configuration
        return folders, {path.name: why for path, why in error.reasons.items()}
    return folders, {}


def train(study: Study, jobs: list[tuple[Run, Path]], **share: Any) -> None:
    """`train_many`; heads on this machine without a Ray, whose start would take longer."""
    heads = all(run.embedder.train == "head" for run, _ in jobs)
    in_process = heads and not on_cluster()
    train_many(jobs, **share, parent=study.folder, in_process=in_process)


def best_heads(study: Study) -> list[Any]:
    """The best of Optuna's complete trials, the earlier one first where two are equal."""
    ranked = sorted(study.complete(), key=lambda trial: -trial.value)
    return ranked[: max(HEADS, study.config.then_all)]


def whole(run: Run, head: Path | None) -> Run:
    """The full training that follows a head: of its loss and batches, with the default learning
    rates, decay and epochs of full trainings; all draw equally many images.
    """
    embedder = run.embedder.model_copy(update={"train": "all", "start": "orthogonal"})
    plain = own_defaults(TrainConfig(), run.method_name, embedder)
    names = ("lr", "head_lr_factor", "weight_decay", "epochs")
    changes: dict[str, Any] = {name: getattr(plain, name) for name in names}
    changes["images"] = round(run.train.images * plain.epochs / run.train.epochs)
    train_config = run.train.model_copy(update=changes)
    init = head or run.init
    return run.model_copy(update={"embedder": embedder, "train": train_config, "init": init})


def train_all(study: Study, heads: Sequence[Any], **share: Any) -> tuple[Any, RunDir]:
    """Trains in full from each of these heads, below DIR/all; gives the best one's trial and RUN.

    Raises:
        UserError: a training failed; each diverged.
    """
    jobs, folders = [], []
    for trial in heads:
        head = study.trial_dir(trial).path
        folders.append(RunDir(study.folder / "all" / head.name))
        jobs.append((whole(with_params(study.base, trial.params), head), folders[-1].path))
    try:
        train(study, jobs, **share)
    except DivergedTrainingsError:
        if not any(folder.finished for folder in folders):
            raise
    values = measured(study, {"all": folders})["all"][MAP_AT_R]
    best = values.index(max(values))
    return heads[best], folders[best]


def measured(study: Study, folders: dict[str, list[RunDir]]) -> dict[str, dict[str, list[float]]]:
    """Each side's objectives, a value a seed; a training that diverged has the worst."""

    objectives = study.config.objectives
    found: dict[str, dict[str, list[float]]] = {}
    for side, runs in folders.items():
        stories = [study.story(run) for run in runs]
        ends = [s.standings[-1] if s.finished and s.standings else {} for s in stories]
        found[side] = {n: [float(end.get(n, WORST)) for end in ends] for n in objectives}
    return found


def gain(tuned_S: Sequence[float], default_S: Sequence[float]) -> Interval:
    """Mean of the differences, seed by seed, with Student's interval."""
    return t_interval([a - b for a, b in zip(tuned_S, default_S, strict=True)])


def tag_best(study: Study, watcher: Watcher, best: Any) -> None:
    """Tags the best trial's MLflow run, and takes the tag from one that was best before."""
    for trial in study.ended():
        path = study.trial_dir(trial).path
        if not path.exists():  # a head's that is not among the best
            continue
        state = State.read(path)
        is_best = "true" if trial.number == best.number else "false"
        if state.tags.get("flowerray.best", "false") != is_best:
            tags = {**state.tags, "flowerray.best": is_best}
            state.store(path, tags=tags, described=False)
            watcher.later(sync.send, path)


def note(study: Study, result: dict[str, Any]) -> None:
    """The confirmation's figures as metrics of the study's MLflow run."""
    metrics: dict[str, float] = {}
    confirmed = result["confirmed"]
    for side in ("tuned", "default"):
        for name, values in confirmed.get(side, {}).items():
            metrics[f"confirmed/{side}_{name.rpartition('/')[2]}"] = mean(values)
    for name, interval in confirmed.get("gain", {}).items():
        metrics[f"confirmed/gain_{name.rpartition('/')[2]}"] = interval["mean"]
    study.report(sum(result["trials"].values()), metrics)
