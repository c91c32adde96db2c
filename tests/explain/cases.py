"""Small models and images for the tests of this folder."""

import torch
from torch import Tensor

from flowerray.model.embedder import Embedder, EmbedderConfig


def embedder(backbone: str = "test_efficientnet", size: int = 64, seed: int = 0) -> Embedder:
    """A random model of any timm family."""
    config = EmbedderConfig(backbone=backbone, weights="none", image_size=size, dim=16)
    return Embedder(config, seed).eval()


def images(count: int = 3, size: int = 64, seed: int = 0) -> Tensor:
    """Smooth colour fields, float BCHW in [0,1]: noise would look the same to every layer."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (size, size), mode="bicubic").clamp(0, 1)


def embed(model: Embedder, images_BCHW: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images_BCHW)
