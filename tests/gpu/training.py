"""Small trainings on a device, on pixels that are the same on each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowerray.data.augment import AugmentConfig
from flowerray.data.batches import Batch
from flowerray.data.resident import Resident
from flowerray.data.store import Store
from flowerray.methods._base import Method
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.loop import Data, train
from flowerray.training.rundir import FolderReporter, RunDir
from tests.train_process import make_run, small_method

STEPS = 21
"""7 epochs of 3 steps."""


def plain(batch: Batch) -> Tensor:
    """The upper left of each image in float64: a GPU divides float32 by 255 otherwise."""
    return batch.images[:, :, :32, :32].double() / 255


def on(
    device: torch.device,
    job: dict[str, Any],
    out: Path,
    method: str,
    *,
    double: bool = False,
    view: Callable[[Batch], Tensor] | None = plain,
    reporter: type[FolderReporter] = FolderReporter,
    **options: Any,
) -> tuple[Method, RunDir]:
    """Trains 21 steps of P = 8, K = 4, and what `options` change of that."""
    harden = HardenConfig(**options.pop("harden", {}))
    config: dict[str, Any] = {"epochs": 7, "classes_per_batch": 8, "images_per_class": 4}
    config |= {"lr": 1e-3, "precision": "fp32", "log_every_steps": 1, **options}
    module, _, targets_N = small_method({**job, "method": method, "double": double})
    module.to(device)
    make_run(out)
    store = Store(Path(job["store"]))
    data = Data(Resident(store, device), targets_N, None, view)
    train(
        TrainConfig(**config), AugmentConfig(), harden, module, data, reporter(out), {"test": True}
    )
    return module, RunDir(out)


def embedded(method: Method, job: dict[str, Any]) -> Tensor:
    """All images' embeddings by a trained model, on the CPU."""
    pixels, _ = Store(Path(job["store"])).padded(range(len(job["targets"])))
    parameter = next(method.parameters())
    images = plain(Batch(0, pixels, *[pixels] * 3)).to(parameter.device, parameter.dtype)
    with torch.no_grad():
        return method.embedder.eval()(images).double().cpu()
