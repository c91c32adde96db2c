"""The watcher: what it says, and that MLflow's faults and delays reach no training."""

import sqlite3
import time
from pathlib import Path

import pytest

from flowerray.cluster.watch import Ending, Watcher
from flowerray.tracking import server as tracking_server
from flowerray.tracking import sync
from flowerray.tracking.state import State, run_id
from flowerray.training.rundir import FolderReporter, RunDir
from tests.tracking.tracked import RUN, append, client, curve, logged, make_run


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test hears its own warnings."""
    sync._warned.clear()


@pytest.fixture
def untracked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """What MLflow would be told: the endings."""
    told: list[tuple[object, ...]] = []
    for name in ("prepare", "start", "send"):
        monkeypatch.setattr(sync, name, lambda *_, **__: True)
    monkeypatch.setattr(sync, "finish", lambda *words: told.append(words))
    return told


def epoch(folder: RunDir, number: int, value: float, **more: float) -> None:
    metrics = {"epoch/loss": 0.5, "val/map_at_r": value, "epoch/seconds": 2.0, **more}
    FolderReporter(folder.path).report(6 * number, number, metrics)


def test_a_training_alone_says_a_line_an_epoch(
    tmp_path: Path, untracked: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunDir(tmp_path / "run")
    folder.create({})
    epoch(folder, 1, 0.25)  # of an earlier sitting
    with Watcher() as watcher, watcher.running(folder, {}, {}, steps=12):
        epoch(folder, 2, 0.5)
        epoch(folder, 2, 0.5)  # a worker that died shows its epoch again
    assert capsys.readouterr().err == "epoch 2  loss 0.5, val MAP@R 0.5, s 2\n"
    assert untracked == [(folder.path, "FINISHED", None)]


def test_of_many_trainings_each_alarm_says_whose_it_is_and_the_rest_are_ended(
    tmp_path: Path, untracked: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [RunDir(tmp_path / name) for name in ("a", "b", "waiting")]
    with pytest.raises(KeyboardInterrupt), Watcher(quiet=True, line=None) as watcher:
        for folder in folders:
            folder.create({})
            watcher.open(folder, {}, {}, parent=tmp_path)
        alarm = {"alarm/collapse": 1.0, "val/mean_cosine": 0.99, "val/effective_rank": 1.5}
        epoch(folders[0], 1, 0.1, **alarm)
        epoch(folders[1], 1, 0.1)
        watcher.close(Ending(folders[0].path, "FAILED", "nan"))
        raise KeyboardInterrupt
    said = capsys.readouterr().err
    assert "warning: a: the embedding has collapsed (mean cosine 0.99" in said
    assert said.count("\n") == 1, "quiet"
    killed = (folders[1].path, "KILLED", "interrupted")
    assert untracked == [(folders[0].path, "FAILED", "nan"), killed], "none that never began"


def test_the_blocks_own_error_is_the_reason(tmp_path: Path, untracked: list[object]) -> None:
    folder = RunDir(tmp_path / "run")
    with pytest.raises(ValueError), Watcher() as watcher, watcher.running(folder, {}, {}):
        raise ValueError("first line\nsecond")
    assert untracked == [(folder.path, "FAILED", "first line")]


def test_metrics_arrive_while_the_block_runs(runs: Path) -> None:
    run_dir = make_run(runs, records=1)
    with Watcher(every=0.05) as watcher, watcher.running(RunDir(run_dir), RUN, {}):
        append(run_dir, range(2, 4))
        end = time.monotonic() + 20
        whole = (run_dir / "metrics.jsonl").stat().st_size
        while State.read(run_dir).bytes_sent < whole and time.monotonic() < end:
            time.sleep(0.05)
        assert logged(run_dir) == curve(range(1, 4))
        assert client(run_dir).get_run(run_id(run_dir)).info.status == "RUNNING"
    assert client(run_dir).get_run(run_id(run_dir)).info.status == "FINISHED"


def test_a_locked_database_holds_nothing_up(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(tracking_server, "LOCK_SECONDS", 0.3)
    connection = sqlite3.connect(runs / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    begin = time.perf_counter()
    run_dir = make_run(runs, records=2)
    with Watcher(every=0.05) as watcher, watcher.running(RunDir(run_dir), RUN, {}):
        inside = time.perf_counter()
        append(run_dir, range(3, 5))
        assert time.perf_counter() - inside < 0.2  # the caller goes on
        time.sleep(0.5)
    assert time.perf_counter() - begin < 4
    connection.close()
    assert [r.getMessage() for r in caplog.records if "database is locked" in r.getMessage()]
    assert len(caplog.records) == 1


def test_any_fault_of_tracking_passes_by(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(uri: str) -> None:
        raise RuntimeError("anything")

    monkeypatch.setattr(tracking_server, "connect", broken)
    run_dir = RunDir(make_run(runs))
    with pytest.raises(KeyError), Watcher(every=0.01) as watcher, watcher.running(run_dir, RUN, {}):
        time.sleep(0.1)
        raise KeyError("the training's own")
