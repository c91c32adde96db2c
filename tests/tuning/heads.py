"""A Ray head node of the tests' own, and jobs that are submitted to it."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).with_name("ray"))


def wait_for(ready: Callable[[], bool], timeout_s: float) -> None:
    """Polls; fails where it takes too long."""
    end = time.monotonic() + timeout_s
    while not ready():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.05)


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


@contextmanager
def start_head() -> Iterator[str]:
    """A head node with ports and a folder of its own; gives the dashboard's address."""
    gcs, dashboard, client, agent = free_ports(4)
    folder = Path("/tmp") / f"flowerray-{os.getpid()}"  # Ray's sockets need a short path
    process = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", "--disable-usage-stats", "--num-cpus=2",
            f"--port={gcs}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}",
            f"--dashboard-agent-listen-port={agent}",
            f"--temp-dir={folder}",
            f"--object-store-memory={128 * 2**20}",
        ],
        # Ray's own default would let its workers wait for everything else that runs.
        env={
            **os.environ,
            "RAY_worker_niceness": "0",
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        },
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def listens() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", dashboard)) == 0

    try:
        wait_for(listens, 120)
        yield f"http://127.0.0.1:{dashboard}"
    finally:
        started = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        _, left = psutil.wait_procs([psutil.Process(process.pid), *started], timeout=20)
        for one in left:
            one.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def submit(head: str, home: Path, job: str, *words: Any) -> str:
    """Runs `jobs/JOB.py` by `ray job submit` and waits; its log. A failed job fails the test."""
    command = [
        RAY, "job", "submit", "--address", head, "--working-dir", str(ROOT), "--runtime-env-json",
        json.dumps({"env_vars": {"FLOWERRAY_HOME": str(home)}}),
        "--", "python", f"jobs/{job}.py", *map(str, words),
    ]  # fmt: skip
    done = subprocess.CompletedProcess[str]([], 1)

    def taken() -> bool:
        nonlocal done
        done = subprocess.run(command, capture_output=True, text=True, timeout=400)
        return "No available agent" not in done.stderr  # the head listens before it takes jobs

    wait_for(taken, 500)
    assert done.returncode == 0 and "succeeded" in done.stdout, done.stdout + done.stderr
    return done.stdout
