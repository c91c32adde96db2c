"""Near-duplicates: the same photograph twice, recompressed, resized, cropped or mirrored.

Two signals name each image's candidates: the perceptual hash (Zauner 2010; `imagehash`'s DCT hash
of 64 bits, of the image and of its mirror image) and the cosine of frozen backbone features. Both
also bring together pictures that only look alike, so that each candidate is then laid over its
partner (align.py) and counts only where the structure agrees.

Letters: N images, K neighbours, P = 64 side of a grey thumbnail, M pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flowerray.explore.align import agreement, plausible

NEIGHBOURS = 6
"""Candidates an image: so many by each signal, within its split and again outside."""
MIN_SCORE = 0.8
"""Agreement of the structure from which a pair is a near-duplicate, -1..1. Altered copies have 0.93
and more, different photographs at most 0.6, both on rendered and on real flowers."""
_BLOCK_ELEMENTS = 2**22  # of a similarity matrix at a time


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show the same photograph."""

    first: int
    """Position in the set; below `second`."""
    second: int
    hash_distance: int
    """Differing bits of 64, the smaller one of plain and mirrored."""
    cosine: float
    """Of the frozen features."""
    score: float
    """Agreement of the structure once aligned, 0..1."""
    mirrored: bool


def find_duplicates(
    grey_NPP: NDArray[np.uint8],
    features_NF: NDArray[np.floating],
    split_N: NDArray[np.str_],
    progress: Callable[[int, int], object] | None = None,
) -> list[DuplicatePair]:
    """Every near-duplicate pair, surest first.

    Args:
        grey_NPP: thumbnails, the whole image squeezed to a square.
        features_NF: unit vectors that see more than brightness: frozen backbone features.
        split_N: split of each image; partners in other splits are looked for on their own, so that
            a burst in one split cannot hide a leak.
        progress: called with (done, total), first of the images whose partners are looked for,
            then of the pairs that are aligned.
    """
    if len(grey_NPP) < 2:
        return []
    bits_N64, mirrored_N64 = hashes(grey_NPP)
    pairs_M2 = candidates(bits_N64, mirrored_N64, features_NF, split_N, progress)
    found = []
    plausible_M2 = plausible(grey_NPP, pairs_M2)
    for done, ((i, j), ways) in enumerate(zip(pairs_M2.tolist(), plausible_M2, strict=True), 1):
        plain = agreement(grey_NPP[i], grey_NPP[j]) if ways[0] else 0.0
        turned = agreement(grey_NPP[i], mirror(grey_NPP[j])) if ways[1] else 0.0
        score, mirrored = max((plain, False), (turned, True), key=lambda way: way[0])
        if score >= MIN_SCORE:
            found.append(
                DuplicatePair(
                    first=i,
                    second=j,
                    hash_distance=min(
                        int((bits_N64[i] != bits_N64[j]).sum()),
                        int((bits_N64[i] != mirrored_N64[j]).sum()),
                    ),
                    cosine=float(features_NF[i] @ features_NF[j]),
                    score=score,
                    mirrored=mirrored,
                )
            )
        if progress is not None:
            progress(done, len(pairs_M2))
    return sorted(found, key=lambda pair: (-pair.score, pair.first, pair.second))


def hashes(grey_NPP: NDArray[np.uint8]) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Perceptual hashes (N, 64) of the images and of their mirror images."""
    from imagehash import phash

    plain, mirrored = [], []
    for grey_PP in grey_NPP:
        image = Image.fromarray(grey_PP)
        plain.append(phash(image).hash.ravel())
        mirrored.append(phash(ImageOps.mirror(image)).hash.ravel())
    return np.stack(plain), np.stack(mirrored)


def candidates(
    bits_N64: NDArray[np.bool_],
    mirrored_N64: NDArray[np.bool_],
    features_NF: NDArray[np.floating],
    split_N: NDArray[np.str_],
    progress: Callable[[int, int], object] | None = None,
) -> NDArray[np.int64]:
    """Pairs (M, 2), i < j, each once: every image with its `NEIGHBOURS` nearest by either signal,
    within its own split and outside. Takes time with the square of N.
    """
    signs = np.where(bits_N64, np.float32(1), np.float32(-1))
    mirrored = np.where(mirrored_N64, np.float32(1), np.float32(-1))
    feats = np.asarray(features_NF, np.float32)
    part_N = np.unique(split_N, return_inverse=True)[1]  # numbers compare faster than names
    found: set[tuple[int, int]] = set()
    block = max(1, _BLOCK_ELEMENTS // len(signs))
    for start in range(0, len(signs), block):
        rows = slice(start, start + block)
        bits = np.maximum(signs[rows] @ signs.T, signs[rows] @ mirrored.T)
        own_split = part_N[rows, None] == part_N[None, :]
        for alike in (bits, feats[rows] @ feats.T):
            alike[np.arange(len(alike)), np.arange(start, start + len(alike))] = -np.inf
            for allowed in (own_split, ~own_split):
                found |= set(_nearest(np.where(allowed, alike, -np.inf), start))
        if progress is not None:
            progress(min(start + block, len(signs)), len(signs))
    return np.array(sorted(found), np.int64).reshape(-1, 2)


def _nearest(alike_BN: NDArray[np.float32], start: int) -> Iterator[tuple[int, int]]:
    """Pairs (lower, higher index) of each row and its nearest columns; -inf counts as absent."""
    k = min(NEIGHBOURS, alike_BN.shape[1])
    columns_BK = np.argpartition(-alike_BN, k - 1, axis=1)[:, :k]
    present_BK = np.isfinite(np.take_along_axis(alike_BN, columns_BK, axis=1))
    for row, place in zip(*np.nonzero(present_BK), strict=True):
        i, j = start + int(row), int(columns_BK[row, place])
        yield min(i, j), max(i, j)


def mirror(grey_PP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """The mirror image, left and right exchanged."""
    return np.ascontiguousarray(grey_PP[:, ::-1])
