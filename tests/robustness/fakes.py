"""A model and a store without files, small and fast, for the tests of this folder."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flowerray.data.store import Store
from flowerray.model.embedder import Embedder, EmbedderConfig

SIZE = 16


class TinyEmbedder(nn.Module):
    """BatchNorm and dropout betray a wrong mode; the channels-last check a wrong layout."""

    image_size = SIZE

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.5))
        self.projection = nn.Linear(8, 4)
        self.mean, self.std = torch.zeros(3), torch.ones(3)
        self.config = EmbedderConfig()
        self.layouts: list[bool] = []

    def features(self, images_BCHW: Tensor) -> Tensor:
        assert images_BCHW.is_floating_point() and 0 <= float(images_BCHW.min())
        assert float(images_BCHW.max()) <= 1
        self.layouts.append(images_BCHW.is_contiguous(memory_format=torch.channels_last))
        return cast(Tensor, self.backbone(images_BCHW).mean((2, 3)))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return nn.functional.normalize(self.projection(self.features(images_BCHW)), dim=1)


class MemoryStore:
    """Images in memory behind the two methods of a store that evaluation uses."""

    def __init__(self, images_NCHW: NDArray[np.uint8]) -> None:
        self.images = torch.from_numpy(images_NCHW)
        self.folder = Path(tempfile.mkdtemp())

    def __len__(self) -> int:
        return len(self.images)

    def centre(self, indices: NDArray[np.int64], size: int) -> Tensor:
        assert size == SIZE
        return self.images[torch.from_numpy(np.asarray(indices))]


def tiny_embedder() -> Embedder:
    return cast(Embedder, TinyEmbedder())


def store_of(images_NCHW: NDArray[np.uint8]) -> Store:
    return cast(Store, MemoryStore(images_NCHW))


def coloured_store(paths: Sequence[Path]) -> Store:
    """Images for names like `<class>_<number>`: the class gives the colour, the rest is noise."""
    images = []
    for path in paths:
        name = path.stem.split("_")[0]
        colour = np.random.default_rng(list(name.encode())).uniform(40, 210, (3, 1, 1))
        noise = np.random.default_rng(list(path.stem.encode())).normal(0, 25, (3, SIZE, SIZE))
        shift = np.random.default_rng(list(path.stem.encode())).normal(0, 25, (3, 1, 1))
        images.append((colour + shift + noise).clip(0, 255).astype(np.uint8))
    return store_of(np.stack(images))
