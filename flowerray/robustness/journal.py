"""What an attack has found so far, kept in its RUN so that it can go on after an interruption."""

import io
import json
import sqlite3
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.errors import UserError

FOLDER = "attack"
"""In a RUN: a database for each attack that has not finished, named by a hash of its options."""

Found = dict[str, NDArray]
"""What one piece of an attack found; no objects."""


class Journal:
    """Pieces of one model's attacks by name; without a database it remembers nothing."""

    def __init__(self, database: sqlite3.Connection | None = None, about: str = "") -> None:
        self.database, self.about = database, about

    def of(self, about: str) -> "Journal":
        """The same journal for another model."""
        return Journal(self.database, about)

    def once(self, name: str, compute: Callable[[], Found]) -> Found:
        """What was found under this name before, or what `compute` finds now."""
        if self.database is None:
            return compute()
        key = f"{self.about} {name}"
        row = self.database.execute("SELECT value FROM found WHERE key = ?", (key,)).fetchone()
        if row is not None:
            with np.load(io.BytesIO(row[0])) as arrays:
                return dict(arrays)
        found = compute()
        packed = io.BytesIO()
        np.savez(packed, **found)  # type: ignore[arg-type]
        try:
            with self.database:
                self.database.execute("INSERT INTO found VALUES (?, ?)", (key, packed.getvalue()))
        except sqlite3.Error as error:
            print(f"from here on the attack cannot be resumed: {error}", file=sys.stderr)
            self.database = None
        return found


@contextmanager
def keeping(
    run: Path | None, asked: dict[str, Any], facts: dict[str, str], resume: bool = False
) -> Iterator[Journal]:
    """The journal of an attack, of an interrupted one with the same options where there is one; it
    is removed once the block has ended.

    Args:
        run: the RUN folder; None: nothing is kept.
        asked: all options, as plain data.
        facts: what else decides the outcome; where it has changed, the attack begins anew.
        resume: refuse to begin anew.

    Raises:
        UserError: another process is at it; with `resume`, changed facts.
    """
    if run is None:
        yield Journal()
        return
    said = json.dumps(asked, sort_keys=True)
    file = run / FOLDER / f"{blake2b(said.encode(), digest_size=8).hexdigest()}.db"
    try:
        database = _open(file, said, facts, resume)
    except (OSError, sqlite3.Error) as error:  # a full disk, somebody else's RUN
        print(f"{run} cannot keep what the attack finds on the way: {error}", file=sys.stderr)
        yield Journal()
        return
    finished = False
    try:
        yield Journal(database)
        finished = True
    finally:
        with suppress(sqlite3.Error):
            finished = finished or not database.execute("SELECT count(*) FROM found").fetchone()[0]
        database.close()
        if finished:
            _remove(file)


def unfinished(run: Path) -> dict[str, Any]:
    """The options of the RUN's last unfinished attack.

    Raises:
        UserError: there is none, or another process is at it.
    """
    files = sorted((run / FOLDER).glob("*.db"), key=lambda file: file.stat().st_mtime)
    if not files:
        raise UserError(f"{run} holds no unfinished attack: start one without `resume`.")
    try:
        database = sqlite3.connect(files[-1], timeout=0)
        options: dict[str, Any] = json.loads(_about(database)["options"])
        database.close()
    except (sqlite3.Error, KeyError, ValueError) as error:
        raise _refused(files[-1], error) from error
    return options


def _open(file: Path, said: str, facts: dict[str, str], resume: bool) -> sqlite3.Connection:
    file.parent.mkdir(exist_ok=True)
    database = sqlite3.connect(file, timeout=0)
    try:
        database.execute("PRAGMA locking_mode = EXCLUSIVE")
        with database:
            database.execute("CREATE TABLE IF NOT EXISTS about (key TEXT PRIMARY KEY, value TEXT)")
            database.execute("CREATE TABLE IF NOT EXISTS found (key TEXT PRIMARY KEY, value BLOB)")
        before = {key: value for key, value in _about(database).items() if key != "options"}
        if before and before != facts:
            changed = ", ".join(key for key in facts if before.get(key) != facts[key])
            if resume:
                raise UserError(
                    f"the attack cannot go on, since it was begun with another {changed}: start it "
                    "anew without `resume`."
                )
            with database:
                database.execute("DELETE FROM found")
        with database:
            for row in {"options": said, **facts}.items():
                database.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", row)
        if number := database.execute("SELECT count(*) FROM found").fetchone()[0]:
            print(f"going on with an interrupted attack, of which {number} steps are done",
                  file=sys.stderr)  # fmt: skip
    except sqlite3.DatabaseError as error:
        database.close()
        if "locked" in str(error) or resume:
            raise _refused(file, error) from error
        if "not a database" not in str(error) and "malformed" not in str(error):
            raise
        _remove(file)
        return _open(file, said, facts, resume)
    except BaseException:
        database.close()
        raise
    return database


def _about(database: sqlite3.Connection) -> dict[str, str]:
    return dict(database.execute("SELECT key, value FROM about"))


def _refused(file: Path, error: Exception) -> UserError:
    if "locked" in str(error):
        return UserError(f"another process is at work on this attack ({file}): stop it first.")
    return UserError(f"{file} is damaged ({error}): start the attack anew without --resume.")


def _remove(file: Path) -> None:
    for path in (file, file.with_name(f"{file.name}-journal")):
        path.unlink(missing_ok=True)
    with suppress(OSError):
        file.parent.rmdir()
