"""Where flowerray keeps its own files, and writes that a kill cannot leave half done."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from flowerray.errors import UserError


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
    """A temporary path beside `path` that replaces it when the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    temporary.chmod(0o666 & ~_umask())  # mkstemp's own files are for the owner alone
    try:
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def writing(
    place: Path, fault: str = "cannot be written", advice: str = "choose another --out"
) -> Iterator[None]:
    """Raises UserError where the block cannot write what `--out` names."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{place} {fault} ({error.strerror or error}): {advice}.") from error


def saving(folder: Path) -> AbstractContextManager[None]:
    """`writing` in the midst of a work."""
    return writing(folder, "can no longer be written", "make room there, then --resume")


def refuse_unwritable(out: Path) -> None:
    """Raises UserError where `out`, a folder, cannot be made or written into; it makes nothing."""
    place = next(p for p in (out.absolute(), *out.absolute().parents) if p.exists())
    if not place.is_dir():
        raise UserError(f"{out} cannot be made, since {place} is a file: choose another --out.")
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
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    temporary.chmod(0o777 & ~_umask())
    old = previous(path)
    try:
        yield temporary
        for file in temporary.rglob("*"):
            _to_disk(file)
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
            path.rename(old)
        temporary.rename(path)
        _to_disk(path.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _to_disk(path: Path) -> None:
    """Waits until a file, or a folder's list of names, would survive a power cut."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def previous(path: Path) -> Path:
    """Where a folder waits while `atomic_folder` replaces it."""
    return path.with_name(f".{path.name}.previous")


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Writes `value` as indented JSON, atomically."""
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def as_json(content: dict[str, Any]) -> str:
    """One object; NaN, which JSON does not know, as null."""
    clean = {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in content.items()}
    return json.dumps(clean, indent=2)
