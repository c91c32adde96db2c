"""Where MLflow is, what it may be told, and that no password is shown."""

import os
import shlex
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import sqlalchemy

from flowerray.errors import UserError
from flowerray.tracking import address, registry, sync
from flowerray.tracking import server as tracking_server
from flowerray.tracking.state import State, tracking_uri, ui_line
from tests.tracking.tracked import client, closed_port, curve, logged, make_run


def test_the_default_is_an_absolute_database_beside_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert tracking_uri(Path("runs/a")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    line = f"mlflow ui --backend-store-uri sqlite:///{tmp_path}/runs/mlflow.db"
    assert ui_line(Path("runs/a")) == line


def test_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host:5000")
    assert tracking_uri(tmp_path / "a") == "http://host:5000" == ui_line(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///m.db")
    assert tracking_uri(tmp_path / "a") == f"sqlite:///{tmp_path}/m.db"


def test_a_servers_password_is_not_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", closed_port().replace("//", "//bob:s3cret@"))
    run_dir = make_run(tmp_path)
    assert not sync.send(run_dir)
    assert "bob:***@127.0.0.1" in caplog.text and "bob:***@127.0.0.1" in ui_line(run_dir)
    with pytest.raises(UserError) as strict:
        sync.send(run_dir, strict=True)
    with pytest.raises(UserError) as other:
        registry.resolve("models:/flowers@champion")
    assert "s3cret" not in f"{caplog.text}{ui_line(run_dir)}{strict.value}{other.value}"


@pytest.mark.parametrize("password", ["p[w", "a/b@c", "p%w:]?#", "s3cret"])
@pytest.mark.parametrize("kind", ["http", "postgresql"])
def test_no_password_is_a_traceback_shown_or_stored(
    kind: str, password: str, runs: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    place = closed_port().removeprefix("http://")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"{kind}://bob:{password}@{place}")
    run_dir = make_run(runs)
    begin = time.perf_counter()
    assert not sync.finish(run_dir)
    assert time.perf_counter() - begin < 3  # MLflow alone tries a dead database for 100 s
    State().store(run_dir, tracking_uri=address.kept(tracking_uri(run_dir)), run_id="a")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    said = caplog.text + ui_line(run_dir) + (run_dir / "mlflow.json").read_text()
    assert "Connection refused" in caplog.text and f"bob:***@{place}" in caplog.text
    assert password not in said and urlsplit(tracking_uri_of(run_dir)).hostname == "127.0.0.1"


def tracking_uri_of(run_dir: Path) -> str:
    return str(State.read(run_dir).tracking_uri)


def test_libraries_get_the_password_that_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    for password in ("p[w", "a/b@c", "p%w:]?#", "already%20escaped"):
        url = sqlalchemy.make_url(address.usable(f"postgresql://bob:{password}@host:1/db"))
        assert (url.username, url.password) == ("bob", unquote(password))
        assert (url.host, url.port, url.database) == ("host", 1, "db")
    assert address.usable("http://host:5000/a@b") == "http://host:5000/a@b"


def test_nothing_goes_to_a_server_that_only_the_run_names(
    runs: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Somebody else's RUN would decide who gets the user's token."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "the-users")
    monkeypatch.setattr(socket, "create_connection", lambda *_: pytest.fail("it was asked"))
    run_dir = make_run(runs, records=1)
    State.read(run_dir).store(run_dir, tracking_uri="http://evil.example", run_id="a" * 32)
    assert not sync.finish(run_dir) and not sync.prepare(run_dir)
    assert "if you trust that address, set MLFLOW_TRACKING_URI to it" in caplog.text
    assert "http://evil.example" in ui_line(run_dir)
    with pytest.raises(UserError, match="evil.example"):
        sync.send(run_dir, strict=True)


def test_nothing_goes_to_a_database_or_a_parent_that_only_the_run_names(runs: Path) -> None:
    run_dir = make_run(runs, records=1)
    theirs = runs.parent / "theirs.db"
    theirs.touch()
    State.read(run_dir).store(run_dir, tracking_uri=f"sqlite:///{theirs}", run_id="a" * 32)
    State.read(run_dir).store(run_dir, parent=str(runs.parent / "elsewhere" / "study"))
    assert tracking_uri(run_dir) == f"sqlite:///{runs}/mlflow.db"


def test_links_are_not_followed_to_mlflow(runs: Path) -> None:
    run_dir = make_run(runs, records=1)
    (run_dir / "plots").mkdir()
    (runs.parent / "secret").write_text("secret")
    (run_dir / "plots" / "a.png").symlink_to(runs.parent / "secret")
    assert sync.finish(run_dir)
    assert not list((runs / "mlartifacts").rglob("a.png"))


def test_everything_stays_beside_the_run_whatever_its_folder_is_called(tmp_path: Path) -> None:
    name = "C# e?f a%20b 50% ü&=+ at@host:3"
    run_dir = make_run(tmp_path / name / "runs", records=2)
    assert sync.finish(run_dir)
    assert logged(run_dir) == curve(range(1, 3))
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name / "runs" / "mlflow.db").exists()
    assert list((tmp_path / name / "runs" / "mlartifacts").rglob("metrics.jsonl"))
    url = sqlalchemy.make_url(shlex.split(ui_line(run_dir))[-1])
    assert url.database == str(tmp_path / name / "runs" / "mlflow.db")


def test_the_host_programs_environment_stays(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in tracking_server.ENVIRONMENT:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_LOGGING_LEVEL", "INFO")
    before = dict(os.environ)
    seen: list[str | None] = []
    api = client(make_run(runs, records=1))
    send = type(api).log_batch

    def watched(*args: Any, **more: Any) -> Any:
        seen.append(os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES"))
        return send(*args, **more)

    monkeypatch.setattr(type(api), "log_batch", watched)
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(sync.send, [make_run(runs, 1, f"r{i}") for i in range(4)]))
    assert set(seen) == {"1"} and dict(os.environ) == before


def test_a_trial_is_tracked_where_its_study_is(tmp_path: Path) -> None:
    study, trial = tmp_path / "study", tmp_path / "study" / "trials" / "1"
    trial.mkdir(parents=True)
    assert sync.start(study, "study", {})
    assert sync.start(trial, "1", {}, parent=study)
    assert tracking_uri(trial) == f"sqlite:///{tmp_path}/mlflow.db"


def test_importing_and_starting_load_no_mlflow(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from flowerray.tracking import sync; "
        f"sync.start(pathlib.Path({str(tmp_path)!r}), 'a', {{}}); "
        "assert not {'mlflow', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
