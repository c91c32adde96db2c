"""Starting and joining Ray, quietly."""

import logging
import os
import secrets
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager
from typing import Any

from flowerray import memory
from flowerray.errors import UserError
from flowerray.files import home
from flowerray.pool import cores

ENVIRONMENT = {
    # `uv run flowerray` is an ancestor of the workers, and Ray's hook would build each of them a
    # new environment.
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
    "RAY_worker_niceness": "0",  # by default workers yield to all else, also to Ray's daemons
    "RAY_num_workers_soft_limit": "0",  # by default one idle process a core stays, and polls
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_OVERRIDE_JOB_RUNTIME_ENV": "1",  # a job that sets FLOWERRAY_HOME may meet ours, its own
    # By default a report waits for a poll every 2 s; one every 0.2 s cost 15 % of the speed.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1",
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_ENABLE_PRINT_PATCH": "0",  # or what a worker prints shows twice
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or each driver without a GPU prints a warning
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}


OWN = {
    # As on other systems, where Ray makes no clusters: all of it listens on the loopback alone.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
}
"""For a Ray that is started on this machine."""
TOKEN = secrets.token_hex(32)
"""Without which nobody else on this machine can use that one."""
ANSWER_SECONDS = 5.0

KNOWN_RAY = "2.60."
"""The version whose private names are used, each where the public way costs seconds; any other
Ray goes the public way."""


def knows_ray() -> bool:
    """Whether the installed Ray is the one whose private names are known."""
    import ray

    return ray.__version__.startswith(KNOWN_RAY)


def on_cluster() -> bool:
    """Whether `RAY_ADDRESS` names a Ray; else one is started on this machine where it is needed."""
    return bool(os.environ.get("RAY_ADDRESS"))


def require_gpus(gpus: float, option: str = "`gpus`") -> None:
    """Raises UserError where a task is to have more GPUs than this machine has and no cluster could
    give them: Ray would wait for them for ever.
    """
    import torch

    if gpus and not on_cluster() and torch.cuda.device_count() < gpus:
        raise UserError(
            f"{option} {gpus:g}: this machine has {torch.cuda.device_count()} that torch can use; "
            "ask for fewer, or 0 for the CPU."
        )


def own_gpus(workers: int = 1) -> float:
    """A GPU for each of so many workers, where torch can use as many on this machine; else, and on
    a cluster, whose GPUs are elsewhere, 0.
    """
    import torch

    enough = not on_cluster() and torch.cuda.device_count() >= workers
    return float(workers) if enough else 0.0


def nodes_of(ray: Any) -> list[Mapping[str, float]]:
    """Resources of each node that is up."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def slots(nodes: Sequence[Mapping[str, float]], cpus: float, gpus: float) -> int:
    """How many processes of so many CPUs and GPUs nodes with these resources hold at a time; none
    spans two nodes.
    """
    shares = {name: share for name, share in (("CPU", cpus), ("GPU", gpus)) if share}
    return sum(
        min(int(node.get(name, 0) / share + 1e-9) for name, share in shares.items())
        for node in nodes
    )


@contextmanager
def own_signals() -> Iterator[None]:
    """Puts our handlers of SIGINT and SIGTERM back: Ray's would stay, and end the process."""
    kept = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            for number, handler in kept.items():
                signal.signal(number, handler)


@contextmanager
def ray_session(min_cpus: int, frees_workers: bool = False) -> Iterator[Any]:
    """A Ray that is up: the cluster at `RAY_ADDRESS` (a job finds it set), else one started on this
    machine, which nothing outside it reaches, and which leaves nothing behind.

    Args:
        min_cpus: CPU slots that a cluster started here must have; more than there are cores is
            allowed, since threads are set apart from slots.
        frees_workers: a Ray Train inside may end before this Ray does; it frees its workers through
            the dashboard. Otherwise none is started here: its dozen processes cost 2 % of a core.

    Raises:
        UserError: the cluster cannot be reached.
    """
    address = os.environ["RAY_ADDRESS"] if on_cluster() else None
    short = "/tmp" if sys.platform != "win32" else None  # a socket's path has 107 bytes
    with tempfile.TemporaryDirectory(
        prefix="flowerray-", dir=short, ignore_cleanup_errors=True
    ) as place:
        for name, value in (ENVIRONMENT if address else {**ENVIRONMENT, **OWN}).items():
            os.environ.setdefault(name, value)
        if address:
            refuse_dead(address)
        elif "RAY_AUTH_MODE" not in os.environ:  # Ray would leave a token in the user's home
            os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", TOKEN
        import ray

        if ray.is_initialized():  # by somebody else, who ends it too
            yield ray
            return
        start: dict[str, Any] = {
            "address": "local",
            "num_cpus": max(min_cpus, cores()),
            "include_dashboard": frees_workers,
            "object_store_memory": 256 * 2**20,
            "_temp_dir": f"{place}/ray",  # which Ray opens to all, inside of ours
        }
        try:
            # Ray has its workers import from the folder where it was started.
            with own_signals(), chdir(place):
                ray.init(
                    **({"address": address} if address else start),
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    runtime_env={"env_vars": worker_variables()},
                )
        except Exception as error:  # a start that takes too long raises a bare Exception
            why = str(error).strip().rstrip(".")
            if address is None:
                first = why.splitlines()[0].rstrip(".")
                raise UserError(f"Ray did not start on this machine: {first}.") from error
            raise UserError(f"the Ray at {address} cannot be joined: {advice(why)}.") from error
        try:
            yield ray
        finally:
            ray.shutdown()


def worker_variables() -> dict[str, str]:
    """Environment variables of workers: they import from where this process does, and know its
    settings.
    """
    names = ("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "FLOWERRAY_HOME", "OMP_NUM_THREADS")
    given = {name: os.environ[name] for name in names if name in os.environ}
    if given.get("FLOWERRAY_HOME"):
        given["FLOWERRAY_HOME"] = str(home())  # workers have another working directory
    installed = tuple({sys.prefix, sys.base_prefix})
    paths = [os.path.abspath(path) for path in sys.path]
    own = [path for path in paths if not path.startswith(installed)]
    if own:
        given["PYTHONPATH"] = os.pathsep.join(own)
    return {**memory.ENVIRONMENT, **given}


def refuse_dead(address: str) -> None:
    """Raises UserError where nothing listens at a cluster's address: Ray would try for a quarter of
    an hour.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if address.startswith("http"):
        raise UserError(
            f"RAY_ADDRESS={address} is a dashboard, which only `ray job submit` uses: give "
            "HOST:PORT of the cluster's head (`ray start --head` prints it; its port is 6379)."
        )
    if not host or not port.isdigit():  # such as "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=ANSWER_SECONDS).close()
    except OSError as error:
        raise UserError(
            f"no Ray answers at RAY_ADDRESS={address} ({error.strerror or error}): start it there "
            "(`ray start --head`, or `ray up cluster.yaml`), or unset RAY_ADDRESS to use this "
            "machine alone."
        ) from error


def advice(why: str) -> str:
    """Ray's own words on one line, and what else may help."""
    said = " ".join(line.strip() for line in why.splitlines()[:3]).rstrip(".")
    if "RAY_AUTH_MODE" not in os.environ:
        said += " (where it asks for a token: export RAY_AUTH_MODE=token)"
    return said
