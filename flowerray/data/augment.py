"""Augmentation of a whole batch on the training device: crop, flip, colour, erase.

Letters: B images, U random numbers an image, C channels, H W padded image, S side of the result.
"""

import functools
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from flowerray.config import Config

_STREAM = 1
"""Keeps these numbers apart from others that are keyed by the same (seed, epoch, step)."""

_GRAIN = 2.0**-12
"""Where a crop reads its image is rounded down to multiples of this, in pixels."""


class AugmentConfig(Config):
    """How far a training image may be from its file.

    Colour tells many flowers apart, so hue moves little; a crop keeps most of a bloom.
    """

    strength: float = Field(1.0, ge=0, le=2)
    """Multiplies the four colour jitters and `erase_probability`. 0 turns everything off, crop and
    flip too: the evaluation's centre crop, bit for bit."""
    area_min: float = Field(0.35, gt=0, le=1)
    """Smallest crop, as a fraction of the image's area."""
    aspect: float = Field(4 / 3, ge=1, le=4)
    """Widest crop, width over height; the narrowest is 1 / aspect."""
    flip_probability: float = Field(0.5, ge=0, le=1)
    """Chance of a left-right flip."""
    brightness: float = Field(0.2, ge=0, le=0.5)
    """Pixels are multiplied by 1 +- this, before `strength`."""
    contrast: float = Field(0.2, ge=0, le=0.5)
    """Distances from mid-grey are multiplied by 1 +- this, before `strength`."""
    saturation: float = Field(0.2, ge=0, le=0.5)
    """Distances from grey are multiplied by 1 +- this, before `strength`."""
    hue: float = Field(0.02, ge=0, le=0.25)
    """Hue is turned by +- this, in turns of the colour circle, before `strength`."""
    erase_probability: float = Field(0.1, ge=0, le=0.5)
    """Chance that a rectangle is painted mid-grey, before `strength`."""
    erase_area: float = Field(0.15, gt=0, le=0.5)
    """Largest such rectangle, as a fraction of the result's area; the smallest is 0.02."""


class _Draws(NamedTuple):
    """The U numbers of each image, in the order in which they are drawn."""

    area: Tensor
    aspect: Tensor
    top: Tensor
    left: Tensor
    flip: Tensor
    brightness: Tensor
    contrast: Tensor
    saturation: Tensor
    hue: Tensor
    erase: Tensor
    erase_area: Tensor
    erase_aspect: Tensor
    erase_top: Tensor
    erase_left: Tensor


def draw(seed: int, epoch: int, step: int, batch: int) -> Tensor:
    """The random numbers of one global batch.

    Args:
        seed, epoch, step: not negative; row i of the result depends on them and on i alone.
        batch: rows, images of the global batch.

    Returns:
        float32 uniforms_BU in [0,1), on the CPU.
    """
    key = np.random.SeedSequence((_STREAM, seed, epoch, step))
    generator = np.random.Generator(np.random.Philox(key))
    return torch.from_numpy(generator.random((batch, len(_Draws._fields)), dtype=np.float32))


def augment(
    images_BCHW: Tensor, sizes_B2: Tensor, uniforms_BU: Tensor, size: int, config: AugmentConfig
) -> Tensor:
    """Crops, flips, recolours and erases each image as its own row of numbers says.

    Crops are read bilinearly without antialias: the store keeps images close to the training size,
    so that a crop is shrunk by 1.6 at most, and usually enlarged. The colour steps are one affine
    map of each pixel and are clamped once, at their end; contrast turns about mid-grey and not
    about the image's mean, so that no pixel depends on another. An image's result depends on its
    own rows alone: a slice of a batch, padded more or less, gives the same bits on the CPU.

    Args:
        images_BCHW: uint8 RGB, each in the upper left of its (H, W); the rest is never read.
        sizes_B2: int64 (height, width) of each image, both at least `size` where `strength` is 0.
        uniforms_BU: rows of `draw`.

    Returns:
        float32 images_BCSS in [0,1], on the images' device.
    """
    assert images_BCHW.dtype == torch.uint8 and images_BCHW.ndim == 4 and images_BCHW.shape[1] == 3
    assert len(images_BCHW) == len(sizes_B2) == len(uniforms_BU)
    device = images_BCHW.device
    sizes_B2 = sizes_B2.to(device, non_blocking=True)
    if config.strength == 0:
        return _centre(images_BCHW, sizes_B2, size)
    # float64 for the few numbers an image: exp and cos differ in float32's last bit between the
    # body and the tail of a vector, and so between a batch and its slice.
    draws = _Draws(*uniforms_BU.to(device, non_blocking=True).double().unbind(1))
    pixels_BCSS = _crop(images_BCHW, sizes_B2.double(), draws, size, config)
    pixels_BCSS = _recolour(pixels_BCSS, draws, config)
    return _erase(pixels_BCSS, draws, config)


def _centre(images_BCHW: Tensor, sizes_B2: Tensor, size: int) -> Tensor:
    cells_S = torch.arange(size, device=images_BCHW.device)
    corner_B2 = (sizes_B2 - size) // 2
    rows_BS1 = (corner_B2[:, :1] + cells_S).unsqueeze(2)
    columns_B1S = (corner_B2[:, 1:] + cells_S).unsqueeze(1)
    batch_B11 = torch.arange(len(images_BCHW), device=images_BCHW.device).view(-1, 1, 1)
    cut_BSSC = images_BCHW.permute(0, 2, 3, 1)[batch_B11, rows_BS1, columns_B1S]
    return cut_BSSC.permute(0, 3, 1, 2).contiguous().float() / 255


def _crop(
    images_BCHW: Tensor, sizes_B2: Tensor, draws: _Draws, size: int, config: AugmentConfig
) -> Tensor:
    height_B, width_B = sizes_B2.unbind(1)
    area_B = (config.area_min + (1 - config.area_min) * draws.area) * height_B * width_B
    aspect_B = torch.exp((2 * draws.aspect - 1) * math.log(config.aspect))
    crop_height_B, crop_width_B = (area_B / aspect_B).sqrt(), (area_B * aspect_B).sqrt()
    # A crop that is too long for its image shrinks and keeps its aspect.
    fit_B = torch.minimum(height_B / crop_height_B, width_B / crop_width_B).clamp(max=1)
    crop_height_B, crop_width_B = crop_height_B * fit_B, crop_width_B * fit_B
    top_B = draws.top * (height_B - crop_height_B)
    left_B = draws.left * (width_B - crop_width_B)

    cells_S = (torch.arange(size, device=images_BCHW.device, dtype=torch.float64) + 0.5) / size
    flip_B1 = (draws.flip < config.flip_probability).unsqueeze(1)
    cells_BS = torch.where(flip_B1, 1 - cells_S, cells_S)
    y_BS = top_B.unsqueeze(1) + cells_S * crop_height_B.unsqueeze(1) - 0.5
    x_BS = left_B.unsqueeze(1) + cells_BS * crop_width_B.unsqueeze(1) - 0.5
    # Between the first and the last pixel, so that nothing beyond them is read.
    y_BS = torch.minimum(y_BS.clamp(min=0), height_B.unsqueeze(1) - 1 - _GRAIN)
    x_BS = torch.minimum(x_BS.clamp(min=0), width_B.unsqueeze(1) - 1 - _GRAIN)

    # Each worker's slice is padded to its own largest image, and grid_sample wants coordinates
    # relative to that. Relative to powers of two, rounded coordinates are exact in float32, so the
    # padding leaves no trace. Hence a canvas that only claims to be that large: cells beyond the
    # images are never read, so they may lie over the next rows or the uninitialised end.
    batch, _, height, width = images_BCHW.shape
    canvas_height, canvas_width = (1 << (side - 1).bit_length() for side in (height, width))
    values = images_BCHW.new_empty(
        images_BCHW.numel() + canvas_height * width + canvas_width, dtype=torch.float32
    )
    values[: images_BCHW.numel()].view(images_BCHW.shape).copy_(images_BCHW)
    canvas_BCHW = values.as_strided(
        (batch, 3, canvas_height, canvas_width), (3 * height * width, height * width, width, 1)
    )
    y_BS = ((2 * (y_BS / _GRAIN).floor() * _GRAIN + 1) / canvas_height - 1).float()
    x_BS = ((2 * (x_BS / _GRAIN).floor() * _GRAIN + 1) / canvas_width - 1).float()
    shape = (batch, size, size)
    grid_BSS2 = torch.stack(
        (x_BS.unsqueeze(1).expand(shape), y_BS.unsqueeze(2).expand(shape)), dim=3
    )
    return F.grid_sample(canvas_BCHW, grid_BSS2, padding_mode="border", align_corners=False)


# Colour as luma and chroma (NTSC's YIQ): hue turns the chroma plane, saturation stretches it.
_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_GREY = np.outer(np.ones(3), _YIQ[0])
_CHROMA = np.eye(3) - _GREY
_TURNED = np.linalg.inv(_YIQ) @ np.array([[0, 0, 0], [0, 0, -1], [0, 1, 0]]) @ _YIQ


@functools.cache
def _matrices(device: torch.device) -> list[Tensor]:
    """Copied once: each copy to a GPU waits for all that was asked of it before."""
    return [torch.from_numpy(matrix).to(device) for matrix in (_GREY, _CHROMA, _TURNED)]


def _recolour(pixels_BCSS: Tensor, draws: _Draws, config: AugmentConfig) -> Tensor:
    """One affine map of RGB an image: from pixels in [0,255] to pixels in [0,1]."""

    def jitter(uniform_B: Tensor, amplitude: float) -> Tensor:
        return config.strength * amplitude * (2 * uniform_B - 1)

    contrast_B = 1 + jitter(draws.contrast, config.contrast)
    gain_B = contrast_B * (1 + jitter(draws.brightness, config.brightness))
    saturation_B = 1 + jitter(draws.saturation, config.saturation)
    angle_B = 2 * math.pi * jitter(draws.hue, config.hue)
    grey_CC, chroma_CC, turned_CC = _matrices(gain_B.device)

    def each(value_B: Tensor) -> Tensor:
        return value_B.view(-1, 1, 1)

    turned_BCC = each(angle_B.cos()) * chroma_CC + each(angle_B.sin()) * turned_CC
    map_BCC = each(gain_B / 255) * (grey_CC + each(saturation_B) * turned_BCC)
    map_BCC11 = map_BCC.float()[..., None, None]
    offset_B111 = (0.5 - 0.5 * contrast_B).float().view(-1, 1, 1, 1)
    # Products and sums one by one: a matrix product may sum differently in a batch and its slice.
    result_BCSS = map_BCC11[:, :, 0] * pixels_BCSS[:, :1]
    result_BCSS += map_BCC11[:, :, 1] * pixels_BCSS[:, 1:2]
    result_BCSS += map_BCC11[:, :, 2] * pixels_BCSS[:, 2:]
    return result_BCSS.add_(offset_B111).clamp_(0, 1)


def _erase(pixels_BCSS: Tensor, draws: _Draws, config: AugmentConfig) -> Tensor:
    chosen_B = draws.erase < config.strength * config.erase_probability
    smallest = min(0.02, config.erase_area)
    area_B = smallest + (config.erase_area - smallest) * draws.erase_area
    aspect_B = torch.exp((2 * draws.erase_aspect - 1) * math.log(2))
    height_B, width_B = (area_B / aspect_B).sqrt(), (area_B * aspect_B).sqrt()
    cells_S = torch.arange(pixels_BCSS.shape[3], device=pixels_BCSS.device, dtype=torch.float64)
    cells_S = (cells_S + 0.5) / len(cells_S)

    def inside(start_B: Tensor, length_B: Tensor) -> Tensor:
        from_start_BS = cells_S - (start_B * (1 - length_B)).unsqueeze(1)
        return (from_start_BS >= 0) & (from_start_BS < length_B.unsqueeze(1))

    rows_BS = inside(draws.erase_top, height_B) & chosen_B.unsqueeze(1)
    columns_BS = inside(draws.erase_left, width_B)
    mask_B1SS = (rows_BS.unsqueeze(2) & columns_BS.unsqueeze(1)).unsqueeze(1)
    return pixels_BCSS.masked_fill_(mask_B1SS, 0.5)
