"""Near-duplicates hidden in a set in the Oxford layout: test images that are altered copies of
training images.
"""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from flowerray.data.oxford import read_oxford

KINDS = ("recompressed", "resized", "cropped", "flipped")


def plant(root: Path, count: int, seed: int = 0, mixed: bool = False) -> dict[tuple[str, str], str]:
    """Overwrites `count` test images, each by an altered copy of another training image of its
    class, the kinds of alteration taking turns.

    Args:
        root: a set that may be changed.
        mixed: every copy is flipped or not, cropped, resized and recompressed.

    Returns:
        (training file, test file), relative to the root -> kind.
    """
    rng = np.random.default_rng(seed)
    dataset = read_oxford(root)
    free = rng.permutation(dataset.splits["train"]).tolist()
    planted: dict[tuple[str, str], str] = {}
    for test in rng.permutation(dataset.splits["test"]).tolist():
        if len(planted) == count:
            break
        source = next((i for i in free if dataset.labels_N[i] == dataset.labels_N[test]), None)
        if source is None:
            continue
        free.remove(source)
        kind = "mixed" if mixed else KINDS[len(planted) % len(KINDS)]
        alter(dataset.paths[source], dataset.paths[test], kind, rng)
        names = [dataset.paths[i].relative_to(root).as_posix() for i in (source, test)]
        planted[names[0], names[1]] = kind
    assert len(planted) == count
    return planted


def alter(source: Path, target: Path, kind: str, rng: np.random.Generator) -> None:
    """Writes an altered copy: JPEG of quality 30 to 60, sides of 50 to 80 %, a crop of 90 to 97 %
    of the area, or mirrored; the others are saved with quality 85.
    """
    with Image.open(source) as image:
        picture = image.convert("RGB")
    quality = 85
    if kind == "flipped" or kind == "mixed" and rng.random() < 0.5:
        picture = ImageOps.mirror(picture)
    if kind in ("cropped", "mixed"):
        picture = _cropped(picture, rng)
    if kind in ("resized", "mixed"):
        share = rng.uniform(0.5, 0.8)
        picture = picture.resize([round(side * share) for side in picture.size])
    if kind in ("recompressed", "mixed"):
        quality = int(rng.integers(30, 61))
    picture.save(target, quality=quality)


def _cropped(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A crop at a random place, of another shape as often as not."""
    area = rng.uniform(0.9, 0.97)
    across = area ** rng.uniform(0, 1)
    # Rounded up, so that at least 90 % are left of a small picture.
    width = int(np.ceil(picture.width * across))
    height = int(np.ceil(picture.height * area / across))
    left = int(rng.integers(picture.width - width + 1))
    top = int(rng.integers(picture.height - height + 1))
    return picture.crop((left, top, left + width, top + height))
