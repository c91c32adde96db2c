"""Tracking: what MLflow ends up with, and that no fault of it reaches a training."""

import json
import logging
import os
import shutil
import sqlite3
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flowerray.cli import dispatch
from flowerray.errors import UserError
from flowerray.tracking import server as tracking_server
from flowerray.tracking import sync
from flowerray.tracking.state import State, run_id, tracking_uri
from tests.tracking.tracked import RUN, append, client, closed_port, curve, logged, make_run, record

# ---- what MLflow ends up with


def test_a_run_is_described(runs: Path) -> None:
    run_dir = make_run(runs)
    long = {"note": "x" * 9000, "sizes": [1, 2], "empty": "", "odd name@": 1}
    sync.start(run_dir, "triplet-1", RUN | long, {"data.fingerprint": "abc"})
    assert sync.send(run_dir)
    run = client(run_dir).get_run(run_id(run_dir))
    params, tags = run.data.params, run.data.tags
    assert params["method.margin"] == "0.2" and params["data.root"] == "null"
    assert params["sizes"] == "[1, 2]" and params["odd name_"] == "1"
    assert len(params["note"]) == 6000 and params["note"].endswith("x...")
    assert tags["data.fingerprint"] == "abc" and tags["flowerray.training.run"] == str(run_dir)
    assert {"version.torch", "version.flowerray"} <= set(tags)
    if (Path(sync.__file__).parent.parent / ".git").exists():
        assert len(tags["git_commit"].removesuffix("-dirty")) == 40
        assert len(tags["mlflow.source.git.commit"]) == 40
    assert run.info.run_name == "triplet-1" and run.info.status == "RUNNING"


def test_metrics_are_sent_once_and_in_order(runs: Path) -> None:
    run_dir = make_run(runs, records=3)
    assert sync.send(run_dir)
    append(run_dir, range(4, 7))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(record(7)[:20])  # a line that is being written
    assert sync.send(run_dir) and sync.send(run_dir)
    assert logged(run_dir) == curve(range(1, 7))
    assert len(logged(run_dir, "system/cpu_utilization_percentage")) == 6
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(record(7)[20:])
    assert sync.send(run_dir)
    assert logged(run_dir) == curve(range(1, 8))
    history = client(run_dir).get_metric_history(run_id(run_dir), "train/loss")
    assert min(point.timestamp for point in history) == 1001500


def test_many_metrics_and_odd_ones(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_server, "METRICS_PER_BATCH", 7)
    run_dir = make_run(runs, records=20)
    odd = {f"recall@{k}": float(k) for k in range(10)} | {"nan": float("nan"), "inf": float("inf")}
    line = {"step": 21, "epoch": 1, "time": 2000.0, "metrics": odd}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "epo\n')  # a kill cut this one short
        file.write(json.dumps(line) + "\n")
    assert sync.send(run_dir)
    assert logged(run_dir) == curve(range(1, 21))
    assert logged(run_dir, "recall_9") == [(21, 9.0)]
    assert np.isnan(logged(run_dir, "nan")[0][1])


@pytest.mark.parametrize("kept", [2, 4])
@pytest.mark.parametrize("again", [3, 8])
def test_a_resume_that_rewrites_metrics_loses_none(runs: Path, kept: int, again: int) -> None:
    run_dir = make_run(runs, records=5)
    assert sync.send(run_dir)
    first = run_id(run_dir)
    (run_dir / "metrics.jsonl").write_text("".join(record(s) for s in range(1, kept + 1)))
    changed = RUN | {"resources": {"workers": 2}}
    sync.start(run_dir, "triplet-1", changed, experiment="here")
    append(run_dir, range(kept + 1, kept + again + 1), sitting=1)
    assert sync.send(run_dir)
    assert run_id(run_dir) == first
    assert dict(logged(run_dir)) == dict(curve(range(1, max(5, kept + again) + 1)))
    steps = [step for step, _ in logged(run_dir)]
    assert all(steps.count(step) == 1 for step in range(1, kept + 1))  # kept lines are not doubled
    run = client(run_dir).get_run(first)
    assert run.data.tags["resumed.resources.workers"] == "2"
    assert run.data.params["resources.workers"] == "1"


def test_a_run_deleted_in_the_ui_is_sent_whole_again(runs: Path) -> None:
    run_dir = make_run(runs, records=3)
    assert sync.send(run_dir)
    first = run_id(run_dir)
    client(run_dir).delete_run(first)
    append(run_dir, range(4, 5))
    assert sync.send(run_dir)
    assert run_id(run_dir) != first and logged(run_dir) == curve(range(1, 5))


def test_an_experiment_deleted_in_the_ui_is_wanted_again(runs: Path) -> None:
    first = make_run(runs, records=3)
    assert sync.send(first)
    api = client(first)
    api.delete_experiment(api.get_run(run_id(first)).info.experiment_id)
    second = make_run(runs, records=2, name="triplet-2")
    assert sync.send(second) and logged(second) == curve(range(1, 3))


def test_a_note_that_a_power_cut_left_empty_is_written_anew(runs: Path) -> None:
    run_dir = make_run(runs, records=2)
    (run_dir / "mlflow.json").write_text("")
    assert sync.send(run_dir) and logged(run_dir) == curve(range(1, 3))


def test_the_end_is_told_before_large_files_which_get_their_time(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(runs, records=2)
    assert sync.send(run_dir)
    api, limits = client(run_dir), []

    def slow(*_: Any) -> None:
        limits.append(int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(api), "log_artifact", slow)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", before := "7")
    assert not sync.finish(run_dir, "FINISHED")
    assert client(run_dir).get_run(run_id(run_dir)).info.status == "FINISHED"
    assert limits == [tracking_server.UPLOAD_SECONDS] and limits[0] > int(before)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == before
    assert not sync.send(run_dir) and len(limits) == 2
    assert sync.finish(run_dir, "KILLED") and len(limits) == 2, "Ctrl-C waited for uploads"
    monkeypatch.undo()
    assert sync.send(run_dir)
    base = runs / "mlartifacts" / str(run_id(run_dir)) / "artifacts"
    assert (base / "metrics.jsonl").exists()


def test_trials_are_nested_even_if_the_study_came_later(runs: Path) -> None:
    study, trial = make_run(runs, name="study"), runs / "study" / "1"
    trial.mkdir()
    sync.start(trial, "1", RUN, parent=study, experiment="here")
    assert sync.send(trial) and sync.send(study) and sync.send(trial)
    tags = client(trial).get_run(run_id(trial)).data.tags
    assert tags["mlflow.parentRunId"] == run_id(study)


def test_track_sync_sends_a_study_with_its_trials(runs: Path) -> None:
    study = make_run(runs, records=1, name="study")
    trials = [make_run(study / "trials", records=2, name=name) for name in ("0000", "0001")]
    for trial in trials:
        sync.start(trial, trial.name, RUN, parent=study, experiment="here")
    assert dispatch(["track", "sync", str(study)]) == 0
    for trial in trials:
        tags = client(trial).get_run(run_id(trial)).data.tags
        assert tags["mlflow.parentRunId"] == run_id(study)
        assert logged(trial) == curve(range(1, 3))


def test_a_later_tag_leaves_the_end_as_it_was(runs: Path) -> None:
    run_dir = make_run(runs, records=1)
    assert sync.finish(run_dir, "KILLED", "stopped early")
    before = client(run_dir).get_run(run_id(run_dir)).info
    time.sleep(0.01)
    state = State.read(run_dir)
    state.store(run_dir, tags={**state.tags, "flowerray.best": "true"}, described=False)
    assert sync.send(run_dir)
    run = client(run_dir).get_run(run_id(run_dir))
    assert run.data.tags["flowerray.best"] == "true"
    assert (run.info.status, run.info.end_time) == ("KILLED", before.end_time)


def test_an_end_sends_files_and_status(runs: Path) -> None:
    run_dir = make_run(runs, records=2)
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "roc.png").write_bytes(b"png")
    (run_dir / "checkpoints" / "best").mkdir(parents=True)
    (run_dir / "checkpoints" / "best" / "state.pt").write_bytes(b"state")
    assert sync.finish(run_dir, "FAILED", "the loss is not finite at step 2")
    run = client(run_dir).get_run(run_id(run_dir))
    assert run.info.status == "FAILED" and "step 2" in run.data.tags["flowerray.reason"]
    base = runs / "mlartifacts" / run.info.run_id / "artifacts"
    names = {"run.json", "metrics.jsonl", "plots/roc.png", "checkpoints/best/state.pt"}
    assert {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} == names

    # Later changes are sent, and only they.
    (base / "run.json").unlink()
    (run_dir / "plots" / "retrieval.png").write_bytes(b"new")
    (run_dir / "plots" / "roc.png").write_bytes(b"changed")
    assert sync.send(run_dir)
    names = names - {"run.json"} | {"plots/retrieval.png"}
    assert {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} == names
    assert (base / "plots" / "roc.png").read_bytes() == b"changed"
    assert client(run_dir).get_run(run.info.run_id).info.status == "FAILED"

    sync.start(run_dir, "triplet-1", RUN, experiment="here")  # resumed
    append(run_dir, range(3, 4))
    assert sync.send(run_dir)
    assert client(run_dir).get_run(run.info.run_id).info.status == "RUNNING"
    assert sync.finish(run_dir, "KILLED")
    assert client(run_dir).get_run(run.info.run_id).info.status == "KILLED"


def test_a_run_that_tracking_never_saw_is_sent(runs: Path) -> None:
    run_dir = runs / "old"
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps(RUN))
    append(run_dir, range(1, 4))
    assert sync.send(run_dir, strict=True)
    run = client(run_dir).get_run(run_id(run_dir))
    assert run.info.run_name == "old" and run.data.params["method.margin"] == "0.2"
    assert run.info.status == "KILLED" and logged(run_dir) == curve(range(1, 4))


def test_no_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is not a RUN folder"):
            sync.send(folder, strict=True)
        assert not sync.send(folder)


# ---- faults


def test_a_dead_server_costs_one_warning_and_nothing_is_lost(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed_port())
    begin = time.perf_counter()
    with caplog.at_level(logging.WARNING, logger="flowerray"):
        assert not sync.prepare(runs / "triplet-1")
        run_dir = make_run(runs, records=2)
        assert not sync.send(run_dir)
        append(run_dir, range(3, 5))
        assert not sync.finish(run_dir, "FINISHED")
    assert time.perf_counter() - begin < 4
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "Connection refused" in message and f"flowerray track sync {run_dir}" in message
    with pytest.raises(UserError, match="Connection refused"):
        sync.send(run_dir, strict=True)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # and later, somewhere else
    assert sync.send(run_dir, strict=True)
    assert logged(run_dir) == curve(range(1, 5))
    run = client(run_dir).get_run(run_id(run_dir))
    assert run.info.status == "FINISHED" and run.data.params["method.margin"] == "0.2"


def test_another_address_gets_everything(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(runs, records=3)
    assert sync.finish(run_dir, "KILLED")
    other = tmp_path_factory.mktemp("other") / "m.db"
    shutil.copy(runs / "mlflow.db", other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert sync.send(run_dir)
    assert logged(run_dir) == curve(range(1, 4))
    assert client(run_dir).get_run(run_id(run_dir)).info.status == "KILLED"


def test_after_the_lock_everything_arrives(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_server, "LOCK_SECONDS", 0.2)
    run_dir = make_run(runs, records=2)
    with sqlite3.connect(runs / "mlflow.db", isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert not sync.finish(run_dir)
        connection.execute("ROLLBACK")
    assert sync.send(run_dir)
    assert logged(run_dir) == curve(range(1, 3))
    assert client(run_dir).get_run(run_id(run_dir)).info.status == "FINISHED"


def test_nothing_to_register_is_a_warning(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = make_run(runs)
    sync.finish(run_dir)
    assert sync.register(run_dir, "flowers", "champion") is None
    assert "no exported model" in caplog.text


def test_two_writers_of_the_state_keep_each_others_changes(tmp_path: Path) -> None:
    """`finish` notes the end while the live thread notes what it sent."""
    sender, ender = State.read(tmp_path), State.read(tmp_path)
    sender.store(tmp_path, run_id="a")
    ender.store(tmp_path, finished="KILLED")
    sender.store(tmp_path, bytes_sent=3)
    state = State.read(tmp_path)
    assert state == sender
    assert (state.run_id, state.finished, state.bytes_sent) == ("a", "KILLED", 3)


@pytest.mark.parametrize("text", ["[]", "null", '{"params": 3}', "[" * 20_000])
def test_a_damaged_note_is_set_aside(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.json").write_text(text)
    assert State.read(tmp_path) == State()
    assert "mlflow.json.damaged" in capsys.readouterr().err
    assert (tmp_path / "mlflow.json.damaged").exists()


def test_a_run_that_is_its_own_parent_has_an_address(tmp_path: Path) -> None:
    for child, parent in [("a", "b"), ("b", "a"), ("c", "c")]:
        (tmp_path / child).mkdir()
        State().store(tmp_path / child, parent=str(tmp_path / parent))
        assert tracking_uri(tmp_path / child).endswith("/mlflow.db")


def test_a_folder_of_results_is_shown_with_its_pages(runs: Path) -> None:
    folder = runs / "exploration"
    (folder / "plots").mkdir(parents=True)
    for name in ("index.html", "classes.csv", "plots/sizes.png", "scratch.tmp"):
        (folder / name).write_bytes(b"content")
    assert sync.log_folder(folder, {"data.root": "x"}, {"images": 480.0}, {"kind": "explore"})
    run = client(folder).get_run(run_id(folder))
    assert run.info.status == "FINISHED" and run.data.metrics == {"images": 480.0}
    assert run.data.params["data.root"] == "x" and run.data.tags["kind"] == "explore"
    kept = {file.path for file in client(folder).list_artifacts(run.info.run_id)}
    assert kept == {"index.html", "classes.csv", "plots"}
