"""Local features of a photograph, and how well one photograph lies on another by them.

Letters: K keypoints, B = 32 bytes of a signature, M matches, P = 64 side of a grey thumbnail.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

_SIDE = 128
"""Shorter side, pixels, at which keypoints are looked for: what a blur or JPEG takes is gone."""
_LONGEST = 2
"""Longer sides are squeezed to so many shorter ones."""
_KEYPOINTS = 160
_BITS = 256
_FEWEST = 10
"""Matches that have to agree on one alignment; chance reaches 7 in one pair of a hundred."""
_DISTANCE = 64
"""Bits of 256 at most between two matched signatures; unlike ones differ in 128."""
_TOLERANCE = 1.0
"""Pixels of the thumbnail between where a keypoint lies and where the alignment puts it."""
_SCALES = (0.45, 2.2)
"""Of both axes."""
_OVERLAP = 0.25
"""Share of the first image that the second one must cover."""
_FINE = 1.0
"""Standard deviation (pixels of the thumbnail) of a blur that hides what JPEG and resizing add."""
_WINDOW = 3.0
"""Standard deviation (pixels) of the window in which structure is compared."""
_FAINT = 3.0
"""Grey levels (of 255): structure fainter than this counts little."""


class Keypoints(NamedTuple):
    """Local features of one image: RootSIFT (Lowe 2004; Arandjelovic and Zisserman 2012), each
    descriptor kept as the signs of 256 projections (Charikar 2002).
    """

    place_K2: NDArray[np.float32]
    """Column and row as shares of width and height, 0..1."""
    plain_KB: NDArray[np.uint8]
    mirrored_KB: NDArray[np.uint8]
    """What the same places look like in the mirror image."""


class Alignment(NamedTuple):
    """How the second image lies on the first."""

    score: float
    """Agreement of the structure in the part that both show, -1..1; 1 for equal images."""
    turned: float
    """Degrees counter-clockwise, -180..180, of the second one (after its mirroring)."""
    area: float
    """Share of the first image that both show; above 1 where it is a part of the second."""


def find_keypoints(image: Image.Image) -> Keypoints:
    """Up to 160 keypoints, the clearest ones; none in an image without structure."""
    import cv2

    shorter = min(image.size)
    size = [min(_LONGEST * _SIDE, max(1, round(side * _SIDE / shorter))) for side in image.size]
    small = image.convert("L").resize(size, Image.Resampling.BOX, reducing_gap=2.0)
    grey = np.asarray(small, np.float32)
    low, high = np.percentile(grey, (1, 99))
    grey = ((grey - low) * (255 / max(high - low, 8))).clip(0, 255)
    sift: Any = cv2
    detector = sift.SIFT_create(_KEYPOINTS, contrastThreshold=0.01)
    found, descriptor_KD = detector.detectAndCompute(grey.astype(np.uint8), None)
    found = found[:_KEYPOINTS]  # equally clear ones come on top
    if not found:
        nothing = np.empty((0, _BITS // 8), np.uint8)
        return Keypoints(np.empty((0, 2), np.float32), nothing, nothing)
    descriptor_KD = descriptor_KD[: len(found)]
    place_K2 = (np.array([point.pt for point in found]) + 0.5) / np.array(size)
    mirrored_KD = descriptor_KD[:, _MIRROR_D]
    return Keypoints(place_K2.astype(np.float32), _signs(descriptor_KD), _signs(mirrored_KD))


def align(
    first: Keypoints,
    second: Keypoints,
    first_PP: NDArray[np.uint8],
    second_PP: NDArray[np.uint8],
    mirrored: bool,
) -> Alignment | None:
    """Lays the second image over the first, by the affine map on which most of their keypoints
    agree (RANSAC, Fischler and Bolles 1981), and compares their thumbnails there.

    Args:
        first_PP, second_PP: the whole images squeezed to squares.
        mirrored: whether the second one is mirrored first, left to right.

    Returns:
        None where too few keypoints agree, or on a map that no copy is made by.
    """
    import cv2

    if np.array_equal(first_PP, second_PP):
        return Alignment(1.0, 0.0, 1.0)
    signatures = second.mirrored_KB if mirrored else second.plain_KB
    if min(len(first.plain_KB), len(signatures)) < _FEWEST:
        return None
    pairs = cv2.BFMatcher(cv2.NORM_HAMMING, crossCheck=True).match(first.plain_KB, signatures)
    pairs = [pair for pair in pairs if pair.distance < _DISTANCE]
    if len(pairs) < _FEWEST:
        return None
    side = len(first_PP)
    from_M2 = first.place_K2[[pair.queryIdx for pair in pairs]] * side - 0.5
    to_M2 = second.place_K2[[pair.trainIdx for pair in pairs]]
    if mirrored:
        to_M2 = np.abs([1, 0] - to_M2)
        second_PP = np.ascontiguousarray(second_PP[:, ::-1])
    to_M2 = to_M2 * side - 0.5
    map_23, agree = cv2.estimateAffine2D(
        from_M2, to_M2, ransacReprojThreshold=_TOLERANCE, maxIters=2000, confidence=0.999
    )
    if map_23 is None or agree.sum() < _FEWEST:
        return None
    scales = np.linalg.svd(map_23[:, :2], compute_uv=False)
    if not (_SCALES[0] <= scales.min() and scales.max() <= _SCALES[1]):
        return None
    if np.linalg.det(map_23[:, :2]) < 0:  # a mirror image of its own: chance
        return None
    size, flags = (side, side), cv2.WARP_INVERSE_MAP
    inside_PP = cv2.warpAffine(np.ones_like(second_PP), map_23, size, flags=flags) > 0
    if inside_PP.mean() < _OVERLAP:
        return None
    moved: Any = cv2.warpAffine(
        second_PP.astype(np.float32), map_23, size, flags=flags | cv2.INTER_LINEAR
    )
    grey = first_PP.astype(np.float32)
    moved = np.where(inside_PP, moved, grey)  # so that the border brings no edge into the windows
    (a, b, _), (c, d, _) = map_23
    return Alignment(
        score=_structure(grey, moved, inside_PP),
        turned=math.degrees(math.atan2(b - c, a + d)),
        area=float(1 / np.linalg.det(map_23[:, :2])),
    )


def _structure(
    first_PP: NDArray[np.float32], second_PP: NDArray[np.float32], inside_PP: NDArray[np.bool_]
) -> float:
    """Mean of the correlations in small windows, so that a strong outline that look-alikes share
    does not outweigh all that it encloses.
    """
    import cv2

    def mean(image_PP: Any) -> Any:
        return cv2.GaussianBlur(image_PP, (0, 0), _WINDOW)

    first, second = (cv2.GaussianBlur(image, (0, 0), _FINE) for image in (first_PP, second_PP))
    first_mean, second_mean = mean(first), mean(second)
    covariance = mean(first * second) - first_mean * second_mean
    first_variance = np.maximum(mean(first * first) - first_mean**2, 0)
    second_variance = np.maximum(mean(second * second) - second_mean**2, 0)
    product = np.sqrt(first_variance * second_variance)
    weight = inside_PP * product / (product + _FAINT**2)
    correlation = covariance / np.maximum(product, 1e-3)
    return float((weight * correlation).sum() / max(float(weight.sum()), 1e-3))


def _projections() -> NDArray[np.float32]:
    """Random directions across the mean descriptor, so that each bit is set half of the time: it
    is about the product of a share of each row and column of cells and of each orientation.
    """
    across, turns = [0.9, 1.1, 1.1, 0.9], [1.8, 1.15, 0.75, 0.8, 0.85, 0.8, 0.75, 1.15]
    mean_D = np.einsum("r,c,o->rco", across, across, turns).ravel()
    mean_D /= np.linalg.norm(mean_D)
    random = np.random.default_rng(0).normal(size=(len(mean_D), _BITS))
    return (random - np.outer(mean_D, mean_D @ random)).astype(np.float32)


def _signs(descriptor_KD: NDArray[np.float32]) -> NDArray[np.uint8]:
    total_K1 = descriptor_KD.sum(axis=1, keepdims=True)
    root_KD = np.sqrt(descriptor_KD / np.maximum(total_K1, 1e-6))
    return np.packbits(root_KD @ _PROJECTIONS > 0, axis=1)


_PROJECTIONS = _projections()
# A mirrored image's descriptor: its 4 x 4 cells upside down (they lie along the keypoint's own
# orientation), the 8 orientations of each counted the other way round.
_MIRROR_D = np.arange(128).reshape(4, 4, 8)[::-1, :, -np.arange(8) % 8].ravel()
