"""The RUN folder: its files, and the reporter that writes them.

run.json  metrics.jsonl  checkpoints/{last,best}/  pairs.json  thresholds.json  *_model_<name>.pth
plots/  ray/"""

import json
import os
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowerray.errors import UserError
from flowerray.files import atomic_folder, previous, saving, write_json, writing

Save = Callable[[Path], None]
"""Writes a checkpoint into the folder that it is given."""


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

    def refuse_existing(self) -> None:
        """Raises UserError where something is at the path already."""
        if self.path.exists():
            more = f", or continue it with --resume {self.path}" if self.run_json.exists() else ""
            raise UserError(f"{self.path} exists already: choose another --out{more}.")

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
            UserError: the folder is no RUN.
        """
        try:
            content = json.loads(self.run_json.read_text())
        except FileNotFoundError:
            raise UserError(f"{self.path} is not a RUN folder: it has no run.json.") from None
        except ValueError:
            raise UserError(f"{self.run_json} is not valid JSON.") from None
        assert isinstance(content, dict)
        return content

    def checkpoint(self) -> Path | None:
        """The newest whole checkpoint, or None."""
        return self.newest(self.last)

    def newest(self, folder: Path) -> Path | None:
        """`last` or `best`, or None; a kill between renames leaves the previous one."""
        return next((f for f in (folder, previous(folder)) if f.is_dir()), None)

    def records(self) -> list[dict[str, Any]]:
        """metrics.jsonl; a last line that a kill cut short is left out."""
        if not self.metrics.exists():
            return []
        records = []
        for line in self.metrics.read_text().rpartition("\n")[0].splitlines():
            with suppress(ValueError):  # what a full disk left of a record, and of the next one
                records.append(json.loads(line))
        return records

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric."""
        return [(r["step"], r["metrics"][name]) for r in self.records() if name in r["metrics"]]


class NewRecords:
    """What is added to a RUN's metrics.jsonl from one look to the next; what was seen is not read
    again, however long it is.
    """

    def __init__(self, folder: RunDir) -> None:
        self.path = folder.metrics
        self.seen = 0
        """Bytes."""

    def __call__(self) -> list[dict[str, Any]]:
        """The lines that are new and whole. Of a file that a resume has cut, those after the cut's
        first look.
        """
        if not self.path.exists():
            return []
        self.seen = min(self.seen, self.path.stat().st_size)
        with self.path.open("rb") as file:
            file.seek(self.seen)
            new = file.read().rpartition(b"\n")[0]
        self.seen += len(new) + 1 if new else 0
        records = []
        for line in new.splitlines():
            with suppress(ValueError):  # cut and grown again between two looks: no whole first line
                records.append(json.loads(line))
        return records


class FolderReporter:
    """The training loop's way out: metrics and checkpoints into a RUN folder, written by rank 0.

    With several nodes the folder has to be on a file system that all of them share.
    """

    def __init__(self, path: Path, rank: int = 0, world: int = 1) -> None:
        self.dir = RunDir(path)
        self.rank = rank
        self.world = world

    def restore(self) -> Path | None:
        """The checkpoint to continue from, or None for a fresh start."""
        if not self.dir.run_json.exists():
            raise UserError(
                f"worker {self.rank} does not see {self.dir.path}: --out has to be on a file "
                "system that all nodes share."
            )
        return self.dir.checkpoint()

    def rewind(self, step: int) -> None:
        """Drops metrics that were written after the checkpoint at `step`: they will come again."""
        if self.rank != 0:
            return
        for folder in (self.dir.last, self.dir.best):  # what a kill left of a save
            for left in folder.parent.glob(f".{folder.name}.*"):
                if left != previous(folder):
                    shutil.rmtree(left, ignore_errors=True)
        if self.dir.metrics.exists():
            kept = [json.dumps(r) + "\n" for r in self.dir.records() if r["step"] <= step]
            temporary = self.dir.metrics.with_suffix(".tmp")
            temporary.write_text("".join(kept))
            os.replace(temporary, self.dir.metrics)

    def report(
        self,
        step: int,
        epoch: int,
        metrics: dict[str, float],
        save: Save | None = None,
        best: bool = False,
    ) -> None:
        """Appends metrics, then writes checkpoints/best (if best), then checkpoints/last.

        In that order a kill in between costs nothing: whatever is newer than `last` is made again,
        equal."""
        if self.rank != 0:
            return
        with saving(self.dir.path):
            self._write(step, epoch, metrics, save, best)

    def _write(
        self, step: int, epoch: int, metrics: dict[str, float], save: Save | None, best: bool
    ) -> None:
        if metrics:
            record = {"step": step, "epoch": epoch, "time": time.time(), "metrics": metrics}
            with self.dir.metrics.open("ab+") as file:
                if file.tell():
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":  # a full disk cut the last record short
                        file.write(b"\n")
                file.write(json.dumps(record).encode() + b"\n")
        if save is None:
            return
        if best:
            with atomic_folder(self.dir.best) as folder:
                save(folder)
        with atomic_folder(self.dir.last) as folder:
            if best:
                shutil.copytree(self.dir.best, folder, dirs_exist_ok=True)
            else:
                save(folder)
