"""A training that takes a second: the options of the runs that tests make."""

from pathlib import Path
from typing import Any

from flowerray import methods
from flowerray.data.source import DataConfig
from flowerray.model.embedder import EmbedderConfig
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig
from flowerray.training.run import ResourcesConfig, Run

OPTIONS = {
    "embedder.backbone": "test_efficientnet",
    "embedder.weights": "none",
    "embedder.image-size": 32,
    "embedder.dim": 16,
    "train.epochs": 2,
    "train.classes-per-batch": 3,
    "train.images-per-class": 4,
    "train.lr": 1e-3,
    "train.precision": "fp32",
    "train.checkpoint-every-steps": 2,
    "train.log-every-steps": 2,
    "resources.workers": 0,
}
"""Six steps an epoch on the fixture `small_set`."""


def words(root: Path, **changes: Any) -> list[str]:
    """The command line of a small training; `train__epochs=3` changes an option."""
    options = {"data.root": root, **OPTIONS}
    options |= {k.replace("__", ".").replace("_", "-"): v for k, v in changes.items()}
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def small(root: Path, method: str = "triplet", **train: Any) -> Run:
    """The same as a Run, with changes to its TrainConfig."""
    parts: dict[str, dict[str, Any]] = {"embedder": {}, "train": {}, "resources": {}}
    for name, value in OPTIONS.items():
        part, _, field = name.partition(".")
        parts[part][field.replace("-", "_")] = value
    return Run(
        method=methods.get(method).config(),
        data=DataConfig(root=root),
        embedder=EmbedderConfig(**parts["embedder"]),
        train=TrainConfig(**{**parts["train"], **train}),
        resources=ResourcesConfig(**parts["resources"]),
    )


def with_hardening(run: Run, init: Path | None = None, **fields: Any) -> Run:
    """The run hardened, from the weights of another RUN where one is given."""
    return run.model_copy(update={"harden": HardenConfig(**fields), "init": init})
