"""One look at every file of a data set: is it whole, how large, how bright, of what colour.

Letters: N images, P = 64 side of a grey thumbnail, S = 32 side of a colour thumbnail.
"""

from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from flowerray.data.dataset import Dataset
from flowerray.data.images import decode, decoding_map
from flowerray.errors import UserError

GREY_SIDE = 64
COLOUR_SIDE = 32
_SIDE = 128  # pixels; every statistic is taken at this size, so that large photographs compare
_HUE_BINS = 36
_GREY_ENOUGH = 0.05
"""Mean saturation below which an image has no dominant hue."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Look(NamedTuple):
    """What is kept of one file; the pixels are squeezed to a square."""

    digest: str
    """Hash of the file's bytes."""
    width: int
    """Pixels, upright."""
    height: int
    grey_PP: NDArray[np.uint8]
    colour_SS3: NDArray[np.uint8]
    brightness: float
    """Mean luma, 0..1."""
    contrast: float
    """Standard deviation of luma, 0..0.5."""
    saturation: float
    """Mean of HSV's S, 0..1."""
    hue: float
    """Most frequent hue, degrees 0..360, pixels weighted by saturation x value; NaN for grey."""


@dataclass(frozen=True)
class Survey:
    """The readable images of a set, as arrays in the order of `dataset.paths`."""

    dataset: Dataset
    """The set without its unreadable files."""
    unreadable: tuple[tuple[Path, str], ...]
    """File and why it is no whole image."""
    digests: tuple[str, ...]
    size_N2: NDArray[np.int64]
    """Width and height, pixels."""
    grey_NPP: NDArray[np.uint8]
    colour_NSS3: NDArray[np.uint8]
    brightness_N: NDArray[np.float64]
    contrast_N: NDArray[np.float64]
    saturation_N: NDArray[np.float64]
    hue_N: NDArray[np.float64]

    def split_names(self) -> NDArray[np.str_]:
        """Name of each image's split; empty where it is in none."""
        names_N = np.full(len(self.digests), "", dtype="<U8")
        for name, indices in self.dataset.splits.items():
            names_N[indices] = name
        return names_N

    def name(self, i: int) -> str:
        """Image i's file relative to the set's folder, with forward slashes."""
        return self.dataset.paths[i].relative_to(self.dataset.root).as_posix()


def take_survey(dataset: Dataset, progress: bool = True) -> Survey:
    """Reads every file of a set once.

    Raises:
        UserError: no image can be read.
    """
    total = len(dataset.paths)
    bar = tqdm(total=total, desc="reading", unit="img", disable=None if progress else True)
    looks: list[Look | str] = []
    with bar, decoding_map(total) as run:
        for found in run(look, dataset.paths):
            looks.append(found)
            bar.update()
    whole = [found for found in looks if isinstance(found, Look)]
    if not whole:
        raise UserError(f"None of the {total} images of {dataset.root} can be read; replace them.")
    readable_N = np.array([isinstance(found, Look) for found in looks])
    return Survey(
        dataset=_part(dataset, readable_N),
        unreadable=tuple(
            (path, found)
            for path, found in zip(dataset.paths, looks, strict=True)
            if isinstance(found, str)
        ),
        digests=tuple(found.digest for found in whole),
        size_N2=np.array([(found.width, found.height) for found in whole]),
        grey_NPP=np.stack([found.grey_PP for found in whole]),
        colour_NSS3=np.stack([found.colour_SS3 for found in whole]),
        brightness_N=np.array([found.brightness for found in whole]),
        contrast_N=np.array([found.contrast for found in whole]),
        saturation_N=np.array([found.saturation for found in whole]),
        hue_N=np.array([found.hue for found in whole]),
    )


def look(path: Path) -> Look | str:
    """One file, or why it is no whole image."""
    try:
        data = path.read_bytes()
    except OSError as error:
        return (error.strerror or "unreadable").lower()
    try:
        image = decode(data)
    except UserError as error:  # its text names no file here; the clause in brackets is the reason
        return str(error).partition("(")[2].rpartition(")")[0]
    square = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    rgb = np.asarray(square, np.float32) / 255
    luma = rgb @ _LUMA
    hue, saturation = _hue_and_saturation(square)
    return Look(
        digest=blake2b(data, digest_size=16).hexdigest(),
        width=image.width,
        height=image.height,
        grey_PP=_bytes(_pooled(luma[..., None], GREY_SIDE)[..., 0]),
        colour_SS3=_bytes(_pooled(rgb, COLOUR_SIDE)),
        brightness=float(luma.mean()),
        contrast=float(luma.std()),
        saturation=saturation,
        hue=hue,
    )


def _hue_and_saturation(square: Image.Image) -> tuple[float, float]:
    """The most frequent hue in degrees (NaN for a grey image), and the mean saturation."""
    hsv = np.asarray(square.convert("HSV"), np.float32) / 255
    saturation = float(hsv[..., 1].mean())
    if saturation < _GREY_ENOUGH:
        return float("nan"), saturation
    bins = (hsv[..., 0] * 256 / 255 * _HUE_BINS).astype(int).ravel() % _HUE_BINS
    weight = (hsv[..., 1] * hsv[..., 2]).ravel()
    count = np.bincount(bins, weights=weight, minlength=_HUE_BINS)
    smooth = count + (np.roll(count, 1) + np.roll(count, -1)) / 2  # a peak may sit on a border
    return (float(smooth.argmax()) + 0.5) * 360 / _HUE_BINS, saturation


def _pooled(image_HWC: NDArray[np.floating], side: int) -> NDArray[np.floating]:
    step = _SIDE // side
    return image_HWC.reshape(side, step, side, step, -1).mean(axis=(1, 3))


def _bytes(values: NDArray[np.floating]) -> NDArray[np.uint8]:
    return (values * 255).round().clip(0, 255).astype(np.uint8)


def _part(dataset: Dataset, keep_N: NDArray[np.bool_]) -> Dataset:
    """The images of a set that are kept, with their splits."""
    if keep_N.all():
        return dataset
    place_N = np.cumsum(keep_N) - 1
    masks = dataset.masks
    return Dataset(
        root=dataset.root,
        kind=dataset.kind,
        protocol=dataset.protocol,
        paths=tuple(p for p, keep in zip(dataset.paths, keep_N, strict=True) if keep),
        labels_N=dataset.labels_N[keep_N],
        classes=dataset.classes,
        splits={
            name: place_N[indices[keep_N[indices]]] for name, indices in dataset.splits.items()
        },
        masks=masks and tuple(m for m, keep in zip(masks, keep_N, strict=True) if keep),
        tags=dataset.tags,
    )
