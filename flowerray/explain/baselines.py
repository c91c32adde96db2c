"""Maps that ignore the model: a heat map that does not beat them has shown nothing.

Each is called like an Explainer. Letters: B images, N masks, C channels, H W S pixels.
"""

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from flowerray.model.embedder import Embedder

Saliency = Callable[[Embedder, Tensor, Tensor], NDArray[np.float32]]
"""(embedder, images_BCHW, reference_BD) -> raw maps (B, H, W) of any resolution."""


def centre_gaussian(sigma: float) -> Saliency:
    """A bell around the image's middle: photographers put the flower there.

    Args:
        sigma: its standard deviation, as a share of the side.
    """

    def saliency(_: Embedder, images_BCHW: Tensor, __: Tensor) -> NDArray[np.float32]:
        side = images_BCHW.shape[-1]
        line = (np.arange(side) + 0.5) / side - 0.5
        bell = np.exp(-np.square(line) / (2 * sigma**2))
        return _same(np.outer(bell, bell), len(images_BCHW))

    return saliency


def mean_mask(masks_NHW: NDArray[np.bool_]) -> Saliency:
    """The share of training masks that cover each pixel."""
    mean_HW = masks_NHW.mean(0)

    def saliency(_: Embedder, images_BCHW: Tensor, __: Tensor) -> NDArray[np.float32]:
        return _same(mean_HW, len(images_BCHW))

    return saliency


def random(seed: int = 0, grid: int = 4) -> Saliency:
    """Noise on a coarse grid, as coarse as a last layer's map: pixel noise would average out."""

    def saliency(_: Embedder, images_BCHW: Tensor, __: Tensor) -> NDArray[np.float32]:
        # Seeded by the image, so that the order and size of batches do not matter.
        keys = (images_BCHW.double().mean((1, 2, 3)) * 1e12).long().tolist()
        rngs = [np.random.default_rng((seed, abs(key))) for key in keys]
        return np.stack([rng.random((grid, grid)) for rng in rngs]).astype(np.float32)

    return saliency


def edges(_: Embedder, images_BCHW: Tensor, __: Tensor) -> NDArray[np.float32]:
    """Length of the Sobel gradient of the grey image."""
    weight_C = torch.tensor([0.299, 0.587, 0.114]).to(images_BCHW)
    grey_B1HW = torch.einsum("bchw,c->bhw", images_BCHW, weight_C)[:, None]
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]]).to(images_BCHW)
    kernels = torch.stack([slope, slope.T])[:, None] / 8
    found = F.conv2d(F.pad(grey_B1HW, (1, 1, 1, 1), mode="replicate"), kernels)
    return found.norm(dim=1).cpu().numpy().astype(np.float32)


def _same(map_HW: NDArray, count: int) -> NDArray[np.float32]:
    return np.broadcast_to(map_HW.astype(np.float32), (count, *map_HW.shape))
