"""Does the model use what the map marks? Pixels are taken away or given back in the map's order.

Letters: B images, V variants of one image, M maps of it, C channels, H W pixels, D dimensions.
"""

from typing import Annotated, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor

from flowerray.config import Config
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating

METRICS = ("deletion", "insertion", "road_morf", "road_lerf")


class FaithfulnessConfig(Config):
    """How pixels are taken away."""

    images: int = Field(100, ge=2)
    """Images that are scored so, at most: each map costs some thirty passes an image."""
    steps: int = Field(10, ge=2, le=100)
    """Equal shares in which deletion and insertion go through the image."""
    road: tuple[Annotated[float, Field(gt=0, lt=1)], ...] = Field(
        (0.2, 0.4, 0.6, 0.8), min_length=1
    )
    """Shares of the pixels that ROAD removes, between 0 and 1."""
    noise: float = Field(0.01, ge=0)
    """Standard deviation of ROAD's noise, in pixel values of 0..1."""
    seed: int = Field(0, ge=0)
    """Of ties between pixels and of the noise."""


class Scores(NamedTuple):
    """One map's scores; cosines to the reference, -1..1."""

    deletion: float
    """Mean cosine while the most relevant pixels turn grey first: lower is better (RISE, Petsiuk
    2018)."""
    insertion: float
    """Mean cosine while they come back into a blurred image: higher is better."""
    road_morf: float
    """Drop of the cosine when the most relevant pixels are imputed: higher is better (ROAD, Rong
    2022)."""
    road_lerf: float
    """The same for the least relevant ones: lower is better."""


def ranking(map_HW: NDArray, seed: int = 0) -> NDArray[np.int64]:
    """Flat pixel indices, largest first; pixels of equal value in a seeded random order.

    A map that is mostly 0 has thousands of ties: a threshold at a percentile would take all of
    them at once, and their order in memory runs from the top left.
    """
    flat = np.asarray(map_HW).ravel()
    tie = np.random.default_rng((seed, flat.size)).random(flat.size)
    return np.lexsort((tie, -flat))


def faithfulness(
    embedder: Embedder,
    image_CHW: Tensor,
    reference_D: Tensor,
    maps_MHW: NDArray,
    config: FaithfulnessConfig,
    road: bool = True,
) -> list[Scores]:
    """Scores several maps of one image on its cosine to the reference.

    Args:
        image_CHW: float pixels in [0,1], on the embedder's device.
        maps_MHW: in the image's resolution.
        road: without it ROAD's two scores are NaN, and four fifths of the time are saved.
    """
    grey = embedder.mean.view(3, 1, 1).to(image_CHW).expand_as(image_CHW)
    smooth = blurred(image_CHW)
    shares = np.linspace(0, 1, config.steps + 1)
    found = []
    for map_HW in maps_MHW:
        order = ranking(map_HW, config.seed)
        first_VHW = _first(order, shares, map_HW.shape).to(image_CHW.device)[:, None]
        parts = [
            torch.where(first_VHW, grey, image_CHW),
            torch.where(first_VHW, image_CHW, smooth),
        ]
        if road:
            removed = np.asarray(config.road)
            most_VHW = _first(order, removed, map_HW.shape).to(image_CHW.device)
            least_VHW = _first(order[::-1].copy(), removed, map_HW.shape).to(image_CHW.device)
            holes = torch.cat([most_VHW, least_VHW])
            parts.append(impute(image_CHW, holes, config.noise, config.seed))
        variants = torch.cat(parts)
        with evaluating(embedder), torch.no_grad():
            value = (embedder(variants) @ reference_D.to(variants)).cpu().double().numpy()
        steps = len(shares)
        deletion, insertion, imputed = np.split(value, [steps, 2 * steps])
        # Shares of the most relevant pixels first, then as many of the least relevant.
        most, least = imputed.reshape(2, -1).mean(1) if road else (np.nan, np.nan)
        whole = value[0]
        found.append(
            Scores(
                float(np.trapezoid(deletion, shares)),
                float(np.trapezoid(insertion, shares)),
                float(whole - most),
                float(whole - least),
            )
        )
    return found


def blurred(image_CHW: Tensor) -> Tensor:
    """The start of insertion: colours without shapes (Gaussian of a tenth of the side)."""
    side = max(image_CHW.shape[1:])
    sigma = side / 10
    reach = int(2 * sigma)
    line = torch.arange(-reach, reach + 1, dtype=torch.float32, device=image_CHW.device)
    kernel = torch.exp(-line.square() / (2 * sigma**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    planes = image_CHW[:, None]
    for vertical in (False, True):
        weight = kernel[..., None] if vertical else kernel[:, :, None]
        edge = (0, 0, reach, reach) if vertical else (reach, reach, 0, 0)
        planes = F.conv2d(F.pad(planes, edge, mode="replicate"), weight)
    return planes[:, 0]


def impute(image_CHW: Tensor, holes_VHW: Tensor, noise: float, seed: int = 0) -> Tensor:
    """ROAD's noisy linear imputation (Rong 2022, section 4.2): a removed pixel is the weighted mean
    of its neighbours, direct ones twice as much as diagonal ones, plus noise.

    Args:
        holes_VHW: True where a pixel is removed, a row a variant.

    Returns:
        (V, C, H, W) in [0,1]. The linear system is solved by conjugate gradients from a coarse
        filling, to about a third of the noise that comes on top (rms, 80 % removed).
    """
    hole = holes_VHW[:, None].to(image_CHW.dtype)
    known = 1 - hole
    start = _coarse(image_CHW * known, known)
    edge = torch.ones_like(hole[:1])
    degree = _neighbours(edge)  # less at the border, where neighbours are missing
    # Unknown x: degree x - neighbours(x) = neighbours(known pixels).
    x = start * hole
    residual = hole * (_neighbours(image_CHW * known) - degree * x + _neighbours(x))
    direction, square = residual, residual.square().sum((2, 3), keepdim=True)
    for _ in range(200):
        if float(residual.abs().max()) < 1e-4:
            break
        image = hole * (degree * direction - _neighbours(direction))
        along = (direction * image).sum((2, 3), keepdim=True)
        step = square / along.clamp_min(1e-20)
        x = x + step * direction
        residual = residual - step * image
        new = residual.square().sum((2, 3), keepdim=True)
        direction = residual + new / square.clamp_min(1e-20) * direction
        square = new
    generator = torch.Generator().manual_seed(seed)
    grain = torch.randn(x.shape, generator=generator).to(x) * noise
    return (image_CHW * known + hole * (x + grain)).clamp(0, 1)


def _neighbours(planes_VCHW: Tensor) -> Tensor:
    """Weighted sum of the eight neighbours, 0 outside of the image; the weights sum to 1."""
    kernel = torch.tensor([[1.0, 2, 1], [2, 0, 2], [1, 2, 1]]).to(planes_VCHW) / 12
    variants, channels = planes_VCHW.shape[:2]
    flat = planes_VCHW.reshape(variants * channels, 1, *planes_VCHW.shape[2:])
    return F.conv2d(flat, kernel.view(1, 1, 3, 3), padding=1).view(planes_VCHW.shape)


def _coarse(sum_VCHW: Tensor, weight_V1HW: Tensor) -> Tensor:
    """Holes filled with the mean of the known pixels around, from ever coarser grids."""
    mean = sum_VCHW / weight_V1HW.clamp_min(1e-12)
    if max(weight_V1HW.shape[2:]) == 1:
        return torch.where(weight_V1HW > 0, mean, 0.5)
    if bool((weight_V1HW > 0).all()):
        return mean
    below = _coarse(
        F.avg_pool2d(sum_VCHW, 2, ceil_mode=True), F.avg_pool2d(weight_V1HW, 2, ceil_mode=True)
    )
    shape = sum_VCHW.shape[2:]
    above = F.interpolate(below, shape, mode="bilinear", align_corners=False)
    return torch.where(weight_V1HW > 0, mean, above)


def _first(order: NDArray[np.int64], shares: NDArray, shape: tuple[int, ...]) -> Tensor:
    """(V, H, W) masks of the first share of an order, one a share."""
    position = np.empty(len(order), np.int64)
    position[order] = np.arange(len(order))
    counts = np.round(shares * len(order)).astype(np.int64)
    return torch.from_numpy(position[None] < counts[:, None]).view(-1, *shape)
