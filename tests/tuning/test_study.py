"""A study's books, without Ray: its folder, Optuna's history, how trials end, who wins."""

from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState

from flowerray.cli import dispatch
from flowerray.errors import UserError
from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training.run import Run
from flowerray.tuning import command as tune
from flowerray.tuning.command import TrialResources, refuse_faults, search
from flowerray.tuning.confirm import champion, count
from flowerray.tuning.live import finish_left
from flowerray.tuning.study import Closed, Study, StudyConfig
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


def test_a_study_whose_photographs_have_changed_is_refused(
    tmp_path: Path, small_set: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = make_study(tmp_path / "study", small_set)
    sync.start(study.folder, "study", {}, {"dataset/fingerprint": "then"})
    monkeypatch.setattr(tune, "prepare", lambda *_: ({"dataset/fingerprint": "now"}, 1))
    with pytest.raises(UserError, match="splits than when this training began"):
        tune.run_study(study, TrialResources(), quiet=True)


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
    state = State.read(failed.folder)
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
    monkeypatch.setattr(sync, "finish", lambda *words: told.append(words))
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
    monkeypatch.setattr("flowerray.tuning.command.ray_session", lambda *_, **__: pytest.fail("Ray"))
    search(study, TrialResources(time_limit=1), quiet=True)

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

    monkeypatch.setattr("flowerray.tuning.command.run_study", stop)
    for number, more in enumerate((["nsga2"], ["nsga2", "--pruner", "asha"], ["tpe"])):
        words = tune_words(small_set, out=tmp_path / str(number))
        assert dispatch(["tune", "triplet", *words, "--sampler", *more]) == 130
    assert dispatch(["tune", "triplet", "--resume", str(tmp_path / "0")]) == 130
    assert taken == ["none", "asha", "asha", "none"]
