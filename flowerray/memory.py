"""How this process' memory allocator treats the large blocks of CPU training."""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8
"""Numbers of glibc's malloc.h."""

NEVER = 2**31 - 1

ENVIRONMENT = {
    "MALLOC_TRIM_THRESHOLD_": str(NEVER),
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_ARENA_MAX": "1",
}
"""`keep_freed_memory` for a process that is still to start; Ray runs a training in a thread, which
has an arena of its own by then."""


def keep_freed_memory() -> bool:
    """Lets glibc reuse freed blocks of any size; the peak of the memory stays as it is.

    By default it gives every block above 32 MiB back to the system at once, and takes fresh, zeroed
    pages for the next one. An activation map of a batch is that large, and in a thread all smaller
    ones are treated so too: a training step of the default backbone then spends a fifth of its time
    on 75,000 page faults (140,000 in a thread). Call it before threads start.

    Returns:
        False where the C library is not glibc; nothing has changed there.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = {M_TRIM_THRESHOLD: NEVER, M_MMAP_MAX: 0, M_ARENA_MAX: 1}
    return all(mallopt(number, value) for number, value in settings.items())
