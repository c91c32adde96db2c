"""RUN/mlflow.json: where a RUN is tracked, and how much of it MLflow has."""

import shlex
import sqlite3
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import filelock

from flowerray.errors import UserError
from flowerray.files import read_kept, sqlite_url, write_json
from flowerray.text import typed
from flowerray.tracking import address

EXPERIMENT = "flowerray"
Status = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass
class State:
    """RUN/mlflow.json."""

    experiment: str = EXPERIMENT
    name: str = ""
    params: dict[str, Any] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    parent: str | None = None
    """RUN folder of the run that this one is shown under."""
    tracking_uri: str | None = None
    experiment_id: str | None = None
    run_id: str | None = None
    described: bool = False
    """Parameters and tags are sent."""
    nested: bool = False
    bytes_sent: int = 0
    sent_mark: str = ""
    """How far metrics.jsonl is sent, and its `mark` there: a resume rewrites it."""
    finished: Status | None = None
    reason: str | None = None
    artifacts_sent: dict[str, list[int]] = field(default_factory=dict)
    """Size in bytes and time of change of the files sent, by path in the RUN folder."""
    model_uri: str | None = None
    model_metrics: dict[str, list[float]] = field(default_factory=dict)
    """Test figures that the logged model has: value, step, time in milliseconds."""
    closed: bool = False
    """The final status is sent."""

    @classmethod
    def read(cls, run_dir: Path) -> "State":
        """The stored state, or a fresh one."""
        found: State | None = read_kept(note_file(run_dir), cls, aside=True)
        return found or cls()

    def store(self, run_dir: Path, **changes: Any) -> None:
        """Changes some fields, here and in the file. Others may have changed other fields there."""
        with filelock.FileLock(run_dir / ".mlflow.json.lock"):
            vars(self).update(vars(State.read(run_dir)) | changes)
            write_json(note_file(run_dir), asdict(self))


def tracking_uri(run_dir: Path) -> str:
    """Where a RUN is tracked: where the user says (`MLFLOW_TRACKING_URI`); else where it already
    is; else where its parent is; else `mlflow.db` beside the RUN folder.

    Raises:
        UserError: the RUN names a server. Its metrics, models and the user's token go to none that
            the user did not name.
    """
    if given := address.given():
        return given
    run_dir = run_dir.expanduser().absolute()
    state = State.read(run_dir)
    if state.run_id and state.tracking_uri:
        database = address.database_file(state.tracking_uri)
        if database is None:
            raise UserError(
                f"{run_dir} says that it is tracked at {address.shown(state.tracking_uri)}: if you "
                f"trust that address, set {address.VARIABLE} to it"
            )
        if _holds(database, state.run_id):  # a copied RUN may have left its database behind
            return address.usable(state.tracking_uri)
    if state.parent and (parent := Path(state.parent)) in run_dir.parents:
        return tracking_uri(parent)
    return sqlite_url(run_dir.parent / "mlflow.db")


def _holds(database: Path, run_id: str) -> bool:
    """Whether a database knows a run: a RUN's note alone must not lead to any file."""
    if not database.exists():
        return False
    try:
        with closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True)) as connection:
            known = connection.execute("SELECT 1 FROM runs WHERE run_uuid = ?", (run_id,))
            return known.fetchone() is not None
    except sqlite3.OperationalError as error:
        return "locked" in str(error)
    except sqlite3.Error:
        return False


def ui_line(run_dir: Path) -> str:
    """How to look at a RUN: a command, or the server's address."""
    try:
        uri = tracking_uri(run_dir)
    except UserError as error:
        return str(error)
    if address.database_file(uri) is None:
        return address.shown(uri)
    return typed(f"mlflow ui --backend-store-uri {shlex.quote(uri)}")


def run_id(run_dir: Path) -> str | None:
    """MLflow's id of a RUN, once MLflow has it."""
    return State.read(run_dir).run_id


def note_file(run_dir: Path) -> Path:
    return run_dir / "mlflow.json"
