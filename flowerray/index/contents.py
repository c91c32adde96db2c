"""An INDEX folder: photographs' embeddings, what they are of, and the model that made them.

    index.json                 the manifest, which is replaced last: it names the folder that counts
    model.pth                  the exported model; after a rebuild model-<8 hex>.pth
    parts-<8 hex>/vectors.npy  float32 (N, D), unit vectors
                  entries.npy  where each path ends in names.npy, content hash, label (-1: none),
                               cell
                  names.npy    uint8, the paths one after the other
                  cells.npy    float32 (C, D), centroids of the cells; C = 0: search is exact

A kill at any moment leaves the old content or the new. Nothing is unpickled, faiss reads no file,
and no file of an INDEX makes us read one outside of it.

Letters: N photographs, D dimensions, C cells, A added ones.
"""

import mmap
import os
import re
import shutil
import uuid
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, NotRequired

import numpy as np
from numpy.typing import NDArray
from typing_extensions import TypedDict

from flowerray.errors import UserError
from flowerray.files import atomic_folder, locked, read_json, write_json, writing
from flowerray.retrieval.neighbours import EXACT, cell_of, filled, nearest_rows, partition

MANIFEST = "index.json"
MODEL = "model.pth"
AGAIN = "build it again"
_ENTRY = np.dtype([("end", "<i8"), ("digest", "u1", (16,)), ("label", "<i4"), ("cell", "<i4")])
_PARTS = re.compile("parts-[0-9a-f]{8}")
_MODELS = re.compile(r"model(-[0-9a-f]{8})?\.pth")
_BLOCK = 8192


class IndexModel(TypedDict):
    """Which model made the vectors."""

    name: str
    """What the user called it."""
    fingerprint: str
    """Hash of its file, which holds its threshold and calibration."""
    dim: int
    file: NotRequired[str]
    """In the INDEX; by default model.pth."""


class Manifest(TypedDict):
    """index.json."""

    model: IndexModel
    classes: list[str]
    parts: str
    checksums: dict[str, str]
    probes: int
    """Cells that a query looks into."""
    partitioned: int
    """Rows when the cells were made."""
    recall: NotRequired[dict[str, Any]]
    """Of the approximate search against the exact one, as `flowerray index check` measured it."""


class Photograph(NamedTuple):
    """One that is added."""

    path: Path
    digest: bytes
    label: str
    emb_D: NDArray[np.float32]


@dataclass(frozen=True)
class Index:
    """An INDEX as it was when it was opened; its files are mapped, and stay readable."""

    folder: Path
    manifest: Manifest
    vectors_ND: NDArray[np.float32]
    entries_N: NDArray[Any]
    names: NDArray[np.uint8]
    centroids_CD: NDArray[np.float32]

    @cached_property
    def cells(self) -> Any:
        """The vectors as faiss searches them; None: every row is looked at."""
        if not len(self.centroids_CD):
            return None
        where_N, probes = self.entries_N["cell"], self.manifest["probes"]
        found = filled(self.vectors_ND, self.centroids_CD, where_N, probes)
        with suppress(AttributeError):  # Windows cannot: the pages that were read are there twice
            self.vectors_ND.base._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[union-attr]
        return found

    def __len__(self) -> int:
        return len(self.entries_N)

    def path(self, row: int) -> Path:
        """Of a photograph."""
        start = int(self.entries_N["end"][row - 1]) if row else 0
        return Path(os.fsdecode(self.names[start : self.entries_N["end"][row]].tobytes()))

    def paths(self) -> list[bytes]:
        """Of all, as the system writes them."""
        text, ends = self.names.tobytes(), self.entries_N["end"].tolist()
        return [text[a:b] for a, b in zip([0, *ends], ends, strict=False)]

    def label(self, row: int) -> str | None:
        """Class of a photograph."""
        label = int(self.entries_N["label"][row])
        return None if label < 0 else self.manifest["classes"][label]

    def digest(self, row: int) -> bytes:
        """Hash of a photograph's file."""
        found: bytes = self.entries_N["digest"][row].tobytes()
        return found

    def nearest(
        self, query_D: NDArray[np.floating], k: int
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
        """See `nearest_rows`."""
        return nearest_rows(self.vectors_ND, query_D, k, self.cells)


def open_index(folder: Path) -> Index:
    """An INDEX, without its model.

    Raises:
        UserError: none, damaged, cut, or with another model's file.
    """
    manifest = read_manifest(folder)
    while True:
        try:
            return _open(folder, manifest)
        except (OSError, ValueError, EOFError, SyntaxError) as error:
            newer = read_manifest(folder)  # another process has replaced it in this moment
            if newer["parts"] == manifest["parts"]:
                raise UserError(f"{folder} is damaged ({error}): {AGAIN}.") from error
            manifest = newer


def read_manifest(folder: Path) -> Manifest:
    """index.json of an INDEX."""
    missing = f"{folder} is no INDEX: `flowerray index build RUN DIR --out {folder}` makes one."
    file = folder / MANIFEST
    _refuse_links(file)
    found: Manifest = read_json(file, Manifest, advice=AGAIN, missing=missing)
    return found


def model_file(folder: Path, manifest: Manifest) -> Path:
    """The model of an INDEX.

    Raises:
        UserError: it is another one than made the vectors.
    """
    name = manifest["model"].get("file", MODEL)
    if not _MODELS.fullmatch(name):
        raise UserError(f"{folder / MANIFEST} names {name!r} as its model's file: {AGAIN}.")
    file = folder / name
    _refuse_links(file)
    if not file.is_file() or checksum(file) != manifest["model"]["fingerprint"]:
        raise UserError(
            f"{file} is not {manifest['model']['name']}, the model that {folder} was built with: "
            f"put that back, or {AGAIN} with the other one."
        )
    return file


def _open(folder: Path, manifest: Manifest) -> Index:
    if not _PARTS.fullmatch(manifest["parts"]):
        raise ValueError(f"{manifest['parts']!r} is no name of its parts")
    parts, dim = folder / manifest["parts"], manifest["model"]["dim"]
    _refuse_links(parts, *parts.iterdir())
    entries_N = _mapped(parts / "entries.npy", _ENTRY, (None,))
    names = _mapped(parts / "names.npy", np.dtype("u1"), (None,))
    vectors_ND = _mapped(parts / "vectors.npy", np.dtype("<f4"), (len(entries_N), dim))
    centroids_CD = _mapped(parts / "cells.npy", np.dtype("<f4"), (None, dim))
    rising_N = np.diff(entries_N["end"], prepend=0, append=len(names))
    outside = entries_N["label"] >= len(manifest["classes"])
    outside |= (entries_N["cell"] < 0) | (entries_N["cell"] >= max(1, len(centroids_CD)))
    if (rising_N < 0).any() or outside.any():
        raise ValueError("entries.npy does not fit the other files")
    return Index(folder, manifest, vectors_ND, entries_N, names, centroids_CD)


def _mapped(file: Path, kind: np.dtype, shape: tuple[int | None, ...]) -> NDArray[Any]:
    empty = file.stat().st_size < 256 and np.load(file, allow_pickle=False)
    found = empty if empty is not False else np.load(file, mmap_mode="r", allow_pickle=False)
    sides = zip(found.shape, shape, strict=False)
    fits = found.ndim == len(shape) and all(wanted in (None, side) for side, wanted in sides)
    if found.dtype != kind or not fits or not found.flags.c_contiguous:
        raise ValueError(f"{file.name} holds {found.dtype} {found.shape}")
    return np.asarray(found)


def _refuse_links(*files: Path) -> None:
    for file in files:
        if file.is_symlink():
            raise UserError(f"{file} is a link, which an INDEX has none of: {AGAIN}.")


def checksum(file: Path) -> str:
    """Hash of a file's content."""
    digest = blake2b(digest_size=16)
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            digest.update(part)
    return digest.hexdigest()


# ---- writing


def create(folder: Path, model: Path, name: str, dim: int) -> None:
    """Makes an INDEX without photographs.

    Args:
        model: an exported file, which is copied.

    Raises:
        UserError: something is there already, or the place cannot be written.
    """
    if (folder / MANIFEST).exists():
        made = read_manifest(folder)["model"]
        if made["fingerprint"] != checksum(model):
            raise UserError(
                f"{folder} was built with {made['name']}, another model than {name}: choose "
                "another `out`."
            )
        raise UserError(f"{folder} exists: `flowerray index add {folder} DIR` adds to it.")
    if folder.exists():
        raise UserError(f"{folder} exists already: choose another `out`.")
    with writing(folder), atomic_folder(folder) as temporary:
        shutil.copyfile(model, temporary / MODEL)
        made = IndexModel(name=name, fingerprint=checksum(temporary / MODEL), dim=dim)
        none_ND, names = np.empty((0, dim), np.float32), np.empty(0, np.uint8)
        manifest = Manifest(model=made, classes=[], parts="", checksums={}, probes=0, partitioned=0)
        empty = Index(temporary, manifest, none_ND, np.empty(0, _ENTRY), names, none_ND)
        _write(empty, np.empty(0, bool), ())


def change(
    folder: Path,
    added: Sequence[Photograph] = (),
    gone: Callable[[bytes], bool] = lambda path: False,
) -> tuple[Index, int]:
    """Adds photographs to an INDEX, instead of those of their paths, and takes others out, at once.

    Args:
        gone: whether a path of the INDEX goes.

    Returns:
        The new INDEX, and how many are out.
    """
    with writing(folder, advice="make room there"), locked(folder / MANIFEST):
        index = open_index(folder)
        new = {os.fsencode(photo.path) for photo in added}
        left_N = np.array([not (path in new or gone(path)) for path in index.paths()], bool)
        if added or not left_N.all():
            _write(index, left_N, added)
        _sweep(folder)
        return open_index(folder), len(index) - int(left_N.sum())


def begin_beside(folder: Path, model: Path, name: str, dim: int) -> Path | None:
    """An INDEX by another model, begun inside the one whose place it will take.

    Returns:
        None where `folder` is by that model already.
    """
    fingerprint = checksum(model)
    ours = folder / f"next-{fingerprint[:8]}"
    done = read_manifest(folder)["model"]["fingerprint"] == fingerprint
    for entry in folder.iterdir():
        if re.match(r"\.?next-[0-9a-f]{8}", entry.name):
            _refuse_links(entry)
            if done or entry != ours:  # a kill left it
                shutil.rmtree(entry, ignore_errors=True)
    if done:
        with locked(folder / MANIFEST):
            _sweep(folder)
        return None
    if not ours.exists():
        create(ours, model, name, dim)
    return ours


def exchange(folder: Path, beside: Path, without: Collection[Path]) -> bool:
    """Puts the content and the model of the INDEX `beside`, on the same disk, in place of an
    INDEX's own, and removes `beside`; after a kill it can be done again.

    Args:
        without: photographs that `beside` need not have.

    Returns:
        False, with nothing changed, where `folder` holds other photographs that `beside` has not.
    """
    with writing(folder, advice="make room there"), locked(folder / MANIFEST):
        _sweep(folder)
        paths = set(open_index(folder).paths())
        new, _ = change(beside, gone=lambda path: path not in paths)
        if paths - set(new.paths()) - {os.fsencode(path) for path in without}:
            return False
        parts, model = new.manifest["parts"], new.manifest["model"]
        file = f"model-{model['fingerprint'][:8]}.pth"
        shutil.copytree(beside / parts, folder / parts, copy_function=os.link)
        os.link(beside / MODEL, folder / file)
        write_json(folder / MANIFEST, {**new.manifest, "model": {**model, "file": file}})
        _sweep(folder)
    shutil.rmtree(beside)
    return True


def note(folder: Path, **facts: Any) -> None:
    """Writes what was found out about the parts of an INDEX into its manifest."""
    with writing(folder, advice="make room there"), locked(folder / MANIFEST):
        write_json(folder / MANIFEST, {**read_manifest(folder), **facts})


def _write(index: Index, left_N: NDArray[np.bool_], added: Sequence[Photograph]) -> None:
    """New parts beside the old ones, then the manifest that names them."""
    manifest, dim = index.manifest, index.manifest["model"]["dim"]
    partitioned = manifest["partitioned"]
    old = np.flatnonzero(left_N)
    classes = list(dict.fromkeys([*manifest["classes"], *(photo.label for photo in added)]))
    number = {label: n for n, label in enumerate(classes)}
    known = index.paths()
    names = [known[row] for row in old] + [os.fsencode(photo.path) for photo in added]
    new = np.zeros(len(added), _ENTRY)
    for entry, photo in zip(new, added, strict=True):
        entry["digest"] = np.frombuffer(photo.digest, np.uint8)
        entry["label"] = number[photo.label]
    entries = np.concatenate([index.entries_N[old], new])
    entries["end"] = np.cumsum([len(name) for name in names])
    added_AD = np.array([photo.emb_D for photo in added], np.float32).reshape(-1, dim)
    parts = index.folder / f"parts-{uuid.uuid4().hex[:8]}"
    with atomic_folder(parts) as temporary:
        header = {"descr": "<f4", "fortran_order": False, "shape": (len(names), dim)}
        with (temporary / "vectors.npy").open("wb") as file:
            np.lib.format.write_array_header_1_0(file, header)
            for start in range(0, len(old), _BLOCK):
                file.write(index.vectors_ND[old[start : start + _BLOCK]].tobytes())
            file.write(added_AD.tobytes())
        centroids_CD, probes = index.centroids_CD, manifest["probes"]
        if len(names) <= EXACT:
            centroids_CD, partitioned, entries["cell"] = centroids_CD[:0], 0, 0
        elif not partitioned / 2 <= len(names) <= partitioned * 2:
            vectors_ND = np.load(temporary / "vectors.npy", mmap_mode="r")
            centroids_CD, partitioned = partition(vectors_ND), len(names)
            entries["cell"] = cell_of(vectors_ND, centroids_CD)
            probes = filled(vectors_ND, centroids_CD, entries["cell"]).nprobe
        elif added:
            entries["cell"][len(old) :] = cell_of(added_AD, centroids_CD)  # others have theirs
        np.save(temporary / "entries.npy", entries)
        np.save(temporary / "names.npy", np.frombuffer(b"".join(names), np.uint8))
        np.save(temporary / "cells.npy", centroids_CD)
        checksums = {file.name: checksum(file) for file in sorted(temporary.iterdir())}
    changed = Manifest(
        model=manifest["model"], classes=classes, parts=parts.name, checksums=checksums,
        probes=probes, partitioned=partitioned,
    )  # fmt: skip
    write_json(index.folder / MANIFEST, changed)


def _sweep(folder: Path) -> None:
    """Removes what the manifest does not name: old parts, and what a kill left behind."""
    manifest = read_manifest(folder)
    for entry in folder.iterdir():
        if entry.name in (manifest["parts"], manifest["model"].get("file", MODEL)):
            continue
        if re.match(r"\.?parts-[0-9a-f]{8}", entry.name):
            shutil.rmtree(entry, ignore_errors=True)
        elif _MODELS.fullmatch(entry.name) or re.fullmatch(
            r"\.index\.json\.[0-9a-f]{8}", entry.name
        ):
            entry.unlink(missing_ok=True)
