"""Altered copies of photographs, and a set in the Oxford layout in which test images are altered
copies of training images.
"""

from collections.abc import Callable, Sequence
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageFont, ImageOps

from flowerray.data.oxford import read_oxford

Alteration = Callable[[Image.Image, np.random.Generator], Image.Image]


def _either(rng: np.random.Generator, one: float, other: float) -> float:
    return one if rng.random() < 0.5 else other


def _cropped(share: float) -> Alteration:
    """To that share of the area, at a random place."""

    def alter(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
        width, height = (round(side * share**0.5) for side in picture.size)
        left = int(rng.integers(picture.width - width + 1))
        top = int(rng.integers(picture.height - height + 1))
        return picture.crop((left, top, left + width, top + height))

    return alter


def _watermarked(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    layer = picture.copy()
    font = ImageFont.load_default(max(8, min(picture.size) // 8))
    place = picture.width // 10, int(rng.integers(picture.height * 3 // 4))
    ImageDraw.Draw(layer).text(
        place, "© flowers.example", "white", font, stroke_width=1, stroke_fill="black"
    )
    return Image.blend(picture, layer, 0.7)


def _framed(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    colour = tuple(rng.integers(0, 256, 3).tolist())
    return ImageOps.expand(picture, round(0.05 * min(picture.size)), colour)


def _turned(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    return picture.rotate(_either(rng, 5, -5), Image.Resampling.BICUBIC)


KINDS: dict[str, Alteration] = {
    "recompressed": lambda p, _: p,  # saved with quality 30, all others with 85
    "resized": lambda p, _: p.resize([round(side / 2) for side in p.size]),
    "stretched": lambda p, rng: p.resize((round(p.width * _either(rng, 0.75, 1.33)), p.height)),
    "brightness": lambda p, rng: ImageEnhance.Brightness(p).enhance(_either(rng, 0.6, 1.4)),
    "contrast": lambda p, rng: ImageEnhance.Contrast(p).enhance(_either(rng, 0.6, 1.5)),
    "grey": lambda p, _: p.convert("L").convert("RGB"),
    "blurred": lambda p, _: p.filter(ImageFilter.GaussianBlur(min(p.size) / 100)),
    "watermarked": _watermarked,
    "mirrored": lambda p, _: ImageOps.mirror(p),
    "mirrored vertically": lambda p, _: ImageOps.flip(p),
    "turned by 90": lambda p, rng: p.rotate(_either(rng, 90, -90), expand=True),
    "turned by 180": lambda p, _: p.rotate(180),
    "turned by 5": _turned,
    "cropped to 95": _cropped(0.95),
    "cropped to 90": _cropped(0.90),
    "cropped to 80": _cropped(0.80),
    "cropped to 64": _cropped(0.64),
    "framed by 5": _framed,
}
"""Shares are of the area; a blur has a standard deviation of 1 % of the shorter side."""


def altered(picture: Image.Image, kinds: Sequence[str], rng: np.random.Generator) -> bytes:
    """The JPEG file of a copy that went through these alterations, one after the other."""
    picture = picture.convert("RGB")
    for kind in kinds:
        picture = KINDS[kind](picture, rng)
    file = BytesIO()
    picture.save(file, "JPEG", quality=30 if "recompressed" in kinds else 85)
    return file.getvalue()


def plant(root: Path, count: int, seed: int = 0) -> set[tuple[str, str]]:
    """Overwrites `count` test images, each by an altered copy of another training image of its
    class, the kinds taking turns.

    Returns:
        (training file, test file), relative to the root, which may be changed.
    """
    rng = np.random.default_rng(seed)
    dataset = read_oxford(root)
    free = rng.permutation(dataset.splits["train"]).tolist()
    kinds = rng.permutation(list(KINDS)).tolist()
    planted: set[tuple[str, str]] = set()
    for test in rng.permutation(dataset.splits["test"]).tolist():
        same = [i for i in free if dataset.labels_N[i] == dataset.labels_N[test]]
        if len(planted) < count and same:
            free.remove(same[0])
            with Image.open(dataset.paths[same[0]]) as image:
                file = altered(image, kinds[len(planted) % len(kinds) :][:1], rng)
            dataset.paths[test].write_bytes(file)
            names = [dataset.paths[i].relative_to(root).as_posix() for i in (same[0], test)]
            planted.add((names[0], names[1]))
    assert len(planted) == count
    return planted
