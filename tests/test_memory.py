"""The allocator's setting: fewer page faults, the same memory."""

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, threading
import numpy as np
from flowerray.memory import keep_freed_memory

if sys.argv[1] == "kept" and not keep_freed_memory():
    sys.exit(77)

def faults():
    for _ in range(30):
        np.ones(6 * 2**20)  # 48 MiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(40):
        np.ones(6 * 2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)

thread = threading.Thread(target=faults)
thread.start() if sys.argv[2] == "thread" else faults()
"""


def count(setting: str, place: str) -> int:
    command = [sys.executable, "-c", PROGRAM, setting, place]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 77:
        pytest.skip("the C library is not glibc")
    return int(done.stdout)


@pytest.mark.parametrize("place", ["main", "thread"])
def test_freed_blocks_are_used_again(place: str) -> None:
    assert count("kept", place) < count("default", place) / 4
