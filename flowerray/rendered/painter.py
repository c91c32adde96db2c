"""Paints one photograph of a synthetic flower, and where the flower is.

Sprites are laid into the picture by the affine map that a flat patch in space has under parallel
projection, so tilt and cup come from geometry.
"""

import math
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from flowerray.rendered.scenery import Canvas, background, foreground, lay, photograph
from flowerray.rendered.species import Species
from flowerray.rendered.sprites import GOLDEN, PAD, Array, paint_centre, paint_leaf, paint_petal


@dataclass(frozen=True)
class Painting:
    """One painted photograph."""

    image: NDArray[np.uint8]
    """RGB, HW3."""
    flower: NDArray[np.bool_]
    """HW, True where a bloom of the class is."""
    centre: tuple[float, float]
    """Middle of the main bloom, x and y as shares of width and height."""


def paint(species: Species, size: int, rng: np.random.Generator) -> Painting:
    """A photograph of `species` with shorter side `size`; everything about it comes from `rng`."""
    longer = round(size * float(rng.choice([1.0, 1.15, 1.25, 4 / 3])))
    height, width = (size, longer) if rng.random() < 0.7 else (longer, size)
    canvas = Canvas(height, width, rng)
    background(canvas, rng)
    species = _individual(species, rng)
    place = (rng.uniform(0.16, 0.84), rng.uniform(0.18, 0.82))
    x, y = place[0] * width, place[1] * height
    radius = size * rng.uniform(0.19, 0.4)
    if species.cluster == "solitary":
        _Plant(canvas, species, radius, rng).solitary(x, y, radius)
    else:
        radius *= 1.15
        _Plant(canvas, species, radius * 0.5, rng).inflorescence(x, y, radius)
    foreground(canvas, rng)
    return Painting(photograph(canvas.image_HW3, rng), canvas.flower_HW > 0.5, place)


def _individual(species: Species, rng: np.random.Generator) -> Species:
    """The plant in this picture: its species with the small differences that plants have."""
    values = dict(vars(species))
    shift = rng.normal(0, 0.025, 3) + rng.normal(0, 0.03)
    for name in ("base", "tip", "throat", "edge", "mark"):
        values[name] = tuple(np.clip(np.array(values[name]) + shift, 0.01, 0.99))
    for name in ("width", "taper", "centre_size", "reach"):
        values[name] *= math.exp(rng.normal(0, 0.08))
    values["elevation"] += rng.normal(0, 0.08)
    if species.petals > 9:
        values["petals"] = max(9, round(species.petals * math.exp(rng.normal(0, 0.06))))
    return Species(**values)


def _pose(tilt: float, toward: float, spin: float) -> NDArray:
    """Rotation that spins a bloom, then leans its face by `tilt` to the picture angle `toward`."""
    c, s = math.cos(toward), math.sin(toward)
    lean = np.array(
        [
            [c * c * math.cos(tilt) + s * s, c * s * (math.cos(tilt) - 1), c * math.sin(tilt)],
            [c * s * (math.cos(tilt) - 1), s * s * math.cos(tilt) + c * c, s * math.sin(tilt)],
            [-c * math.sin(tilt), -s * math.sin(tilt), math.cos(tilt)],
        ]
    )
    a, b = math.cos(spin), math.sin(spin)
    return lean @ np.array([[a, -b, 0], [b, a, 0], [0, 0, 1.0]])


def _random_pose(species: Species, rng: np.random.Generator) -> NDArray:
    """Cups and thistles are mostly seen from the side, an orchid's lip hangs down."""
    sideways = species.form in ("cup", "thistle")
    tilt = rng.uniform(0.3, 1.15) if sideways else min(abs(rng.normal(0.35, 0.3)), 1.2)
    spin = rng.normal(0, 0.25) if species.lip else rng.uniform(0, 6.283)
    return _pose(tilt, -math.pi / 2 + rng.normal(0, 0.8), spin)


class _Plant:
    """A plant as it is painted; its blooms share their parts."""

    def __init__(
        self, canvas: Canvas, species: Species, length: float, rng: np.random.Generator
    ) -> None:
        """Paints petals of that length, pixels, and the middle of a bloom."""
        self.canvas, self.species, self.rng = canvas, species, rng
        layers = min(species.layers, 2)
        self.petals = [[paint_petal(species, length, rng) for _ in range(2)] for _ in range(layers)]
        self.centre = paint_centre(species, rng)

    def solitary(self, x: float, y: float, radius: float) -> None:
        """One bloom, and maybe others around it."""
        rng = self.rng
        blooms = [(x, y, radius)]
        for _ in range(int(rng.choice([0, 0, 0, 1, 1, 2, 3]))):
            angle, away = rng.uniform(0, 6.283), radius * rng.uniform(1.3, 2.6)
            bx, by = x + away * math.cos(angle), y + away * math.sin(angle)
            blooms.append((bx, by, radius * rng.uniform(0.5, 0.9)))
        if rng.random() < 0.75:
            blooms = blooms[::-1]  # the main bloom is usually, not always, in front
        for bx, by, br in blooms:
            self._stem(bx, by, br)
        for bx, by, br in blooms:
            self._bloom(bx, by, br, _random_pose(self.species, rng))

    def inflorescence(self, x: float, y: float, radius: float) -> None:
        """Many small blooms: a head (umbel) or along a stem (spike)."""
        rng = self.rng
        self._stem(x, y, radius)
        count = int(rng.integers(6, 13))
        lean = rng.normal(0, 0.25)
        for i in range(count):
            if self.species.cluster == "umbel":
                angle = i * GOLDEN + rng.normal(0, 0.3)
                away = radius * math.sqrt((count - i) / count) * 0.8
                bx, by = x + away * math.cos(angle), y + away * math.sin(angle) * 0.8
                pose = _pose(0.9 * away / radius, math.atan2(by - y, bx - x), rng.uniform(0, 6.3))
                br = radius * rng.uniform(0.36, 0.48)
            else:
                step = 1 - i / count
                by = y + radius * (1.6 * step - 0.8) * 1.3
                bx = x + lean * (by - y) + radius * 0.3 * (-1) ** i * (0.4 + step)
                br = radius * (0.24 + 0.26 * step) * rng.uniform(0.9, 1.1)
                pose = _pose(rng.uniform(0.2, 0.9), rng.uniform(0.0, 3.4), 0.0)
            self._bloom(bx, by, br, pose)

    def _bloom(self, x: float, y: float, radius: float, rotation: NDArray) -> None:
        """One bloom at (x, y); `rotation` turns its own axes (z = its face) to the picture's."""
        species, canvas, rng = self.species, self.canvas, self.rng
        front: list[tuple[Array, NDArray, float]] = []
        start = rng.uniform(0, 6.283)
        for layer in range(species.layers):
            depth = layer / max(1, species.layers - 1)  # 0 = outermost, 1 = innermost
            size = 1 + (species.inner - 1) * depth
            rise = species.elevation + depth * (0.7 if species.form == "double" else 0.25)
            start += math.pi / species.petals
            for i in range(species.petals):
                angle = start + 2 * math.pi * i / species.petals + rng.normal(0, 0.05)
                length = radius * size * math.exp(rng.normal(0, 0.05))
                breadth = 1.0
                if species.lip:
                    turn = 2 * math.pi * i / species.petals
                    angle = turn + math.pi / 2
                    breadth = 1 + species.lip * (0.7 if i == 0 else -0.35 * (i % 2))
                    length *= 1 + 0.15 * species.lip * (i == 0)
                elevation = rise + rng.normal(0, 0.06)
                out = np.array([math.cos(angle), math.sin(angle), 0.0])
                along = rotation @ (out * math.cos(elevation) + [0, 0, math.sin(elevation)])
                across = rotation @ np.array([-out[1], out[0], 0.0])
                normal = rotation @ (-out * math.sin(elevation) + [0, 0, math.cos(elevation)])
                sprite = self.petals[layer % len(self.petals)][i % 2]
                h, w = sprite.shape[:2]
                scale = length / (w - 2 * PAD)
                base = np.array([x, y]) + (rotation @ out)[:2] * radius * 0.05
                affine = np.empty((2, 3))
                affine[:, 0] = along[:2] * scale
                affine[:, 1] = across[:2] * scale * breadth
                affine[:, 2] = base - affine[:, 0] * PAD - affine[:, 1] * h / 2
                facing = float(normal @ canvas.light)
                shade = 0.68 + 0.36 * abs(facing) - (0.12 if normal[2] < 0 else 0.0) - 0.12 * depth
                if normal[2] < 0:  # its back is towards us: it stands before the bloom's middle
                    front.append((sprite, affine, shade))
                else:
                    canvas.paste(sprite, affine, shade, True)
        reach = radius * species.centre_size / 24
        affine = np.empty((2, 3))
        affine[:, :2] = rotation[:2, :2] * reach
        lift = rotation[:2, 2] * radius * 0.08
        affine[:, 2] = np.array([x, y]) + lift - affine[:, :2] @ np.array([32.0, 32.0])
        canvas.paste(self.centre, affine, 1.0, True)
        for sprite, affine, shade in reversed(front):
            canvas.paste(sprite, affine, shade, True)

    def _stem(self, x: float, y: float, radius: float) -> None:
        """A stalk from the bloom to below the picture, with a few leaves."""
        species, canvas, rng = self.species, self.canvas, self.rng
        height = canvas.image_HW3.shape[0]
        foot = x + rng.normal(0, 0.25) * height
        bend = rng.normal(0, 0.1) * height
        t = np.linspace(0, 1, 12)
        xs = x + (foot - x) * t**1.3 + bend * np.sin(math.pi * t)
        ys = y + (height * 1.05 - y) * t
        thick = max(2, round(radius * rng.uniform(0.05, 0.1)))
        points = np.stack([xs, ys], 1)
        for shift, tone in ((0, 0.65), (-thick * 0.25, 1.0)):
            line = np.round((points + [shift, 0]) * 16).astype(np.int32)
            color = tuple(float(c * tone) for c in species.leaf_color)
            wide = max(1, int(thick * tone))
            cv2.polylines(canvas.image_HW3, [line], False, color, wide, cv2.LINE_8, 4)
        for _ in range(int(rng.integers(1, 4))):
            at = points[int(rng.integers(2, 10))]
            length = radius * rng.uniform(0.7, 1.5)
            leaf = paint_leaf(species.leaf_color, species.leaf_width, length, rng)
            squash, shade = rng.uniform(0.4, 1.0), rng.uniform(0.6, 1.05)
            lay(canvas, leaf, at, rng.uniform(0, 6.283), length, squash, shade)
