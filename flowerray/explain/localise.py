"""Do the maps lie on the flower? Segmentation masks, and three scores against them.

Letters: N images, H W pixels.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from flowerray.data.images import decode, eval_crop
from flowerray.explain.faithfulness import ranking
from flowerray.rendered.synthetic import MASK_BACKGROUND

_TOLERANCE = 40
"""Largest distance of a channel from `MASK_BACKGROUND`: the masks are JPEG files."""


def read_masks(paths: Sequence[Path], size: int) -> NDArray[np.bool_]:
    """Masks (N, S, S) of the flower, through the evaluation transform of their photographs.

    Raises:
        UserError: a file that is missing or no image.
    """
    return np.stack([_read_mask(path, size) for path in paths])


def _read_mask(path: Path, size: int) -> NDArray[np.bool_]:
    pixels = np.asarray(decode(path)).astype(np.int16)
    flower = (np.abs(pixels - np.array(MASK_BACKGROUND)) > _TOLERANCE).any(-1)
    # Told apart at full size, since a resized blue edge is neither flower nor background; then
    # through the reader of photographs itself, so that both are cut alike.
    return eval_crop(Image.fromarray(flower.astype(np.uint8) * 255), size) > 127


def energy(map_HW: NDArray, mask_HW: NDArray[np.bool_]) -> float:
    """Share of the map's positive part that lies in the mask (Wang et al. 2020, Score-CAM); a map
    with no positive part says nothing and counts as a flat one.
    """
    positive = np.maximum(map_HW, 0.0)
    total = float(positive.sum())
    return float(positive[mask_HW].sum()) / total if total > 0 else float(mask_HW.mean())


def pointing(map_HW: NDArray, mask_HW: NDArray[np.bool_]) -> float:
    """The pointing game (Zhang et al. 2016) without its tolerance: 1 where the largest pixel is in
    the mask; of several largest ones, the share that is.
    """
    return float(mask_HW[map_HW == map_HW.max()].mean())


def iou(map_HW: NDArray, mask_HW: NDArray[np.bool_], seed: int = 0) -> float:
    """Intersection over union of the mask and the map's largest pixels, as many as the mask has."""
    area = int(mask_HW.sum())
    if area == 0:
        return 0.0
    chosen = np.zeros(mask_HW.size, bool)
    chosen[ranking(map_HW, seed)[:area]] = True
    overlap = int((chosen & mask_HW.ravel()).sum())
    return overlap / (2 * area - overlap)
