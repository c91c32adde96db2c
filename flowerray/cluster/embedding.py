"""`flowerray embed`: photographs of a folder, a bucket or WebDataset shards as embeddings in
parquet, by Ray Data: read ahead, decoded and embedded by as many workers as there is room for.

What is embedded is written part by part, so that the same call goes on after a kill.

Letters: B photographs of a batch, H W C an image, D embedding dimensions.
"""

import json
import logging
import os
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from tqdm import tqdm
from typing_extensions import TypedDict

from flowerray.cluster.session import nodes_of, own_gpus, ray_session, require_gpus, slots
from flowerray.cluster.trainer import innermost
from flowerray.cluster.worker import pick_device
from flowerray.config import Config
from flowerray.data.folder import SUFFIXES
from flowerray.data.images import MAX_BYTES, crop_or_fault, map_ahead
from flowerray.errors import UserError
from flowerray.files import atomic_file, read_json, write_json, writing
from flowerray.index.contents import checksum
from flowerray.model.embedder import Embedder
from flowerray.opening import open_model
from flowerray.retrieval.embed import embed_crops
from flowerray.tracking.registry import resolve
from flowerray.training.checkpoint import export_file

PIECE = 256
"""Files that a worker takes at a time."""
PART = 8192
"""Rows of a parquet file, about: as many are embedded again after a kill."""
BATCH = 64
READERS = 16
"""Threads that read files for a worker: a bucket takes a while to answer each."""
BLOCK = 32 * 2**20
"""Bytes of decoded photographs that are handed on at a time."""
BUFFER = 4 * 2**20
"""Bytes of a shard that are asked for at a time."""
SHARD = ".tar"
MANIFEST = "embed.json"

Batch = dict[str, NDArray[Any]]
"""`name`, `fault` (why there is no image, else empty) and `crop` (BHWC) or `emb` (BD)."""


class EmbedConfig(Config):
    """How much of a machine or a cluster is used."""

    cpus: int = Field(1, ge=1)
    """CPU cores and threads of each worker."""
    gpus: float | None = Field(None, ge=0)
    """GPUs of each, also a fraction; by default 1 where this machine has one, else 0."""
    workers: int | None = Field(None, ge=1)
    """By default as many as there is room for."""


class Piece(TypedDict):
    """What a worker takes at a time."""

    shard: str
    """A tar file; empty: the names are files."""
    names: list[str]
    """To read; of a shard the members that are known."""


class Manifest(TypedDict):
    """embed.json."""

    model: str
    fingerprint: str
    """Hash of the model's file."""
    source: str


def embed_source(
    name: str, source: str, out: Path, config: EmbedConfig, quiet: bool = False
) -> dict[str, Any]:
    """Embeds every photograph of a source into `out/part-*.parquet` (columns `path` and
    `embedding`), except for those that are there; `out/unreadable.json` has the others.

    Args:
        name: the model, see `open_model`.
        source: a folder or a .tar file, of this machine or by an address that pyarrow knows, such
            as `s3://bucket/folder`; .tar files of a folder are read too.

    Raises:
        UserError: a source without photographs, `out` in use for another model or source, a fault
            of Ray's.
    """
    gpus = own_gpus() if config.gpus is None else config.gpus
    require_gpus(gpus)
    embedder = open_model(name, torch.device("cpu")).embedder
    where = source if "://" in source else os.path.abspath(source)
    filesystem, names, faults = listed(where)
    made = Manifest(model=name, fingerprint=checksum(export_file(resolve(name))), source=where)
    known = begin(out, made)
    todo = pieces(names, known)
    added = 0
    if todo:
        cpus = 0 if gpus else config.cpus  # beside a GPU all cores decode
        with ray_session(min_cpus=config.cpus) as ray:
            workers = config.workers or max(1, slots(nodes_of(ray), cpus, gpus))
            decode = partial(decoded, filesystem=filesystem, size=embedder.image_size)
            stream = stream_of(embedder, decode, todo, workers, cpus, gpus)
            total = None if any(piece["shard"] for piece in todo) else len(names) - len(known)
            with tqdm(total=total, unit="img", desc="embed", disable=quiet or None) as bar:
                try:
                    added = keep(out, stream, faults, bar.update)
                except ray.exceptions.RayError as error:
                    raise UserError(
                        f"a worker failed ({innermost(error).rstrip('.')}): what is embedded is "
                        "kept, and the same call goes on."
                    ) from error
    with writing(out):
        write_json(out / "unreadable.json", dict(sorted(faults.items())))
    return {"out": str(out), "added": added, "known": len(known), "unreadable": faults}


# ---- what there is


def listed(where: str) -> tuple[Any, list[str], dict[str, str]]:
    """The file system of an address, its photographs and shards, and why others cannot be read."""
    import pyarrow
    from pyarrow import fs

    try:
        filesystem, root = fs.FileSystem.from_uri(where)
        (place,) = filesystem.get_file_info([root])
        if place.type == fs.FileType.NotFound:
            raise UserError(f"{where} is not there: give a folder or a .tar file of photographs.")
        single = place.type == fs.FileType.File
        found = (
            [place] if single else filesystem.get_file_info(fs.FileSelector(root, recursive=True))
        )
        infos = sorted(found, key=lambda info: info.path)
    except UnicodeError:
        raise UserError(f"{where} holds a file whose name is not UTF-8: rename it.") from None
    except (OSError, pyarrow.ArrowException) as error:
        why = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"{where} cannot be listed ({why}): check the address.") from error
    names, faults = [], {}
    for info in infos:
        hidden, suffix = info.base_name.startswith("."), Path(info.base_name).suffix.lower()
        shard = info.path.endswith(SHARD)
        if info.type != fs.FileType.File or hidden or not (shard or suffix in SUFFIXES):
            continue
        if not shard and info.size > MAX_BYTES:
            faults[info.path] = f"it has more than {MAX_BYTES // 2**20} MB"
        else:
            names.append(info.path)
    if not names and not faults:
        raise UserError(f"{where} holds no photographs ({', '.join(SUFFIXES)}) and no .tar files.")
    return filesystem, names, faults


def pieces(names: Sequence[str], known: set[str]) -> list[Piece]:
    """The work, without what is known."""
    files = [name for name in names if not name.endswith(SHARD) and name not in known]
    members: dict[str, list[str]] = {name: [] for name in names if name.endswith(SHARD)}
    for name in known if members else ():
        place = name
        while place and place not in members:
            place = place.rpartition("/")[0]
        members.get(place, []).append(name)
    starts = range(0, len(files), PIECE)
    work = [Piece(shard="", names=files[start : start + PIECE]) for start in starts]
    return work + [Piece(shard=shard, names=names) for shard, names in members.items()]


# ---- in the workers


def decoded(batch: Batch, filesystem: Any, size: int) -> Iterator[Batch]:
    """The photographs of pieces, cropped as for an evaluation, a batch at a time."""
    for text in batch["piece"]:
        found = contents(filesystem, json.loads(text))
        while part := list(islice(found, BATCH)):
            crops = [crop_or_fault(data, size) if data else why for _, data, why in part]
            black_HWC = np.zeros((size, size, 3), np.uint8)
            yield {
                "name": np.array([name for name, _, _ in part]),
                "fault": np.array([crop if isinstance(crop, str) else "" for crop in crops]),
                "crop": np.stack([black_HWC if isinstance(c, str) else c for c in crops]),
            }


def contents(filesystem: Any, piece: Piece) -> Iterator[tuple[str, bytes, str]]:
    """Name and bytes of each photograph of a piece, or why there are none."""
    if not piece["shard"]:
        with ThreadPoolExecutor(READERS) as pool:
            yield from map_ahead(pool, BATCH, partial(content, filesystem), piece["names"])
        return
    shard, known = piece["shard"], set(piece["names"])
    try:
        with (
            filesystem.open_input_stream(shard, compression=None, buffer_size=BUFFER) as stream,
            tarfile.open(fileobj=stream, mode="r|") as members,
        ):
            for member in members:
                name = f"{shard}/{member.name}".encode(errors="backslashreplace").decode()
                suffix = Path(name).suffix.lower()
                if member.isfile() and suffix in SUFFIXES and name not in known:
                    whole = member.size <= MAX_BYTES and members.extractfile(member)
                    data = whole.read() if whole else b""
                    yield name, data, "" if data else "it is empty, or too large"
        with filesystem.open_input_file(shard) as file:
            file.seek(max(0, file.size() - 1024))
            if any(file.read()):  # a whole one ends with zeros
                raise tarfile.ReadError("cut short")
    except (OSError, tarfile.TarError) as error:
        yield shard, b"", f"the shard is damaged: {error}"


def content(filesystem: Any, name: str) -> tuple[str, bytes, str]:
    """Name and bytes of one file, or why there are none."""
    try:
        with filesystem.open_input_stream(name, compression=None) as stream:
            data = stream.read()
            return name, data, "" if data else "the file is empty"
    except OSError as error:
        return name, b"", str(error).splitlines()[0]


class Worker:
    """An actor of Ray Data: crops, or pieces where it decodes them too, to embeddings."""

    def __init__(
        self,
        embedder: Embedder,
        decode: Callable[[Batch], Iterator[Batch]] | None,
        device: str,
        threads: int,
    ) -> None:
        torch.set_num_threads(threads)
        self.embedder, self.decode = embedder.to(pick_device(device)), decode

    def __call__(self, batch: Batch) -> Iterator[Batch]:
        """Embeds a batch."""
        for part in [batch] if self.decode is None else self.decode(batch):
            emb_BD = embed_crops(self.embedder, part.pop("crop"))
            yield {**part, "emb": emb_BD}


# ---- here


def stream_of(
    embedder: Embedder,
    decode: Callable[[Batch], Iterator[Batch]],
    todo: Sequence[Piece],
    workers: int,
    cpus: int,
    gpus: float,
) -> Iterable[Batch]:
    """The embeddings of all pieces, as they are ready; where they are not fetched, work waits."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = BLOCK
    rows = [{"piece": json.dumps(piece)} for piece in todo]
    data: Any = ray.data.from_items(rows, override_num_blocks=len(rows))
    if gpus:
        data = data.map_batches(decode, batch_size=1)
    device = "cuda" if gpus else "cpu"
    data = data.map_batches(
        Worker, batch_size=4 * BATCH if gpus else 1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        fn_constructor_args=(embedder, None if gpus else decode, device, max(1, cpus)),
        **({"num_gpus": gpus} if gpus else {"num_cpus": cpus}),
    )  # fmt: skip
    found: Iterable[Batch] = data.iter_batches(batch_size=None)
    return found


def begin(out: Path, made: Manifest) -> set[str]:
    """Names of what is embedded in `out` already.

    Raises:
        UserError: it holds something else.
    """
    from pyarrow import ArrowException, parquet

    file = out / MANIFEST
    if file.exists():
        before = read_json(file, Manifest)
        if (before["fingerprint"], before["source"]) != (made["fingerprint"], made["source"]):
            raise UserError(
                f"{out} holds embeddings of {before['source']} by {before['model']}: choose "
                "another `out`."
            )
    elif out.exists() and any(not entry.name.startswith(".") for entry in out.iterdir()):
        raise UserError(f"{out} exists already: choose another `out`.")
    else:
        with writing(out):
            write_json(file, made)
    known: set[str] = set()
    for part in sorted(out.glob("part-*.parquet")):
        try:
            known.update(parquet.read_table(part, columns=["path"])["path"].to_pylist())
        except (OSError, ArrowException, KeyError) as error:
            raise UserError(f"{part} is damaged ({error}): remove it, and call again.") from error
    return known


def keep(
    out: Path, stream: Iterable[Batch], faults: dict[str, str], progress: Callable[[int], object]
) -> int:
    """Writes parts of embeddings as they come, also where that is interrupted; how many."""
    names: list[str] = []
    rows: list[NDArray[np.float32]] = []
    written = 0
    try:
        for batch in stream:
            good_B = batch["fault"] == ""
            faults.update(zip(batch["name"][~good_B], batch["fault"][~good_B], strict=True))
            names += batch["name"][good_B].tolist()
            rows.append(batch["emb"][good_B])
            progress(len(good_B))
            if len(names) >= PART:
                written += write_part(out, names, np.concatenate(rows))
                names, rows = [], []
    finally:
        if names:
            written += write_part(out, names, np.concatenate(rows))
    return written


def write_part(out: Path, names: Sequence[str], emb_ND: NDArray[np.float32]) -> int:
    """Writes one more file; how many rows it has."""
    import pyarrow
    from pyarrow import parquet

    number = 1 + max((int(part.stem[5:]) for part in out.glob("part-*.parquet")), default=-1)
    values = pyarrow.array(np.ascontiguousarray(emb_ND, np.float32).ravel())
    vectors = pyarrow.FixedSizeListArray.from_arrays(values, emb_ND.shape[1])
    table = pyarrow.table({"path": pyarrow.array(names, pyarrow.string()), "embedding": vectors})
    with (
        writing(out, advice="make room there, and call again"),
        atomic_file(out / f"part-{number:05}.parquet") as temporary,
    ):
        parquet.write_table(table, temporary, write_page_checksum=True)
    return len(names)
