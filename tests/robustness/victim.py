"""A small victim without files: a smooth embedder, coloured images, a clean gallery."""

from dataclasses import replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from flowerray.model.embedder import Embedder
from flowerray.opening import Model
from flowerray.robustness.config import AttackConfig
from flowerray.robustness.victim import Victim, choose_queries
from tests.robustness.fakes import store_of
from tests.small import small

SIDE = 16
CLASSES = 6


class Colours(nn.Module):
    """Mean colours of four quarters, mixed by a fixed random matrix, on the unit sphere."""

    image_size = SIDE

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.mix = nn.Parameter(torch.randn(8, 12, generator=generator))
        self.scale = scale

    def forward(self, images_BCHW: Tensor) -> Tensor:
        quarters_BF = nn.functional.avg_pool2d(images_BCHW, SIDE // 2).flatten(1)
        return nn.functional.normalize((quarters_BF - 0.5) @ self.mix.T * self.scale, dim=1)


class Rippled(Colours):
    """A landscape of many small hills: short steps stay on the first one."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward(images_BCHW + 0.01 * (200 * images_BCHW).sin())


class Masked(Colours):
    """The planted fault of defences that mask: what counts has no gradient, what has one is
    saturated, so that it vanishes in float32.
    """

    def forward(self, images_BCHW: Tensor) -> Tensor:
        emb_BD = super().forward(images_BCHW)
        saturated_BD = torch.tanh(1e4 * (emb_BD + 2))
        return nn.functional.normalize(saturated_BD + 4 * emb_BD.detach(), dim=1)


class Constant(Colours):
    """A collapsed encoder: all images in nearly one place."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return nn.functional.normalize(1e-3 * super().forward(images_BCHW) + 1, dim=1)


class Leaking(Colours):
    """An image's embedding depends on its batch, as under BatchNorm in training mode."""

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return super().forward((images_BCHW + images_BCHW.mean(0)) / 2)


def pictures(per_class: int, seed: int, classes: int = CLASSES) -> tuple[np.ndarray, np.ndarray]:
    """uint8 NCHW and labels: classes differ by the colours of four quarters."""
    colours = np.random.default_rng(0).uniform(70, 180, (classes, 3, 2, 2))
    labels = np.repeat(np.arange(classes), per_class)
    noise = np.random.default_rng(seed).normal(0, 8, (len(labels), 3, SIDE, SIDE))
    shift = np.random.default_rng(seed + 1).normal(0, 8, (len(labels), 3, 2, 2))
    images = np.kron(colours[labels] + shift, np.ones((1, 1, SIDE // 2, SIDE // 2))) + noise
    return images.clip(0, 255).astype(np.uint8), labels


def victim_of(
    model: nn.Module | None = None,
    config: AttackConfig | None = None,
    queries: int = 24,
    per_class: int = 6,
    classes: int = CLASSES,
) -> Victim:
    """Queries and gallery of `classes` classes; the threshold of pairs is 0.9."""
    embedder = cast(Embedder, (model or Colours()).eval().requires_grad_(False))
    images, labels = pictures(per_class, 1, classes)
    gallery, gallery_labels = pictures(5, 2, classes)
    store, gallery_store = store_of(images), store_of(gallery)
    chosen_Q = choose_queries(labels, queries, 0)
    empty = np.empty((0, 8), np.float32)
    victim = Victim(
        model=Model("tiny", None, small(Path("flowers")), embedder, threshold=0.9),
        config=config or AttackConfig(),
        store=store,
        chosen_Q=chosen_Q,
        query_paths=tuple(Path(f"{i}.png") for i in chosen_Q),
        labels_Q=labels[chosen_Q],
        emb_QD=empty,
        protocol="official",
        gallery_name="train",
        gallery_store=gallery_store,
        gallery_paths=tuple(Path(f"gallery/{i}.png") for i in range(len(gallery))),
        gallery_labels_G=gallery_labels,
        gallery_GD=empty,
        classes=tuple(f"class {i}" for i in range(classes)),
    )
    return replace(
        victim,
        emb_QD=victim.embed(victim.images(chosen_Q)),
        gallery_GD=victim.embed(torch.from_numpy(gallery).float() / 255),
    )
