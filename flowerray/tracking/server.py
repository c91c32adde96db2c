"""MLflow at one address: opening it safely and quickly, runs, parameters and curves."""

import json
import logging
import os
import re
import socket
import sqlite3
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import filelock
import psutil

from flowerray.tracking import address
from flowerray.tracking.address import database_file

LOCK_SECONDS = 3.0
"""Longest wait for a locked database."""
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_LOGGING_LEVEL": "ERROR",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # by default a server that dies blocks for 245 s
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # stdout may carry --json
    "GIT_PYTHON_REFRESH": "quiet",
    "PGCONNECT_TIMEOUT": "5",  # seconds; libpq's own default is for ever
}
"""Of a process while it speaks to MLflow; what the user set stays."""
UPLOAD_SECONDS = 600
"""Longest wait for a server that was sent a file; a checkpoint may have gigabytes."""
ARTIFACTS = "mlartifacts"
"""Folder of the files that MLflow keeps, beside its database."""
METRICS_PER_BATCH = 800  # MLflow takes 1000
PARAMS_PER_BATCH = 100
PORTS = {"http": 80, "https": 443, "postgresql": 5432, "mysql": 3306, "mssql": 1433}
NETWORK_DISKS = ("nfs", "cifs", "smb", "fuse", "lustre", "gpfs", "beegfs", "9p")


class Point(NamedTuple):
    """One value of one curve."""

    name: str
    value: float
    time_ms: int
    step: int


_speaking: Counter[str] = Counter()
_guard = threading.Lock()


@contextmanager
def settings() -> Iterator[None]:
    """Sets variables for MLflow, which reads them at each call, as long as a block of any thread
    needs them; the host program's environment is as before afterwards.
    """
    with _guard:
        own = [name for name in ENVIRONMENT if _speaking[name] or name not in os.environ]
        for name in own:
            _speaking[name] += 1
            os.environ.setdefault(name, ENVIRONMENT[name])
    try:
        yield
    finally:
        with _guard:
            for name in own:
                _speaking[name] -= 1
                if not _speaking[name]:
                    os.environ.pop(name, None)


def connect(uri: str) -> Any:
    """An MlflowClient, after a look whether anything answers: MLflow itself would wait 20 s at each
    statement for a lock, and try a dead server again and again.

    Raises:
        sqlite3.Error: the database is locked for longer than `LOCK_SECONDS`, or is none.
        OSError: nothing listens at the server's address.
    """
    url = urlsplit(uri)
    kind = url.scheme.partition("+")[0]
    if url.hostname and kind in PORTS and url.scheme not in getproxies():
        socket.create_connection((url.hostname, url.port or PORTS[kind]), LOCK_SECONDS).close()
    if (database := database_file(uri)) and database.exists():
        with closing(
            sqlite3.connect(database, timeout=LOCK_SECONDS, isolation_level=None)
        ) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    with settings():
        import mlflow

        logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a lock's traceback
        logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry
        return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def uploading() -> Iterator[None]:
    """Gives a server the time to store a large file before it answers: MLflow asks for the limit at
    each request, and `connect` has found out that the server lives. For inside `settings`.
    """
    name = "MLFLOW_HTTP_REQUEST_TIMEOUT"
    before = os.environ[name]
    os.environ[name] = str(max(int(before), UPLOAD_SECONDS))
    try:
        yield
    finally:
        os.environ[name] = before


def open_experiment(uri: str, name: str) -> tuple[Any, str]:
    """A client and the experiment's id; makes it, and the database, where they are not there.

    Two processes that open a fresh database at once break each other's migrations: one at a time.
    """
    database = database_file(uri)
    if database is None:
        client = connect(uri)
        return client, _find_or_make(client, name, None)
    database.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{database}.lock", timeout=60):
        fresh = not database.exists()
        client = connect(uri)
        found = _find_or_make(client, name, (database.parent / ARTIFACTS).as_uri())
        if (escaped := uri.removeprefix("sqlite://")) != str(database):
            with suppress(OSError):  # MLflow makes the folder of the address, read as a path
                os.removedirs(os.path.dirname(escaped))
        if fresh and _on_local_disk(database):
            # So that readers (the UI) do not hold the writer up; it needs shared memory, which
            # network disks lack.
            with closing(sqlite3.connect(database, timeout=LOCK_SECONDS)) as connection:
                connection.execute("PRAGMA journal_mode=wal")
    return client, found


def _find_or_make(client: Any, name: str, artifacts: str | None) -> str:
    if experiment := client.get_experiment_by_name(name):
        if experiment.lifecycle_stage == "deleted":  # in the UI; its name stays taken
            client.restore_experiment(experiment.experiment_id)
        return str(experiment.experiment_id)
    return str(client.create_experiment(name, artifact_location=artifacts))


def _on_local_disk(path: Path) -> bool:
    mounts = [m for m in psutil.disk_partitions(all=True) if path.is_relative_to(m.mountpoint)]
    kind = max(mounts, key=lambda mount: len(mount.mountpoint)).fstype if mounts else ""
    return not kind.startswith(NETWORK_DISKS)


def find_run(client: Any, run_id: str) -> Any | None:
    """The run, or None if it was deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = client.get_run(run_id)
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise
    return None if run.info.lifecycle_stage == "deleted" else run


def describe(client: Any, run: Any, params: dict[str, Any], tags: dict[str, str]) -> None:
    """Logs parameters and tags; a parameter that differs from the logged one, which MLflow would
    refuse, becomes a tag `resumed.<name>`."""
    from mlflow.entities import Param

    texts, sent = {_name(name): _text(value) for name, value in params.items()}, run.data.params
    entities = [Param(name, value) for name, value in texts.items() if name not in sent]
    for i in range(0, len(entities), PARAMS_PER_BATCH):
        client.log_batch(run.info.run_id, params=entities[i : i + PARAMS_PER_BATCH])
    changed = {f"resumed.{name}": v for name, v in texts.items() if sent.get(name, v) != v}
    log_tags(client, run.info.run_id, tags | changed)


def log_tags(client: Any, run_id: str, tags: dict[str, str]) -> None:
    """Sets tags."""
    from mlflow.entities import RunTag

    client.log_batch(run_id, tags=[RunTag(_name(name), _text(tag)) for name, tag in tags.items()])


def log_points(
    client: Any,
    run_id: str,
    points: Iterable[Point],
    model_id: str | None = None,
    dataset: str | None = None,
    digest: str | None = None,
) -> None:
    """Logs points of curves; those that MLflow has already change nothing.

    Args:
        model_id: the logged model that they are figures of.
        dataset: name of the data that they were measured on.
        digest: of that data.
    """
    from mlflow.entities import Metric

    of = (model_id, dataset, digest) if model_id else ()
    entities = [Metric(_name(point.name), *point[1:], *of) for point in points]
    for i in range(0, len(entities), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=entities[i : i + METRICS_PER_BATCH])


def brief(error: Exception) -> str:
    """Why MLflow could not be used, in a few words."""
    if isinstance(error, filelock.Timeout):
        return "another process is using it"
    text = address.shown(str(error))
    if "Max retries exceeded" in text or "timeout exception" in text:
        return "no answer"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if "is locked" in text:
        return "the database is locked"
    first = (text.splitlines() or [""])[0].rstrip(".")
    return first[:160] or type(error).__name__


def _name(name: str) -> str:
    """MLflow refuses a whole batch for one bad character."""
    return re.sub(r"[^\w.\- :/]", "_", name)[:250]


def _text(value: Any) -> str:
    """At most the 6000 characters that MLflow takes."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text if len(text) <= 6000 else text[:5997] + "..."
