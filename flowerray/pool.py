"""Processes that share the work of decoding and painting images."""

import math
import multiprocessing
import os
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path

from flowerray.errors import UserError

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def cores() -> int:
    """CPU cores that this process may use: of a container or a batch job often fewer than the
    machine has.
    """
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    with suppress(OSError, ValueError):  # "max 100000", or the time that a period of 100 ms allows
        quota, period = _QUOTA.read_text().split()
        count = min(count, math.ceil(int(quota) / int(period)))
    return max(1, count)


def ignore_pillow() -> None:
    """In a process of our own: no warnings of odd metadata and large images, to users."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


def leave_unguarded() -> None:
    """Ends a new process that runs its parent's script once more, because that has no main guard,
    instead of letting it wait for a lock that the parent holds. `spawned` then says so there.
    """
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # as multiprocessing asks
        raise SystemExit(1)


@contextmanager
def spawned(
    processes: int, work: str, initializer: Callable[[], None] | None = None
) -> Iterator[ProcessPoolExecutor]:
    """A pool of new processes: forked ones would inherit the locks of the parent's threads (torch,
    Ray).

    Args:
        work: what each does, for the message: "decodes images".
        initializer: called first in each.

    Raises:
        UserError: one of them died.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, mp_context=context, initializer=initializer) as pool:
            yield pool
    except BrokenProcessPool as error:
        raise UserError(
            f"A process that {work} died: free some memory, or put your script's calls under "
            '`if __name__ == "__main__":`.'
        ) from error
