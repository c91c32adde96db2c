"""Where flowerray keeps its own files, and writes that a kill cannot leave half done."""

import glob
import json
import math
import os
import shutil
import sys
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from typing_extensions import is_typeddict

from flowerray.errors import UserError

SCHEMA = 1
"""`schema_version` of every JSON object that is written; files of 0.1.0 have none."""
STALE_S = 3600
"""Age of a temporary file that nobody writes any more."""
DEPTH = 100
"""Levels of a JSON file of ours at most; deeper ones would end in a RecursionError somewhere."""


def home() -> Path:
    """`$FLOWERRAY_HOME`, by default `~/.cache/flowerray`: synthetic sets, decoded stores, runs of
    Ray jobs.
    """
    return (
        Path(os.environ.get("FLOWERRAY_HOME") or Path.home() / ".cache" / "flowerray")
        .expanduser()
        .absolute()
    )


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that replaces it when the block ends without an error. What
    kills left of it hours ago is removed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.touch(exist_ok=False)
    for left in path.parent.glob(f"{glob.escape(temporary.name[:-8])}????????"):
        with suppress(OSError):
            if temporary.stat().st_mtime - left.stat().st_mtime > STALE_S:
                left.unlink()
    try:
        yield temporary
        to_disk(temporary)
        os.replace(temporary, path)
        to_disk(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(
    place: Path, fault: str = "cannot be written", advice: str = "choose another `out`"
) -> Iterator[None]:
    """Raises UserError where the block cannot write what `--out` names."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} {fault} ({error.strerror or error}): {advice}.") from error


def saving(folder: Path) -> AbstractContextManager[None]:
    """`writing` in the midst of a work."""
    return writing(folder, "can no longer be written", "make room there, then `resume`")


def refuse_existing(folder: Path) -> None:
    """Raises UserError where a folder of results is there already."""
    if folder.exists():
        raise UserError(
            f"{folder} exists already: choose another `out`, or continue it with `resume` {folder}."
        )


def refuse_unwritable(out: Path) -> None:
    """Raises UserError where `out`, a folder, cannot be made or written into; it makes nothing."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"{out} cannot be made, since {place} is a file: choose another `out`.")
    if not os.access(place, os.W_OK | os.X_OK):
        raise UserError(f"{out} cannot be written (no permission for {place}): choose another.")


@contextmanager
def only_driver(folder: Path) -> Iterator[None]:
    """Holds a folder for this process, also against other machines where the file system locks.

    Raises:
        UserError: another process is at work on it.
    """
    lock = FileLock(folder / ".driver.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"another process is at work on {folder}: stop it first, a Ray job with `ray job stop`."
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends without an error.

    A folder already at `path` is replaced; between the two renames a reader may find none, so
    readers of a folder that is rewritten (checkpoints) also look at `previous(path)`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _beside(path)
    temporary.mkdir()
    old = previous(path)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            to_disk(file)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
        to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def previous(path: Path) -> Path:
    """Where a folder waits while `atomic_folder` replaces it."""
    return path.with_name(f".{path.name}.previous")


def _beside(path: Path) -> Path:
    """A new name in the same folder. `tempfile` would make files for the owner alone, and what the
    others may do can be asked for only by changing the whole process' umask.
    """
    name = path.name.encode()[:200].decode(errors="ignore")  # with ours it may be 255 bytes long
    return path.with_name(f".{name}.{uuid.uuid4().hex[:8]}")


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a file that is read, changed and written; others wait for their turn. Where nobody may
    write, nothing is held.
    """
    lock = FileLock(path.with_name(f".{path.name}.lock"))
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def as_json(content: Any, indent: int | None = 2) -> str:
    """JSON text of plain values; a number that is not finite, which JSON does not know, as null. An
    object gets `schema_version`.
    """
    if isinstance(content, dict):
        content = {"schema_version": SCHEMA, **content}
    return json.dumps(_finite(content), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_json(path: Path, content: Any, indent: int | None = 2) -> None:
    """Writes `as_json`, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(as_json(content, indent) + "\n", encoding="utf-8")


def read_json(
    path: Path,
    kind: Any = dict[str, Any],
    *,
    advice: str = "put a whole copy of it back, or remove it",
    missing: str = "",
) -> Any:
    """The content of a JSON file of ours, without its `schema_version`.

    Args:
        kind: the type that it has to have; what it lacks or has too much is found by pydantic.
        advice: what to do about a file that cannot be used.
        missing: the sentence where there is no file.

    Raises:
        UserError: the file is missing, cut, no JSON, of another kind, or newer than this version.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(missing or f"{path} is not there: {advice}.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): {advice}.") from error
    except (ValueError, RecursionError):
        raise UserError(f"{path} is not valid JSON, or was cut short: {advice}.") from None
    if _too_deep(content):
        raise UserError(f"{path} is nested too deep to be a file of flowerray: {advice}.")
    if isinstance(content, dict):
        schema = content.pop("schema_version", SCHEMA)
        if isinstance(schema, int) and schema > SCHEMA:
            raise UserError(
                f"{path} was written by a newer flowerray (schema {schema}, known is {SCHEMA}): "
                "update flowerray."
            )
    strict = is_typeddict(kind)
    try:
        found = TypeAdapter(kind).validate_python(content, strict=strict)
        return content if strict else found  # pydantic would drop the keys that are not named
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))
        said = f"{where}: {fault['msg']}" if where else fault["msg"]
        raise UserError(
            f"{path} is not the JSON that belongs there ({said.lower()}): {advice}."
        ) from None


def read_kept(path: Path, kind: Any = dict[str, Any], *, aside: bool = False) -> Any:
    """`read_json` of what can be written anew: None where there is none or, after a line on
    standard error, where it cannot be used.

    Args:
        aside: such a file stays, as `<name>.damaged`.
    """
    if not path.exists():
        return None
    kept = path.with_name(f"{path.name}.damaged")
    try:
        return read_json(path, kind, advice=f"it is kept as {kept}" if aside else "made again")
    except UserError as error:
        print(error, file=sys.stderr)
        if aside:
            with suppress(OSError):
                path.replace(kept)
        return None


def _too_deep(content: Any) -> bool:
    level = [content]
    for _ in range(DEPTH):
        parts = [part for part in level if isinstance(part, dict | list)]
        level = [x for part in parts for x in (part.values() if isinstance(part, dict) else part)]
    return any(isinstance(part, dict | list) for part in level)


def sqlite_url(path: Path) -> str:
    """SQLAlchemy's address of a file; it decodes what is escaped, and `?` would end the path."""
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")
