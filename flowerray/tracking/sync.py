"""A RUN folder in MLflow, from the driver: sent as it trains, or all at once later.

Workers only append to metrics.jsonl. `RUN/mlflow.json` keeps what a run is called and how much of
it MLflow has, so that every function here may be called again after a fault and goes on where it
stopped. A server that is down, or a locked database, costs the driver a few seconds and one
warning, never an exception, unless the caller asks for it.
"""

import itertools
import logging
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock

from flowerray.description import describe
from flowerray.errors import UserError
from flowerray.tracking import address, registry, server
from flowerray.tracking.state import EXPERIMENT, State, Status, note_file, run_id, tracking_uri
from flowerray.training.rundir import RunDir, grown, mark, read_records

FILES = ("run.json", "thresholds.json", "pairs.json", "metrics.jsonl")
FOLDERS = ("plots", "checkpoints/best", "evaluation", "explanations")
PAGES = (".html", ".json", ".csv", ".png")
"""Endings of what is sent of a folder that is no RUN (an exploration, a study, a report)."""

UNFINISHED: dict[str, Any] = {
    "finished": None, "reason": None, "model_uri": None,
    "described": False, "closed": False,
}  # fmt: skip
UNSENT: dict[str, Any] = {
    "experiment_id": None, "run_id": None, "model_uri": None, "bytes_sent": 0, "sent_mark": "",
    "described": False, "nested": False, "artifacts_sent": {}, "closed": False,
    "model_metrics": {},
}  # fmt: skip
RECORDS_PER_BATCH = 100
"""Between two notes of how much MLflow has."""
log = logging.getLogger(__name__)
_warned: set[Path] = set()


# ---- what a driver calls, in this order


def prepare(run_dir: Path, experiment: str = EXPERIMENT) -> bool:
    """Makes the database and the experiment. Several drivers may do so at once.

    Args:
        run_dir: need not exist yet.

    Returns:
        False, after a warning, where that failed.
    """
    return _attempt(run_dir, lambda: server.open_experiment(tracking_uri(run_dir), experiment))


def start(
    run_dir: Path,
    name: str,
    params: dict[str, Any],
    tags: dict[str, str] | None = None,
    *,
    parent: Path | None = None,
    experiment: str = EXPERIMENT,
) -> bool:
    """Notes how a run is to be shown; the next `sync` (a `Watcher`'s first) makes it in MLflow.

    A resumed RUN keeps its MLflow run. Takes milliseconds and loads no MLflow.

    Args:
        params: the Run as a dict, nested or flat. One that changed on a resume becomes a tag
            `resumed.<name>`.
        tags: the caller's, such as the data's fingerprint; commit, versions and path are added.
        parent: RUN folder of the run that this one belongs to (a study's, for a trial).
    """
    run_dir = run_dir.expanduser().absolute()
    note = dict(
        **describe(run_dir, name, params, tags or {}),
        experiment=experiment,
        parent=str(parent.expanduser().absolute()) if parent else None,
        **UNFINISHED,
    )
    return _attempt(run_dir, lambda: State().store(run_dir, **note))


def send(run_dir: Path, strict: bool = False) -> bool:
    """Sends what MLflow does not have yet: everything, for a RUN that it never saw.

    Returns:
        True where MLflow now has it all.

    Raises:
        UserError: only if `strict`: it cannot be sent, or this is no RUN folder.
    """
    run_dir = run_dir.expanduser().absolute()
    return _attempt(run_dir, lambda: _send(run_dir), strict)


def finish(run_dir: Path, status: Status = "FINISHED", reason: str | None = None) -> bool:
    """Ends a run: last metrics, files, the model and the status are sent, now or by a later `sync`.

    Files that change afterwards (an evaluation's plots) are sent by the `sync` that follows.

    Args:
        reason: why it failed or was stopped; becomes a tag.
    """
    run_dir = run_dir.expanduser().absolute()

    def action() -> None:
        State().store(run_dir, finished=status, reason=reason, closed=False)
        _send(run_dir, files=status != "KILLED")  # who pressed Ctrl-C does not wait for uploads

    return _attempt(run_dir, action)


def log_folder(
    folder: Path,
    params: dict[str, Any],
    metrics: dict[str, float],
    tags: dict[str, str] | None = None,
) -> bool:
    """Shows a folder of results that is no RUN (an exploration, a report) as a run of its own: its
    pages, tables and pictures become artifacts.

    Returns:
        False, after a warning, where MLflow cannot be used; a later `sync` sends it.
    """
    folder = folder.expanduser().absolute()
    run = RunDir(folder)
    run.metrics.unlink(missing_ok=True)
    run.append(0, 0, metrics)
    start(folder, folder.name, params, tags)
    return finish(folder)


def register(run_dir: Path, name: str, alias: str) -> str | None:
    """Registers a finished RUN's model and points `alias` at it.

    Returns:
        The new version, or None, after a warning, where that failed.
    """
    run_dir = run_dir.expanduser().absolute()
    made: list[str] = []

    def action() -> None:
        _send(run_dir)
        state = State.read(run_dir)
        if state.model_uri is None or state.run_id is None:
            raise UserError(f"{run_dir} has no exported model in MLflow")
        client = server.connect(tracking_uri(run_dir))
        made.append(registry.register_model(client, state.run_id, state.model_uri, name, alias))

    return made[0] if _attempt(run_dir, action) else None


# ---- sending


def _attempt(run_dir: Path, action: Callable[[], object], strict: bool = False) -> bool:
    """Runs `action`; a fault becomes False and, once for each RUN, a warning."""
    run_dir = run_dir.expanduser().absolute()
    try:
        with server.settings():
            action()
    except Exception as error:  # of any kind: tracking never stops a training
        reason = str(error).rstrip(".")
        if not isinstance(error, UserError):
            reason = f"{address.shown(tracking_uri(run_dir))}: {server.brief(error)}"
        if strict:
            raise UserError(f"{run_dir} is not in MLflow yet ({reason}).") from error
        if run_dir not in _warned:
            _warned.add(run_dir)
            log.warning(
                f"Warning: MLflow cannot be used ({reason}); metrics stay in the RUN, "
                f"and `flowerray track sync {shlex.quote(str(run_dir))}` sends them later."
            )
        return False
    return True


def _send(run_dir: Path, files: bool = True) -> None:
    """Sends all that MLflow lacks. A step is noted once done, and harmless if done twice."""
    state = State.read(run_dir)
    if not state.name:  # never started here
        note = describe(run_dir, run_dir.name, RunDir(run_dir).read(), {})
        ended: Status = "FINISHED" if _exports(run_dir) else "KILLED"
        state.store(run_dir, **note, finished=state.finished or ended)
    with filelock.FileLock(run_dir / ".mlflow.lock", timeout=2 * server.LOCK_SECONDS):
        state, uri = State.read(run_dir), tracking_uri(run_dir)
        client, experiment_id = server.open_experiment(uri, state.experiment)
        if state.tracking_uri != (kept := address.kept(uri)):
            state.store(run_dir, tracking_uri=kept, **UNSENT)
        _send_run(client, state, run_dir, experiment_id)
        _send_metrics(client, state, run_dir)
        if state.finished and not state.closed:
            if state.reason:
                client.set_tag(state.run_id, "flowerray.reason", state.reason[:5000])
            client.set_terminated(state.run_id, status=state.finished)
            state.store(run_dir, closed=True)
        if state.finished and files:
            _send_files(client, state, run_dir)


def _send_run(client: Any, state: State, run_dir: Path, experiment_id: str) -> None:
    run = server.find_run(client, state.run_id) if state.run_id else None
    if run is None:
        if state.run_id:
            state.store(run_dir, **UNSENT)  # deleted in the UI, and wanted again
        run = client.create_run(experiment_id, run_name=state.name)
        state.store(run_dir, experiment_id=experiment_id, run_id=run.info.run_id)
    assert state.run_id is not None
    if not state.described:
        server.describe(client, run, state.params, state.tags)
        if not state.closed:
            client.update_run(state.run_id, status="RUNNING", name=state.name)
        state.store(run_dir, described=True)
    if state.parent and not state.nested and (parent := run_id(Path(state.parent))):
        server.log_tags(client, state.run_id, {"mlflow.parentRunId": parent})
        state.store(run_dir, nested=True)


def _send_metrics(client: Any, state: State, run_dir: Path) -> None:
    path = RunDir(run_dir).metrics
    assert state.run_id is not None
    # Where a resume rewrote the file all is sent; points that MLflow has are not doubled.
    start = state.bytes_sent if grown(path, state.bytes_sent, state.sent_mark) else 0
    records = read_records(path, start)
    while batch := list(itertools.islice(records, RECORDS_PER_BATCH)):
        points = [
            server.Point(name, value, int(record["time"] * 1000), record["step"])
            for record, _ in batch
            for name, value in record["metrics"].items()
        ]
        server.log_points(client, state.run_id, points)
        end = batch[-1][1]
        state.store(run_dir, bytes_sent=end, sent_mark=mark(path, end))


def _send_files(client: Any, state: State, run_dir: Path) -> None:
    assert state.run_id is not None and state.experiment_id is not None
    exports = _exports(run_dir)
    files = [run_dir / name for name in FILES] + exports
    if not (run_dir / "run.json").exists():
        files = [
            f for f in sorted(run_dir.iterdir()) if f.suffix in PAGES and f != note_file(run_dir)
        ]
    files += [file for folder in FOLDERS for file in sorted((run_dir / folder).rglob("*"))]
    for file in files:
        if file.is_symlink() or not file.is_file():  # a link may lead anywhere
            continue
        path, stamp = file.relative_to(run_dir), [file.stat().st_size, file.stat().st_mtime_ns]
        if state.artifacts_sent.get(str(path)) != stamp:
            folder = None if path.parent == Path(".") else str(path.parent)
            with server.uploading():
                client.log_artifact(state.run_id, str(file), folder)
            state.store(run_dir, artifacts_sent=state.artifacts_sent | {str(path): stamp})
    if exports and state.finished == "FINISHED" and not state.model_uri:
        dim = RunDir(run_dir).read()["embedder"]["dim"]
        ids = state.experiment_id, state.run_id
        with server.uploading():
            made = registry.log_model(client, *ids, exports[0], dim)
        state.store(run_dir, model_uri=made)
    if state.model_uri:
        _send_model_metrics(client, state, run_dir)


def _send_model_metrics(client: Any, state: State, run_dir: Path) -> None:
    """The newest test figures of a RUN become the logged model's, on its data set: by them MLflow
    ranks models.
    """
    assert state.run_id is not None and state.model_uri is not None
    newest = {
        name: [value, record["step"], int(record["time"] * 1000)]
        for record, _ in read_records(RunDir(run_dir).metrics)
        for name, value in record["metrics"].items()
        if name.startswith("test/")
    }
    fresh = {name: told for name, told in newest.items() if state.model_metrics.get(name) != told}
    if fresh:
        points = [
            server.Point(name, value, int(time_ms), int(step))
            for name, (value, step, time_ms) in fresh.items()
        ]
        kind, digest = (state.tags.get(f"dataset/{fact}") for fact in ("kind", "fingerprint"))
        model_id = state.model_uri.removeprefix("models:/")
        server.log_points(client, state.run_id, points, model_id, kind, digest)
        state.store(run_dir, model_metrics=newest)


def _exports(run_dir: Path) -> list[Path]:
    return sorted(path for pattern in registry.EXPORTS for path in run_dir.glob(pattern))
