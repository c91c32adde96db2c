"""The RUN folder: its files, and the reporter that writes them.

run.json  metrics.jsonl  checkpoints/{last,best}/  pairs.json  thresholds.json  *_model_<name>.pth
plots/  ray/"""

import hashlib
import json
import math
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from flowerray.errors import UserError
from flowerray.files import (
    atomic_file,
    atomic_folder,
    previous,
    read_json,
    saving,
    write_json,
    writing,
)

ATTEMPT = ".attempt"
"""In a RUN: a word of the worker that writes it."""
Save = Callable[[Path], None]
"""Writes a checkpoint into the folder that it is given."""


class Record(TypedDict):
    """A line of metrics.jsonl."""

    step: int
    epoch: int
    time: float
    """Seconds since 1970."""
    metrics: dict[str, float]
    """In the file a value that is not finite, which JSON does not know, stands as a text: "NaN",
    "Infinity", "-Infinity"; of 0.1.0 as it is."""


class Outcome(TypedDict):
    """thresholds.json, which a training writes last."""

    threshold: float
    """Cosine from which two photographs count as the same class."""
    best_epoch: int
    calibration: NotRequired[dict[str, Any] | None]
    """A `Calibration`; None: there was no val. Older versions did not write it."""
    training: NotRequired[dict[str, Any]]
    """What it cost; older versions did not write it."""


def read_records(path: Path, start: int = 0) -> Iterator[tuple[Record, int]]:
    """The records of a metrics.jsonl from a byte on, each with the byte after it; a last line that
    is being written, and what a full disk left of a record, are left out.
    """
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(start)
        for line in file:
            start += len(line)
            if line.endswith(b"\n") and (record := _record(line)):
                yield record, start


def _record(line: bytes) -> Record | None:
    try:
        found = json.loads(line)
        metrics = {str(name): float(value) for name, value in found["metrics"].items()}
        step, epoch, when = int(found["step"]), int(found["epoch"]), float(found.get("time", 0))
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return None
    return Record(step=step, epoch=epoch, time=when, metrics=metrics)


def _line(record: Record) -> bytes:
    metrics = {n: v if math.isfinite(v) else json.dumps(v) for n, v in record["metrics"].items()}
    return json.dumps({**record, "metrics": metrics}, allow_nan=False).encode() + b"\n"


def mark(path: Path, end: int) -> str:
    """Hash of what stands before a byte of a growing file: another one where it was rewritten."""
    with path.open("rb") as file:
        file.seek(max(0, end - 4096))
        return hashlib.sha256(file.read(min(end, 4096))).hexdigest()[:16]


def grown(path: Path, end: int, known: str) -> bool:
    """Whether a file still stands as it was read up to a byte; see `mark`."""
    return path.exists() and path.stat().st_size >= end and mark(path, end) == known


class RunDir:
    """Paths of a RUN folder and the few operations on them."""

    def __init__(self, path: Path) -> None:
        self.path = path.expanduser().absolute()
        self.run_json = self.path / "run.json"
        self.metrics = self.path / "metrics.jsonl"
        self.pairs = self.path / "pairs.json"
        self.thresholds = self.path / "thresholds.json"
        self.plots = self.path / "plots"
        self.ray = self.path / "ray"
        self.last = self.path / "checkpoints" / "last"
        self.best = self.path / "checkpoints" / "best"
        self._records: list[Record] = []
        self._end, self._mark = 0, ""

    def refuse_existing(self) -> None:
        """Raises UserError where something is at the path already."""
        if self.path.exists():
            more = f", or continue it with `resume` {self.path}" if self.run_json.exists() else ""
            raise UserError(f"{self.path} exists already: choose another `out`{more}.")

    def create(self, run: dict[str, Any]) -> None:
        """Makes the folder and writes run.json.

        Raises:
            UserError: something is there already, or the place cannot be written.
        """
        self.refuse_existing()
        with writing(self.path):
            self.path.mkdir(parents=True)
            write_json(self.run_json, run)

    def read(self) -> dict[str, Any]:
        """run.json as a dict.

        Raises:
            UserError: the folder is no RUN, or the file is damaged.
        """
        missing = f"{self.path} is not a RUN folder: it has no run.json."
        again = "put a whole copy of it back"
        return dict(read_json(self.run_json, missing=missing, advice=again))

    @property
    def finished(self) -> bool:
        """The training came to its end: model and threshold are there."""
        return self.thresholds.exists()

    def outcome(self) -> Outcome:
        """thresholds.json of a finished training.

        Raises:
            UserError: it has not finished, or the file is damaged.
        """
        again = "remove it and resume the run, which writes it again"
        missing = f"{self.path} has not finished: resume it first."
        found: Outcome = read_json(self.thresholds, Outcome, missing=missing, advice=again)
        return found

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return self.newest(self.last)

    def newest(self, folder: Path) -> Path | None:
        """`last` or `best`, or None; a kill between renames leaves the previous one."""
        return next((f for f in (folder, previous(folder)) if f.is_dir()), None)

    def records(self) -> list[Record]:
        """metrics.jsonl; only what is new since the last call is read, unless it was rewritten."""
        if not grown(self.metrics, self._end, self._mark):
            self._records, self._end = [], 0
        for record, end in read_records(self.metrics, self._end):
            self._records.append(record)
            self._end = end
        if self.metrics.exists():
            self._mark = mark(self.metrics, self._end)
        return list(self._records)

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric."""
        return [(r["step"], r["metrics"][name]) for r in self.records() if name in r["metrics"]]

    def append(self, step: int, epoch: int, metrics: dict[str, float]) -> None:
        """Adds a line to metrics.jsonl."""
        record = Record(step=step, epoch=epoch, time=time.time(), metrics=metrics)
        with saving(self.path), self.metrics.open("ab+") as file:
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # a full disk cut the last record short
                    file.write(b"\n")
            file.write(_line(record))

    def note(self, metrics: dict[str, float]) -> None:
        """Adds what was measured after the training to metrics.jsonl."""
        records = self.records()
        step, epoch = (records[-1]["step"], records[-1]["epoch"]) if records else (0, 0)
        self.append(step, epoch, metrics)


class NewRecords:
    """What is added to a RUN's metrics.jsonl from one look to the next."""

    def __init__(self, folder: RunDir) -> None:
        self.path = folder.metrics
        self.seen = 0
        """Bytes."""

    def __call__(self) -> list[Record]:
        """The lines that are new and whole. Of a file that a resume has cut, those after the cut's
        first look.
        """
        if self.path.exists():
            self.seen = min(self.seen, self.path.stat().st_size)
        found = list(read_records(self.path, self.seen))
        self.seen = found[-1][1] if found else self.seen
        return [record for record, _ in found]


class Behind:
    """Writes checkpoints in a thread: the newest best one, then the newest one. What came in
    between, while it was busy, is left out: who resumes makes it again, equal.
    """

    def __init__(self, write: Callable[[Save | None, Save], None]) -> None:
        self.write = write
        self.lock = threading.Lock()
        self.thread: threading.Thread | None = None
        """At work, or ended."""
        self.best: Save | None = None
        self.last: Save | None = None
        self.error: BaseException | None = None

    def put(self, save: Save, best: bool) -> None:
        """Takes a checkpoint; raises what an earlier one raised."""
        with self.lock:
            self._raise()
            self.best, self.last = save if best else self.best, save
            if self.thread is None:
                self.thread = threading.Thread(target=self._work, name="flowerray-checkpoints")
                self.thread.start()

    def wait(self) -> None:
        """Returns when nothing is left to write; raises what writing raised."""
        with self.lock:
            thread = self.thread
        if thread is not None:
            thread.join()
        self._raise()

    def _raise(self) -> None:
        error, self.error = self.error, None
        if error is not None:
            raise error

    def _work(self) -> None:
        while True:
            with self.lock:
                best, last, self.best, self.last = self.best, self.last, None, None
                if last is None:
                    self.thread = None
                    return
            try:
                self.write(best, last)
            except BaseException as error:  # noqa: B036 (who waits raises it)
                self.error = error


class FolderReporter:
    """The training loop's way out: metrics and checkpoints into a RUN folder, written by rank 0.

    With several nodes the folder has to be on a file system that all of them share.
    """

    def __init__(self, path: Path, rank: int = 0, world: int = 1) -> None:
        self.dir = RunDir(path)
        self.rank = rank
        self.world = world
        self.attempt = ""
        """A word of this worker's own, which RUN/.attempt holds until another takes over."""
        self._behind = Behind(self._write)

    def restore(self) -> Path | None:
        """The checkpoint to continue from, or None for a fresh start. From now on earlier attempts
        at this RUN write nothing more.

        Raises:
            UserError: the RUN is not to be seen from here.
        """
        if not self.dir.run_json.exists():
            raise UserError(
                f"worker {self.rank} does not see {self.dir.path} on {socket.gethostname()}: mount "
                "there the file system that all nodes share, or give an `out` that is on one."
            )
        if self.rank == 0 and not self.attempt:
            self.attempt = uuid.uuid4().hex
            with atomic_file(self.dir.path / ATTEMPT) as file:
                file.write_text(self.attempt)
        return self.dir.checkpoint()

    def refuse_outdated(self) -> None:
        """Ends an attempt that was taken for dead (a paused machine, a cut cable) and replaced.

        Raises:
            UserError: another attempt has begun since.
        """
        with suppress(FileNotFoundError):
            if self.attempt and (self.dir.path / ATTEMPT).read_text() != self.attempt:
                raise UserError(
                    f"{self.dir.path} goes on in another worker, which took over from this one on "
                    f"{socket.gethostname()}: this one stops, and has written nothing since."
                )

    def rewind(self, step: int) -> None:
        """Drops metrics that were written after the checkpoint at `step`: they will come again."""
        if self.rank != 0:
            return
        self.refuse_outdated()
        for folder in (self.dir.last, self.dir.best):  # what a kill left of a save
            for left in folder.parent.glob(f".{folder.name}.*"):
                if left != previous(folder) or folder.is_dir():
                    shutil.rmtree(left, ignore_errors=True)
        if self.dir.metrics.exists():
            kept = [_line(record) for record in self.dir.records() if record["step"] <= step]
            with atomic_file(self.dir.metrics) as temporary:
                temporary.write_bytes(b"".join(kept))

    def report(
        self,
        step: int,
        epoch: int,
        metrics: dict[str, float],
        save: Save | None = None,
        best: bool = False,
        beside: bool = False,
    ) -> None:
        """Appends metrics, then writes checkpoints/best (if best), then checkpoints/last; `beside`:
        in a thread, see `Behind`.

        In that order a kill in between costs nothing: whatever is newer than `last` is made again,
        equal."""
        if self.rank != 0:
            return
        self.refuse_outdated()
        if metrics:
            self.dir.append(step, epoch, metrics)
        if save is None:
            return
        if beside:
            self._behind.put(save, best)
        else:
            self._write(save if best else None, save)

    def wait(self) -> None:
        """Returns when all checkpoints are on the disk.

        Raises:
            UserError: one could not be written.
        """
        self._behind.wait()

    def _write(self, best: Save | None, last: Save) -> None:
        with saving(self.dir.path):
            if best is not None:
                with atomic_folder(self.dir.best) as folder:
                    best(folder)
                    self.refuse_outdated()  # it took its time
            with atomic_folder(self.dir.last) as folder:
                if best is last:
                    shutil.copytree(self.dir.best, folder, dirs_exist_ok=True)
                else:
                    last(folder)
                self.refuse_outdated()
