"""Verification pairs: fixed by a seed, stored by file name, with easy and with hard negatives.

Letters: N images, D embedding dimensions, P pairs, K neighbours of a row.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from flowerray.calibration import Calibration, fit_calibration
from flowerray.errors import UserError
from flowerray.files import read_json, write_json

KINDS = ("positive", "easy", "hard")
"""Same class; another class at random; another class and close by the given features."""
PAIR_SEED = 0
"""Of the verification pairs: the same for every run, so that runs can be compared."""
PAIRS_PER_KIND = 5000
"""Enough for a standard error of about half a point."""
RANDOM_PAIRS = 100_000
"""Pairs of each sort that calibrate and judge decisions, 100 at a false-match rate of 0.001."""
_ROWS = 256
"""Rows of the similarity matrix held at a time."""


@dataclass(frozen=True)
class Pairs:
    """Pairs of images of one split; no image with itself, no pair twice in either order."""

    index: NDArray[np.int64]
    """(P, 2): positions in the split, the smaller first."""
    kind: NDArray[np.int64]
    """(P,): position in `KINDS`."""

    @property
    def same(self) -> NDArray[np.bool_]:
        """(P,): True for the pairs of one class."""
        return self.kind == 0


def make_pairs(
    labels_N: ArrayLike,
    seed: int,
    num_per_kind: int = PAIRS_PER_KIND,
    hard_features_ND: ArrayLike | None = None,
) -> Pairs:
    """Draws pairs of each kind, a pure function of the arguments.

    A pair's first image is drawn evenly, its second evenly among those that fit it. Hard negatives
    join an image and its nearest neighbours of another class, nearest first; so that they favour
    no method, give features of the frozen backbone. Fewer pairs of a kind come back where there
    are no more.

    Args:
        hard_features_ND: features by whose cosine hard negatives are chosen; None: no hard
            negatives.

    Raises:
        UserError: no two images of one class, or no two classes.
    """
    labels = np.asarray(labels_N)
    _, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    _refuse_no_pairs(counts)
    rng = np.random.default_rng(seed)
    hard = np.empty(0, np.int64)
    if hard_features_ND is not None:
        hard = _hard(np.asarray(hard_features_ND), codes, num_per_kind, rng)
    positive = _draw(codes, counts, num_per_kind, rng, same=True, taken=np.empty(0, np.int64))
    easy = _draw(codes, counts, num_per_kind, rng, same=False, taken=hard)
    flat_P = np.concatenate([positive, easy, hard])
    kind_P = np.repeat(np.arange(3), [len(positive), len(easy), len(hard)])
    return Pairs(np.stack([flat_P // len(codes), flat_P % len(codes)], axis=1), kind_P)


def _refuse_no_pairs(counts: NDArray) -> None:
    if len(counts) < 2 or counts.max(initial=0) < 2:
        raise UserError(
            f"No verification pairs can be made of {counts.sum()} images in {len(counts)} classes: "
            "at least two classes, one of them with two images, are needed."
        )


def _flatten(first: NDArray, second: NDArray, size: int) -> NDArray[np.int64]:
    """One number a pair, the smaller position first: (a, b) and (b, a) are one pair."""
    return np.minimum(first, second) * size + np.maximum(first, second)


def _draw(
    codes_N: NDArray,
    counts: NDArray,
    number: int,
    rng: np.random.Generator,
    same: bool,
    taken: NDArray,
) -> NDArray[np.int64]:
    """`number` different pairs of the same class or of two classes, none of them in `taken`."""
    size = len(codes_N)
    positives = int((counts * (counts - 1) // 2).sum())
    total = positives if same else size * (size - 1) // 2 - positives - len(taken)
    order = np.argsort(codes_N, kind="stable")  # each class is one stretch of `order`
    starts = np.cumsum(counts) - counts
    partners_N = (counts if same else size - counts)[codes_N] - int(same)
    place_N = np.empty(size, np.int64)
    place_N[order] = np.arange(size) - starts[codes_N[order]]
    if total <= 4 * number:  # list them all instead of waiting to hit the last ones
        parts = []
        for start, end in zip(starts, starts + counts, strict=True):
            members = order[start:end]
            if same:
                first, second = (members[side] for side in np.triu_indices(len(members), 1))
            else:
                first, second = (side.ravel() for side in np.meshgrid(members, order[end:]))
            parts.append(_flatten(first, second, size))
        every = np.setdiff1d(np.concatenate(parts), taken)
        return np.sort(rng.permutation(every)[:number])
    firsts = np.flatnonzero(partners_N > 0)
    found = np.empty(0, np.int64)
    while len(found) < number:
        first = rng.choice(firsts, size=2 * number)
        draw = rng.integers(partners_N[first])
        if same:
            draw += draw >= place_N[first]  # step over the image itself
            second = order[starts[codes_N[first]] + draw]
        else:
            draw += np.where(draw >= starts[codes_N[first]], counts[codes_N[first]], 0)
            second = order[draw]
        drawn = _flatten(first, second, size)
        drawn = drawn[~np.isin(drawn, taken) & ~np.isin(drawn, found)]
        _, at = np.unique(drawn, return_index=True)
        found = np.concatenate([found, drawn[np.sort(at)]])
    return np.sort(found[:number])


def _hard(
    features_ND: NDArray, codes_N: NDArray, number: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """Each image with its nearest image of another class, then its second nearest, and so on."""
    size = len(codes_N)
    if features_ND.ndim != 2 or len(features_ND) != size or not np.isfinite(features_ND).all():
        raise UserError(
            f"Features of shape {features_ND.shape} do not give hard negatives for {size} images: "
            "one row of finite numbers an image is needed."
        )
    features = torch.nn.functional.normalize(
        torch.from_numpy(features_ND.astype(np.float64)), dim=1
    )
    codes = torch.from_numpy(codes_N.astype(np.int64))
    others = size - int(np.bincount(codes_N).max())
    k = min(-(-2 * number // size), others)  # a pair is found from both of its ends at most
    neighbours = []
    for start in range(0, size, _ROWS):
        cosine_BN = features[start : start + _ROWS] @ features.T
        cosine_BN[codes[start : start + _ROWS, None] == codes] = -torch.inf
        neighbours.append(torch.topk(cosine_BN, k, dim=1).indices.numpy())
    neighbour_NK = np.concatenate(neighbours)
    found = np.empty(0, np.int64)
    for column in neighbour_NK.T:
        pairs = np.setdiff1d(_flatten(np.arange(size), column, size), found)
        found = np.concatenate([found, rng.permutation(pairs)])
    return np.sort(found[:number])


def save_pairs(path: Path, splits: Mapping[str, tuple[Pairs, Sequence[str]]], seed: int) -> None:
    """Writes the pairs of several splits, by file name, atomically.

    Args:
        splits: split -> its pairs and the names of its images relative to the data's root, in
            order.
    """
    value: dict[str, object] = {"seed": seed}
    for split, (pairs, names) in splits.items():
        used, position = np.unique(pairs.index, return_inverse=True)
        position = position.reshape(pairs.index.shape)
        kinds = {kind: position[pairs.kind == i].tolist() for i, kind in enumerate(KINDS)}
        value[split] = {"files": [names[i] for i in used], **kinds}
    write_json(path, value, indent=None)


def load_pairs(path: Path, split: str, names: Sequence[str]) -> Pairs | None:
    """The pairs of one split, as positions in `names`; None where the file has none for that split.

    Args:
        names: the split's images now, relative to the data's root, in order.

    Raises:
        UserError: a file that is missing or not pairs, or an image that is not in `names`.
    """
    advice = "for verification pairs train again, or restore the file"
    stored = read_json(path, advice=advice).get(split)
    if stored is None:
        return None
    try:
        lists = [np.array(stored[kind], np.int64).reshape(-1, 2) for kind in KINDS]
        files = list(stored["files"])
        local_P2 = np.concatenate(lists)
        if len(local_P2) and not 0 <= local_P2.min() <= local_P2.max() < len(files):
            raise ValueError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} cannot be read as verification pairs: train again or restore the file."
        ) from error
    position = {name: i for i, name in enumerate(names)}
    missing = [name for name in files if name not in position]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(files)} images in {path} are not in split {split} "
            f"(the first is {missing[0]}): give the data that the run was trained on."
        )
    index_P2 = np.array([position[name] for name in files], np.int64)[local_P2]
    return Pairs(np.sort(index_P2, axis=1), np.repeat(np.arange(3), [len(part) for part in lists]))


def pair_cosines(emb_ND: ArrayLike, pairs: Pairs) -> NDArray[np.float64]:
    """Cosine of each pair's two embeddings, in -1..1; 0 where one of them is a zero vector.

    Raises:
        UserError: an embedding that is not finite, or fewer embeddings than the pairs speak of.
    """
    emb = np.asarray(emb_ND, np.float64)
    if emb.ndim != 2 or not np.isfinite(emb).all() or pairs.index.max(initial=-1) >= len(emb):
        raise UserError(
            f"Embeddings of shape {emb.shape} do not fit the verification pairs: "
            "one row of finite numbers is needed for each image of the split."
        )
    norm_N1 = np.linalg.norm(emb, axis=1, keepdims=True)
    unit_ND = emb / np.where(norm_N1 > 0, norm_N1, 1.0)
    first_PD, second_PD = unit_ND[pairs.index[:, 0]], unit_ND[pairs.index[:, 1]]
    return np.einsum("pd,pd->p", first_PD, second_PD).clip(-1.0, 1.0)


def pair_metrics(
    emb_ND: ArrayLike, pairs: Pairs, threshold: float | None = None
) -> dict[str, float]:
    """How well the cosine tells pairs of one class from others. Nothing is fitted here.

    Args:
        threshold: cosine from which two images count as the same class, fitted on val beforehand.

    Returns:
        `pair_auc` and `pair_eer` over all pairs, `pair_auc_hard` against the hard negatives alone
        (where there are any), and, given a threshold, `pair_accuracy`: the mean of the accuracies
        on same and on different pairs, so that the number of negatives does not move it.

    Raises:
        UserError: as `pair_cosines`.
    """
    from sklearn.metrics import auc, roc_curve  # takes a second to import

    cosine_P, same_P = pair_cosines(emb_ND, pairs), pairs.same
    false_rate, true_rate, _ = roc_curve(same_P, cosine_P, drop_intermediate=False)
    metrics = {
        "pair_auc": float(auc(false_rate, true_rate)),
        "pair_eer": _eer(false_rate, true_rate),
    }
    if (pairs.kind == 2).any():
        chosen = pairs.kind != 1
        false_rate, true_rate, _ = roc_curve(same_P[chosen], cosine_P[chosen])
        metrics["pair_auc_hard"] = float(auc(false_rate, true_rate))
    if threshold is not None:
        says_same = cosine_P >= threshold
        metrics["pair_accuracy"] = float(
            (says_same[same_P].mean() + (~says_same[~same_P]).mean()) / 2
        )
    return metrics


def _eer(false_rate: NDArray, true_rate: NDArray) -> float:
    """Where the ROC curve, joined by straight lines, has as many false alarms as misses."""
    gap = false_rate - (1 - true_rate)  # rises from -1 to 1 along the curve
    at = int(np.argmax(gap >= 0))
    share = -gap[at - 1] / (gap[at] - gap[at - 1])
    return float(false_rate[at - 1] + share * (false_rate[at] - false_rate[at - 1]))


def random_pairs(labels_N: ArrayLike) -> Pairs:
    """Same and different pairs of classes drawn evenly, whatever number of images they have; small
    sets give some pairs several times.

    The pairs of `make_pairs` with features are no such draw: the easy ones lack the hard ones,
    which hold most of what a high threshold lets pass.

    Raises:
        UserError: as `make_pairs`.
    """
    _, codes, counts = np.unique(np.asarray(labels_N), return_inverse=True, return_counts=True)
    _refuse_no_pairs(counts)
    rng, size = np.random.default_rng(PAIR_SEED), len(codes)
    order, starts = np.argsort(codes, kind="stable"), np.cumsum(counts) - counts
    positives = int((counts * (counts - 1) // 2).sum())
    drawn = []
    for same, total in ((True, positives), (False, size * (size - 1) // 2 - positives)):
        number = min(RANDOM_PAIRS, 10 * total)
        if same:
            first = second = rng.choice(np.flatnonzero(counts > 1), number)
            one, two = rng.integers(counts[first]), rng.integers(counts[first] - 1)
            two += two >= one
        else:
            first = rng.integers(len(counts), size=number)
            second = rng.integers(len(counts) - 1, size=number)
            second += second >= first
            one, two = rng.integers(counts[first]), rng.integers(counts[second])
        drawn.append(np.stack([order[starts[first] + one], order[starts[second] + two]], axis=1))
    kind_P = np.repeat([0, 1], [len(part) for part in drawn])
    return Pairs(np.sort(np.concatenate(drawn), axis=1), kind_P)


def calibrate(emb_ND: ArrayLike, labels_N: ArrayLike) -> Calibration:
    """`fit_calibration` on random pairs of the embeddings of val."""
    pairs = random_pairs(labels_N)
    return fit_calibration(pair_cosines(emb_ND, pairs), pairs.same, pairs.index, labels_N)


def fit_threshold(cosine_P: ArrayLike, same_P: ArrayLike) -> float:
    """The cosine with the best mean of the accuracies on same and on different pairs.

    Only for val pairs: what it is fitted on cannot judge it. It lies
    midway between the two neighbouring scores that it parts; of equally good ones, the highest.

    Raises:
        UserError: no pair of one of the two sorts, or a score that is not finite.
    """
    from sklearn.metrics import roc_curve

    cosine, same = np.asarray(cosine_P, np.float64), np.asarray(same_P, bool)
    if same.all() or not same.any() or not np.isfinite(cosine).all():
        raise UserError(
            "A threshold needs finite similarities of both same and different pairs: "
            "use a validation split with at least two classes and two images in one of them."
        )
    false_rate, true_rate, cuts = roc_curve(same, cosine, drop_intermediate=False)
    best = int(np.argmax(true_rate - false_rate))
    # cuts[0] is infinite: above every score.
    above = cuts[best]
    below = cuts[best + 1] if best + 1 < len(cuts) else cosine.min()
    if best == 0:
        return float(np.nextafter(cosine.max(), np.inf))
    return float((above + below) / 2) if below < above else float(above)
