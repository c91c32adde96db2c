"""Photographs decoded once to a memory-mapped folder that all workers and trials of a node share.

    <key>/pixels.bin   the images one after the other, uint8 HWC
          index.npy    int64 (N, 3): offset in pixels.bin, height, width
          checks.npy   uint32 (N,): CRC-32 of each image's pixels
          meta.json    version, shorter side, count, bytes, fingerprint, CRC-32 of the other two

Letters: N images, B of a batch, C H W an image.
"""

import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import blake2b
from pathlib import Path
from shutil import rmtree
from typing import Any, NotRequired, TypeVar

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm
from typing_extensions import TypedDict

from flowerray.cache import touch
from flowerray.data.images import (
    centre_crop,
    decoding_map,
    eval_image,
    load_image,
    load_or_fault,
    read_file,
    resize_side,
)
from flowerray.errors import UserError
from flowerray.files import atomic_file, atomic_folder, home, read_kept, write_json
from flowerray.gpu import to_device
from flowerray.pool import leave_unguarded
from flowerray.text import some

__all__ = ["Store", "build_store", "eval_image", "load_image", "resize_side"]

STORE_VERSION = 1
"""Rises when the same files would give other pixels."""
T = TypeVar("T")
_NAMED = 10  # bad files that an error lists
_SETTLED = 2 * 10**9
"""Nanoseconds after which another change shows in a file's time: such clocks tick slowly."""


class Meta(TypedDict):
    """meta.json."""

    version: int
    side: int
    count: int
    bytes: int
    fingerprint: str
    crc: NotRequired[dict[str, int]]


def floats(
    images_BCHW: Tensor,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 images as pixels in [0,1], in channels_last memory."""
    moved_BCHW = images_BCHW if device is None else to_device(images_BCHW, device)
    return (moved_BCHW.to(dtype) / 255).contiguous(memory_format=torch.channels_last)


class Store:
    """One list of decoded images; an index is the position in that list. Read-only."""

    def __init__(self, folder: Path) -> None:
        """Maps a finished store.

        Raises:
            UserError: absent, of another version, or files of other sizes than it was built with.
        """
        self.folder = Path(folder)
        meta = _read_meta(self.folder)
        if meta is None:
            raise UserError(f"{folder} holds no complete store of decoded images; build it again.")
        self.side: int = meta["side"]
        """Shorter side of each image, pixels."""
        self.fingerprint: str = meta["fingerprint"]
        """Hash of the source files' bytes in their order, the side and the version."""
        self._index_N3 = np.load(self.folder / "index.npy")
        self._pixels = np.asarray(np.memmap(self.folder / "pixels.bin", np.uint8, "r"))
        self.checks_N = self._read_checks()
        """CRC-32 of each image's pixels, by which it is known again."""
        self._unchecked_N = np.ones(len(self), bool)
        touch(self.folder / "meta.json")

    def __len__(self) -> int:
        return len(self._index_N3)

    @property
    def nbytes(self) -> int:
        """Bytes of all pixels."""
        return len(self._pixels)

    def __reduce__(self) -> tuple[type["Store"], tuple[Path]]:
        """Travels to another process of the node as a path: pickle would copy the mapped pixels."""
        return Store, (self.folder,)

    def image(self, i: int) -> NDArray[np.uint8]:
        """Image i, a read-only HWC view; checked when it is first read.

        Raises:
            UserError: its pixels are not those that were written.
        """
        offset, height, width = (int(value) for value in self._index_N3[i])
        pixels = self._pixels[offset : offset + height * width * 3]
        if self._unchecked_N[i]:
            if zlib.crc32(pixels.data) != self.checks_N[i]:
                (self.folder / "meta.json").unlink(missing_ok=True)  # so that it is built again
                raise UserError(
                    f"{self.folder} is damaged (a failing disk?): call the command again, which "
                    "decodes the photographs again."
                )
            self._unchecked_N[i] = False
        return pixels.reshape(height, width, 3)

    def _read_checks(self) -> NDArray[np.uint32]:
        file = self.folder / "checks.npy"
        if file.exists():
            found: NDArray[np.uint32] = np.load(file)
            return found
        sizes_N = self._index_N3[:, 1:].prod(axis=1) * 3  # a store of 0.1.0
        ends_N = self._index_N3[:, 0] + sizes_N
        parts = zip(self._index_N3[:, 0], ends_N, strict=True)
        checks_N = np.array([zlib.crc32(self._pixels[a:b].data) for a, b in parts], np.uint32)
        with suppress(OSError), atomic_file(file) as temporary, temporary.open("wb") as opened:
            np.save(opened, checks_N)
        return checks_N

    def centre(self, indices: Sequence[int] | NDArray[np.int64], size: int) -> Tensor:
        """Centre crops of `size` pixels: uint8 BCHW, in channels_last memory.

        Equal to `eval_image(path, size)` where the store's side is `resize_side(size)`.
        """
        crops_BHWC = np.empty((len(indices), size, size, 3), np.uint8)
        for row, i in enumerate(indices):
            crops_BHWC[row] = centre_crop(self.image(i), size)
        return torch.from_numpy(crops_BHWC).permute(0, 3, 1, 2)

    def padded(self, indices: Sequence[int] | NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        """Whole images, zeros at the right and the bottom up to the largest of the batch.

        Returns:
            uint8 BCHW in channels_last memory, and int64 B2: height and width inside the padding.
        """
        sizes_B2 = self._index_N3[np.asarray(indices), 1:]
        images_BHWC = np.zeros((len(indices), *sizes_B2.max(axis=0), 3), np.uint8)
        for row, i in enumerate(indices):
            height, width = sizes_B2[row]
            images_BHWC[row, :height, :width] = self.image(i)
        return torch.from_numpy(images_BHWC).permute(0, 3, 1, 2), torch.from_numpy(sizes_B2)


def build_store(
    paths: Iterable[Path],
    shorter_side: int,
    *,
    progress: bool = True,
    processes: int | None = None,
) -> Store:
    """The store of these files, decoded now if this node does not have it.

    It lies in `$FLOWERRAY_HOME/stores` under a key made of the files' bytes, so a changed file
    gives another store. Builders of the same key wait for each other; a killed one leaves nothing
    behind that counts as a store.

    Args:
        paths: N image files, at least one.
        shorter_side: of the decoded images, pixels; `resize_side(size)` for a model of `size`.
        processes: how many decode; None = one per core.

    Raises:
        UserError: files that are missing or no whole images, each by name (up to 10, then a count),
            or the store cannot be written.
    """
    paths = [Path(path) for path in paths]
    assert paths, "a store needs at least one image"
    key = _key(paths, shorter_side, progress)
    folder = home() / "stores" / key
    if _read_meta(folder) is not None:
        return Store(folder)
    leave_unguarded()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f"{key}.lock")):
            if _read_meta(folder) is None:
                for leftover in folder.parent.glob(f".{key}.*"):  # a builder that was killed
                    rmtree(leftover, ignore_errors=True)
                with atomic_folder(folder) as temporary:
                    _write(temporary, paths, shorter_side, key, progress, processes)
    except OSError as error:
        raise UserError(
            f"Decoded images cannot be stored in {folder.parent} ({error.strerror}); "
            "set FLOWERRAY_HOME to a folder with room that you may write to."
        ) from error
    return Store(folder)


def _key(paths: list[Path], shorter_side: int, progress: bool) -> str:
    """Hash of the files' bytes, their order, the side and the version.

    The bytes are read once: a note beside the stores keeps the key for as long as no file changes
    its place, size or times.
    """
    stamps = list(_in_threads(_stamp, paths))
    changed = max((stamp[-1] for stamp in stamps), default=0)
    facts = f"{STORE_VERSION} {shorter_side} {stamps}"
    name = blake2b(facts.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    note = home() / "stores" / "known" / name
    with suppress(OSError, ValueError):
        known, check = note.read_text().split()
        if int(check, 16) == zlib.crc32(known.encode()):
            return known
    key = _content_key(paths, shorter_side, progress)
    if changed < time.time_ns() - _SETTLED:
        with suppress(OSError):  # it would only have saved time
            note.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(note) as temporary:
                temporary.write_text(f"{key} {zlib.crc32(key.encode()):08x}")
    return key


def _stamp(path: Path) -> tuple[str, int, int, int, int]:
    """What tells that a file is the one that was read before; last, when it changed."""
    with suppress(OSError):
        found = path.stat()
        times = found.st_mtime_ns, found.st_ctime_ns  # the second is out of a user's reach
        return str(path.absolute()), found.st_ino, found.st_size, *times
    return str(path.absolute()), 0, 0, 0, time.time_ns()


def _in_threads(function: Callable[[Path], T], paths: list[Path]) -> Iterator[T]:
    """`map` over threads, in parts: a million single tasks would need gigabytes."""
    parts = [paths[i : i + 256] for i in range(0, len(paths), 256)]
    with ThreadPoolExecutor() as pool:
        for results in pool.map(lambda part: [function(path) for path in part], parts):
            yield from results


def _content_key(paths: list[Path], shorter_side: int, progress: bool) -> str:
    bar = tqdm(
        total=len(paths), desc="reading images", unit="img", delay=2, leave=False,
        disable=None if progress else True,
    )  # fmt: skip
    digests = []
    with bar:
        for digest in _in_threads(_digest, paths):
            digests.append(digest)
            bar.update()
    _refuse_bad(paths, [digest if isinstance(digest, str) else None for digest in digests])
    total = blake2b(f"{STORE_VERSION} {shorter_side} ".encode(), digest_size=16)
    for digest in digests:
        assert isinstance(digest, bytes)
        total.update(digest)
    return total.hexdigest()


def _digest(path: Path) -> bytes | str:
    """Hash of a file's bytes, or why it cannot be read."""
    data = read_file(path)
    return data if isinstance(data, str) else blake2b(data, digest_size=16).digest()


def _write(
    folder: Path,
    paths: list[Path],
    shorter_side: int,
    key: str,
    progress: bool,
    processes: int | None,
) -> None:
    index_N3, checks_N = np.zeros((len(paths), 3), np.int64), np.zeros(len(paths), np.uint32)
    faults: list[str | None] = []
    offset = 0
    bar = tqdm(
        total=len(paths), desc="decoding images", unit="img", disable=None if progress else True
    )
    pool = decoding_map(len(paths), processes)
    with (folder / "pixels.bin").open("wb") as file, bar, pool as run:
        for image in run(partial(load_or_fault, shorter_side=shorter_side), paths):
            faults.append(image if isinstance(image, str) else None)
            if not isinstance(image, str):
                pixels = np.ascontiguousarray(image)
                index_N3[len(faults) - 1] = offset, *image.shape[:2]
                checks_N[len(faults) - 1] = zlib.crc32(pixels.data)
                offset += file.write(pixels.data)
            bar.update()
    _refuse_bad(paths, faults)
    np.save(folder / "index.npy", index_N3)
    np.save(folder / "checks.npy", checks_N)
    meta = {
        "version": STORE_VERSION,
        "side": shorter_side,
        "count": len(paths),
        "bytes": offset,
        "fingerprint": key,
        "crc": {name: _crc(folder / name) for name in ("index.npy", "checks.npy")},
    }
    write_json(folder / "meta.json", meta)


def _refuse_bad(paths: list[Path], faults: list[str | None]) -> None:
    bad = [f"{p} ({fault})" for p, fault in zip(paths, faults, strict=True) if fault is not None]
    if bad:
        raise UserError(
            f"{len(bad)} of {len(paths)} images cannot be read: {some(bad, _NAMED)}; replace or "
            "remove them."
        )


def _read_meta(folder: Path) -> dict[str, Any] | None:
    """A store's meta.json, or None where its files are absent or not as they were written."""
    meta: dict[str, Any] | None = read_kept(folder / "meta.json", Meta)
    if meta is None or meta["version"] != STORE_VERSION:
        return None
    try:
        intact = all(_crc(folder / name) == crc for name, crc in meta.get("crc", {}).items())
        index_N3 = np.load(folder / "index.npy")
        size = (folder / "pixels.bin").stat().st_size
        whole = size == meta["bytes"] == int(index_N3[:, 1:].prod(axis=1).sum() * 3)
        whole = whole and len(index_N3) == meta["count"]
    except (OSError, ValueError, EOFError, IndexError):
        intact = whole = False
    if not (intact and whole):
        print(f"{folder} is damaged, and is made again", file=sys.stderr)
    return meta if intact and whole else None


def _crc(file: Path) -> int:
    return zlib.crc32(file.read_bytes())
