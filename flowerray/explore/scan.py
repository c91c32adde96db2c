"""Every file of a data set, read once: is it whole, how large, how bright, of what colour, and
what a model makes of it.

Letters: N images, B of a batch, D embedding dimensions, H W C an image, P = 64 side of a grey
thumbnail, S = 32 side of a colour thumbnail.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from flowerray.data.dataset import Dataset
from flowerray.data.images import decoding_map, eval_crop, read_image
from flowerray.errors import UserError
from flowerray.explore.align import Keypoints, find_keypoints
from flowerray.pool import cores

GREY_SIDE = 64
COLOUR_SIDE = 32
_SIDE = 128  # pixels; every statistic is taken at this size, so that large photographs compare
_BATCH = 64  # images that are embedded at a time
_WORTH_A_POOL = 300  # fewer images are read before new processes have started
_HUE_BINS = 36
_GREY_ENOUGH = 0.05
"""Mean saturation below which an image has no dominant hue."""
_LUMA = np.array([0.299, 0.587, 0.114], np.float32)  # ITU-R BT.601


class Photograph(NamedTuple):
    """What is kept of one file; the thumbnails are squeezed to squares."""

    width: int
    """Pixels, upright."""
    height: int
    grey_PP: NDArray[np.uint8]
    colour_SS3: NDArray[np.uint8]
    keypoints: Keypoints
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
    """Hashes of the files' bytes."""
    emb_ND: NDArray[np.float32]
    """Unit vectors."""
    keypoints: tuple[Keypoints, ...]
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

    def examined(self) -> dict[Path, tuple[str, str | None]]:
        """Each file that was read -> hash of its bytes, and why it is no whole image."""
        whole = dict(zip(self.dataset.paths, ((d, None) for d in self.digests), strict=True))
        return whole | {path: ("", why) for path, why in self.unreadable}


def take_survey(
    dataset: Dataset,
    size: int,
    embed: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    progress: bool = True,
) -> Survey:
    """Reads every file of a set once.

    Args:
        size: pixels of the squares that are embedded, see `eval_image`.
        embed: uint8 BHWC to unit vectors BD.

    Raises:
        UserError: no image can be read.
    """
    total = len(dataset.paths)
    read: list[tuple[str, Photograph | str]] = []
    rows: list[NDArray[np.float32]] = []
    bar = tqdm(total=total, desc="reading", unit="img", disable=None if progress else True)
    with bar, decoding_map(total, cores() if total >= _WORTH_A_POOL else 1) as run:
        results = iter(run(partial(scan, size=size), dataset.paths))
        while batch := list(islice(results, _BATCH)):
            read += [(digest, photograph) for digest, photograph, _ in batch]
            if crops := [crop for _, _, crop in batch if crop is not None]:
                rows.append(embed(np.stack(crops)))
            bar.update(len(batch))
    whole = [(digest, found) for digest, found in read if isinstance(found, Photograph)]
    if not whole:
        raise UserError(f"None of the {total} images of {dataset.root} can be read; replace them.")
    digests, found = zip(*whole, strict=True)
    columns = dict(zip(Photograph._fields, zip(*found, strict=True), strict=True))
    return Survey(
        dataset=_part(dataset, np.array([isinstance(found, Photograph) for _, found in read])),
        unreadable=tuple(
            (path, why)
            for path, (_, why) in zip(dataset.paths, read, strict=True)
            if isinstance(why, str)
        ),
        digests=digests,
        emb_ND=np.concatenate(rows),
        keypoints=columns["keypoints"],
        size_N2=np.array([columns["width"], columns["height"]]).T,
        grey_NPP=np.stack(columns["grey_PP"]),
        colour_NSS3=np.stack(columns["colour_SS3"]),
        brightness_N=np.array(columns["brightness"]),
        contrast_N=np.array(columns["contrast"]),
        saturation_N=np.array(columns["saturation"]),
        hue_N=np.array(columns["hue"]),
    )


def scan(path: Path, size: int) -> tuple[str, Photograph | str, NDArray[np.uint8] | None]:
    """One file: the hash of its bytes, what is kept of it or why it is no whole image, and its
    square of `size` pixels to be embedded.
    """
    digest, image = read_image(path)
    if isinstance(image, str):
        return digest, image, None
    square = image.resize((_SIDE, _SIDE), Image.Resampling.BOX, reducing_gap=2.0)
    rgb = np.asarray(square, np.float32) / 255
    luma = rgb @ _LUMA
    hue, saturation = _hue_and_saturation(square)
    photograph = Photograph(
        width=image.width,
        height=image.height,
        grey_PP=_bytes(_pooled(luma[..., None], GREY_SIDE)[..., 0]),
        colour_SS3=_bytes(_pooled(rgb, COLOUR_SIDE)),
        keypoints=find_keypoints(image),
        brightness=float(luma.mean()),
        contrast=float(luma.std()),
        saturation=saturation,
        hue=hue,
    )
    return digest, photograph, eval_crop(image, size)


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
    place_N, kept = np.cumsum(keep_N) - 1, np.flatnonzero(keep_N)
    return replace(
        dataset,
        paths=tuple(dataset.paths[i] for i in kept),
        labels_N=dataset.labels_N[keep_N],
        splits={
            name: place_N[indices[keep_N[indices]]] for name, indices in dataset.splits.items()
        },
        masks=dataset.masks and tuple(dataset.masks[i] for i in kept),
    )
