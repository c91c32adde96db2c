"""One training on Ray Train's workers, for a training of its own and for a trial of several
workers.
"""

import time
from collections.abc import Callable
from typing import Any

import torch

from flowerray.cluster.session import knows_ray
from flowerray.cluster.worker import train_worker
from flowerray.errors import UserError
from flowerray.training.progress import DivergedError
from flowerray.training.run import Run
from flowerray.training.rundir import FolderReporter, RunDir

UNUSED = ("DatasetsCallback",)
"""Callbacks of Ray Train's own that serve no training here: it hands out shards of Ray Data."""
UNUSED_ALONE = (*UNUSED, "PlacementGroupCleanerCallback")
"""In a Ray that ends with its driver, nothing is left to clean after it either."""
FAULT = "user_error"
"""Key under which a worker hands an error back that a retry would only repeat."""
MakeReporter = Callable[[int, int], FolderReporter]
"""From a worker's rank, and their number."""


def train_on_workers(
    run: Run,
    folder: RunDir,
    reporter: MakeReporter,
    *,
    cpus: float,
    use_gpu: bool,
    alone: bool = False,
    callbacks: tuple[Any, ...] = (),
) -> dict[str, Any]:
    """Trains a run on Ray Train's workers; a worker that dies is replaced, twice at most, and goes
    on from the last checkpoint.

    Args:
        run: its `resources.workers` says how many.
        reporter: makes each worker's.
        cpus: CPU slots (and threads) of each worker.
        use_gpu: each has a GPU too.
        alone: this Ray was started for its driver alone: nothing else asks for its slots, and it
            ends with the driver.
        callbacks: more of Ray Train's.

    Returns:
        Rank 0's summary.

    Raises:
        UserError: bad data; DivergedError: the loss is not finite. Other errors are Ray's.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig

    trainer = _trainer_kind(alone)(
        ray_worker,
        train_loop_config={
            "run": run.to_dict(), "reporter": reporter, "threads": max(1, int(cpus))
        },
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=run.resources.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": cpus},
        ),
        run_config=RunConfig(
            # The same name would make Ray resume; here the RUN's own checkpoints do that.
            name=f"training-{time.time_ns()}",
            storage_path=str(folder.ray),
            failure_config=FailureConfig(max_failures=2),
            callbacks=list(callbacks),
        ),
    )  # fmt: skip
    summary = trainer.fit().return_value
    assert isinstance(summary, dict)
    if FAULT in summary:
        raise (DivergedError if summary["diverged"] else UserError)(summary[FAULT])
    return summary


def ray_worker(config: dict[str, Any]) -> dict[str, Any]:
    """The function that Ray Train runs on each worker."""
    import ray.train
    from ray.train.torch import get_device

    torch.set_num_threads(config["threads"])
    context = ray.train.get_context()
    reporter = config["reporter"](context.get_world_rank(), context.get_world_size())
    try:
        return train_worker(Run.from_dict(config["run"]), reporter, get_device())
    except UserError as error:  # it would come again, so it is no failure that Ray should retry
        # Every rank sees the same loss; of another fault the others know nothing, and would wait.
        diverged = isinstance(error, DivergedError)
        if diverged or reporter.world == 1:
            return {FAULT: str(error), "diverged": diverged}
        raise


def _trainer_kind(alone: bool) -> Any:
    """`TorchTrainer`; with a Ray whose insides are known, without the helpers that serve nothing
    here: each is a process that takes seconds to start.
    """
    from ray.train.torch import TorchTrainer

    if not knows_ray():
        return TorchTrainer
    unused = UNUSED_ALONE if alone else UNUSED

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in made if type(callback).__name__ not in unused]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            if alone:  # nobody has to share slots out
                for name in ("_send", "_maybe_send", "_cancel"):
                    setattr(parts["scaling_policy"], f"{name}_resource_request", _nothing)
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]

    return Trainer


def _nothing() -> None:
    """Asks nobody for anything."""


def innermost(error: BaseException) -> str:
    """One line of a worker's own error, out of Ray's wrappers."""
    failures = list(getattr(error, "worker_failures", {}).values())
    told = [_said(failure) for failure in failures or [error]]
    # Where one of several workers dies, the others lose their connection to it.
    return next((line for line in told if "onnection" not in line), told[0])


def _said(error: BaseException) -> str:
    """The first line of an error's message. Ray hands over the whole traceback as the message:
    there it is the line after the last frame, of which only the frames are indented.
    """
    while (cause := getattr(error, "cause", None) or error.__cause__) is not None:
        error = cause
    lines = [line for line in str(error).splitlines() if line.strip()]
    frames = [i for i, line in enumerate(lines) if line.startswith("  File ")]
    if frames:
        lines = [line for line in lines[frames[-1] :] if not line.startswith(" ")]
    return lines[0].strip() if lines else type(error).__name__
