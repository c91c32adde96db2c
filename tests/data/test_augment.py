"""Augmentation: its numbers, its geometry and colour against loops, and independence of rows."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from flowerray.data.augment import AugmentConfig, augment, draw
from flowerray.errors import UserError

GEOMETRY_ONLY = AugmentConfig(brightness=0, contrast=0, saturation=0, hue=0, erase_probability=0)
COLUMNS = 14
FLIP, BRIGHTNESS, CONTRAST, SATURATION, HUE, ERASE = 4, 5, 6, 7, 8, 9


def batch(count: int, seed: int = 0, padding: int = 0) -> tuple[Tensor, Tensor]:
    """Images of random noise and sizes in a padded batch."""
    rng = np.random.default_rng(seed)
    sizes_B2 = torch.from_numpy(rng.integers(37, 71, (count, 2)))
    images_BCHW = torch.full((count, 3, 70, 75), padding, dtype=torch.uint8)
    for image, (h, w) in zip(images_BCHW, sizes_B2.tolist(), strict=True):
        image[:, :h, :w] = torch.from_numpy(rng.integers(0, 256, (3, h, w), dtype=np.uint8))
    return images_BCHW, sizes_B2


def test_rows_of_draw_depend_on_their_position_alone() -> None:
    uniforms_BU = draw(3, 1, 7, 48)
    assert uniforms_BU.shape == (48, COLUMNS) and uniforms_BU.dtype == torch.float32
    assert uniforms_BU.min() >= 0 and uniforms_BU.max() < 1
    assert torch.equal(draw(3, 1, 7, 48), uniforms_BU)
    assert torch.equal(draw(3, 1, 7, 20), uniforms_BU[:20])
    for other in (draw(4, 1, 7, 48), draw(3, 2, 7, 48), draw(3, 1, 8, 48), draw(1, 3, 7, 48)):
        assert (other != uniforms_BU).float().mean() > 0.99
    many = draw(0, 0, 0, 20_000).double()
    assert (many.mean(0) - 0.5).abs().max() < 0.01
    off_diagonal = torch.corrcoef(many.T) - torch.eye(COLUMNS)
    assert off_diagonal.abs().max() < 0.03


@pytest.mark.parametrize("size", [32, 33])
def test_a_slice_gets_the_same_bits_as_the_batch(size: int) -> None:
    images_BCHW, sizes_B2 = batch(48)
    uniforms_BU = draw(0, 0, 0, 48)
    config = AugmentConfig(strength=2)
    whole = augment(images_BCHW, sizes_B2, uniforms_BU, size, config)
    assert whole.shape == (48, 3, size, size) and whole.dtype == torch.float32
    assert whole.is_contiguous() and whole.min() >= 0 and whole.max() <= 1
    for bounds in ((0, 24, 48), (0, 7, 8, 21, 48)):
        for a, b in zip(bounds, bounds[1:], strict=False):
            part = augment(images_BCHW[a:b], sizes_B2[a:b], uniforms_BU[a:b], size, config)
            assert torch.equal(part, whole[a:b])
    # A worker pads its slice to its own largest image.
    wider = torch.nn.functional.pad(images_BCHW, (0, 60, 0, 11))
    assert torch.equal(augment(wider, sizes_B2, uniforms_BU, size, config), whole)
    for b in range(0, 48, 5):
        h, w = sizes_B2[b].tolist()
        alone = images_BCHW[b : b + 1, :, :h, :w], sizes_B2[b : b + 1], uniforms_BU[b : b + 1]
        assert torch.equal(augment(*alone, size, config), whole[b : b + 1])


def test_padding_is_never_read() -> None:
    uniforms_BU = draw(1, 0, 0, 64)
    uniforms_BU[:, 0:4] = (uniforms_BU[:, 0:4] * 2).floor() * 0.999999  # crops that touch the edges
    results = [
        augment(*batch(64, padding=value), uniforms_BU, 32, AugmentConfig(strength=s))
        for s in (0, 1)
        for value in (0, 255)
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[2], results[3])


def test_strength_zero_is_the_centre_crop() -> None:
    images_BCHW, sizes_B2 = batch(9)
    result = augment(images_BCHW, sizes_B2, draw(0, 0, 0, 9), 32, AugmentConfig(strength=0))
    assert result.is_contiguous()
    for image, (h, w), got in zip(images_BCHW, sizes_B2.tolist(), result, strict=True):
        top, left = (h - 32) // 2, (w - 32) // 2
        assert torch.equal(got, image[:, top : top + 32, left : left + 32].float() / 255)


def test_crop_and_flip_match_a_loop() -> None:
    images_BCHW, sizes_B2 = batch(6)
    uniforms_BU = draw(5, 0, 0, 6)
    uniforms_BU[:, FLIP] = torch.tensor([0.0, 0.9] * 3)
    result = augment(images_BCHW, sizes_B2, uniforms_BU, 16, GEOMETRY_ONLY)
    for b in range(6):
        h, w = sizes_B2[b].tolist()
        area, aspect, top, left = (float(u) for u in uniforms_BU[b, :4])
        aspect = (4 / 3) ** (2 * aspect - 1)
        crop_w = math.sqrt((0.35 + 0.65 * area) * h * w * aspect)
        crop_h = crop_w / aspect
        shrink = min(1, h / crop_h, w / crop_w)
        crop_h, crop_w = crop_h * shrink, crop_w * shrink
        for i in range(16):
            for j in range(16):
                column = 15 - j if b % 2 == 0 else j
                y = top * (h - crop_h) + (i + 0.5) / 16 * crop_h - 0.5
                x = left * (w - crop_w) + (column + 0.5) / 16 * crop_w - 0.5
                y, x = min(max(y, 0), h - 1), min(max(x, 0), w - 1)
                y0, x0 = min(int(y), h - 2), min(int(x), w - 2)
                fy, fx = y - y0, x - x0
                block = images_BCHW[b, :, y0 : y0 + 2, x0 : x0 + 2].double() / 255
                weights = torch.tensor(
                    [[(1 - fy) * (1 - fx), (1 - fy) * fx], [fy * (1 - fx), fy * fx]]
                )
                expected = (block * weights).sum((1, 2))
                assert (result[b, :, i, j] - expected).abs().max() < 2e-3


def test_crops_stay_inside_their_bounds() -> None:
    # The red ramp runs down, the green one to the right: the result tells where it was cut.
    ramp = torch.arange(200, dtype=torch.uint8)
    image = torch.zeros(3, 200, 200, dtype=torch.uint8)
    image[0], image[1] = ramp[:, None], ramp
    count = 400
    sizes_B2 = torch.full((count, 2), 200)
    result = augment(
        image.expand(count, -1, -1, -1), sizes_B2, draw(0, 0, 0, count), 50, GEOMETRY_ONLY
    )
    height_B = (result[:, 0, -1, 0] - result[:, 0, 0, 0]) * 255 * 50 / 49
    width_signed_B = (result[:, 1, 0, -1] - result[:, 1, 0, 0]) * 255 * 50 / 49
    width_B = width_signed_B.abs()
    area_B, aspect_B = height_B * width_B / 200**2, width_B / height_B
    assert area_B.min() > 0.34 and area_B.max() < 1.01 and area_B.std() > 0.1
    assert aspect_B.min() > 0.73 and aspect_B.max() < 1.36 and aspect_B.std() > 0.1
    assert 0.4 < (width_signed_B < 0).float().mean() < 0.6


def recolour(uniforms_BU: Tensor, config: AugmentConfig) -> tuple[Tensor, Tensor]:
    """A whole square image without crop: pixels before and after colour."""
    pixels = torch.from_numpy(np.random.default_rng(2).integers(60, 190, (1, 3, 32, 32), np.uint8))
    images_BCHW = pixels.expand(len(uniforms_BU), -1, -1, -1)
    fixed = uniforms_BU.clone()
    fixed[:, :2], fixed[:, FLIP], fixed[:, ERASE] = torch.tensor([1.0, 0.5]), 0.999, 0.999
    sizes_B2 = torch.full((len(fixed), 2), 32)
    plain = augment(images_BCHW, sizes_B2, fixed, 32, GEOMETRY_ONLY)
    assert (plain - images_BCHW / 255).abs().max() < 2e-3
    return plain, augment(images_BCHW, sizes_B2, fixed, 32, config)


def test_colour_matches_its_steps_one_after_the_other() -> None:
    uniforms_BU = draw(0, 0, 0, 8)
    config = AugmentConfig(strength=1.5, brightness=0.1, contrast=0.1, saturation=0.3, hue=0.05)
    plain, result = recolour(uniforms_BU, config)
    to_yiq = torch.tensor([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    for before, after, u in zip(plain, result, uniforms_BU.tolist(), strict=True):
        y, i, q = torch.einsum("ij,jhw->ihw", to_yiq, before)
        angle = 2 * math.pi * 1.5 * 0.05 * (2 * u[HUE] - 1)
        i, q = i * math.cos(angle) - q * math.sin(angle), i * math.sin(angle) + q * math.cos(angle)
        stretch = 1 + 1.5 * 0.3 * (2 * u[SATURATION] - 1)
        rgb = torch.einsum("ij,jhw->ihw", torch.linalg.inv(to_yiq), torch.stack((y, i, q)))
        grey = (rgb * to_yiq[0].view(3, 1, 1)).sum(0)
        rgb = grey + stretch * (rgb - grey)
        rgb = rgb * (1 + 1.5 * 0.1 * (2 * u[BRIGHTNESS] - 1))
        rgb = (rgb - 0.5) * (1 + 1.5 * 0.1 * (2 * u[CONTRAST] - 1)) + 0.5
        assert (after - rgb.clamp(0, 1)).abs().max() < 2e-3


def test_each_colour_knob_does_what_it_says() -> None:
    uniforms_BU = torch.full((1, COLUMNS), 0.5)
    off = {"brightness": 0, "contrast": 0, "saturation": 0, "hue": 0}
    for name, column in (("brightness", 5), ("contrast", 6), ("saturation", 7), ("hue", 8)):
        config = AugmentConfig.model_validate({**off, name: 0.2})
        plain, middle = recolour(uniforms_BU, config)
        assert torch.allclose(plain, middle, atol=1e-5)
        moved = uniforms_BU.clone()
        moved[:, column] = 0
        plain, result = recolour(moved, config)
        if name == "brightness":
            assert torch.allclose(result, 0.8 * plain, atol=1e-5)
        elif name == "contrast":
            assert torch.allclose(result - 0.5, 0.8 * (plain - 0.5), atol=1e-5)
        else:
            grey = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
            inside = ((result > 0) & (result < 1)).all(1)  # clamping moves the luma
            luma = ((result - plain) * grey).sum(1)
            assert luma[inside].abs().max() < 2e-3
            assert (result - plain).abs().max() > 0.02


def test_erase_paints_as_often_and_as_large_as_configured() -> None:
    config = AugmentConfig(
        strength=2, brightness=0, contrast=0, saturation=0, hue=0, erase_probability=0.2
    )
    count = 500
    white = torch.full((count, 3, 40, 40), 255, dtype=torch.uint8)
    result = augment(white, torch.full((count, 2), 40), draw(0, 0, 0, count), 40, config)
    assert ((result == 0.5) | (result > 0.9999)).all()
    share_B = (result == 0.5).float().mean((1, 2, 3))
    assert 0.33 < (share_B > 0).float().mean() < 0.47
    assert share_B[share_B > 0].min() > 0.01 and share_B.max() < 0.17
    for image in result[share_B > 0]:
        rows, columns = (image[0] == 0.5).any(1), (image[0] == 0.5).any(0)
        assert torch.equal(image[0] == 0.5, rows[:, None] & columns)
        assert 0.4 < rows.sum() / columns.sum() < 2.5


def test_config_bounds() -> None:
    for bad in ({"strength": 2.1}, {"area_min": 0}, {"hue": 0.3}, {"aspect": 0.5}, {"blur": 1}):
        with pytest.raises(UserError):
            AugmentConfig(**bad)
