"""A small attackable arena without files: a smooth embedder, coloured images, a clean gallery."""

from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from flowerray.model.embedder import Embedder
from flowerray.robustness.subject import Arena, choose_queries, embed_images, frozen_copy
from tests.robustness.fakes import store_of

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


def arena_of(
    model: nn.Module | None = None, queries: int = 24, per_class: int = 6, classes: int = CLASSES
) -> Arena:
    """Queries and gallery of `classes` classes."""
    embedder = frozen_copy(cast(Embedder, model or Colours()))
    images, labels = pictures(per_class, 1, classes)
    gallery, gallery_labels = pictures(5, 2, classes)
    store = store_of(images)
    chosen_Q = choose_queries(labels, queries, 0)
    empty = np.empty((0, 8), np.float32)
    arena = Arena(embedder, store, chosen_Q, labels[chosen_Q], empty, empty, gallery_labels)
    return Arena(
        embedder, store, chosen_Q, labels[chosen_Q], embed_images(arena, arena.images(chosen_Q)),
        embed_images(arena, torch.from_numpy(gallery).float() / 255), gallery_labels,
    )  # fmt: skip
