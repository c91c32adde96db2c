"""Petals, leaves and centres, painted flat.

A sprite is float32 hw4: RGB in [0,1], premultiplied, and coverage. Petals and leaves run along x,
from their base PAD pixels from the left, and are centred on y.
"""

import math

import cv2
import numpy as np
from numpy.typing import NDArray

from flowerray.rendered.species import Color, Species

Array = NDArray[np.floating]
PAD = 3
GOLDEN = math.pi * (3 - math.sqrt(5))
"""The angle between one seed of a flower head and the next."""


def paint_petal(species: Species, length: float, rng: np.random.Generator) -> Array:
    """A petal that runs along x from its base; `length` in pixels."""
    columns = int(np.clip(length, 10, 110))
    half = max(2.0, columns * species.width)
    rows = int(2 * half) + 2 * PAD + 2
    u = ((np.arange(columns + 2 * PAD, dtype=np.float32) - PAD) / columns)[None, :]
    v = ((np.arange(rows, dtype=np.float32) - rows / 2) / half)[:, None]
    reach = 1 - species.notch * np.exp(-((v / 0.3) ** 2))
    if species.fringe:
        reach = reach - species.fringe * np.abs((v * 4.5 + rng.random()) % 1 - 0.5) * 2
    along = np.clip(u / reach, 0, 1)
    a, b = species.swell, species.taper
    peak = a / (a + b)
    outline = (along / peak) ** a * ((1 - along) / (1 - peak)) ** b
    if species.ruffle:
        phase = rng.uniform(0, 6.3, 2)
        waves = np.sin(17 * u + phase[0]) * np.sin(7 * u + phase[1])
        outline = outline * (1 + species.ruffle * waves)
    outside = np.abs(v) - outline
    cover = np.clip(0.5 - outside * half, 0, 1) * (along > 0) * (along < 1)
    across = np.clip(v / (outline + 0.08), -1.2, 1.2)
    u = np.clip(u, 0, 1)

    color = _blend(np.array(species.base, np.float32), species.tip, species.blend * u**1.5)
    throat = 1 / (1 + np.exp((u - species.reach * (1 - 0.25 * across**2)) * 22))
    color = _blend(color, species.throat, throat)
    if species.margin:
        rim = _smooth(0.62, 0.95, np.maximum(np.abs(across), u**3))
        color = _blend(color, species.edge, species.margin * rim)
    if species.stripe:
        line = np.exp(-((across / 0.17) ** 2)) * (1 - 0.6 * u)
        color = _blend(color, species.mark, species.stripe * line)
    if species.veins:
        fan = np.abs((across * (3 + 2 * u) + 0.5) % 1 - 0.5)
        color = _blend(
            color, species.mark, species.veins * np.exp(-((fan / 0.12) ** 2)) * (1 - 0.8 * u)
        )
    if species.spots:
        dots = np.zeros(cover.shape, np.uint8)
        where = rng.uniform((0.12, -0.6), (0.72, 0.6), (species.spots, 2))
        for du, dv in where:
            spot = (int((PAD + du * columns) * 16), int((rows / 2 + dv * half * 0.8) * 16))
            cv2.circle(dots, spot, int(columns * 0.028 * 16) + 6, 255, -1, cv2.LINE_AA, 4)
        color = _blend(color, species.mark, dots.astype(np.float32) / 290)

    shade = 0.62 + 0.38 * _smooth(0.0, 0.45, u) - 0.10 * np.exp(-((across / 0.12) ** 2)) * (1 - u)
    shade = shade + rng.uniform(-0.08, 0.08) * across - 0.16 * _smooth(0.75, 1.1, np.abs(across))
    shade = shade + 0.04 * np.sin(across * 14 + rng.uniform(0, 6)) * u
    return _sprite(color * shade[..., None], cover, max(1.0, columns * 0.05))


def paint_leaf(color: Color, width: float, length: float, rng: np.random.Generator) -> Array:
    """A leaf that runs along x from its stalk."""
    columns = int(np.clip(length, 10, 120))
    half = max(2.0, columns * width)
    rows = int(2 * half) + 2 * PAD + 2
    u = np.clip((np.arange(columns + 2 * PAD, dtype=np.float32) - PAD) / columns, 0, 1)[None, :]
    v = ((np.arange(rows, dtype=np.float32) - rows / 2) / half)[:, None]
    outline = (u / 0.4) ** 0.8 * ((1 - u) / 0.6) ** 1.2
    bend = rng.uniform(-0.4, 0.4) * u * (1 - u)
    across = (v - bend) / (outline + 0.05)
    cover = np.clip(0.5 + (outline - np.abs(v - bend)) * half, 0, 1) * (u > 0) * (u < 1)
    ribs = np.abs((u * 9 - np.abs(across) * 2.2) % 1 - 0.5)
    shade = 0.85 + 0.22 * np.exp(-((across / 0.09) ** 2)) + 0.12 * np.exp(-((ribs / 0.09) ** 2))
    shade = shade + rng.uniform(-0.2, 0.2) * np.sign(across) * (np.abs(across) < 1.5)
    tint = np.array(color, np.float32) * np.exp(rng.normal(0, 0.12, 3)).astype(np.float32)
    return _sprite(tint * shade[..., None], cover, max(1.0, columns * 0.04))


def paint_centre(species: Species, rng: np.random.Generator) -> Array:
    """What stands in the middle of a bloom, seen from above: 64 x 64, radius 24."""
    side, middle = 64, 32
    color = np.zeros((side, side, 3), np.float32)
    cover = np.zeros((side, side), np.float32)
    body = np.array(species.centre_color)
    anther = np.array(species.anther_color)

    def dot(x: float, y: float, r: float, c: NDArray) -> None:
        at = (int((middle + x) * 16), int((middle + y) * 16))
        shown = tuple(float(value) for value in np.clip(c, 0, 1))
        cv2.circle(color, at, int(r * 16) + 8, shown, -1, cv2.LINE_8, 4)
        cv2.circle(cover, at, int(r * 16), 1.0, -1, cv2.LINE_8, 4)

    if species.centre in ("disc", "eye"):
        dot(0, 0, 24, body * (0.75 if species.centre == "disc" else 1.0))
    if species.centre == "disc":
        for i in range(110):
            r, angle = 23.5 * math.sqrt((i + 0.5) / 110), i * GOLDEN
            tone = body * (0.65 if r < 9 else 1.0) * rng.uniform(0.75, 1.2)
            dot(r * math.cos(angle), r * math.sin(angle), 1.4, tone)
    elif species.centre == "eye":
        dot(0, 0, 11, anther * 0.8)
    elif species.centre == "boss":
        for r in 24 * np.sqrt(np.linspace(1, 0, 90)):
            angle = rng.uniform(0, 6.283)
            dot(r * math.cos(angle), r * math.sin(angle), 1.8, anther * rng.uniform(0.7, 1.15))
        dot(0, 0, 5, body * 0.8)
    elif species.centre == "column":
        dot(0, 0, 14, body * 0.7)
        for r in np.linspace(0, 18, 10):
            dot(r, 0.15 * r, 4.5, body * (0.9 + r / 90))
        dot(20, 3, 5, anther)
    else:
        count = int(rng.integers(5, 8))
        for i in range(count):
            angle = (i + rng.uniform(-0.2, 0.2)) * 6.283 / count
            end = (22 * math.cos(angle), 22 * math.sin(angle))
            for t in np.linspace(0.05, 1, 14):
                dot(end[0] * t, end[1] * t, 0.9, body * (0.8 + 0.2 * t))
            dot(*end, 3.2, anther)
        dot(0, 0, 4, body * 0.8)
    y, x = np.mgrid[0:side, 0:side].astype(np.float32) / middle - 1
    dome = 1.05 - 0.25 * (x * 0.5 + y) - 0.2 * (x**2 + y**2)
    shaded = cv2.GaussianBlur(color, (0, 0), 0.7) * dome[..., None]
    cv2.GaussianBlur(cover, (0, 0), 0.7, dst=cover)
    return _sprite(shaded, cover, 2.5)


def _sprite(color_hw3: Array, cover_hw: Array, soft: float) -> Array:
    """Premultiplied, with a faint shadow of `soft` pixels that sets it off from what lies below."""
    cover_hw = cover_hw.astype(np.float32)
    shadow = cv2.GaussianBlur(cover_hw, (0, 0), soft) * np.float32(0.4)
    sprite = np.empty((*cover_hw.shape, 4), np.float32)
    sprite[..., :3] = np.clip(color_hw3, 0, 1) * cover_hw[..., None]
    sprite[..., 3] = cover_hw + (1 - cover_hw) * shadow
    return sprite


def _blend(below: Array, color: Color, share_hw: Array) -> Array:
    share = np.clip(share_hw, 0, 1).astype(np.float32)[..., None]
    return below * (1 - share) + np.array(color, np.float32) * share


def _smooth(low: float, high: float, x: Array) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    t = np.clip((x - low) / (high - low), 0, 1)
    return t * t * (3 - 2 * t)
