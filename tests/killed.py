"""Work that is killed at a chosen moment."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def killed_at(event: int, folder: Path, work: Callable[[], object]) -> bool:
    """Runs `work` in a process that ends, as by a kill, before its n-th change of a file or folder
    below `folder`, or before the n-th wait for the disk; False where it came to its end.
    """
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    left = [event]

    def one(name: str, arguments: tuple[Any, ...]) -> None:
        changing = name in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "fsync")
        writing = name == "open" and arguments[1] not in ("r", "rb", None)
        if (changing or writing) and (name == "fsync" or str(folder) in str(arguments[0])):
            left[0] -= 1
            if left[0] == 0:
                os._exit(9)

    def synced(fd: Any, wait: Callable[[Any], None] = os.fsync) -> None:
        one("fsync", ())
        wait(fd)

    setattr(os, "fsync", synced)  # noqa: B010
    sys.addaudithook(one)
    try:
        work()
    except BaseException:
        os._exit(1)
    os._exit(0)
