"""Studies of heads: trials in memory that equal RUNs, ASHA's books, a search through Ray."""

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from optuna.trial import TrialState

from flowerray.cli import dispatch
from flowerray.cluster.worker import train_worker
from flowerray.errors import UserError
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir
from flowerray.tuning.command import TrialResources, check_resources
from flowerray.tuning.heads import Rungs, features, train_head
from flowerray.tuning.space import HEAD, search_space
from flowerray.tuning.study import Study
from flowerray.tuning.trial import MAP_AT_R
from tests.small import small
from tests.training.test_head import head_run
from tests.tuning.studies import make_study, tune_words

LONG = 2**30


def trained(run: Run, out: Path) -> dict[str, Any]:
    """Into a RUN, without MLflow."""
    RunDir(out).create(run.to_dict())
    return train_worker(run, FolderReporter(out), torch.device("cpu"))


def head_study(out: Path, root: Path, **more: Any) -> Study:
    study = make_study(out, root, trials=3)
    study.base = head_run(root, "center", **more)
    return study


@pytest.mark.parametrize("start", ["orthogonal", "pca"])
def test_a_trial_is_the_training_of_a_run(start: str, small_set: Path, tmp_path: Path) -> None:
    study = head_study(tmp_path / "study", small_set, start=start)
    kept = features(study)
    trained(study.base, tmp_path / "run")
    reached = [value for _, value in RunDir(tmp_path / "run").series(MAP_AT_R)]
    best = np.maximum.accumulate(reached).tolist()
    for _ in range(2):  # the second one finds the embedder as the first has left it
        told = train_head(kept, study.base.to_dict(), {}, 1)
        assert [known[MAP_AT_R] for known in told.standings] == best
        assert told.reason is None
    assert not (study.folder / "trials").exists()


def test_a_trial_goes_on_from_another_run_as_a_run_does(
    small_set: Path, small_run: Path, tmp_path: Path
) -> None:
    study = head_study(tmp_path / "study", small_set)
    study.base = head_run(small_set).model_copy(update={"init": small_run})
    told = train_head(features(study), study.base.to_dict(), {}, 1)
    reached = trained(study.base, tmp_path / "run")
    assert told.standings[-1][MAP_AT_R] == reached["val_map_at_r"]


def test_a_trial_below_a_cutoff_stops_and_one_that_diverges_says_so(
    small_set: Path, tmp_path: Path
) -> None:
    study = head_study(tmp_path / "study", small_set)
    kept, run = features(study), study.base.to_dict()
    an_epoch = train_head(kept, run, {}, 1).standings[0]["images"]
    run["train"]["images"] = LONG
    told = train_head(kept, run, {an_epoch + 1: 0.999, LONG // 2: 0.0}, 1)
    assert told.reason == "stopped early after epoch 2"
    run["train"]["images"] = 2 * an_epoch
    assert train_head(kept, run, {an_epoch + 1: 0.999}, 1).reason is None, "it is at its end"
    run["method"]["center_weight"] = 1e300
    reason = train_head(kept, run, {}, 1).reason
    assert reason is not None and "the loss became" in reason


def test_rungs_keep_the_best_third() -> None:
    rungs = Rungs(grace=100, images=1000)
    assert rungs.cutoffs() == {}
    rng = np.random.default_rng(0)
    curves = [dict(zip((90, 180, 270, 360), np.sort(rng.random(4)), strict=True)) for _ in range(9)]
    for curve in curves:
        rungs.add(curve)
    cutoffs = rungs.cutoffs()
    assert set(cutoffs) == {100, 300}, "nobody came to 900"
    for rung, images in ((100, 180), (300, 360)):
        assert sum(curve[images] >= cutoffs[rung] for curve in curves) == 3


def test_the_space_of_a_head(small_set: Path) -> None:
    """What needs the backbone, or other views for each trial, is not searched."""
    run = head_run(small_set, "center")
    knobs = search_space(run, ["train.weight_decay"], 6, 60)
    assert {"method.scale", "train.lr", "embedder.start"} <= knobs.keys() <= {
        *HEAD, "method.scale", "method.center_weight", "method.center_rate",
    } - {"train.weight_decay"}  # fmt: skip
    begun = run.model_copy(update={"init": small_set})
    assert "embedder.start" not in search_space(begun, [], 6, 60)
    assert "augment.strength" in search_space(small(small_set), [], 6, 60)


def test_what_a_study_of_heads_refuses(
    small_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match="a second of one worker"):
        check_resources(head_run(small_set), TrialResources(workers_per_trial=2))
    words = tune_words(small_set, out=tmp_path / "study", then_all=2)
    assert dispatch(["tune", "triplet", *words]) == 2
    assert "add --embedder.train head" in capsys.readouterr().err
    assert not (tmp_path / "study").exists()


def test_a_damaged_database_of_heads_is_one_sentence(small_set: Path, tmp_path: Path) -> None:
    study = head_study(tmp_path / "study", small_set)
    (study.folder / "optuna.db").write_bytes(b"no database")
    with pytest.raises(UserError, match="is damaged .*: begin anew"):
        study.requeue()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_search_of_heads_goes_on_and_then_trains_all(
    small_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    out = tmp_path / "study"
    words = tune_words(
        small_set, out=out, embedder__train="head", data__views=2, train__lr=1e-2,
        trials=5, confirm_seeds=0, then_all=1,
    )  # fmt: skip
    assert dispatch(["tune", "triplet", *words]) == 0
    again = ["tune", "triplet", "--resume", str(out), "--trials", "8", "--confirm-seeds", "0"]
    assert dispatch(again) == 0

    study = Study.read(out)
    trials = study.optuna.trials
    assert len(trials) == 8 and {t.state for t in trials} <= {
        TrialState.COMPLETE,
        TrialState.PRUNED,
    }
    assert len({str(t.params) for t in trials}) == 8
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    with (out / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["trial"] for row in rows] == [str(n) for n in range(8)]
    best = max(complete, key=lambda trial: trial.value)
    head = study.trial_dir(best)
    assert max(value for _, value in head.series(MAP_AT_R)) == best.value, "trained again, as a RUN"
    full = RunDir(out / "all" / head.path.name)
    run = Run.from_dict(full.read())
    assert run.embedder.train == "all" and run.init == head.path and full.finished
    assert run.train.lr == 1e-4 and run.train.epochs == 15
    client = MlflowClient()
    shown = client.search_runs(["1"])
    assert {"study", head.path.name} <= {run.info.run_name for run in shown}
    assert len(shown) < 1 + 8
