"""Small seeded pictures on disk for the tests of the readers."""

import io
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike
from PIL import Image
from scipy.io import savemat


def picture(seed: int, height: int = 12, width: int = 16) -> Image.Image:
    """A tinted gradient with noise; each seed another one."""
    rng = np.random.default_rng((seed, 77))
    ramp = np.linspace(0, 120, height)[:, None, None] + np.linspace(0, 60, width)[None, :, None]
    pixels = ramp + rng.integers(0, 60, 3) + rng.normal(0, 8, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save_picture(path: Path, seed: int, height: int = 12, width: int = 16) -> Path:
    """Writes it in the format of the suffix, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(seed, height, width).save(path)
    return path


def jpeg(image: Image.Image, **options: object) -> bytes:
    """Its bytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", **options)
    return buffer.getvalue()


SHAPES = [(20, 30), (30, 20), (25, 25), (16, 16), (9, 40), (200, 31)]
"""Height and width."""


def six_pictures(folder: Path) -> list[Path]:
    """JPEGs of different shapes."""
    return [
        save_picture(folder / f"{i}.jpg", i, height, width)
        for i, (height, width) in enumerate(SHAPES)
    ]


def class_folders(root: Path, sizes: Mapping[str, int]) -> Path:
    """One folder a class with that many JPEGs."""
    for c, (name, size) in enumerate(sizes.items()):
        (root / name).mkdir(parents=True)
        for k in range(size):
            save_picture(root / name / f"{k:03d}.jpg", 1000 * c + k)
    return root


def numbered(folder: Path, count: int) -> Path:
    """image_00001.jpg and so on, links to one tiny JPEG."""
    first = save_picture(folder / "image_00001.jpg", 0, 8, 8)
    for number in range(2, count + 1):
        os.link(first, folder / f"image_{number:05d}.jpg")
    return folder


def write_tables(root: Path, labels: ArrayLike, parts: Mapping[str, ArrayLike]) -> None:
    """imagelabels.mat, and setid.mat with the keys trnid, valid, tstid; numbers as on disk."""
    savemat(root / "imagelabels.mat", {"labels": np.array([labels], np.uint8)})
    savemat(root / "setid.mat", {key: np.array([ids], np.uint16) for key, ids in parts.items()})
