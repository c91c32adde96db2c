"""The picture around the blooms: canvas, background, foreground, light and lens.

Letters: H, W picture; h, w sprite.
Picture coordinates are pixels, x right, y down, z towards the viewer.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from flowerray.rendered.species import Color, pick
from flowerray.rendered.sprites import Array, paint_leaf

_GREENS: tuple[Color, ...] = (
    (0.16, 0.30, 0.11),
    (0.28, 0.44, 0.16),
    (0.40, 0.52, 0.22),
    (0.20, 0.34, 0.24),
    (0.45, 0.47, 0.20),
)
_GROUNDS: tuple[Color, ...] = (
    (0.33, 0.25, 0.17),
    (0.45, 0.38, 0.28),
    (0.10, 0.12, 0.09),
    (0.55, 0.66, 0.76),
    (0.52, 0.52, 0.50),
    (0.30, 0.38, 0.20),
)


class Canvas:
    """The picture while it is painted, the flower's coverage, and the light."""

    def __init__(self, height: int, width: int, rng: np.random.Generator) -> None:
        self.image_HW3: Array = np.zeros((height, width, 3), np.float32)
        self.flower_HW: Array = np.zeros((height, width), np.float32)
        light = rng.normal(0, 0.6, 2)
        self.light = np.array([light[0], light[1] - 0.4, 1.0])
        self.light /= np.linalg.norm(self.light)

    def paste(self, sprite_hw4: Array, affine_23: NDArray, shade: float, flower: bool) -> None:
        """Lays a sprite over the picture; `affine_23` maps sprite pixels to picture pixels."""
        height, width = self.flower_HW.shape
        h, w = sprite_hw4.shape[:2]
        corners = affine_23 @ np.array([[0, w, 0, w], [0, 0, h, h], [1, 1, 1, 1]], float)
        left, top = (max(0, int(v)) for v in corners.min(1))
        right, bottom = (int(v) + 2 for v in corners.max(1))
        right, bottom = min(right, width), min(bottom, height)
        if right <= left or bottom <= top:
            return
        shifted = affine_23 - np.array([[0, 0, left], [0, 0, top]])
        patch = cv2.warpAffine(sprite_hw4, shifted, (right - left, bottom - top))
        cover = patch[..., 3]
        region = self.image_HW3[top:bottom, left:right]
        region *= (1 - cover)[..., None]
        region += patch[..., :3] * np.float32(shade)
        mask = self.flower_HW[top:bottom, left:right]
        if flower:
            np.maximum(mask, cover, out=mask)
        else:
            mask *= 1 - cover


def lay(
    canvas: Canvas,
    sprite: Array,
    at: NDArray,
    angle: float,
    length: float,
    squash: float,
    shade: float,
) -> None:
    """Pastes a leaf from `at` towards `angle`; `squash` narrows it, as turning a leaf does."""
    h, w = sprite.shape[:2]
    scale = length / w
    affine = np.empty((2, 3))
    affine[:, 0] = (math.cos(angle) * scale, math.sin(angle) * scale)
    affine[:, 1] = (-math.sin(angle) * scale * squash, math.cos(angle) * scale * squash)
    affine[:, 2] = at - affine[:, 1] * h / 2
    canvas.paste(sprite, affine, shade, False)


def background(canvas: Canvas, rng: np.random.Generator) -> None:
    """Foliage, ground or sky, more or less out of focus."""
    height, width = canvas.flower_HW.shape
    palette = _GREENS if rng.random() < 0.65 else _GROUNDS
    first = np.array(pick(rng, *palette))
    second = np.array(pick(rng, *_GREENS, *_GROUNDS))
    share = np.zeros((height, width), np.float32)
    for cells, weight in ((3, 0.5), (9, 0.3), (30, 0.2)):
        noise = rng.random((cells, cells), np.float32)
        share += weight * cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    share = np.clip((share - 0.5) * 2.2 + 0.5, 0, 1)[..., None]
    canvas.image_HW3[:] = first.astype(np.float32) * (1 - share) + second.astype(np.float32) * share
    canvas.image_HW3 *= np.float32(rng.uniform(0.7, 1.4))
    kind = rng.random()
    if kind < 0.55:
        green = np.array(pick(rng, *_GREENS))
        breadth = rng.uniform(0.05, 0.45)
        shapes = [
            paint_leaf(tuple(green * rng.uniform(0.6, 1.2)), breadth, height * 0.35, rng)
            for _ in range(3)
        ]
        for i in range(int(rng.integers(8, 22))):
            at = rng.uniform((-0.1, -0.1), (1.1, 1.1)) * (width, height)
            angle = rng.uniform(0, 6.283) if breadth > 0.12 else rng.normal(-1.57, 0.4)
            length = height * rng.uniform(0.25, 0.7)
            lay(
                canvas, shapes[i % 3], at, angle, length, rng.uniform(0.4, 1), rng.uniform(0.5, 1.1)
            )
    blur = rng.choice([0.0, 1.0, 2.5, 5.0]) * height / 160
    if rng.random() < 0.3:  # other flowers and lights, out of focus
        glow = np.clip(rng.uniform(0.2, 1.1, 3), 0, 1)
        for _ in range(int(rng.integers(2, 7))):
            at = (rng.uniform(0, 1, 2) * (width, height)).astype(int)
            tone = tuple(float(c) for c in glow * rng.uniform(0.7, 1.1))
            radius = int(height * rng.uniform(0.03, 0.1))
            cv2.circle(canvas.image_HW3, at.tolist(), radius, tone, -1, cv2.LINE_8)
        blur = max(blur, 4.0 * height / 160)
    if blur:
        cv2.GaussianBlur(canvas.image_HW3, (0, 0), blur, dst=canvas.image_HW3)
    canvas.flower_HW[:] = 0


def foreground(canvas: Canvas, rng: np.random.Generator) -> None:
    """Now and then a leaf or two in front; at least half of the flower stays in sight."""
    if rng.random() > 0.35:
        return
    height, width = canvas.flower_HW.shape
    image_HW3, flower_HW = canvas.image_HW3.copy(), canvas.flower_HW.copy()
    green = tuple(np.array(pick(rng, *_GREENS)) * rng.uniform(0.6, 1.3))
    for _ in range(int(rng.integers(1, 4))):
        leaf = paint_leaf(green, rng.uniform(0.06, 0.2), height * 0.6, rng)
        cv2.GaussianBlur(leaf, (0, 0), rng.uniform(0.5, 2.5), dst=leaf)
        at = np.array([rng.uniform(0, width), height * rng.uniform(0.8, 1.1)])
        length, shade = height * rng.uniform(0.4, 0.9), rng.uniform(0.6, 1.1)
        lay(canvas, leaf, at, rng.normal(-1.57, 0.6), length, 1.0, shade)
    if canvas.flower_HW.sum() < 0.5 * flower_HW.sum():
        canvas.image_HW3, canvas.flower_HW = image_HW3, flower_HW


def photograph(image_HW3: Array, rng: np.random.Generator) -> NDArray[np.uint8]:
    """Light, lens and sensor: exposure, colour cast, shade, blur, noise."""
    height, width = image_HW3.shape[:2]
    cast = np.exp(rng.normal(0, 0.07, 3) + rng.normal(0.1, 0.18))
    light = cv2.resize(
        rng.normal(1, 0.16, (3, 4)).astype(np.float32),
        (width, height),
        interpolation=cv2.INTER_CUBIC,
    )
    image = image_HW3 * light[..., None] * cast.astype(np.float32)
    grey = image.mean(2, keepdims=True)
    image = grey + (image - grey) * np.float32(rng.uniform(0.65, 1.1))
    if rng.random() < 0.6:
        image = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.4, 1.3) * min(height, width) / 160)
    image = np.clip(image, 0, 1) ** np.float32(math.exp(rng.normal(0, 0.15)))
    noise = rng.standard_normal(image.shape, np.float32) * np.float32(rng.uniform(0.003, 0.035))
    return (np.clip(image + noise, 0, 1) * 255 + 0.5).astype(np.uint8)
