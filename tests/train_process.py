"""One worker of a small training, as a process of its own: what the tests of resume and of world
sizes start.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from flowerray import methods
from flowerray.data.augment import AugmentConfig
from flowerray.data.store import Store
from flowerray.methods._base import Method
from flowerray.model.embedder import Embedder, EmbedderConfig, Head
from flowerray.model.modes import deterministic
from flowerray.retrieval.embed import embed_together
from flowerray.retrieval.measure import validation_metrics
from flowerray.retrieval.views import Views, kept_views
from flowerray.training import loop
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.loop import Data, train
from flowerray.training.rundir import FolderReporter, RunDir


class DyingReporter(FolderReporter):
    """Kills its own process, without any clean-up, at one step."""

    die_at = 0

    def report(self, step: int, *args: Any, **more: Any) -> None:
        """Dies instead of reporting."""
        if self.die_at and step >= self.die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        super().report(step, *args, **more)


def small_method(job: dict[str, Any]) -> tuple[Method, Embedder, NDArray[np.int64]]:
    """A method with the weights of seed 0, its embedder, and the targets that it trains on."""
    torch.manual_seed(0)
    file = methods.get(job["method"])
    backbone = job.get("backbone", "test_efficientnet")
    embedder = Embedder(EmbedderConfig(backbone=backbone, dim=16, image_size=32, weights="none"))
    targets_N = np.array(job["targets"])
    own = Head(embedder) if job.get("head") else embedder
    method = file.method(
        file.config(**job.get("config", {})), own, num_classes=int(targets_N.max()) + 1
    )
    if job.get("double"):
        method.double()
    return method, embedder, targets_N


def train_small(job: dict[str, Any]) -> Method:
    """Trains from plain options; see tests/training/test_loop.py for their keys."""
    config = TrainConfig(**{"precision": "fp32", "log_every_steps": 1, **job["train"]})
    method, embedder, targets_N = small_method(job)
    method.to(job.get("device", "cpu"))
    store = Store(Path(job["store"]))

    def validate(embedder: Embedder) -> dict[str, float]:
        return validation_metrics(embed_together(embedder, store), targets_N, None)

    reporter = DyingReporter(Path(job["out"]), job.get("rank", 0), job.get("world", 1))
    reporter.die_at = job.get("die_at", 0)
    data = Data(store, targets_N, validate if job.get("validate") else None)
    if job.get("head"):
        views = Views(kept_views(embedder, store, AugmentConfig(), 3))
        data = Data(views, targets_N, None, views.view)
    harden = HardenConfig(**job.get("harden", {}))
    # On the CPU checkpoints are written beside the training only where a test wants that.
    beside = lambda device: job.get("beside", device.type == "cuda")  # noqa: E731
    with patch.object(loop, "writes_beside", beside), deterministic(config.deterministic):
        train(config, AugmentConfig(), harden, method, data, reporter, run={"test": True})
    return method


def fork(target: Callable[..., object], *args: object) -> BaseProcess:
    """Calls `target` in a new process. One server that has torch loaded forks them all, and runs no
    torch itself.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=args)
    process.start()
    return process


def start(job: dict[str, Any]) -> BaseProcess:
    """Runs `work` on `job` in a new process."""
    return fork(work, job)


def exit_code(process: BaseProcess, timeout_s: float = 120) -> int | None:
    """How a process ended; None, and it is killed, where it has not."""
    process.join(timeout_s)
    code = process.exitcode
    process.kill()
    return code


def work(job: dict[str, Any]) -> None:
    """Trains each of `job["methods"]`, in a gloo process group where there are several workers;
    `job["by_method"]` changes options of one.
    """
    torch.set_num_threads(1)
    if job.get("world", 1) > 1:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{job['rendezvous']}",
            rank=job["rank"],
            world_size=job["world"],
        )
    for method in job["methods"]:
        own = {
            "method": method,
            "out": f"{job['out']}-{method}",
            **job.get("by_method", {}).get(method, {}),
        }
        trained = train_small({**job, **own})
        if job.get("rank", 0) == 0:
            torch.save(trained.state_dict(), f"{job['out']}-{method}.pt")
    if job.get("world", 1) > 1:
        dist.destroy_process_group()


def make_run(out: Path) -> None:
    """A RUN folder as the driver makes it."""
    RunDir(out).create({"test": True})


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def train_as_one_and_as_two(options: dict[str, Any], folder: Path) -> None:
    """Trains every method on one worker and on two, into `folder`/w1-METHOD and w2-METHOD."""
    processes = []
    for world in (1, 2):
        out = folder / f"w{world}"
        for method in options["methods"]:
            make_run(Path(f"{out}-{method}"))
        for rank in range(world):
            more = {"out": str(out), "world": world, "rank": rank}
            processes.append(start({**options, **more, "rendezvous": str(folder / "rendezvous")}))
    assert [exit_code(process) for process in processes] == [0, 0, 0]
