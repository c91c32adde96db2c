"""Tracking: what MLflow ends up with, and that no fault of it reaches a training."""

import io
import json
import logging
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowerray import tracking, tracking_server
from flowerray.errors import UserError

RUN = {
    "flowerray": "0.1.0",
    "method": {"name": "triplet", "margin": 0.2},
    "data": {"root": None, "protocol": "official"},
    "embedder": {"backbone": "test_efficientnet", "dim": 16, "image_size": 32, "weights": "none"},
    "resources": {"workers": 1},
}


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracking._warned.clear()


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database that `prepare` made once; its migrations take seconds."""
    folder = tmp_path_factory.mktemp("prepared")
    assert tracking.prepare(folder / "run")
    return folder / "mlflow.db"


@pytest.fixture
def runs(tmp_path: Path, database: Path) -> Path:
    """A folder of runs with a database; its experiment `here` keeps artifacts in it."""
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


def make_run(folder: Path, records: int = 0, name: str = "triplet-1") -> Path:
    """A RUN folder of a training under way."""
    run_dir = folder / name
    run_dir.mkdir(parents=True)
    (run_dir / "run.json").write_text(json.dumps(RUN))
    append(run_dir, range(1, records + 1))
    tracking.start(run_dir, name, RUN, {"data.fingerprint": "abc"}, experiment="here")
    return run_dir


def record(step: int, sitting: int = 0) -> str:
    metrics = {"train/loss": 1 / step, "system/cpu_utilization_percentage": 50.0}
    content = {"step": step, "epoch": 1, "time": 1000.5 + step + 100 * sitting, "metrics": metrics}
    return json.dumps(content) + "\n"


def append(run_dir: Path, steps: range, sitting: int = 0) -> None:
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.writelines(record(step, sitting) for step in steps)


def client(run_dir: Path) -> Any:
    return tracking_server.connect(tracking.tracking_uri(run_dir))


def logged(run_dir: Path, metric: str = "train/loss") -> list[tuple[int, float]]:
    run_id = tracking.run_id(run_dir)
    return sorted((m.step, m.value) for m in client(run_dir).get_metric_history(run_id, metric))


def curve(steps: range) -> list[tuple[int, float]]:
    return [(step, 1 / step) for step in steps]


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{free.getsockname()[1]}"


# ---- addresses


def test_the_default_is_an_absolute_database_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking.tracking_uri(Path("runs/a")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    line = f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db"
    monkeypatch.delenv("UV_RUN_RECURSION_DEPTH", raising=False)
    assert tracking.ui_line(Path("runs/a")) == line


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking.tracking_uri(tmp_path / "a") == "http://host:5000" == tracking.ui_line(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    assert tracking.tracking_uri(tmp_path / "a") == f"sqlite:///{tmp_path}/m.db"


def test_a_trial_is_tracked_where_its_study_is(tmp_path: Path) -> None:
    study, trial = tmp_path / "study", tmp_path / "study" / "trials" / "1"
    trial.mkdir(parents=True)
    assert tracking.start(study, "study", {})
    assert tracking.start(trial, "1", {}, parent=study)
    assert tracking.tracking_uri(trial) == f"sqlite:///{tmp_path}/mlflow.db"


def test_importing_and_starting_load_no_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from flowerray import tracking; "
        f"tracking.start(pathlib.Path({str(tmp_path)!r}), 'a', {{}}); "
        "assert not {'mlflow', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- the database


def test_prepare_makes_database_and_experiment(database: Path) -> None:
    with sqlite3.connect(database) as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        query = "SELECT artifact_location FROM experiments WHERE name = 'flowerray'"
        assert connection.execute(query).fetchone() == (f"file://{database.parent}/mlartifacts",)


def test_a_fresh_database_is_opened_by_one_driver_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside: list[int] = []
    most: list[int] = []

    class SlowClient:
        """Stands in for the migrations."""

        def __init__(self) -> None:
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.02)

        def get_experiment_by_name(self, name: str) -> None:
            return None

        def create_experiment(self, name: str, artifact_location: str) -> str:
            inside.pop()
            return "1"

    monkeypatch.setattr(tracking_server, "connect", lambda uri: SlowClient())
    with ThreadPoolExecutor(6) as pool:
        made = list(pool.map(lambda i: tracking.prepare(tmp_path / "runs" / str(i)), range(6)))
    assert made == [True] * 6 and most == [1] * 6


RACE = """
import sys, time, pathlib
from flowerray import tracking
import mlflow
ready, go, run = map(pathlib.Path, sys.argv[1:])
ready.touch()
while not go.exists(): time.sleep(0.01)
sys.exit(not tracking.prepare(run))
"""


@pytest.mark.slow
def test_four_drivers_prepare_at_once(tmp_path: Path) -> None:
    """The same with MLflow itself, whose migrations break each other without a lock."""
    go, runs = tmp_path / "go", tmp_path / "runs"
    ready = [tmp_path / f"ready{i}" for i in range(4)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(file), str(go), str(runs / str(i))],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i, file in enumerate(ready)
    ]
    while not all(file.exists() for file in ready) and all(p.poll() is None for p in started):
        time.sleep(0.05)
    go.touch()
    for process in started:
        out, err = process.communicate(timeout=200)
        assert process.returncode == 0, err
        assert out == "" == err  # neither MLflow's nor alembic's chatter
    with sqlite3.connect(runs / "mlflow.db") as connection:
        query = "SELECT count(*) FROM experiments WHERE name = 'flowerray'"
        assert connection.execute(query).fetchone() == (1,)


FLOW = """
import sys, pathlib
from flowerray import tracking
run = pathlib.Path(sys.argv[1])
with tracking.LiveTracking(run):
    pass
assert tracking.finish(run)
assert tracking.register(run, "flowers", "champion") == "1"
assert tracking.resolve("models:/flowers@champion").suffix == ".pth"
"""


@pytest.mark.slow
def test_mlflow_prints_nothing(tmp_path: Path, export: bytes) -> None:
    """From a fresh database to a registered model, without a line of MLflow's own."""
    run_dir = make_run(tmp_path, records=2)
    (run_dir / "best_model_triplet_loss.pth").write_bytes(export)
    done = subprocess.run(
        [sys.executable, "-c", FLOW, str(run_dir)], cwd=tmp_path, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# ---- what MLflow ends up with


def test_a_run_is_described(runs: Path) -> None:
    run_dir = make_run(runs)
    long = {"note": "x" * 9000, "sizes": [1, 2], "empty": "", "odd name@": 1}
    tracking.start(run_dir, "triplet-1", RUN | long, {"data.fingerprint": "abc"})
    assert tracking.sync(run_dir)
    run = client(run_dir).get_run(tracking.run_id(run_dir))
    params, tags = run.data.params, run.data.tags
    assert params["method.margin"] == "0.2" and params["data.root"] == "null"
    assert params["sizes"] == "[1, 2]" and params["odd name_"] == "1"
    assert len(params["note"]) == 6000 and params["note"].endswith("x...")
    assert tags["data.fingerprint"] == "abc" and tags["flowerray.run"] == str(run_dir)
    assert {"version.torch", "version.flowerray"} <= set(tags)
    if (Path(tracking.__file__).parent.parent / ".git").exists():
        assert len(tags["git_commit"]) == 40
    assert run.info.run_name == "triplet-1" and run.info.status == "RUNNING"


def test_metrics_are_sent_once_and_in_order(runs: Path) -> None:
    run_dir = make_run(runs, records=3)
    assert tracking.sync(run_dir)
    append(run_dir, range(4, 7))
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(record(7)[:20])  # a line that is being written
    assert tracking.sync(run_dir) and tracking.sync(run_dir)
    assert logged(run_dir) == curve(range(1, 7))
    assert len(logged(run_dir, "system/cpu_utilization_percentage")) == 6
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write(record(7)[20:])
    assert tracking.sync(run_dir)
    assert logged(run_dir) == curve(range(1, 8))
    history = client(run_dir).get_metric_history(tracking.run_id(run_dir), "train/loss")
    assert min(point.timestamp for point in history) == 1001500


def test_many_metrics_and_odd_ones(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_server, "METRICS_PER_BATCH", 7)
    run_dir = make_run(runs, records=20)
    odd = {f"recall@{k}": float(k) for k in range(10)} | {"nan": float("nan"), "inf": float("inf")}
    line = {"step": 21, "epoch": 1, "time": 2000.0, "metrics": odd}
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "epo\n')  # a kill cut this one short
        file.write(json.dumps(line) + "\n")
    assert tracking.sync(run_dir)
    assert logged(run_dir) == curve(range(1, 21))
    assert logged(run_dir, "recall_9") == [(21, 9.0)]
    assert np.isnan(logged(run_dir, "nan")[0][1])


@pytest.mark.parametrize("kept", [2, 4])
@pytest.mark.parametrize("again", [3, 8])
def test_a_resume_that_rewrites_metrics_loses_none(runs: Path, kept: int, again: int) -> None:
    run_dir = make_run(runs, records=5)
    assert tracking.sync(run_dir)
    first = tracking.run_id(run_dir)
    (run_dir / "metrics.jsonl").write_text("".join(record(s) for s in range(1, kept + 1)))
    changed = RUN | {"resources": {"workers": 2}}
    tracking.start(run_dir, "triplet-1", changed, experiment="here")
    append(run_dir, range(kept + 1, kept + again + 1), sitting=1)
    assert tracking.sync(run_dir)
    assert tracking.run_id(run_dir) == first
    assert dict(logged(run_dir)) == dict(curve(range(1, max(5, kept + again) + 1)))
    steps = [step for step, _ in logged(run_dir)]
    assert all(steps.count(step) == 1 for step in range(1, kept + 1))  # kept lines are not doubled
    run = client(run_dir).get_run(first)
    assert run.data.tags["resumed.resources.workers"] == "2"
    assert run.data.params["resources.workers"] == "1"


def test_a_run_deleted_in_the_ui_is_sent_whole_again(runs: Path) -> None:
    run_dir = make_run(runs, records=3)
    assert tracking.sync(run_dir)
    first = tracking.run_id(run_dir)
    client(run_dir).delete_run(first)
    append(run_dir, range(4, 5))
    assert tracking.sync(run_dir)
    assert tracking.run_id(run_dir) != first and logged(run_dir) == curve(range(1, 5))


def test_an_experiment_deleted_in_the_ui_is_wanted_again(runs: Path) -> None:
    first = make_run(runs, records=3)
    assert tracking.sync(first)
    api = client(first)
    api.delete_experiment(api.get_run(tracking.run_id(first)).info.experiment_id)
    second = make_run(runs, records=2, name="triplet-2")
    assert tracking.sync(second) and logged(second) == curve(range(1, 3))


def test_a_note_that_a_power_cut_left_empty_is_written_anew(runs: Path) -> None:
    run_dir = make_run(runs, records=2)
    (run_dir / "mlflow.json").write_text("")
    assert tracking.sync(run_dir) and logged(run_dir) == curve(range(1, 3))


def test_the_end_is_told_before_large_files_which_get_their_time(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(runs, records=2)
    assert tracking.sync(run_dir)
    api, limits = client(run_dir), []

    def slow(*_: Any) -> None:
        limits.append(int(os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]))
        raise TimeoutError("no answer")

    monkeypatch.setattr(type(api), "log_artifact", slow)
    before = os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"]
    assert not tracking.finish(run_dir, "FINISHED")
    assert client(run_dir).get_run(tracking.run_id(run_dir)).info.status == "FINISHED"
    assert limits == [tracking_server.UPLOAD_SECONDS] and limits[0] > int(before)
    assert os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == before
    monkeypatch.undo()
    assert tracking.sync(run_dir)
    base = runs / "mlartifacts" / str(tracking.run_id(run_dir)) / "artifacts"
    assert (base / "metrics.jsonl").exists()


def test_trials_are_nested_even_if_the_study_came_later(runs: Path) -> None:
    study, trial = make_run(runs, name="study"), runs / "study" / "1"
    trial.mkdir()
    tracking.start(trial, "1", RUN, parent=study, experiment="here")
    assert tracking.sync(trial) and tracking.sync(study) and tracking.sync(trial)
    tags = client(trial).get_run(tracking.run_id(trial)).data.tags
    assert tags["mlflow.parentRunId"] == tracking.run_id(study)


def test_an_end_sends_files_and_status(runs: Path) -> None:
    run_dir = make_run(runs, records=2)
    (run_dir / "plots").mkdir()
    (run_dir / "plots" / "roc.png").write_bytes(b"png")
    (run_dir / "checkpoints" / "best").mkdir(parents=True)
    (run_dir / "checkpoints" / "best" / "state.pt").write_bytes(b"state")
    assert tracking.finish(run_dir, "FAILED", "the loss is not finite at step 2")
    run = client(run_dir).get_run(tracking.run_id(run_dir))
    assert run.info.status == "FAILED" and "step 2" in run.data.tags["flowerray.reason"]
    base = runs / "mlartifacts" / run.info.run_id / "artifacts"
    names = {"run.json", "metrics.jsonl", "plots/roc.png", "checkpoints/best/state.pt"}
    assert {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} == names

    # Later changes are sent, and only they.
    (base / "run.json").unlink()
    (run_dir / "plots" / "retrieval.png").write_bytes(b"new")
    (run_dir / "plots" / "roc.png").write_bytes(b"changed")
    assert tracking.sync(run_dir)
    names = names - {"run.json"} | {"plots/retrieval.png"}
    assert {str(p.relative_to(base)) for p in base.rglob("*") if p.is_file()} == names
    assert (base / "plots" / "roc.png").read_bytes() == b"changed"
    assert client(run_dir).get_run(run.info.run_id).info.status == "FAILED"

    tracking.start(run_dir, "triplet-1", RUN, experiment="here")  # resumed
    append(run_dir, range(3, 4))
    assert tracking.sync(run_dir)
    assert client(run_dir).get_run(run.info.run_id).info.status == "RUNNING"
    assert tracking.finish(run_dir, "KILLED")
    assert client(run_dir).get_run(run.info.run_id).info.status == "KILLED"


def test_a_run_that_tracking_never_saw_is_sent(runs: Path) -> None:
    run_dir = runs / "old"
    run_dir.mkdir()
    (run_dir / "run.json").write_text(json.dumps(RUN))
    append(run_dir, range(1, 4))
    assert tracking.sync(run_dir, strict=True)
    run = client(run_dir).get_run(tracking.run_id(run_dir))
    assert run.info.run_name == "old" and run.data.params["method.margin"] == "0.2"
    assert run.info.status == "KILLED" and logged(run_dir) == curve(range(1, 4))


def test_no_run_folder(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match="is not a RUN folder"):
            tracking.sync(folder, strict=True)
        assert not tracking.sync(folder)


# ---- faults


def test_a_dead_server_costs_one_warning_and_nothing_is_lost(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed_port())
    begin = time.perf_counter()
    with caplog.at_level(logging.WARNING, logger="flowerray"):
        assert not tracking.prepare(runs / "triplet-1")
        run_dir = make_run(runs, records=2)
        assert not tracking.sync(run_dir)
        with tracking.LiveTracking(run_dir, every=0.05):
            append(run_dir, range(3, 5))
            time.sleep(0.5)
        assert not tracking.finish(run_dir, "FINISHED")
    assert time.perf_counter() - begin < 4
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "Connection refused" in message and f"flowerray track sync {run_dir}" in message
    with pytest.raises(UserError, match="Connection refused"):
        tracking.sync(run_dir, strict=True)

    monkeypatch.delenv("MLFLOW_TRACKING_URI")  # and later, somewhere else
    assert tracking.sync(run_dir, strict=True)
    assert logged(run_dir) == curve(range(1, 5))
    run = client(run_dir).get_run(tracking.run_id(run_dir))
    assert run.info.status == "FINISHED" and run.data.params["method.margin"] == "0.2"


def test_another_address_gets_everything(
    runs: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_dir = make_run(runs, records=3)
    assert tracking.finish(run_dir, "KILLED")
    other = tmp_path_factory.mktemp("other") / "m.db"
    shutil.copy(runs / "mlflow.db", other)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{other}")
    assert tracking.sync(run_dir)
    assert logged(run_dir) == curve(range(1, 4))
    assert client(run_dir).get_run(tracking.run_id(run_dir)).info.status == "KILLED"


@pytest.fixture
def locked(runs: Path) -> Iterator[Path]:
    connection = sqlite3.connect(runs / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield runs
    connection.close()


def test_a_locked_database_holds_nothing_up(
    runs: Path,
    locked: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    request: pytest.FixtureRequest,
) -> None:
    monkeypatch.setattr(tracking_server, "LOCK_SECONDS", 0.3)
    begin = time.perf_counter()
    run_dir = make_run(runs, records=2)
    with tracking.LiveTracking(run_dir, every=0.05):
        inside = time.perf_counter()
        append(run_dir, range(3, 5))
        assert time.perf_counter() - inside < 0.2  # the caller goes on
        time.sleep(0.5)
    assert not tracking.finish(run_dir)
    assert time.perf_counter() - begin < 3
    assert [r.getMessage() for r in caplog.records if "database is locked" in r.getMessage()]
    assert len(caplog.records) == 1


def test_after_the_lock_everything_arrives(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking_server, "LOCK_SECONDS", 0.2)
    run_dir = make_run(runs, records=2)
    with sqlite3.connect(runs / "mlflow.db", isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        assert not tracking.finish(run_dir)
        connection.execute("ROLLBACK")
    assert tracking.sync(run_dir)
    assert logged(run_dir) == curve(range(1, 3))
    assert client(run_dir).get_run(tracking.run_id(run_dir)).info.status == "FINISHED"


def test_live_tracking_sends_while_the_block_runs(runs: Path) -> None:
    run_dir = make_run(runs, records=1)
    with tracking.LiveTracking(run_dir, every=0.05):
        append(run_dir, range(2, 4))
        end = time.monotonic() + 20
        while tracking.State.read(run_dir).lines_sent < 3 and time.monotonic() < end:
            time.sleep(0.05)
    assert logged(run_dir) == curve(range(1, 4))


def test_live_tracking_survives_any_fault_and_the_blocks_own_error_passes(
    runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(uri: str) -> None:
        raise RuntimeError("anything")

    monkeypatch.setattr(tracking_server, "connect", broken)
    run_dir = make_run(runs)
    with pytest.raises(KeyError), tracking.LiveTracking(run_dir, every=0.01):
        time.sleep(0.1)
        raise KeyError("the training's own")


# ---- the model


@pytest.fixture(scope="module")
def export() -> bytes:
    """A real exported file of a tiny embedder with random weights."""
    import torch

    from flowerray.model import Embedder, EmbedderConfig

    config = EmbedderConfig(**RUN["embedder"])  # type: ignore[arg-type]
    file = io.BytesIO()
    content = {
        "embedder": Embedder(config).state_dict(),
        "method": {},
        "run": json.dumps(RUN),
        "threshold": 0.5,
        "classes": ["a", "b"],
    }
    torch.save(content, file)
    return file.getvalue()


def jpegs(n: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    files = []
    for i in range(n):
        pixels = rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(pixels).resize((80 + i, 60)).save(file, "PNG" if i == 0 else "JPEG")
        files.append(file.getvalue())
    return files


def test_the_model_turns_image_files_into_embeddings(
    runs: Path, export: bytes, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import mlflow
    import pandas as pd
    import torch

    import flowerray
    from flowerray import pyfunc
    from flowerray.data.store import eval_image

    run_dir = make_run(runs, records=1)
    path = run_dir / "best_model_triplet_loss.pth"
    path.write_bytes(export)
    assert tracking.finish(run_dir)
    assert tracking.register(run_dir, "flowers", "champion") == "1"
    assert tracking.register(run_dir, "flowers", "champion") == "2"
    run = client(run_dir).get_run(tracking.run_id(run_dir))
    assert len(run.outputs.model_outputs) == 1

    uri = tracking.tracking_uri(run_dir)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.setattr(pyfunc, "BATCH", 2)
    files = jpegs(5)
    state = tracking.State.read(run_dir)
    assert state.model_uri is not None
    embedder = flowerray.load(path)
    images = np.stack([eval_image(file, 32) for file in files])
    with torch.inference_mode():
        expected = embedder(torch.from_numpy(images).float() / 255).numpy()
    for address in (state.model_uri, "models:/flowers@champion", "models:/flowers/1"):
        model = mlflow.pyfunc.load_model(address)
        found = model.predict(pd.DataFrame({"image": files}))
        assert found.dtype == np.float32 and found.shape == (5, 16)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        resolved = tracking.resolve(address)
        assert resolved.name == path.name and resolved.read_bytes() == export
    with monkeypatch.context() as away:  # the database beside the runs is found by itself
        away.delenv("MLFLOW_TRACKING_URI")
        away.setenv("FLOWERRAY_HOME", str(run_dir.parent / "home"))
        away.chdir(run_dir.parent)
        assert tracking.resolve("models:/flowers@champion").read_bytes() == export
        assert "MLFLOW_TRACKING_URI" not in os.environ
    signature = model.metadata.signature
    assert [(c.name, c.type.name) for c in signature.inputs] == [("image", "binary")]
    assert signature.outputs.inputs[0].shape == (-1, 16)
    assert model.predict(pd.DataFrame({"image": []}, dtype=object)).shape == (0, 16)

    folder = tracking.resolve(f"runs:/{run.info.run_id}")
    assert sorted(p.name for p in folder.iterdir()) == [path.name, "metrics.jsonl", "run.json"]
    flowerray.load(folder)
    assert tracking.resolve(f"runs:/{run.info.run_id}/{path.name}").read_bytes() == export
    for missing in ("models:/none@champion", "runs:/0123456789abcdef0123456789abcdef"):
        with pytest.raises(UserError, match="cannot be fetched from MLflow"):
            tracking.resolve(missing)
    with pytest.raises(UserError, match="holds 0 flowerray models"):
        tracking.resolve(f"runs:/{run.info.run_id}/metrics.jsonl")
    assert capfd.readouterr() == ("", "")


def test_resolve_of_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking.resolve(str(tmp_path)) == tmp_path
    with pytest.raises(UserError, match="is not there: give a RUN folder"):
        tracking.resolve(str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="set MLFLOW_TRACKING_URI"):
        tracking.resolve("models:/flowers@champion")


def test_nothing_to_register_is_a_warning(runs: Path, caplog: pytest.LogCaptureFixture) -> None:
    run_dir = make_run(runs)
    tracking.finish(run_dir)
    assert tracking.register(run_dir, "flowers", "champion") is None
    assert "no exported model" in caplog.text


def test_two_writers_of_the_state_keep_each_others_changes(tmp_path: Path) -> None:
    """`finish` notes the end while the live thread notes what it sent."""
    sender, ender = tracking.State.read(tmp_path), tracking.State.read(tmp_path)
    sender.store(tmp_path, run_id="a")
    ender.store(tmp_path, finished="KILLED")
    sender.store(tmp_path, lines_sent=3)
    state = tracking.State.read(tmp_path)
    assert (
        (state.run_id, state.finished, state.lines_sent)
        == ("a", "KILLED", 3)
        == (
            sender.run_id,
            sender.finished,
            sender.lines_sent,
        )
    )


def test_a_folder_of_results_is_shown_with_its_pages(runs: Path) -> None:
    folder = runs / "exploration"
    (folder / "plots").mkdir(parents=True)
    for name in ("index.html", "classes.csv", "plots/sizes.png", "scratch.tmp"):
        (folder / name).write_bytes(b"content")
    assert tracking.log_folder(folder, {"data.root": "x"}, {"images": 480.0}, {"kind": "explore"})
    run = client(folder).get_run(tracking.run_id(folder))
    assert run.info.status == "FINISHED" and run.data.metrics == {"images": 480.0}
    assert run.data.params["data.root"] == "x" and run.data.tags["kind"] == "explore"
    kept = {file.path for file in client(folder).list_artifacts(run.info.run_id)}
    assert kept == {"index.html", "classes.csv", "plots"}
