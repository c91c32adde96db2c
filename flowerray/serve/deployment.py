"""The service on Ray Serve: replicas, batches, and an end that leaves nothing behind."""

import logging
import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flowerray.cluster.session import on_cluster, ray_session
from flowerray.errors import UserError

WAITING = 32
"""Requests at a time; more are answered with 503."""
BATCH = 16
"""Photographs that are embedded at once."""
BATCH_SECONDS = 0.005
"""How long the first of a batch waits for others."""
NAME = "flowerray"
TOKEN = "FLOWERRAY_SERVE_TOKEN"


@dataclass(frozen=True)
class Serving:
    """What is served, and how."""

    index: Path
    beside: Path | None = None
    """A second INDEX."""
    token: str | None = None
    replicas: int = 1
    cpus: float = 1
    """Of each replica, which uses as many threads."""
    gpus: float = 0


def application(serving: Serving) -> Any:
    """The ASGI application of one replica, whose embeddings are made in batches."""
    import ray
    import torch
    from anyio.to_thread import run_sync
    from ray import serve

    from flowerray.cluster.worker import pick_device
    from flowerray.serve.app import make_app
    from flowerray.serve.service import Served, Service

    own = ray.get_runtime_context().get_assigned_resources()
    torch.set_num_threads(max(1, int(own.get("CPU", 1))))
    device = pick_device("auto")
    service, *others = [Service(f, device) for f in (serving.index, serving.beside) if f]
    for one in (service, *others):
        threading.Thread(target=one.follow, daemon=True).start()

    @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=BATCH_SECONDS)
    async def batched(asked: list[tuple[Served, Any]]) -> list[Any]:
        answers: dict[int, Any] = {}
        for served in {id(served): served for served, _ in asked}.values():  # mostly one
            places = [n for n, (other, _) in enumerate(asked) if other is served]
            found = await run_sync(served.embed, [asked[n][1] for n in places])
            answers |= zip(places, found, strict=True)
        return [answers[n] for n in range(len(asked))]

    async def embed(served: Served, crop: Any) -> Any:
        return await batched((served, crop))

    return make_app(service, serving.token, next(iter(others), None), embed, WAITING)


def bound(serving: Serving) -> Any:
    """What `serve.run` runs."""
    from ray import serve

    def replica() -> Any:
        return application(serving)

    ingress: Any = serve.ingress(replica)()
    return serve.deployment(
        name=NAME,
        num_replicas=serving.replicas,
        max_ongoing_requests=10 * WAITING,  # the application itself says that it is full
        max_queued_requests=10 * WAITING,
        ray_actor_options={"num_cpus": serving.cpus, "num_gpus": serving.gpus},
    )(ingress).bind()


def build(arguments: dict[str, str]) -> Any:
    """For a RayService, and `serve run flowerray.serve.deployment:build index=INDEX`; the token
    comes from the environment.

    Args:
        arguments: `index`, and `beside` where there is a second one.
    """
    if not {"index"} <= arguments.keys() <= {"index", "beside"}:
        raise UserError(f"args {sorted(arguments)}: give `index`, and `beside` if you like.")
    beside = arguments.get("beside")
    folders = Path(arguments["index"]), Path(beside) if beside else None
    return bound(Serving(*folders, token=os.environ.get(TOKEN)))


def require(host: str, port: int) -> None:
    """Raises UserError where the service cannot be: Ray Serve is not installed, or another program
    listens there.
    """
    needed = ("fastapi", "watchfiles", "python_multipart")
    if missing := [part for part in needed if not find_spec(part)]:
        raise UserError(
            f"the service needs {', '.join(missing)}: `pip install 'flowerray[serve]'` brings them."
        )
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise UserError(
            f"{host} port {port} cannot be listened at ({error.strerror}): choose another `port`."
        ) from error


def run(serving: Serving, host: str, port: int, ready: Callable[[], None]) -> None:
    """Serves until the user ends it.

    Args:
        ready: called once requests are answered.

    Raises:
        UserError: Ray, or the replicas, did not start.
        KeyboardInterrupt: the user's.
    """
    with ray_session(serving.replicas):
        from ray import serve

        quiet = {"log_level": "WARNING", "enable_access_log": False}
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        serve.start(
            http_options={"host": host, "port": port, "request_timeout_s": 60}, logging_config=quiet
        )
        try:
            serve.run(bound(serving), name=NAME, route_prefix="/", logging_config=quiet)
            ready()
            threading.Event().wait()
        except RuntimeError as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
            raise UserError(f"the service did not start: {first}.") from error
        finally:
            if on_cluster():  # a Ray of our own ends with all that is in it
                _leave(serve)


def _leave(serve: Any) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C cuts nothing
    try:
        serve.delete(NAME)
        if not serve.status().applications:  # of others
            serve.shutdown()
    finally:
        signal.signal(signal.SIGINT, before)
