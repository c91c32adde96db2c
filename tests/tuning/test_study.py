"""A study's books, without Ray: its folder, Optuna's history, how trials end, who wins."""

import sqlite3
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from optuna.trial import TrialState

from flowerray.cli import dispatch
from flowerray.cluster.watch import Ending, Watcher
from flowerray.errors import UserError
from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir
from flowerray.tuning import command as tune
from flowerray.tuning.command import TrialResources, end_left, refuse_faults, search
from flowerray.tuning.config import StudyConfig
from flowerray.tuning.confirm import champion, count
from flowerray.tuning.database import make_sampler
from flowerray.tuning.searcher import make_searcher
from flowerray.tuning.space import with_params
from flowerray.tuning.study import Study
from tests.small import small
from tests.tuning.studies import KNOBS, make_study, pretend, run_trial, tune_words

OBJECTIVES = ["val/map_at_r"]


# --- the folder ------------------------------------------------------------------------------


def test_a_study_is_read_as_it_was_written(tmp_path: Path) -> None:
    made = make_study(tmp_path / "study", tmp_path, trials=7, sampler="random")
    read = Study.read(made.folder)
    assert (read.name, read.config, read.base, read.knobs) == (
        made.name, StudyConfig(trials=7, sampler="random"), small(tmp_path, epochs=4), KNOBS,
    )  # fmt: skip
    assert make_study(tmp_path / "other", tmp_path).name != made.name
    with pytest.raises(UserError, match="choose another `out`"):
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


def test_a_study_whose_photographs_have_changed_is_refused(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path / "study", small_set)
    sync.start(study.folder, "study", {}, {"dataset/fingerprint": "then"})
    monkeypatch.setattr(tune, "check_run", lambda *_: ({"dataset/fingerprint": "now"}, 1))
    with pytest.raises(UserError, match="splits than when this training began"):
        tune.resume_study(study, TrialResources())


# --- trials ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory, small_set: Path) -> Study:
    """A study of four trials: complete, stopped, diverged, died; a fifth was running when the
    driver was killed. Nothing was trained.
    """
    folder = tmp_path_factory.mktemp("studies") / "study"
    study = make_study(folder, small_set, trials=6)
    run_trial(study, [0.2, 0.5, 0.4, 0.4])
    run_trial(study, [0.1, 0.3], done=False)
    run_trial(study, [0.9], done=False, failed="the loss became nan at step 9")
    study.close_trial(study.open_trial()[0], None)
    pretend(study.open_trial()[1], [0.3], done=False)
    return study


def test_the_search_begins_with_the_default(searched: Study) -> None:
    study, first = searched, searched.optuna.trials[0]
    assert first.params == {"method.margin": 0.2, "method.miner": "distance-weighted"}
    assert Run.from_dict(study.trial_dir(first).read()) == study.base


def test_each_end_is_told_to_optuna(searched: Study) -> None:
    study = searched
    complete, stopped, diverged, died, running = study.optuna.trials[:5]
    assert (complete.state, complete.value) == (TrialState.COMPLETE, 0.5)
    assert (stopped.state, stopped.intermediate_values) == (TrialState.PRUNED, {1: 0.1, 2: 0.3})
    assert (diverged.state, diverged.value) == (TrialState.COMPLETE, 0.0)
    assert diverged.user_attrs["reason"] == "the loss became nan at step 9"
    assert (died.state, died.value) == (TrialState.COMPLETE, 0.0)
    assert "died" in died.user_attrs["reason"]
    assert running.state == TrialState.RUNNING
    ended = study.ended()
    assert count(ended) == {"complete": 1, "stopped": 1, "failed": 2}
    assert [t.user_attrs["images"] for t in ended] == [288, 144, 72, 0]
    assert champion(ended).number == 0


def test_what_mlflow_is_told(tmp_path: Path, small_set: Path) -> None:
    study = make_study(tmp_path / "study", small_set)
    complete = run_trial(study, [0.2, 0.5, 0.4, 0.4])
    stopped = run_trial(study, [0.1, 0.3], done=False)
    failed = run_trial(study, [], done=False, failed="out of memory")
    assert complete[1:] == ("FINISHED", None)
    assert stopped[1:] == ("KILLED", "stopped early after epoch 2")
    assert failed[1:] == ("FAILED", "out of memory")
    assert failed.folder == study.folder / "trials" / "0002"


def test_a_trial_that_was_running_is_asked_for_again(searched: Study) -> None:
    """The last test that uses the fixture: it goes on with the search."""
    study = Study.read(searched.folder)
    optuna_study = study.optuna
    before = optuna_study.trials[4]
    assert study.requeue() == 2  # of six, four have ended
    again, folder, _ = study.open_trial()
    assert again.params == before.params and folder.path.name == "0004"
    assert len(folder.records()) == 1, "its metrics are still there"
    pretend(folder, [0.3, 0.6, 0.6, 0.6], done=True)
    study.close_trial(again, {"epoch": 4, "val/map_at_r": 0.6})
    states = [trial.state.name for trial in study.optuna.trials]
    assert states == ["COMPLETE", "PRUNED", "COMPLETE", "COMPLETE", "FAIL", "COMPLETE"]
    assert study.requeue() == 1
    assert champion(study.ended()).number == 5


def test_a_fault_teaches_the_sampler_nothing_and_is_tried_again(
    tmp_path: Path, small_set: Path
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=3)
    optuna_study = study.optuna
    run_trial(study, [0.4])
    closed = run_trial(study, [0.3], done=False, failed="disk full", fault=True)
    run_trial(study, [0.2])
    folder = study.folder / "trials" / "0001"
    assert closed == Ending(folder, "FAILED", "disk full")
    assert optuna_study.trials[1].state == TrialState.FAIL
    wrong = r"^1 of 3 trials could not be trained \(disk full\): .* `trials` 2 goes on without"
    with pytest.raises(UserError, match=wrong):
        refuse_faults(study)

    assert study.requeue() == 1
    refuse_faults(study)  # as where the user goes on with two trials
    again, same, _ = study.open_trial()
    assert again.params == optuna_study.trials[1].params and same.path == folder
    pretend(study.trial_dir(again), [0.6], done=True)
    study.close_trial(again, {"epoch": 1, "val/map_at_r": 0.6})
    assert study.requeue() == 0
    numbers = {row.number: row.values for row in study.rows()}
    assert numbers == {0: (0.4,), 2: (0.2,), 1: (0.6,)}, "pictures show the folders' names"


def test_a_death_while_trials_are_asked_for_again_loses_none(
    tmp_path: Path, small_set: Path
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=3)
    optuna_study = study.optuna
    for _ in range(2):
        study.open_trial()
    optuna_study.tell(0, state=TrialState.FAIL)  # as far as a killed `requeue` came
    for _ in range(2):
        assert study.requeue() == 3
    waiting = [t for t in optuna_study.trials if t.state == TrialState.WAITING]
    assert [study.trial_dir(t).path.name for t in waiting] == ["0000", "0001"]
    assert optuna_study.ask(study.distributions).params == optuna_study.trials[0].params


def test_what_a_smaller_search_leaves_out_is_ended_in_mlflow(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=1)
    run_trial(study, [0.4])
    left = study.open_trial()[1].path
    (left / "checkpoints").mkdir()
    told: list[Ending] = []
    end_left(study, SimpleNamespace(close=told.append))  # type: ignore[arg-type]
    first = study.folder / "trials" / "0000"
    assert told == [(first, "FINISHED", None), (left, "KILLED", "left out")]
    assert (left / "checkpoints").exists()


def test_a_search_that_its_time_limit_ended_is_not_begun_again(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=3)
    run_trial(study, [0.4])
    study.searched = True
    study.write()
    study = Study.read(study.folder)
    monkeypatch.setattr("flowerray.tuning.command.ray_session", lambda *_, **__: pytest.fail("Ray"))
    search(study, TrialResources(time_limit=1), Watcher(quiet=True))

    seen: list[bool] = []
    monkeypatch.setattr(
        "flowerray.tuning.command.tune", lambda s, *_, **__: seen.append(s.searched)
    )
    monkeypatch.setattr("flowerray.tuning.pictures.study_table", str)
    for more in ([], ["--time-limit", "2"], ["--trials", "4"]):
        assert dispatch(["tune", "triplet", "--resume", str(study.folder), *more]) == 0
        study.write()
    assert seen == [True, False, False]


def test_a_resumed_sampler_does_not_repeat_itself(tmp_path: Path) -> None:
    study = make_study(tmp_path / "study", tmp_path, sampler="random")

    def draws(asked: int) -> list[float]:
        import optuna

        fresh = optuna.create_study(sampler=make_sampler(study.config, asked))
        return [fresh.ask(study.distributions).params["method.margin"] for _ in range(3)]

    assert draws(0) == draws(0)
    assert not set(draws(0)) & set(draws(5))


@pytest.mark.parametrize("name", ["tpe", "random", "nsga2", "cmaes"])
def test_every_sampler_draws(name: Any, tmp_path: Path) -> None:
    import optuna

    study = make_study(tmp_path / "study", tmp_path, sampler=name)
    fresh = optuna.create_study(sampler=make_sampler(study.config, 0), direction="maximize")
    for value in (0.1, 0.5, 0.3, 0.2, 0.6, 0.4):
        fresh.tell(fresh.ask(study.distributions), value)
    assert len({trial.params["method.margin"] for trial in fresh.trials}) == 6


def test_cmaes_learns_from_trials_that_were_stopped(tmp_path: Path) -> None:
    """Two of three are; a generation has 5 trials."""
    import optuna

    study = make_study(tmp_path / "study", tmp_path, sampler="cmaes")
    fresh = optuna.create_study(sampler=make_sampler(study.config, 0), direction="maximize")
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

    monkeypatch.setattr("flowerray.tuning.command.tune", stop)
    for number, more in enumerate((["nsga2"], ["nsga2", "--pruner", "asha"], ["tpe"])):
        words = tune_words(small_set, out=tmp_path / str(number))
        assert dispatch(["tune", "triplet", *words, "--sampler", *more]) == 130
    assert dispatch(["tune", "triplet", "--resume", str(tmp_path / "0")]) == 130
    assert taken == ["none", "asha", "asha", "none"]


def test_trials_of_other_batches_draw_as_many_images(tmp_path: Path, small_set: Path) -> None:
    """6 classes of 10: an epoch of 3 x 4 draws 72 images, of 2 x 8 draws 96, of 6 x 2 draws 60."""
    study = make_study(tmp_path / "study", small_set, epochs=4)
    assert study.grace == 2 * 72
    train = study.base.train.model_copy(update={"images": 288})
    study.base = study.base.model_copy(update={"train": train})
    sampler = {"train.classes_per_batch": 2, "train.images_per_class": 8}
    runs = [study.base, with_params(study.base, sampler)]
    runs.append(with_params(study.base, {**sampler, "train.classes_per_batch": 6,
                                         "train.images_per_class": 2}))  # fmt: skip
    assert [study.epochs(run) for run in runs] == [4, 3, 5]
    study.see({}, study.targets_N)
    assert study.grace == 2 * 72


# --- optuna.db -------------------------------------------------------------------------------


def test_a_damaged_database_is_made_again_from_the_runs(
    tmp_path: Path, small_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study = make_study(tmp_path / "study", small_set, trials=6)
    endings = [
        run_trial(study, [0.2, 0.5, 0.4, 0.4]),
        run_trial(study, [0.1, 0.3], done=False),
        run_trial(study, [0.9], done=False, failed="the loss became nan at step 9"),
    ]
    for ending in endings:
        State().store(ending.folder, finished=ending.status, reason=ending.reason)
    running, folder, _ = study.open_trial()
    pretend(folder, [0.3], done=False)
    before = {t.user_attrs["folder"]: (t.state, t.params, t.values, t.intermediate_values)
              for t in study.ended()}  # fmt: skip
    images = [trial.user_attrs["images"] for trial in study.ended()]

    file = study.folder / "optuna.db"
    whole = file.read_bytes()
    for damaged in (b"", whole[:100], whole[: len(whole) // 2], b"no database" * 99):
        file.write_bytes(damaged)
        again = Study.read(study.folder)
        found = {t.user_attrs["folder"]: (t.state, t.params, t.values, t.intermediate_values)
                 for t in again.ended()}  # fmt: skip
        assert found == before
        assert [trial.user_attrs["images"] for trial in again.ended()] == images
        assert again.requeue() == 3
        trial, asked, _ = again.open_trial()
        assert (trial.params, asked.path) == (running.params, folder.path)
        said = capsys.readouterr().err
        assert "is damaged" in said and "read back" in said and said.count("\n") == 1


def test_a_database_that_stays_locked_is_one_sentence_and_loses_nothing(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flowerray.tuning.study.LOCK_SECONDS", 0.05)
    study = make_study(tmp_path / "study", small_set, trials=2)
    trial, folder, _ = study.open_trial()
    pretend(folder, [0.2, 0.5], done=True)
    other = sqlite3.connect(study.folder / "optuna.db", isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(UserError, match=r"cannot be used .*locked.* `resume` the study"):
        study.close_trial(trial, {"epoch": 2, "val/map_at_r": 0.5})
    assert study.fault is not None
    other.execute("ROLLBACK")
    with pytest.raises(UserError, match="locked"):
        study.open_trial()  # nothing more is proposed in this sitting

    again = Study.read(study.folder)
    assert again.requeue() == 2
    trial, same, _ = again.open_trial()
    assert same.path == folder.path
    again.close_trial(trial, {"epoch": 2, "val/map_at_r": 0.5})
    assert [t.value for t in again.ended()] == [0.5]


def test_the_searcher_asks_tells_and_stops_at_a_fault(tmp_path: Path, small_set: Path) -> None:
    study = make_study(tmp_path / "study", small_set, trials=2)
    study.tags = {"dataset/fingerprint": "x"}
    opened: list[Any] = []
    closed: list[Any] = []
    said: list[str] = []
    watcher = SimpleNamespace(
        open=lambda *words, **more: opened.append((words, more)),
        close=closed.append, say=said.append,
    )  # fmt: skip
    wanted: list[int] = []
    searcher = make_searcher(study, watcher, 2, wanted.append)  # type: ignore[arg-type]
    told = searcher.suggest("one")
    assert told["folder"] == str(study.folder / "trials" / "0000") and told["epochs"] == 4
    (((folder, params, tags), more),) = opened
    assert (more["name"], more["parent"], tags["kind"]) == ("trial-0000", study.folder, "trial")
    assert params["method"]["margin"] == 0.2
    pretend(folder, [0.2, 0.5], done=True)
    (folder.path / "checkpoints").mkdir()
    searcher.on_trial_complete("one", {"epoch": 2, "val/map_at_r": 0.5})
    searcher.on_trial_complete("one", {"epoch": 2, "val/map_at_r": 0.5})  # Tune may say it twice
    assert closed == [Ending(folder.path)] and wanted == [1]
    assert said == ["trial 0000  complete (1 of 2; best val MAP@R so far 0.500)"]
    assert not (folder.path / "checkpoints").exists()
    assert [value for _, value in RunDir(study.folder).series("study/best_val_map_at_r")] == [0.5]
    study.fault = UserError("locked")
    assert searcher.suggest("two") == type(searcher).FINISHED
