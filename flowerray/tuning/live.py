"""What shows a search while it runs: MLflow, fed by a thread of the driver, and lines on standard
error.
"""

import queue
import shutil
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowerray.tracking import sync
from flowerray.tracking.state import State
from flowerray.training.rundir import FolderReporter, RunDir
from flowerray.tuning.study import Closed, Study, label
from flowerray.tuning.trial import FAILED, MAP_AT_R


class LiveStudy:
    """While its block runs, a thread of the driver sends the study and its trials to MLflow."""

    def __init__(self, folder: Path, every: float = 5.0) -> None:
        self.folder = folder
        self.every = every
        """Seconds between two looks at the metrics."""
        self.running: dict[Path, None] = {}
        self.closed: queue.Queue[Closed] = queue.Queue()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._loop, daemon=True, name="study-tracking")

    def open(self, folder: Path) -> None:
        """A trial began."""
        self.running[folder] = None

    def close(self, ended: Closed) -> None:
        """A trial ended."""
        self.running.pop(ended.folder, None)
        self.closed.put(ended)

    def __enter__(self) -> "LiveStudy":
        sync.prepare(self.folder)
        sync.send(self.folder)  # trials are shown under it
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        for folder in list(self.running):
            self.close(Closed(folder, "KILLED", "interrupted", final=False))
        self._finish()

    def _loop(self) -> None:
        while not self._stop.wait(self.every):
            self._finish()
            for folder in list(self.running):
                if (folder / "metrics.jsonl").exists():
                    sync.send(folder)
            sync.send(self.folder)

    def _finish(self) -> None:
        while not self.closed.empty():
            finish(self.closed.get())


def finish(ended: Closed) -> None:
    """Ends a trial's MLflow run."""
    if ended.final:
        shutil.rmtree(ended.folder / "checkpoints", ignore_errors=True)
    sync.finish(ended.folder, ended.status, ended.reason)


def finish_left(study: Study, ended: Sequence[Any]) -> None:
    """Ends the MLflow runs of trials that ended just before their driver was killed, and of those
    that the search, with fewer trials now, leaves out.
    """
    endings = [study.ending(trial) for trial in ended]
    known = {ending.folder for ending in endings}
    left_out = sorted(set((study.folder / "trials").glob("*")) - known)
    endings += [Closed(path, "KILLED", "left out", final=False) for path in left_out]
    for ending in endings:
        state = State.read(ending.folder)
        if not (state.closed or (ending.folder in left_out and state.finished)):
            finish(ending)


class Lines:
    """One line a trial and epoch on standard error, and the study's own curves."""

    def __init__(self, study: Study, best: float | None, ended: int, quiet: bool) -> None:
        self.study = study
        self.best = best
        """Best val MAP@R of a complete trial."""
        self.ended = ended
        self.quiet = quiet
        self.shown: dict[str, int] = {}

    def epoch(self, folder: RunDir, result: dict[str, Any]) -> None:
        """A trial's epoch; each is shown once."""
        name, epoch = folder.path.name, result["epoch"]
        if epoch <= self.shown.get(name, 0) or FAILED in result:
            return
        self.shown[name] = epoch
        values = "  ".join(f"{label(n)} {result[n]:.3f}" for n in self.study.config.objectives)
        self.say(f"trial {name}  epoch {epoch:>2} of {self.study.epochs}  {values}")

    def end(self, folder: RunDir, result: dict[str, Any] | None, closed: Closed) -> None:
        """A trial's end."""
        if not closed.final:
            self.say(f"trial {folder.path.name}  could not be trained: {closed.reason}")
            return
        self.ended += 1
        if result is not None and closed.status != "FAILED":
            self.epoch(folder, result)
        if closed.status == "FINISHED":
            assert result is not None
            self.best = max(self.best or 0.0, result[MAP_AT_R])
        what = {"FINISHED": "complete"}.get(closed.status, closed.reason)
        if closed.status == "FAILED":
            what = f"failed: {closed.reason}"
        best = "" if self.best is None else f"; best val MAP@R so far {self.best:.3f}"
        self.say(
            f"trial {folder.path.name}  {what} ({self.ended} of {self.study.config.trials}{best})"
        )
        if self.best is not None:
            FolderReporter(self.study.folder).report(
                self.ended, 0, {"study/best_val_map_at_r": self.best}
            )

    def say(self, line: str) -> None:
        """Prints."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)
