"""Near-duplicates: the same photograph twice, recompressed, resized, stretched, in other light,
watermarked, mirrored, turned, cropped or framed.

Two photographs that have local features in common are candidates; each is then laid over its
partner (align.py) and counts only where the structure agrees.

Letters: N images, B of a block, M pairs, W words, T words of a keypoint.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from flowerray.explore.align import Keypoints, align

CANDIDATES = 8
"""Partners of an image that are looked at: so many within its split and again outside."""
MIN_SCORE = 0.65
"""Agreement of the structure from which a pair is a near-duplicate, -1..1."""
_WORD_BYTES = 3
"""Of a signature; all ten parts of it are words."""
_COMMON = 200
"""A word that more images have tells nothing."""
_FEWEST = 3
"""Words that no third image has, or as much in more common ones, make a candidate; copies have the
worth of five and more.
"""
_WHOLE = 32
"""Words that the thumbnail is worth."""
_BLOCK = 512


@dataclass(frozen=True)
class DuplicatePair:
    """Two images that show the same photograph."""

    first: int
    """Position in the set; below `second`."""
    second: int
    score: float
    """Agreement of the structure once aligned, 0..1."""
    mirrored: bool
    turned: float
    """Degrees counter-clockwise, -180..180."""
    area: float
    """Of the smaller part of the motif as a share of the larger, 0..1; 1 = the same framing."""

    def change(self) -> str:
        """What makes the second one another: "mirrored, turned by 90°, cropped to 64 %"."""
        turned, area = round(abs(self.turned)), round(100 * self.area)
        parts = ["mirrored"] * self.mirrored + [f"turned by {turned}°"] * (turned > 1)
        return ", ".join(parts + [f"cropped to {area} %"] * (area < 98)) or "same framing"


def find_duplicates(
    keypoints_N: Sequence[Keypoints],
    grey_NPP: NDArray[np.uint8],
    split_N: NDArray[np.str_],
    progress: Callable[[int, int], object] | None = None,
) -> list[DuplicatePair]:
    """Every near-duplicate pair, surest first.

    Args:
        grey_NPP: thumbnails, the whole image squeezed to a square.
        split_N: split of each image; partners in other splits are looked for on their own, so that
            a burst in one split cannot hide a leak.
        progress: called with (done, total) of the candidates.
    """
    found: dict[tuple[int, int], DuplicatePair] = {}
    pairs_M3 = candidates(keypoints_N, grey_NPP, split_N)
    for done, (i, j, mirrored) in enumerate(pairs_M3.tolist(), 1):
        one, two = keypoints_N[i], keypoints_N[j]
        aligned = align(one, two, grey_NPP[i], grey_NPP[j], bool(mirrored))
        if aligned is not None and aligned.score >= MIN_SCORE:
            area = min(aligned.area, 1 / aligned.area)
            pair = DuplicatePair(i, j, aligned.score, bool(mirrored), aligned.turned, area)
            found[i, j] = max(pair, found.get((i, j), pair), key=lambda pair: pair.score)
        if progress is not None:
            progress(done, len(pairs_M3))
    return sorted(found.values(), key=lambda pair: (-pair.score, pair.first, pair.second))


def candidates(
    keypoints_N: Sequence[Keypoints], grey_NPP: NDArray[np.uint8], split_N: NDArray[np.str_]
) -> NDArray[np.int64]:
    """Pairs (M, 3): i < j, and whether j is to be mirrored.

    Every image with the `CANDIDATES` that share most words with it, rare ones counting more (the
    inverse document frequency of text retrieval), within its own split and outside. Words are parts
    of the signatures of keypoints, and the thumbnail as a whole. Since common words are left out,
    time and memory grow with the number of images, not with its square.
    """
    from scipy.sparse import csr_matrix

    num = len(keypoints_N)
    plain = [
        np.append(
            _words(k.plain_KB), (1 << 40) + crc32(grey_PP.tobytes()) * _WHOLE + np.arange(_WHOLE)
        )
        for k, grey_PP in zip(keypoints_N, grey_NPP, strict=True)
    ]
    mirrored = [_words(k.mirrored_KB) for k in keypoints_N]
    known_W, number = np.unique(np.concatenate(plain), return_inverse=True)

    def table(words_N: list[NDArray[np.int64]], column: NDArray[np.int64]) -> csr_matrix:
        row = np.repeat(np.arange(num), [len(words) for words in words_N])
        inside = column >= 0
        ones = np.ones(inside.sum(), np.float32)
        found = csr_matrix((ones, (row[inside], column[inside])), (num, len(known_W)))
        found.sum_duplicates()
        found.data[:] = 1
        return found

    every = np.concatenate(mirrored)
    place = np.searchsorted(known_W, every).clip(max=len(known_W) - 1)
    plain_NW = table(plain, number)
    mirrored_WN = table(mirrored, np.where(known_W[place] == every, place, -1)).T.tocsr()
    images_W = np.bincount(plain_NW.indices, minlength=len(known_W))
    rarity_W = np.where(images_W <= max(_COMMON, 2), np.log((num + 1) / images_W), 0)
    weighted_NW = plain_NW.multiply(rarity_W.astype(np.float32)).tocsr()
    weighted_NW.eliminate_zeros()
    plain_WN = plain_NW.T.tocsr()
    part_N = np.unique(split_N, return_inverse=True)[1]
    least = _FEWEST * np.log((num + 1) / 2) - 1e-3
    best = [np.empty((0, 3), np.int64)]
    for start in range(0, num, _BLOCK):
        rows = weighted_NW[start : start + _BLOCK]
        as_is, turned = rows @ plain_WN, rows @ mirrored_WN
        votes = as_is.maximum(turned).tocoo()
        row, column = votes.row + start, votes.col
        other = np.flatnonzero((row != column) & (votes.data >= least))
        row, column, count = row[other], column[other], votes.data[other]
        across = part_N[row] != part_N[column]
        order = np.lexsort((column, -count, across, row))
        row, column, across = row[order], column[order], across[order]
        group = 2 * row.astype(np.int64) + across
        rank = np.arange(len(group)) - np.searchsorted(group, group)
        row, column = row[rank < CANDIDATES], column[rank < CANDIDATES]
        if not len(row):
            continue
        way = np.asarray(turned[row - start, column] > as_is[row - start, column]).ravel()
        best.append(np.stack([np.minimum(row, column), np.maximum(row, column), way], axis=1))
    return np.unique(np.concatenate(best), axis=0)


def _words(signature_KB: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Parts of signatures as numbers that tell which part they are."""
    num, total = signature_KB.shape
    parts = total // _WORD_BYTES
    bytes_KTB = signature_KB[:, : parts * _WORD_BYTES].reshape(num, parts, _WORD_BYTES)
    value_KT = bytes_KTB.astype(np.int64) @ (256 ** np.arange(_WORD_BYTES))
    return np.asarray(value_KT + (np.arange(parts) << 8 * _WORD_BYTES)).ravel()
