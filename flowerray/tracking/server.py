"""MLflow at one address: opening it safely and quickly, logging, models."""

import json
import logging
import os
import re
import socket
import sqlite3
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

import filelock
import psutil

from flowerray.description import installed
from flowerray.errors import UserError
from flowerray.files import atomic_folder, home

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
}
UPLOAD_SECONDS = 600
"""Longest wait for a server that was sent a file; a checkpoint may have gigabytes."""
ARTIFACTS = "mlartifacts"
"""Folder of the files that MLflow keeps, beside its database."""
EXPORTS = ("best_model_*.pth", "robust_model_*.pth")
METRICS_PER_BATCH = 800  # MLflow takes 1000
PARAMS_PER_BATCH = 100
NETWORK_DISKS = ("nfs", "cifs", "smb", "fuse", "lustre", "gpfs", "beegfs", "9p")


class Point(NamedTuple):
    """One value of one curve."""

    name: str
    value: float
    time_ms: int
    step: int


def database_file(uri: str) -> Path | None:
    """The file of a sqlite address, or None for a server."""
    path = uri.removeprefix("sqlite:///")
    return Path(path) if path != uri else None


def without_password(uri: str) -> str:
    """A server's address as it may be shown and logged."""
    password = urlsplit(uri).password
    return uri.replace(f":{password}@", ":***@") if password else uri


def absolute(uri: str) -> str:
    """Workers and jobs have other working directories: a sqlite path must not depend on one."""
    database = database_file(uri)
    return uri if database is None else f"sqlite:///{database.absolute()}"


def connect(uri: str) -> Any:
    """An MlflowClient, after a look whether anything answers: MLflow itself would wait 20 s at each
    statement for a lock, and try a dead server again and again.

    Raises:
        sqlite3.Error: the database is locked for longer than `LOCK_SECONDS`, or is none.
        OSError: nothing listens at the server's address.
    """
    url = urlsplit(uri)
    if url.scheme in ("http", "https") and url.scheme not in getproxies():
        address = (url.hostname or "", url.port or {"http": 80, "https": 443}[url.scheme])
        socket.create_connection(address, timeout=LOCK_SECONDS).close()
    if (database := database_file(uri)) and database.exists():
        with closing(
            sqlite3.connect(database, timeout=LOCK_SECONDS, isolation_level=None)
        ) as connection:
            connection.execute("BEGIN IMMEDIATE")
            connection.execute("ROLLBACK")
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow

    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)  # a lock's traceback
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)  # a line for each retry
    return mlflow.MlflowClient(tracking_uri=uri, registry_uri=uri)


@contextmanager
def uploading() -> Iterator[None]:
    """Gives a server the time to store a large file before it answers: MLflow asks for the limit at
    each request, and `connect` has found out that the server lives.
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
        found = _find_or_make(client, name, f"file://{database.parent / ARTIFACTS}")
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


def log_points(client: Any, run_id: str, points: Iterable[Point]) -> None:
    """Logs points of curves; those that MLflow has already change nothing."""
    from mlflow.entities import Metric

    entities = [Metric(_name(point.name), *point[1:]) for point in points]
    for i in range(0, len(entities), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=entities[i : i + METRICS_PER_BATCH])


def log_model(
    client: Any, experiment_id: str, run_id: str, export: Path, dim: int, python_model: Path
) -> str:
    """Logs an exported `.pth` as a pyfunc model of a run; its `models:/` address.

    Through the client, since MLflow's own `log_model` works on process-wide state.

    Args:
        dim: length D of an embedding.
        python_model: the file that MLflow keeps and runs.
    """
    import mlflow
    import numpy as np
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec

    inputs = Schema([ColSpec("binary", "image")])
    outputs = Schema([TensorSpec(np.dtype(np.float32), (-1, dim))])
    packages = ("mlflow", "torch", "timm", "numpy", "pillow", "pydantic")
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # advice to add an input example
            mlflow.pyfunc.save_model(
                folder,
                python_model=str(python_model),
                artifacts={"model": str(export)},
                signature=ModelSignature(inputs, outputs),
                pip_requirements=[f"{package}=={installed(package)}" for package in packages],
            )
        model = client.create_logged_model(
            experiment_id, export.stem, run_id, model_type="embedder"
        )
        client.log_model_artifacts(model.model_id, str(folder))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step=0)])
    return f"models:/{model.model_id}"


def register_model(client: Any, run_id: str, model_uri: str, name: str, alias: str) -> str:
    """Makes a logged model the registered `name`'s newest version, unless this run's is one, and
    points `alias` at it.
    """
    if not client.search_registered_models(f"name = '{name}'"):
        client.create_registered_model(name)
    for known in client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'"):
        client.set_registered_model_alias(name, alias, known.version)
        return str(known.version)
    model_id = model_uri.removeprefix("models:/")
    source = client.get_logged_model(model_id).artifact_location
    made = client.create_model_version(name, source, run_id, model_id=model_id)
    client.set_registered_model_alias(name, alias, made.version)
    return str(made.version)


def download(uri: str, address: str, folder: Path) -> None:
    """Fetches `models:/...`, `runs:/ID/PATH`, or of `runs:/ID` the files at the top: no command
    reads the folders, which are large."""
    client = connect(uri)
    import mlflow

    run_id, _, path = address.removeprefix("runs:/").partition("/")
    sources = [address]
    if address.startswith("runs:/") and not path:
        files = [item.path for item in client.list_artifacts(run_id) if not item.is_dir]
        sources = [f"runs:/{run_id}/{file}" for file in files]
    # For models:/ MLflow looks where the variable says, whatever it is given.
    before = os.environ.get("MLFLOW_TRACKING_URI")
    os.environ["MLFLOW_TRACKING_URI"] = uri
    try:
        for source in sources:
            mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=str(folder), tracking_uri=uri, registry_uri=uri
            )
    finally:
        del os.environ["MLFLOW_TRACKING_URI"]
        if before is not None:
            os.environ["MLFLOW_TRACKING_URI"] = before


def resolve(run: str) -> Path:
    """The RUN argument of a command as a path that `flowerray.load` takes.

    Args:
        run: a RUN folder, a `.pth` file, `models:/NAME@ALIAS` (or /VERSION, or an id), `runs:/ID`
            (gives a folder) or `runs:/ID/PATH`. MLflow's are fetched to `$FLOWERRAY_HOME/mlflow`
            from `MLFLOW_TRACKING_URI`; without that from `runs/mlflow.db` or `mlflow.db` here, or
            the jobs' `$FLOWERRAY_HOME/runs/mlflow.db`.

    Raises:
        UserError: nothing is there, or it holds no model.
    """
    if not run.startswith(("models:/", "runs:/")):
        path = Path(run).expanduser().absolute()
        if not path.exists():
            raise UserError(
                f"{run} is not there: give a RUN folder, a .pth file, models:/NAME@ALIAS or "
                "runs:/ID."
            )
        return path
    target = home() / "mlflow" / re.sub(r"[^\w.-]+", "_", run)
    reason = "no mlflow.db here: set MLFLOW_TRACKING_URI"
    for uri in _known_addresses():
        try:
            with atomic_folder(target) as folder:
                download(uri, run, folder)
            break
        except Exception as error:  # of many kinds, by store; the next address may have it
            reason = f"{without_password(uri)}: {brief(error)}"
    else:
        raise UserError(f"{run} cannot be fetched from MLflow ({reason}).")
    if (target / "run.json").exists():
        return target
    found = [path for pattern in EXPORTS for path in target.rglob(pattern)]
    if len(found) != 1:
        raise UserError(f"{run} holds {len(found)} flowerray models, not one.")
    return found[0]


def experiment_runs(name: str) -> list[str]:
    """The trainings of an experiment as `resolve` takes them, oldest first: the RUN folder where it
    is on this machine, else `runs:/ID`.

    Args:
        name: an experiment of the addresses that `resolve` looks at.

    Raises:
        UserError: there is none, or it holds no training.
    """
    for uri in _known_addresses():
        try:
            client = connect(uri)
            experiment = client.get_experiment_by_name(name)
        except Exception as error:
            place = without_password(uri)
            raise UserError(f"MLflow at {place} cannot be used ({brief(error)}).") from error
        if experiment is None:
            continue
        found, token = [], None
        while True:
            page = client.search_runs(
                [experiment.experiment_id], order_by=["attributes.start_time"], page_token=token
            )
            found += [run for run in page if "method.name" in run.data.params]
            if not (token := page.token):
                break
        folders = [Path(run.data.tags.get("flowerray.training.run", "")) for run in found]
        if found:
            return [
                str(folder) if (folder / "run.json").exists() else f"runs:/{run.info.run_id}"
                for folder, run in zip(folders, found, strict=True)
            ]
    raise UserError(
        f"no MLflow here has an experiment {name} with trainings: set MLFLOW_TRACKING_URI."
    )


def _known_addresses() -> list[str]:
    if given := os.environ.get("MLFLOW_TRACKING_URI"):
        return [absolute(given)]
    folders = (Path.cwd() / "runs", Path.cwd(), home() / "runs")
    return [f"sqlite:///{f / 'mlflow.db'}" for f in folders if (f / "mlflow.db").exists()]


def brief(error: Exception) -> str:
    """Why MLflow could not be used, in a few words."""
    if isinstance(error, filelock.Timeout):
        return "another process is using it"
    text = str(error)
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
