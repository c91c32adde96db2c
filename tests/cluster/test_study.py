"""A study's books, without Ray: its folder, Optuna's history, how trials end, who wins."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from optuna.trial import TrialState

from flowerray import tracking
from flowerray.cli import dispatch
from flowerray.cluster.confirm import champion, count, gain, pick
from flowerray.cluster.live import finish_left
from flowerray.cluster.study import Closed, Study, StudyConfig, images_trained
from flowerray.cluster.trial import TrialReporter, guarded, history
from flowerray.cluster.tune import (
    TrialResources,
    ask_for_nodes,
    refuse_faults,
    refuse_unequal_shares,
    room,
    search,
)
from flowerray.errors import UserError
from flowerray.files import only_driver
from flowerray.progress import DivergedError, Progress, note_epoch
from flowerray.run import Run
from flowerray.rundir import FolderReporter, RunDir
from tests.cluster.studies import KNOBS, make_study, pretend, run_trial, tune_words
from tests.small import small, with_hardening

OBJECTIVES = ["val/map_at_r"]


# --- the folder ------------------------------------------------------------------------------


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = make_study(tmp_path / "study", tmp_path, trials=7, sampler="random")
    read = Study.read(made.folder)
    assert (read.name, read.config, read.base, read.knobs) == (
        made.name, StudyConfig(trials=7, sampler="random"), small(tmp_path, epochs=4), KNOBS,
    )  # fmt: skip
    assert make_study(tmp_path / "other", tmp_path).name != made.name
    with pytest.raises(UserError, match="exists already: choose another --out"):
        make_study(made.folder, tmp_path)
    with pytest.raises(UserError, match="is not a study"):
        Study.read(tmp_path)


def test_other_options_are_refused_on_resume(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", tmp_path, trials=4)
    with pytest.raises(UserError, match="pruner, train.lr differ from its study.json"):
        study.resume_with(small(tmp_path, epochs=4, lr=0.5), StudyConfig(trials=4, pruner="none"))
    study.resume_with(study.base, StudyConfig(trials=9))
    assert Study.read(study.folder).config.trials == 9


def test_a_refused_resume_is_one_sentence(
    tmp_path: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path / "study", small_set)
    words = ["tune", "triplet", "--resume", str(study.folder)]
    assert dispatch([*words, "--method.margin", "0.4", "--sampler", "random"]) == 2
    said = capsys.readouterr().err
    assert "sampler, method.margin differ from its study.json" in said and said.count("\n") == 1
    assert dispatch(["tune", "center", *words[2:]]) == 2
    assert "tunes triplet, not center" in capsys.readouterr().err


def test_a_pareto_study_needs_attacks(
    tmp_path: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = tune_words(small_set, out=tmp_path / "study", objective="pareto")
    assert dispatch(["tune", "triplet", *words]) == 2
    assert "add --harden" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


# --- trials ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> tuple[Study, Any]:
    """A study of four trials: complete, stopped, diverged, died; a fifth was running when the
    driver was killed. Nothing was trained.
    """
    folder = tmp_path_factory.mktemp("studies") / "study"
    study = make_study(folder, small_set, trials=6)
    optuna_study = study.open_optuna()
    run_trial(study, optuna_study, [0.2, 0.5, 0.4, 0.4])
    run_trial(study, optuna_study, [0.1, 0.3], done=False)
    run_trial(study, optuna_study, [0.9], done=False, failed="the loss became nan at step 9")
    trial = optuna_study.ask(study.distributions)
    study.open_trial(trial)
    study.close_trial(optuna_study, trial, None)
    running = optuna_study.ask(study.distributions)
    pretend(study.open_trial(running), [0.3], done=False)
    return study, optuna_study


def test_the_search_begins_with_the_default(searched: tuple[Study, Any]) -> None:
    study, optuna_study = searched
    first = optuna_study.trials[0]
    assert first.params == {"method.margin": 0.2, "method.miner": "distance-weighted"}
    assert Run.from_dict(study.trial_dir(first).read()) == study.base


def test_each_end_is_told_to_optuna(searched: tuple[Study, Any]) -> None:
    study, optuna_study = searched
    complete, stopped, diverged, died, running = optuna_study.trials[:5]
    assert (complete.state, complete.value) == (TrialState.COMPLETE, 0.5)
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {1: 0.1, 2: 0.3})
    assert (diverged.state, diverged.value) == (TrialState.COMPLETE, 0.0)
    assert diverged.user_attrs["reason"] == "the loss became nan at step 9"
    assert (died.state, died.value) == (TrialState.COMPLETE, 0.0)
    assert "died" in died.user_attrs["reason"]
    assert running.state == TrialState.RUNNING
    ended = study.ended(optuna_study)
    assert count(ended) == {"complete": 1, "stopped": 1, "failed": 2}
    assert [t.user_attrs["images"] for t in ended] == [288, 144, 72, 0]
    assert champion(ended).number == 0


def test_what_mlflow_is_told(tmp_path: Path, small_set: Path) -> None:
    study = make_study(tmp_path / "study", small_set)
    optuna_study = study.open_optuna()
    complete = run_trial(study, optuna_study, [0.2, 0.5, 0.4, 0.4])
    stopped = run_trial(study, optuna_study, [0.1, 0.3], done=False)
    failed = run_trial(study, optuna_study, [], done=False, failed="out of memory")
    assert complete[1:] == ("FINISHED", None, True)
    assert stopped[1:] == ("KILLED", "stopped early after epoch 2 of 4", True)
    assert failed[1:] == ("FAILED", "out of memory", True)
    state = tracking.State.read(failed.folder)
    assert state.parent == str(study.folder) and state.name == "trial-0002"
    assert state.params["method.margin"] == optuna_study.trials[2].params["method.margin"]


def test_a_trial_that_was_running_is_asked_for_again(searched: tuple[Study, Any]) -> None:
    """The last test that uses the fixture: it goes on with the search."""
    study, _ = searched
    study = Study.read(study.folder)
    optuna_study = study.open_optuna()
    before = optuna_study.trials[4]
    assert study.requeue(optuna_study) == 2  # of six, four have ended
    again = optuna_study.ask(study.distributions)
    folder = study.open_trial(again)
    assert again.params == before.params and folder.path.name == "0004"
    assert len(folder.records()) == 1, "its metrics are still there"
    pretend(folder, [0.3, 0.6, 0.6, 0.6], done=True)
    study.close_trial(optuna_study, again, {"epoch": 4, "val/map_at_r": 0.6})
    states = [trial.state.name for trial in study.open_optuna().trials]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert study.requeue(optuna_study) == 1
    assert champion(study.ended(optuna_study)).number == 5


def test_a_fault_teaches_the_sampler_nothing_and_is_tried_again(
    tmp_path: Path, small_set: Path
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=3)
    optuna_study = study.open_optuna()
    run_trial(study, optuna_study, [0.4])
    closed = run_trial(study, optuna_study, [0.3], done=False, failed="disk full", fault=True)
    run_trial(study, optuna_study, [0.2])
    folder = study.folder / "trials" / "0001"
    assert closed == Closed(folder, "FAILED", "disk full", final=False)
    assert optuna_study.trials[1].state == TrialState.FAIL
    wrong = r"^1 of 3 trials could not be trained \(disk full\): .* --trials 2 goes on without"
    with pytest.raises(UserError, match=wrong):
        refuse_faults(study, optuna_study)

    assert study.requeue(optuna_study) == 1
    refuse_faults(study, optuna_study)  # as where the user goes on with two trials
    again = optuna_study.ask(study.distributions)
    assert again.params == optuna_study.trials[1].params
    assert study.open_trial(again).path == folder
    pretend(study.trial_dir(again), [0.6], done=True)
    study.close_trial(optuna_study, again, {"epoch": 1, "val/map_at_r": 0.6})
    assert study.requeue(optuna_study) == 0
    numbers = {row.number: row.values for row in study.rows(study.ended(optuna_study))}
    assert numbers == {0: (0.4,), 2: (0.2,), 1: (0.6,)}, "pictures show the folders' names"


def test_a_death_while_trials_are_asked_for_again_loses_none(
    tmp_path: Path, small_set: Path
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=3)
    optuna_study = study.open_optuna()
    for _ in range(2):
        study.open_trial(optuna_study.ask(study.distributions))
    optuna_study.tell(0, state=TrialState.FAIL)  # as far as a killed `requeue` came
    for _ in range(2):
        assert study.requeue(optuna_study) == 3
    waiting = [t for t in optuna_study.trials if t.state == TrialState.WAITING]
    assert [study.trial_dir(t).path.name for t in waiting] == ["0000", "0001"]
    assert optuna_study.ask(study.distributions).params == optuna_study.trials[0].params


def test_what_a_smaller_search_leaves_out_is_ended_in_mlflow(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=1)
    optuna_study = study.open_optuna()
    run_trial(study, optuna_study, [0.4])
    left = study.open_trial(optuna_study.ask(study.distributions)).path
    (left / "checkpoints").mkdir()
    told: list[Any] = []
    monkeypatch.setattr(tracking, "finish", lambda *words: told.append(words))
    finish_left(study, study.ended(optuna_study))
    first = study.folder / "trials" / "0000"
    assert told == [(first, "FINISHED", None), (left, "KILLED", "left out")]
    assert (left / "checkpoints").exists()


def test_a_search_that_its_time_limit_ended_is_not_begun_again(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=3)
    run_trial(study, study.open_optuna(), [0.4])
    study.searched = True
    study.write()
    study = Study.read(study.folder)
    monkeypatch.setattr("flowerray.cluster.tune.ray_session", lambda *_, **__: pytest.fail("Ray"))
    search(study, TrialResources(time_limit=1), quiet=True)

    seen: list[bool] = []
    monkeypatch.setattr("flowerray.cluster.tune.tune", lambda s, *_, **__: seen.append(s.searched))
    monkeypatch.setattr("flowerray.report.study.study_table", str)
    for more in ([], ["--time-limit", "2"], ["--trials", "4"]):
        assert dispatch(["tune", "triplet", "--resume", str(study.folder), *more]) == 0
        study.write()
    assert seen == [True, False, False]


def test_a_resumed_sampler_does_not_repeat_itself(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", tmp_path, sampler="random")

    def draws(asked: int) -> list[float]:
        import optuna

        fresh = optuna.create_study(sampler=study.sampler(asked))
        return [fresh.ask(study.distributions).params["method.margin"] for _ in range(3)]

    assert draws(0) == draws(0)
    assert not set(draws(0)) & set(draws(5))


@pytest.mark.parametrize("name", ["tpe", "random", "nsga2", "cmaes"])
def test_every_sampler_draws(name: Any, tmp_path: Path) -> None:
    import optuna

    study = make_study(tmp_path / "study", tmp_path, sampler=name)
    fresh = optuna.create_study(sampler=study.sampler(0), direction="maximize")
    for value in (0.1, 0.5, 0.3, 0.2, 0.6, 0.4):
        fresh.tell(fresh.ask(study.distributions), value)
    assert len({trial.params["method.margin"] for trial in fresh.trials}) == 6


def test_cmaes_learns_from_trials_that_were_stopped(tmp_path: Path) -> None:
    """Two of three are; a generation has 5 trials."""
    import optuna

    study = make_study(tmp_path / "study", tmp_path, sampler="cmaes")
    fresh = optuna.create_study(sampler=study.sampler(0), direction="maximize")
    for number in range(30):
        trial = fresh.ask(study.distributions)
        value = -abs(trial.params["method.margin"] - 0.3)
        trial.report(value, 1)
        stopped = number % 3 > 0
        fresh.tell(trial, None if stopped else value,
                   state=TrialState.PRUNED if stopped else None)  # fmt: skip
    generations = {
        value for t in fresh.trials for key, value in t.system_attrs.items() if "generation" in key
    }
    assert len(generations) >= 4


def test_nsga2_has_no_pruner_unless_it_is_asked_for(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It learns from trials that came to their end alone."""
    taken: list[str] = []

    def stop(study: Study, *_: Any, **__: Any) -> None:
        taken.append(study.config.pruner)
        raise KeyboardInterrupt

    monkeypatch.setattr("flowerray.cluster.tune.run_study", stop)
    for number, more in enumerate((["nsga2"], ["nsga2", "--pruner", "asha"], ["tpe"])):
        words = tune_words(small_set, out=tmp_path / str(number))
        assert dispatch(["tune", "triplet", *words, "--sampler", *more]) == 130
    assert dispatch(["tune", "triplet", "--resume", str(tmp_path / "0")]) == 130
    assert taken == ["none", "asha", "asha", "none"]


# --- the worker's side -----------------------------------------------------------------------


def a_run(tmp_path: Path) -> RunDir:
    folder = RunDir(tmp_path / "run")
    folder.create(small(tmp_path, epochs=3).to_dict())
    return folder


def test_a_trial_stands_where_its_best_checkpoint_stands(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    pretend(folder, [0.2, 0.5, 0.4], done=True)
    assert history(folder, OBJECTIVES) == [
        {"epoch": 1, "val/map_at_r": 0.2},
        {"epoch": 2, "val/map_at_r": 0.5},
        {"epoch": 3, "val/map_at_r": 0.5},
    ]
    assert images_trained(folder) == 18 * 12
    with pytest.raises(UserError, match="reports no finite val/adversarial_recall_at_1"):
        history(folder, [*OBJECTIVES, "val/adversarial_recall_at_1"])


def test_a_trial_stands_where_equal_attacked_figures_are_told_apart(tmp_path: Path) -> None:
    """Tuning is told of the checkpoint that the training keeps."""
    folder = RunDir(tmp_path / "run")
    folder.create(with_hardening(small(tmp_path, epochs=3), kind="pgd").to_dict())
    reporter, progress = FolderReporter(folder.path), Progress()
    selection = "val/adversarial_recall_at_1"
    for epoch, map_at_r in enumerate((0.2, 0.5, 0.4), start=1):
        metrics = {selection: 0.0, "val/map_at_r": map_at_r}
        note_epoch(progress, metrics, selection)
        reporter.report(epoch, epoch, metrics | {"epoch/seconds": 1.0})
    found = history(folder, [selection, "val/map_at_r"])
    assert [standing["val/map_at_r"] for standing in found] == [0.2, 0.5, 0.5]
    assert progress.best_epoch == 2


def test_the_last_epoch_is_told_once_the_model_is_there(tmp_path: Path) -> None:
    folder, told = a_run(tmp_path), list[dict[str, Any]]()
    reporter = TrialReporter(folder.path, told.append, OBJECTIVES, 3, scheduled=0.0)
    assert reporter.restore() is None
    for epoch, value in enumerate([0.2, 0.5, 0.4], start=1):
        reporter.report(6 * epoch - 3, epoch, {"train/loss": 1.0})
        reporter.report(6 * epoch, epoch, {"epoch/seconds": 1.0, "val/map_at_r": value})
    assert [(t["epoch"], t["val/map_at_r"]) for t in told] == [(1, 0.2), (2, 0.5)]
    assert len(folder.series("trial/start_seconds")) == 1
    assert len(folder.series("trial/report_seconds")) == 3


def test_a_first_try_that_was_cut_off_leaves_no_trace(tmp_path: Path) -> None:
    folder = a_run(tmp_path)
    for _ in range(2):
        reporter = TrialReporter(folder.path, lambda _: None, OBJECTIVES, 3, scheduled=0.0)
        assert reporter.restore() is None
        reporter.report(2, 1, {"train/loss": 1.0})
    assert [r["step"] for r in folder.records()] == [0, 2]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (DivergedError("the loss became nan at step 3."), "the loss became nan at step 3"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"), "out of memory"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried"), "out of memory"),
        (UserError("the training workers failed: CUDA out of memory."), "out of memory"),
        (MemoryError(), "out of memory"),
    ],
)
def test_a_failure_is_told_as_the_worst_value(
    error: Exception, reason: str, tmp_path: Path
) -> None:
    folder, told = a_run(tmp_path), list[dict[str, Any]]()
    pretend(folder, [0.7], done=False)

    def training() -> None:
        raise error

    guarded(folder, OBJECTIVES, told.append, training)
    assert told == [{"epoch": 1, "val/map_at_r": 0.0, "failed": reason}]


@pytest.mark.parametrize("error", [OSError(28, "No space left"), UserError("no RUN folder here.")])
def test_what_the_configuration_is_not_to_blame_for_is_a_fault(
    error: Exception, tmp_path: Path
) -> None:
    folder, told = a_run(tmp_path), list[dict[str, Any]]()

    def training() -> None:
        raise error

    guarded(folder, OBJECTIVES, told.append, training)
    assert told[0]["fault"] is True and told[0]["failed"] == str(error).rstrip(".")


def test_a_collapse_is_a_failure(tmp_path: Path) -> None:
    folder, told = a_run(tmp_path), list[dict[str, Any]]()
    pretend(folder, [0.3, 0.2, 0.1], done=True, spread=0.01)
    guarded(folder, OBJECTIVES, told.append, lambda: None)
    assert told[0]["val/map_at_r"] == 0.0 and "collapsed" in told[0]["failed"]
    assert "fault" not in told[0]


def test_a_finished_trial_is_not_trained_again(tmp_path: Path) -> None:
    folder, told = a_run(tmp_path), list[dict[str, Any]]()
    pretend(folder, [0.2, 0.5, 0.4], done=True)

    def training() -> None:
        raise AssertionError("it is trained already")

    guarded(folder, OBJECTIVES, told.append, training)
    assert told == [{"epoch": 3, "val/map_at_r": 0.5}]


# --- who wins --------------------------------------------------------------------------------


def test_one_objective_takes_the_highest() -> None:
    assert pick([(0.3,), (0.5,), (0.5,), (0.1,)]) == 1


def test_the_pareto_rule() -> None:
    """The front's best adversarial R@1 is 0.50, so 0.45 is enough; (0.8, 0.46) is the cleanest of
    those, though (0.9, 0.44) is cleaner still. (0.79, 0.46) is beaten.
    """
    points = [(0.9, 0.44), (0.79, 0.46), (0.8, 0.46), (0.6, 0.50), (0.5, 0.2)]
    assert pick(points) == 2
    assert pick([(0.9, 0.449), (0.6, 0.50)]) == 1
    assert pick([(0.9, 0.451), (0.6, 0.50)]) == 0


def test_no_complete_trial_names_the_first_failure(tmp_path: Path, small_set: Path) -> None:
    study = make_study(tmp_path / "study", small_set)
    optuna_study = study.open_optuna()
    run_trial(study, optuna_study, [0.4], done=False)
    run_trial(study, optuna_study, [], done=False, failed="out of memory")
    with pytest.raises(UserError, match=r"none of 2 trials .* failed: out of memory"):
        champion(study.ended(optuna_study))


def test_the_gain_is_paired_by_seed() -> None:
    """Differences 0.02, 0.04, 0.06: mean 0.04, standard error 0.02 / sqrt 3, t(2) = 4.3027."""
    found = gain([0.52, 0.64, 0.76], [0.50, 0.60, 0.70])
    half = 4.302653 * 0.02 / 3**0.5
    assert found.mean == pytest.approx(0.04)
    assert (found.low, found.high) == (
        pytest.approx(0.04 - half, abs=1e-6), pytest.approx(0.04 + half, abs=1e-6),
    )  # fmt: skip
    single = gain([0.5], [0.4]).to_dict()
    assert json.loads(json.dumps(single)) == {
        "n": 1, "mean": pytest.approx(0.1), "low": None, "high": None,
    }  # fmt: skip


# --- resources -------------------------------------------------------------------------------


def test_how_many_trials_a_cluster_holds() -> None:
    gpus = TrialResources(cpus_per_trial=2, gpus_per_trial=0.5)
    assert room([{"CPU": 16, "GPU": 1}], gpus) == 2
    assert room([{"CPU": 3}], TrialResources()) == 3
    assert room([{"CPU": 2}], TrialResources(cpus_per_trial=0.5)) == 4
    assert room([{"CPU": 3}, {"CPU": 3}], TrialResources(cpus_per_trial=2)) == 2, "none spans two"
    two = TrialResources(cpus_per_trial=4, gpus_per_trial=2, workers_per_trial=2)
    assert room([{"CPU": 4, "GPU": 1}] * 5, two) == 2, "its workers may"
    with pytest.raises(UserError, match=r"does not fit this cluster of 1 node.* 2 CPUs and 0 GPUs"):
        room([{"CPU": 2}], gpus)
    with pytest.raises(UserError, match=r"cluster of 2 node\(s\) with up to 4 CPUs"):
        room([{"CPU": 4}, {"CPU": 4}], TrialResources(cpus_per_trial=8))
    with pytest.raises(UserError, match="give --workers-per-trial 2 too"):
        TrialResources(gpus_per_trial=2).check()
    with pytest.raises(UserError, match="cannot be shared by 2 workers"):
        TrialResources(workers_per_trial=2, gpus_per_trial=1).check()


def test_workers_that_cannot_share_every_batch_are_refused(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", tmp_path)  # 3 x 4
    refuse_unequal_shares(study, 3)
    study.knobs = {**study.knobs, "train.classes_per_batch": {"choices": [3, 5]}}
    refuse_unequal_shares(study, 4)
    with pytest.raises(UserError, match=r"--workers-per-trial 3: .* P x K = 5 x 4 images"):
        refuse_unequal_shares(study, 3)


def test_a_refused_search_leaves_no_folder(
    tmp_path: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for wrong, said in (
        (["--embedder.backbone", "no_such_net"], "no_such_net"),
        (["--gpus-per-trial", "1.5"], "give --workers-per-trial 2 too"),
        (["--train.classes-per-batch", "100"], "100"),
    ):
        words = tune_words(small_set, out=tmp_path / "study")
        assert dispatch(["tune", "triplet", *words, *wrong]) == 2
        assert said in capsys.readouterr().err
        assert not (tmp_path / "study").exists()


def test_a_resumed_study_keeps_its_resources_and_one_driver(
    tmp_path: Path,
    small_set: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[TrialResources] = []

    def stop(study: Study, resources: TrialResources, quiet: bool) -> None:
        taken.append(resources)
        raise KeyboardInterrupt

    monkeypatch.setattr("flowerray.cluster.tune.run_study", stop)
    said = ["--cpus-per-trial", "4", "--max-concurrent", "8", "--time-limit", "90"]
    words = tune_words(small_set, out=tmp_path / "study")
    assert dispatch(["tune", "triplet", *words, *said]) == 130
    resume = ["tune", "triplet", "--resume", str(tmp_path / "study")]
    assert dispatch(resume) == 130
    assert dispatch([*resume, "--cpus-per-trial", "2"]) == 130
    assert dispatch(resume) == 130
    whole = TrialResources(cpus_per_trial=4, max_concurrent=8, time_limit=90)
    less = whole.model_copy(update={"cpus_per_trial": 2})
    assert taken == [whole, whole, less, less]
    capsys.readouterr()
    before = (tmp_path / "study" / "study.json").read_bytes()
    with only_driver(tmp_path / "study"):
        assert dispatch([*resume, "--trials", "99"]) == 2
    assert (tmp_path / "study" / "study.json").read_bytes() == before
    assert "another process is at work" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("resources", "trials", "bundles"),
    [
        ({"gpus_per_trial": 0.5}, 3, [{"CPU": 1, "GPU": 0.5}] * 3),
        (
            {"cpus_per_trial": 8, "gpus_per_trial": 4, "workers_per_trial": 4},
            2,
            [{"CPU": 2, "GPU": 1}] * 8,
        ),
        ({"cpus_per_trial": 2}, 0, []),
    ],
)
def test_a_growing_cluster_is_asked_for_all_trials_at_once(
    resources: dict[str, Any],
    trials: int,
    bundles: list[dict[str, float]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[dict[str, float]]] = []
    sdk = SimpleNamespace(request_resources=lambda bundles: asked.append(bundles))
    monkeypatch.setitem(sys.modules, "ray.autoscaler.sdk", sdk)
    ask_for_nodes(TrialResources(**resources), trials)
    assert asked == [bundles]
