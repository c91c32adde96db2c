"""A Run composes the parts' configurations; a preset is a function that returns one. `run.json` is
a Run as a dict.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny

from flowerray import methods
from flowerray.config import Config
from flowerray.data.augment import AugmentConfig
from flowerray.data.source import DataConfig
from flowerray.description import VERSION, flatten
from flowerray.errors import UserError
from flowerray.methods._base import MethodConfig
from flowerray.model.embedder import EmbedderConfig
from flowerray.rendered.synthetic import SyntheticConfig
from flowerray.training.config import TrainConfig
from flowerray.training.harden import HardenConfig


class ResourcesConfig(Config):
    """Where a run runs. It does not change the result, so it may differ when a run is resumed."""

    workers: int = Field(1, ge=0, le=1024)
    """Ray Train workers; 0 trains in this process, without Ray."""
    cpus_per_worker: int = Field(0, ge=0, le=4096)
    """CPU cores (and threads) of a worker; 0 = the cores of the cluster divided by the workers."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = a GPU for each worker where the cluster has as many, else the CPU."""


HEAD = Path("head")
"""The `init` that has a head trained first."""


class Run(Config):
    """Everything that decides a training's result, and where it runs."""

    method: SerializeAsAny[MethodConfig]
    """The loss."""
    data: DataConfig = DataConfig()
    """The photographs and their splits."""
    embedder: EmbedderConfig = EmbedderConfig()
    """The network."""
    augment: AugmentConfig = AugmentConfig()
    """Random changes to training images."""
    train: TrainConfig = TrainConfig()
    """The optimisation."""
    harden: HardenConfig = HardenConfig()
    """Adversarial training."""
    init: Path | None = None
    """A finished RUN or an exported .pth to start from: its embedder's weights and, where method
    and classes are the same, the loss's own parameters; "head" = a head of the same method, data
    and seed, trained first in OUT-head. None = the backbone's pretrained ones."""
    threshold: float | None = Field(None, ge=-1, le=1)
    """Cosine from which two photographs count as the same class; None = fitted on val. The protocol
    `trainval` has no val and takes it from `--from RUN`."""
    resources: ResourcesConfig = ResourcesConfig()
    """Workers and devices."""

    @property
    def method_name(self) -> str:
        """The name of the method's file."""
        return methods.name_of(type(self.method))

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: the parts by name, with the method's and flowerray's own."""
        parts = self.model_dump(mode="json")
        method = {"name": self.method_name, **parts.pop("method")}
        return {"flowerray": VERSION, "method": method, **parts}

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Run":
        """The inverse of `to_dict`.

        Raises:
            UserError: a key or a value that this version does not know.
        """
        parts = dict(content)
        version = parts.pop("flowerray", "?")
        try:
            if not isinstance(method := parts.pop("method"), dict) or "name" not in method:
                raise KeyError("method.name")
            method = dict(method)
            parts["method"] = methods.get(method.pop("name")).config(**method)
            return cls(**parts)
        except (KeyError, UserError) as error:
            reason = str(error) if isinstance(error, UserError) else f"{error} is missing."
            whose = (
                f"the run is not as flowerray {VERSION} wrote it"
                if version == VERSION
                else f"a run written by flowerray {version} does not fit {VERSION}"
            )
            raise UserError(f"{whose}: {reason}") from error


def differences(old: Run, new: Run) -> list[str]:
    """Dotted names of the options that differ; resources do not count."""
    a, b = (
        flatten(run.model_copy(update={"resources": ResourcesConfig()}).to_dict())
        for run in (old, new)
    )
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def demo(method: MethodConfig) -> Run:
    """`flowerray demo`: 40 rendered classes at 96 px, 8 epochs. 2 CPU cores: under 5 minutes.

    Expect frozen features at R@1 0.2 to 0.6 and the trained model at least 0.15 above them.
    """
    return Run(
        method=method,
        data=DataConfig(synthetic=SyntheticConfig(classes=40, scale=0.2, size=112)),
        embedder=EmbedderConfig(image_size=96),
        train=TrainConfig(epochs=8),
    )


def laptop(method: MethodConfig) -> Run:
    """`flowerray train triplet`: the default, 128 px, lite0. 2 CPU cores: about 6 minutes on 1,020
    images.
    """
    return Run(method=method)


def gpu(method: MethodConfig) -> Run:
    """`flowerray train triplet --preset gpu`: 224 px, ConvNeXt-Tiny from the Hub, 512-d, 30 epochs,
    P 24 x K 4.
    """
    return Run(
        method=method,
        embedder=EmbedderConfig(
            backbone="convnext_tiny.in12k_ft_in1k", weights="hub", image_size=224, dim=512
        ),
        train=TrainConfig(epochs=30, classes_per_batch=24),
    )


PRESETS: dict[str, Callable[[MethodConfig], Run]] = {"demo": demo, "laptop": laptop, "gpu": gpu}


def from_preset(
    name: str, method: MethodConfig, train: Literal["all", "head"] = "all", backbone: str = ""
) -> Run:
    """A preset with the method's own defaults.

    Args:
        train: what of the network is trained.
        backbone: another one than the preset's.
    """
    run = PRESETS[name](method)
    chosen = {"train": train, "backbone": backbone or run.embedder.backbone}
    embedder = run.embedder.model_copy(update=chosen)
    options = own_defaults(run.train, run.method_name, embedder)
    return run.model_copy(update={"embedder": embedder, "train": options})


def own_defaults(train: TrainConfig, method: str, embedder: EmbedderConfig) -> TrainConfig:
    """`train` with the method's defaults where it has the general ones. They were found with the
    default backbone and hold for that alone.
    """
    if embedder.backbone != EmbedderConfig().backbone:
        return train
    plain, own = TrainConfig(), methods.get(method).defaults.get(embedder.train, {})
    return train.model_copy(
        update={k: value for k, value in own.items() if getattr(train, k) == getattr(plain, k)}
    )
