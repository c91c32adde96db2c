"""Follows trainings while they run: what they append to metrics.jsonl is shown and sent to MLflow,
alike wherever the workers are.
"""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

from tqdm import tqdm

from flowerray.robustness.guard import alarms
from flowerray.tracking import server, sync
from flowerray.tracking.state import Status
from flowerray.training.rundir import NewRecords, Record, RunDir

LABELS = {
    "loss": "{kind}loss",
    "val MAP@R": "val/map_at_r",
    "val R@1": "val/recall_at_1",
    "adversarial": "val/adversarial_recall_at_1",
    "img/s": "train/images_per_second",
    "s": "epoch/seconds",
}
"""The few numbers that tell how a training goes."""
Line = Callable[[RunDir, Record], str]
"""What is said of a training's record that ends an epoch."""


class Ending(NamedTuple):
    """How a training ended."""

    folder: Path
    status: Status = "FINISHED"
    reason: str | None = None


@dataclass
class Followed:
    """A training that goes on."""

    folder: RunDir
    steps: int
    """Of the whole training."""
    new_records: NewRecords
    root: bool
    """Shown in MLflow from the start, not from its first record on."""
    step: int = 0
    epoch: int = 0
    sent: int = -1
    """Bytes of metrics.jsonl that MLflow has."""


def brief(metrics: Mapping[str, float], kind: str = "epoch/") -> str:
    """One line of numbers; `kind` says whose loss: an epoch's, or of the last steps (`train/`)."""
    named = {label: name.format(kind=kind) for label, name in LABELS.items()}
    return ", ".join(f"{k} {metrics[name]:.3g}" for k, name in named.items() if name in metrics)


def epoch_line(_: RunDir, record: Record) -> str:
    """What a training on its own says of an epoch."""
    return f"epoch {record['epoch']}  {brief(record['metrics'])}"


class Watcher:
    """Follows trainings, each from `open` to `close`, while its block runs.

    One thread shows them: on a terminal a live bar, elsewhere, so that a log stays readable, lines.
    Another one sends them to MLflow, whose delays thus stop neither trainings nor lines.

    Args:
        quiet: show nothing but alarms.
        line: said of each epoch where no bar is shown; None = nothing.
        bar: show one on a terminal.
        every: seconds between two sendings; six times as many after a failure.
    """

    def __init__(
        self,
        quiet: bool = False,
        line: Line | None = epoch_line,
        bar: bool = True,
        every: float = 5.0,
    ) -> None:
        self.quiet, self.line, self.every = quiet, line, every
        live = bar and sys.stderr.isatty() and not quiet
        self.bar = tqdm(total=0, unit="step", disable=not live, dynamic_ncols=True)
        self.going: dict[Path, Followed] = {}
        self.opened = 0
        self.steps_ended = 0
        self._calls: queue.Queue[Callable[[], object]] = queue.Queue()
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=target, name=f"flowerray-{name}", daemon=True)
            for name, target in (("lines", self._show_on), ("tracking", self._send_on))
        ]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._calls.put(lambda: None)  # wakes the thread
        for thread in self._threads:
            thread.join(server.LOCK_SECONDS)  # a call that hangs ends by itself
        for path, one in list(self.going.items()):
            begun = one.folder.metrics.exists()
            self.close(Ending(path, "KILLED", "interrupted"), tell=begun)
        self._call()
        self.bar.close()

    # ---- what a driver says

    def open(
        self,
        folder: RunDir,
        params: dict[str, Any],
        tags: dict[str, str],
        *,
        name: str | None = None,
        steps: int = 0,
        parent: Path | None = None,
    ) -> None:
        """Follows a training from now on; see `sync.start`.

        Args:
            steps: of the whole training, for the bar.
            parent: the folder whose MLflow run this one is shown under.
        """
        if not self.opened:  # waits: two threads that load the same libraries may trip
            self.later(sync.prepare, folder.path).result()
        self.later(sync.start, folder.path, name or folder.path.name, params, tags, parent=parent)
        new = NewRecords(folder)
        new()  # what an earlier sitting showed
        self.opened += 1
        if not self.bar.disable:
            self.bar.total += steps
        self.going[folder.path] = Followed(folder, steps, new, parent is None)

    def close(self, ending: Ending, tell: bool = True) -> None:
        """A training ended; MLflow gets the rest of it, and its end.

        Args:
            tell: tell MLflow of the end; not of one that never began.
        """
        self._show()
        with self._lock:
            ended = self.going.pop(ending.folder, None)
            self.steps_ended += ended.steps if ended else 0
        if tell:
            self.later(sync.finish, *ending)

    @contextmanager
    def running(self, folder: RunDir, *note: Any, **more: Any) -> Iterator[None]:
        """`open`, and `close` with how the block ends: FINISHED, FAILED with the reason, KILLED."""
        self.open(folder, *note, **more)
        ending = Ending(folder.path, "KILLED", "interrupted")
        try:
            yield
            ending = Ending(folder.path)
        except Exception as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            ending = Ending(folder.path, "FAILED", reason)
            raise
        finally:
            self.close(ending)

    def later(self, function: Callable[..., Any], *arguments: Any, **more: Any) -> Future[Any]:
        """Has the thread that sends call one of `sync`'s functions; gives what that returns."""
        result: Future[Any] = Future()

        def call() -> None:
            try:
                result.set_result(function(*arguments, **more))
            except Exception as error:
                result.set_exception(error)

        if self._threads[1].is_alive():
            self._calls.put(call)
        else:  # outside of the block nobody would
            call()
        return result

    def say(self, line: str) -> None:
        """A line on standard error."""
        if not self.quiet:
            self.bar.write(line, file=sys.stderr)

    # ---- the threads

    def _show_on(self) -> None:
        while not self._stop.wait(1.0):
            self._show()

    def _show(self) -> None:
        with self._lock:
            shown: dict[str, float] = {}
            for one in list(self.going.values()):
                for record in one.new_records():
                    one.step = record["step"]
                    shown |= record["metrics"]
                    self._tell(one, record)
            if self.bar.disable:
                return
            self.bar.n = self.steps_ended + sum(one.step for one in self.going.values())
            over = f"{self.opened - len(self.going)} of {self.opened} trainings ended"
            if self.opened > 1:
                self.bar.set_postfix_str(over)
            elif shown:
                self.bar.set_postfix_str(brief(shown, "train/"))
            self.bar.refresh()

    def _tell(self, one: Followed, record: Record) -> None:
        whose = f"{one.folder.path.name}: " if self.opened > 1 else ""
        for alarm in alarms(record["metrics"]):
            self.bar.write(f"warning: {whose}{alarm}", file=sys.stderr)
        ends_epoch = "epoch/seconds" in record["metrics"] and record["epoch"] > one.epoch
        if ends_epoch:
            one.epoch = record["epoch"]
            if self.bar.disable and self.line is not None:
                self.say(self.line(one.folder, record))

    def _send_on(self) -> None:
        while not self._stop.is_set():
            sent = [self._send(one) for one in list(self.going.values())]
            self._call(self.every if all(sent) else 6 * self.every)

    def _send(self, one: Followed) -> bool:
        metrics = one.folder.metrics
        size = metrics.stat().st_size if metrics.exists() else 0
        if size == one.sent or not (size or one.root):
            return True
        sent = sync.send(one.folder.path)
        if sent:
            one.sent = size
        return sent

    def _call(self, seconds: float = 0.0) -> None:
        """Makes the calls that are asked for, for so many seconds at least."""
        end = time.monotonic() + seconds
        while True:
            rest = end - time.monotonic()
            try:
                call = self._calls.get(rest > 0 and not self._stop.is_set(), max(rest, 0.0))
            except queue.Empty:
                return
            call()
