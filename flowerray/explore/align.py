"""Lays one small grey image over another and says how well their structure agrees.

Letters: N images, M pairs, P = 64 side of a grey thumbnail.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

_SCALES = (0.8, 1.25)
"""Of width and height: a crop to 90 % of the area scales one side by at most 1 / 0.9."""
_SHEAR = 0.08
_MIN_OVERLAP = 0.7
"""Share of the first image that the second one must cover."""
_FINE = 1.0
"""Standard deviation (pixels of the thumbnail) of a blur that hides what JPEG and resizing add."""
_WINDOW = 3.0
"""Standard deviation (pixels) of the window in which structure is compared."""
_FAINT = 3.0
"""Grey levels (of 255): structure fainter than this counts little."""
_ITERATIONS = 40
_MIN_FIT = 0.7
"""Correlation of the whole images after a step of the alignment; altered copies reach 0.89."""
_ROUGH_SIDE = 16
_PAIRS = 20_000
"""Compared at a time: 20 MB of each."""
_ROUGHLY = 0.5
"""Correlation at 16 x 16 pixels; altered copies have 0.88 and more on rendered sets."""


def plausible(grey_NPP: NDArray[np.uint8], pairs_M2: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Whether two images agree roughly as they lie, at 16 x 16 pixels: plain, and with the second
    one mirrored (M, 2). It spares the alignment of almost all pairs that only look alike.
    """
    step = grey_NPP.shape[1] // _ROUGH_SIDE
    rough = grey_NPP.reshape(len(grey_NPP), _ROUGH_SIDE, step, _ROUGH_SIDE, step).mean(
        (2, 4), dtype=np.float32
    )
    plain, mirrored = (_unit(image.reshape(len(rough), -1)) for image in (rough, rough[..., ::-1]))
    found_M2 = np.zeros((len(pairs_M2), 2), bool)
    for start in range(0, len(pairs_M2), _PAIRS):
        rows = slice(start, start + _PAIRS)
        first, second = pairs_M2[rows].T
        for column, other in enumerate((plain, mirrored)):
            found_M2[rows, column] = (plain[first] * other[second]).sum(axis=1) >= _ROUGHLY
        # Of one colour all over, nothing correlates.
        found_M2[rows, 0] |= (rough[first] == rough[second]).all(axis=(1, 2))
    return found_M2


def agreement(first_PP: NDArray[np.uint8], second_PP: NDArray[np.uint8]) -> float:
    """How well the second image lies on the first one.

    The alignment is affine and found by ECC (Evangelidis and Psarakis 2008), coarse to fine.

    Returns:
        Correlation (-1..1) of the structure in the part that both show; 1 for equal images; 0
        where no near-identical framing aligns them.
    """
    if np.array_equal(first_PP, second_PP):
        return 1.0
    return _aligned(first_PP, second_PP)


def _aligned(first_PP: NDArray[np.uint8], second_PP: NDArray[np.uint8]) -> float:
    import cv2

    warp_23: Any = np.eye(2, 3, dtype=np.float32)
    stop = (cv2.TERM_CRITERIA_EPS | cv2.TERM_CRITERIA_COUNT, _ITERATIONS, 1e-4)
    nothing: Any = None  # OpenCV's types know no absent mask
    try:
        for blur in (9, 3):  # a wide blur first: it pulls from further away
            fit, warp_23 = cv2.findTransformECC(
                first_PP, second_PP, warp_23, cv2.MOTION_AFFINE, stop, nothing, blur
            )
            if fit < _MIN_FIT:
                return 0.0
    except cv2.error:  # no structure, or nothing to converge to
        return 0.0
    (a, b, _), (c, d, _) = warp_23
    if not (_SCALES[0] <= min(a, d) and max(a, d) <= _SCALES[1] and max(abs(b), abs(c)) <= _SHEAR):
        return 0.0
    size = first_PP.shape[::-1]
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    moved: Any = cv2.warpAffine(second_PP.astype(np.float32), warp_23, size, flags=flags)
    inside = cv2.warpAffine(np.ones_like(second_PP), warp_23, size, flags=cv2.WARP_INVERSE_MAP) > 0
    if inside.mean() < _MIN_OVERLAP:
        return 0.0
    first = first_PP.astype(np.float32)
    moved = np.where(inside, moved, first)  # so that the border brings no edge into the windows
    return _structure(first, moved, inside)


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


def _unit(rows: NDArray[np.floating]) -> NDArray[np.floating]:
    """Rows without their mean, of length 1; a constant row becomes zeros."""
    rows = rows - rows.mean(axis=1, keepdims=True)
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-6)
