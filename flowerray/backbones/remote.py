"""Many backbones: accuracy as tasks of a Ray in parallel, then speeds, one model after another with
nothing beside them.
"""

import os
import platform
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm

from flowerray.backbones.bench import BackbonesConfig, assess, time_models
from flowerray.cluster.session import nodes_of, on_cluster, ray_session, require_gpus
from flowerray.cluster.tasks import run_tasks
from flowerray.cluster.trainer import innermost
from flowerray.cluster.worker import pick_device
from flowerray.data.source import DataConfig, open_dataset
from flowerray.errors import UserError
from flowerray.opening import store_builder

Keep = Callable[[dict[str, Any]], None]
"""Gets each model's row as soon as it is there; see `assess_one`."""


def assess_all(
    names: Sequence[str],
    config: BackbonesConfig,
    data: DataConfig,
    keep: Keep,
    *,
    cpus: float,
    gpus: float = 0,
    quiet: bool = False,
) -> None:
    """Assesses every model, as many at a time as there is room for; see `run_tasks`.

    Args:
        keep: called here, in the order in which models are done.
        cpus: cores (and threads) of each; less than 1 shares a core.
        gpus: GPUs of each, also a fraction; 0 = on the CPU.

    Raises:
        UserError: fewer GPUs here than asked for; Ray does not start.
    """
    require_gpus(gpus)
    device = "cuda" if gpus else "cpu"
    with tqdm(total=len(names), unit="model", desc="accuracy", disable=quiet or None) as bar:

        def ended(name: str, outcome: Any) -> None:
            if isinstance(outcome, Exception):  # a node that died: the other models go on
                outcome = {"model": name, "skipped": f"Its task failed: {innermost(outcome)}"}
            keep(outcome)
            bar.set_postfix_str(name)
            bar.update()

        calls = {name: (name, config, data, device) for name in names}
        run_tasks(assess_one, calls, ended, cpus=cpus, gpus=gpus)


def assess_one(
    name: str, config: BackbonesConfig, data: DataConfig, device: str, threads: int
) -> dict[str, Any]:
    """The task: the row of `assess`, or `model` and `skipped`, the reason why there is none."""
    torch.set_num_threads(threads)
    build = store_builder(config.image_size, quiet=True)
    try:
        dataset = open_dataset(data, progress=False)
        return assess(name, dataset, build, config, pick_device(device))
    except UserError as error:
        return {"model": name, "skipped": str(error)}
    except Exception as error:  # timm's models fail in many ways; the others are measured
        return {"model": name, "skipped": f"It failed with {type(error).__name__}: {error}"}


def time_alone(
    names: Sequence[str], config: BackbonesConfig, gpus: float, quiet: bool
) -> dict[str, Any]:
    """Times every model, with nothing of ours running beside it: in this process, or, with a
    cluster in `RAY_ADDRESS`, in one task that takes a whole node.

    Returns:
        `device`, `threads` and `models`, the result of `time_models`.
    """
    device = "cuda" if gpus else "cpu"
    if not on_cluster():
        return time_here(names, config, device, None, quiet)
    with ray_session(min_cpus=1) as ray:
        fit = [node.get("CPU", 0) for node in nodes_of(ray) if not gpus or node.get("GPU")]
        cpus = max(fit, default=0)
        if not cpus:
            raise UserError(
                f"the cluster has no node with {'a GPU' if gpus else 'CPUs'} now: start one first, "
                "since a model is timed alone on a whole node."
            )
        if not quiet:
            print(f"timing {len(names)} models on a node of {cpus:g} CPUs", file=sys.stderr)
        task = ray.remote(time_here).options(num_cpus=cpus, num_gpus=1 if gpus else 0)
        reference = task.remote(names, config, device, max(1, int(cpus)), True)
        try:
            found: dict[str, Any] = ray.get(reference)
        except Exception as error:
            if isinstance(cause := getattr(error, "cause", None), UserError):
                raise cause from error
            raise
        return found


def time_here(
    names: Sequence[str], config: BackbonesConfig, device: str, threads: int | None, quiet: bool
) -> dict[str, Any]:
    """See `time_alone`; `OMP_NUM_THREADS` decides the threads where it is set."""
    if threads is not None and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads)
    place, total = pick_device(device), config.rounds * len(names)
    with tqdm(total=total, unit="visit", desc="timing", disable=quiet or None) as bar:
        models = time_models(names, config, place, bar.update)
    gpu = torch.cuda.get_device_name(place) if place.type == "cuda" else None
    return {
        "device": gpu or f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "models": models,
    }
