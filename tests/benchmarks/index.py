"""Nearest neighbours among many embeddings: flowerray's INDEX, which faiss searches, beside
usearch, in the same run.

    uv run --with usearch python -m tests.benchmarks.index --out FILE.json
        [--rows 1000000] [--dim 128] [--sides flowerray usearch]

Each side is a process of its own, one after the other, on the same file of vectors. It looks as far
as it needs to for a recall@10 of 0.99 on tuning queries and is measured on others. The vectors are
drawn as a trained model's embeddings lie (see `draw`), or read from a
`.npy` file with `--vectors`.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import psutil
from numpy.typing import NDArray

from flowerray.index import contents
from flowerray.retrieval.neighbours import library
from tests.benchmarks.command import about

K = 10
QUERIES = 1000
ADDED = 10_000
WANTED = 0.99
Vectors = NDArray[np.float32]


class Side(Protocol):
    """One way to search; `effort` is cells to look into, or the breadth of a graph's search."""

    effort: int

    def build(self, vectors_ND: Vectors) -> None: ...
    def search(self, query_D: Vectors) -> NDArray[np.int64]: ...
    def add(self, vectors_ND: Vectors, first: int) -> None: ...
    def remove(self, ids: NDArray[np.int64]) -> None: ...
    def save(self, folder: Path) -> None: ...
    def load(self, folder: Path) -> None: ...


class Ours:
    """flowerray's INDEX folder as `flowerray index` writes it, names, hashes and all."""

    effort = 8

    def __init__(self) -> None:
        self.place = tempfile.TemporaryDirectory()
        self.folder = Path(self.place.name) / "index"
        self.index: contents.Index

    def build(self, vectors_ND: Vectors) -> None:
        model = Path(self.place.name) / "model.pth"
        model.write_bytes(b"")
        contents.create(self.folder, model, "none", vectors_ND.shape[1])
        self.add(vectors_ND, 0)
        self.effort = self.index.cells.nprobe  # as it was chosen, for a recall of 0.995

    def search(self, query_D: Vectors) -> NDArray[np.int64]:
        self.index.cells.nprobe = self.effort
        rows_K, _ = self.index.nearest(query_D, K)
        return np.array([int(self.index.path(row).stem) for row in rows_K])

    def add(self, vectors_ND: Vectors, first: int) -> None:
        photographs = [
            contents.Photograph(Path(f"/photographs/{first + n}.jpg"), bytes(16), "none", emb_D)
            for n, emb_D in enumerate(vectors_ND)
        ]
        self.index, _ = contents.change(self.folder, photographs)

    def remove(self, ids: NDArray[np.int64]) -> None:
        paths = {f"/photographs/{n}.jpg".encode() for n in ids.tolist()}
        self.index, _ = contents.change(self.folder, gone=paths.__contains__)

    def save(self, folder: Path) -> None:
        folder.rmdir()
        folder.symlink_to(self.folder)  # it is written already

    def load(self, folder: Path) -> None:
        self.index = contents.open_index(folder.resolve())


class Usearch:
    """usearch: a graph (HNSW) of whole vectors, with its defaults."""

    effort = 16
    index: Any = None

    def build(self, vectors_ND: Vectors) -> None:
        from usearch.index import Index

        self.index = Index(ndim=vectors_ND.shape[1], metric="cos", dtype="f32")
        self.index.add(np.arange(len(vectors_ND)), vectors_ND)

    def search(self, query_D: Vectors) -> NDArray[np.int64]:
        self.index.expansion_search = self.effort
        return np.asarray(self.index.search(query_D, K).keys, np.int64)

    def add(self, vectors_ND: Vectors, first: int) -> None:
        self.index.add(np.arange(first, first + len(vectors_ND)), vectors_ND)

    def remove(self, ids: NDArray[np.int64]) -> None:
        self.index.remove(ids)

    def save(self, folder: Path) -> None:
        self.index.save(str(folder / "index.usearch"))

    def load(self, folder: Path) -> None:
        from usearch.index import Index

        self.index = Index.restore(str(folder / "index.usearch"))


SIDES: dict[str, Callable[[], Side]] = {"flowerray": Ours, "usearch": Usearch}


def draw(rows: int, dim: int, seed: int = 0) -> Vectors:
    """Unit vectors of classes of 100 in families of 10 classes. The spectrum, and the share of the
    variance within classes (0.48), are those of a center-loss model on Oxford-102's test images.
    """
    rng = np.random.default_rng(seed)
    spread_D = (np.arange(5, dim + 5) ** -0.65).astype(np.float32)

    def normal(count: int, share: float) -> Vectors:
        found: Vectors = share**0.5 * rng.standard_normal((count, dim), np.float32) * spread_D
        return found

    family_FD = normal(max(1, rows // 1000), 0.36)
    class_CD = normal(max(1, rows // 100), 0.16)
    class_CD += family_FD[rng.integers(len(family_FD), size=len(class_CD))]
    emb_ND = normal(rows, 0.48)
    emb_ND += class_CD[rng.integers(len(class_CD), size=rows)]
    emb_ND /= np.linalg.norm(emb_ND, axis=1, keepdims=True)
    return emb_ND


def exact(vectors_ND: Vectors, query_QD: Vectors) -> NDArray[np.int64]:
    """The true neighbours, Q x K."""
    faiss = library()
    found: NDArray[np.int64] = faiss.knn(
        query_QD, vectors_ND, K, metric=faiss.METRIC_INNER_PRODUCT
    )[1]
    return found


def recall(side: Side, query_QD: Vectors, true_QK: NDArray[np.int64]) -> float:
    """Of the true neighbours those that are found."""
    hits = [
        len(np.intersect1d(side.search(query_D), true_K))
        for query_D, true_K in zip(query_QD, true_QK, strict=True)
    ]
    return sum(hits) / true_QK.size


def once(name: str, folder: Path) -> dict[str, Any]:
    """Everything that is measured of one side."""
    vectors_ND, query_QD, added_AD = (
        np.load(folder / f"{part}.npy") for part in ("vectors", "queries", "added")
    )
    true_QK = np.load(folder / "true.npy")
    half = len(query_QD) // 2
    before = psutil.Process().memory_info().rss
    side = SIDES[name]()
    result: dict[str, Any] = {"build_seconds": seconds(lambda: side.build(vectors_ND))}
    result["build_added_mib"] = (
        resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    ) / 2**20
    while recall(side, query_QD[:half], true_QK[:half]) < WANTED and side.effort < 4096:
        side.effort = -(-side.effort * 5 // 4)
    result["effort"] = side.effort
    result["recall_at_10"] = recall(side, query_QD[half:], true_QK[half:])
    kept = folder / name
    kept.mkdir()
    result["save_seconds"] = seconds(lambda: side.save(kept))
    result["file_mib"] = sum(file.stat().st_size for file in kept.resolve().rglob("*")) / 2**20
    words = [
        sys.executable,
        "-m",
        "tests.benchmarks.index",
        "--side",
        name,
        "--effort",
        side.effort,
    ]
    command = [*map(str, words), "--folder", str(folder)]
    started = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    result |= json.loads(started.splitlines()[-1])
    result["add_10000_seconds"] = seconds(lambda: side.add(added_AD, len(vectors_ND)))
    gone = np.arange(0, len(vectors_ND), max(1, len(vectors_ND) // 1000))
    result["remove_1000_seconds"] = seconds(lambda: side.remove(gone))
    found = np.stack([side.search(query_D) for query_D in query_QD[half:]])
    result["removed_still_found"] = int(np.isin(found, gone).sum())
    result["of_removed_neighbours"] = int(np.isin(true_QK[half:], gone).sum())
    return result


def started(name: str, effort: int, folder: Path) -> dict[str, Any]:
    """A fresh process on the saved files: its start, its memory, its answers' time."""
    query_QD = np.load(folder / "queries.npy")
    side = SIDES[name]()
    side.effort = effort
    before = psutil.Process().memory_info().rss
    start = seconds(lambda: side.load(folder / name)) + seconds(lambda: side.search(query_QD[0]))
    took_Q, cpu = [], time.process_time()
    for query_D in query_QD:
        took_Q.append(seconds(partial(side.search, query_D)))
    cpu = time.process_time() - cpu
    return {
        "start_seconds": start,
        "p50_ms": 1000 * float(np.quantile(took_Q, 0.5)),
        "p99_ms": 1000 * float(np.quantile(took_Q, 0.99)),
        "cpu_ms": 1000 * cpu / len(query_QD),
        "added_mib": (psutil.Process().memory_info().rss - before) / 2**20,
    }


def seconds(call: Callable[[], Any]) -> float:
    """What a call takes."""
    begin = time.perf_counter()
    call()
    return time.perf_counter() - begin


def main(argv: Sequence[str] | None = None) -> None:
    """Measures the sides, prints a table, writes the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--vectors", type=Path, help="a .npy file of unit vectors instead")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    for hidden in ("--side", "--effort", "--folder"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.side:
        folder = Path(options.folder)
        effort = options.effort
        found = started(options.side, int(effort), folder) if effort else once(options.side, folder)
        print(json.dumps(found))
        return
    sides: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(options, folder)
        for name in options.sides:
            command = [sys.executable, "-m", "tests.benchmarks.index", "--side", name]
            done = subprocess.run(
                [*command, "--folder", place], check=True, stdout=subprocess.PIPE, text=True
            )
            sides[name] = json.loads(done.stdout.splitlines()[-1])
            print(line(name, sides[name]), flush=True)
    content = {**about(), "rows": options.rows, "dim": options.dim, "sides": sides}
    if options.out is not None:
        options.out.write_text(json.dumps(content, indent=2) + "\n")


def prepare(options: argparse.Namespace, folder: Path) -> None:
    """The files that every side reads."""
    if options.vectors is not None:
        every = np.load(options.vectors)
        every = every[np.random.default_rng(0).permutation(len(every))]
        options.rows, options.dim = len(every) - QUERIES - ADDED, every.shape[1]
    else:
        every = draw(options.rows + ADDED + QUERIES, options.dim)
    vectors, added, queries = np.split(every, [options.rows, options.rows + ADDED])
    parts = {"vectors": vectors, "queries": queries, "added": added}
    for name, part in {**parts, "true": exact(vectors, queries)}.items():
        np.save(folder / f"{name}.npy", part)


def line(name: str, found: dict[str, Any]) -> str:
    """A side in one line."""
    return (
        f"{name:<11} recall@10 {found['recall_at_10']:.4f}  p50 {found['p50_ms']:.2f} ms  "
        f"p99 {found['p99_ms']:.2f} ms  build {found['build_seconds']:.0f} s  "
        f"start {found['start_seconds']:.2f} s  {found['added_mib']:.0f} MiB  "
        f"10,000 added {found['add_10000_seconds']:.1f} s"
    )


if __name__ == "__main__":
    main()
