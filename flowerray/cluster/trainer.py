"""Ray Train's trainer, for a training of its own and for a trial of several workers."""

import time
from collections.abc import Callable
from typing import Any

from flowerray.training.rundir import RunDir

UNUSED = ("DatasetsCallback",)
"""Callbacks of Ray Train's own that serve no training here: it hands out shards of Ray Data."""
UNUSED_ALONE = (*UNUSED, "PlacementGroupCleanerCallback")
"""In a Ray that ends with its driver, nothing is left to clean after it either."""


def make_trainer(
    worker: Callable[[dict[str, Any]], dict[str, Any]],
    config: dict[str, Any],
    folder: RunDir,
    *,
    workers: int,
    cpus: float,
    use_gpu: bool,
    alone: bool = False,
    callbacks: tuple[Any, ...] = (),
) -> Any:
    """A `TorchTrainer`. A worker that dies is replaced, twice at most.

    Each of Ray Train's helpers is a process that takes seconds to start. Those that serve nothing
    here are left out. A version of Ray that names them otherwise starts them all, and trains as
    well.

    Args:
        worker: runs on each of the workers, with `config`.
        workers: how many; each has `cpus` CPU slots, and a GPU with `use_gpu`.
        alone: this Ray was started for its driver alone: nothing else asks for its slots, so
            nobody has to share them out, and it ends with the driver.
        callbacks: more of Ray Train's.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    unused = UNUSED_ALONE if alone else UNUSED

    class Trainer(TorchTrainer):
        def _create_default_callbacks(self) -> list[Any]:
            made = super()._create_default_callbacks()  # type: ignore[misc]
            return [callback for callback in made if type(callback).__name__ not in unused]

        def _initialize_and_run_controller(self, **parts: Any) -> Any:
            if alone:
                for name in ("_send", "_maybe_send", "_cancel"):
                    setattr(parts["scaling_policy"], f"{name}_resource_request", _nothing)
            return super()._initialize_and_run_controller(**parts)  # type: ignore[misc]

    return Trainer(
        worker,  # type: ignore[arg-type]
        train_loop_config=config,
        torch_config=TorchConfig(backend="nccl" if use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=workers, use_gpu=use_gpu, resources_per_worker={"CPU": cpus}
        ),
        run_config=RunConfig(
            # The same name would make Ray resume; here the RUN's own checkpoints do that.
            name=f"training-{time.time_ns()}",
            storage_path=str(folder.ray),
            failure_config=FailureConfig(max_failures=2),
            callbacks=list(callbacks),
        ),
    )


def _nothing() -> None:
    """Asks nobody for anything."""
