"""What is kept because it takes long to make: decoded images, arrays beside them, rendered sets,
models fetched from MLflow. All of it can be made again; a RUN is none of it.
"""

import shutil
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowerray.description import VERSION, installed
from flowerray.errors import UserError
from flowerray.files import atomic_file, home

KINDS = {
    "store": "stores/*/",
    "rendered": "synthetic/*/",
    "model": "mlflow/*",
    "frozen": "frozen/*.json",
}
"""Kind of an item -> where it lies in FLOWERRAY_HOME."""
NOTES = "known"
"""Folder in `stores` of notes on files that were read before; of no size."""
IN_USE = 3600.0
"""Seconds after its last use in which nothing is removed: a command may still need it."""


# ---- arrays


def key(weights: Mapping[str, Any], device: str, *facts: object) -> str:
    """Hash of what decides kept arrays: weights (a `state_dict`), their type, other facts, the
    device, and the versions of what computed them.
    """
    stack = [VERSION, *(installed(package) for package in ("torch", "timm", "numpy"))]
    digest = blake2b(repr((stack, device, facts)).encode(), digest_size=8)
    for name, value in weights.items():
        digest.update(f"{name} {value.dtype}".encode() + value.cpu().numpy().tobytes())
    return digest.hexdigest()


def write_arrays(path: Path, **arrays: NDArray[Any]) -> None:
    """Writes an `.npz`, atomically; a zip file has a checksum for each of its parts."""
    with atomic_file(path) as temporary, temporary.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]  # numpy's own annotation of `allow_pickle`


def read_arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    """The arrays of an `.npz`; None where there is none or, after a line on standard error, where
    it is damaged, so that it is made again.
    """
    if not path.exists():
        return None
    try:
        with path.open("rb") as opened, np.load(opened, allow_pickle=False) as kept:
            return dict(kept)
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile, zlib.error):
        print(f"{path} is damaged, and is made again", file=sys.stderr)
        return None


# ---- listing and pruning


class Item(NamedTuple):
    """Something that is kept."""

    kind: str
    path: Path
    bytes: int
    used: float
    """Seconds since 1970: when it was last used."""


def items() -> list[Item]:
    """What lies in FLOWERRAY_HOME, the longest unused first."""
    found = []
    for kind, pattern in KINDS.items():
        for path in home().glob(pattern):
            if path.name != NOTES and not path.name.endswith(".lock"):
                sizes, times = zip(*_stats(path), strict=True)
                found.append(Item(kind, path, sum(sizes), max(times)))
    return sorted(found, key=lambda item: item.used)


def _stats(path: Path) -> Iterator[tuple[int, float]]:
    yield 0, 0.0
    for file in [path, *path.rglob("*")]:
        with suppress(OSError):
            stat = file.lstat()
            yield stat.st_size, stat.st_mtime


def prune(days: float, most_bytes: float, dry: bool = False) -> list[Item]:
    """Removes what was not used for `days`, then the longest unused of the rest until `most_bytes`
    are left; nothing that was used within the last hour.

    Args:
        dry: remove nothing.

    Returns:
        What was (or would be) removed.

    Raises:
        UserError: something cannot be removed.
    """
    now, gone = time.time(), []
    kept = items()
    total = sum(item.bytes for item in kept)
    for item in kept:
        age = now - item.used
        if age > IN_USE and (age > days * 86_400 or total > most_bytes):
            gone.append(item)
            total -= item.bytes
            if not dry:
                _remove(item.path)
    return gone


def _remove(path: Path) -> None:
    try:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    except OSError as error:
        raise UserError(f"{path} cannot be removed ({error.strerror}).") from error
    path.with_name(f"{path.name}.lock").unlink(missing_ok=True)


def touch(path: Path) -> None:
    """Notes that something is used now."""
    with suppress(OSError):
        path.touch()


def listing(found: list[Item], what: str) -> str:
    """A line an item, and their sum."""
    now = time.time()
    lines = [
        f"{item.kind:<9} {size(item.bytes):>9}  {(now - item.used) / 86_400:5.1f} days  {item.path}"
        for item in found
    ]
    return "\n".join([*lines, f"{what} {len(found)}: {size(sum(item.bytes for item in found))}"])


def size(count: float) -> str:
    """12.3 MB."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
