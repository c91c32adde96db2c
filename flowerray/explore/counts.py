"""Counts of a data set: classes, splits, what two splits share, colours by class.

Letters: N images, C classes.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flowerray.data.dataset import Dataset
from flowerray.explore.scan import COLOUR_SIDE, Survey

_MIDDLE = slice(COLOUR_SIDE // 4, -COLOUR_SIDE // 4)


def imbalance(counts_C: ArrayLike) -> dict[str, float]:
    """How unequal the classes are, over the classes that have an image (one at the least).

    Returns:
        `classes`, `smallest` and `largest` (images), `ratio` (largest / smallest; 1 = balanced),
        `gini` (Gini's coefficient: 0 = balanced, towards 1 = all images in one class),
        `effective_classes` (exp of the entropy of the class shares: as many equal classes would be
        as uncertain).
    """
    counts = np.asarray(counts_C, np.float64)
    counts = np.sort(counts[counts > 0])
    assert len(counts), "a set without images"
    share = counts / counts.sum()
    # The mean difference of two classes by the sorted form: sum (2i - C - 1) x_i / (C sum x).
    rank = 2 * np.arange(1, len(counts) + 1) - len(counts) - 1
    return {
        "classes": len(counts),
        "smallest": int(counts[0]),
        "largest": int(counts[-1]),
        "ratio": float(counts[-1] / counts[0]),
        "gini": abs(float((rank * share).sum() / len(counts))),  # never -0.0
        "effective_classes": float(np.exp(-(share * np.log(share)).sum())),
    }


def split_table(dataset: Dataset) -> list[dict[str, Any]]:
    """Each split that has an image, in the order train, val, test: `name`, `images`, `classes`, and
    the images of its `smallest` and `largest` class.
    """
    rows = []
    for name in ("train", "val", "test"):
        if len(dataset.splits.get(name, ())):
            sizes = imbalance(np.bincount(dataset.split_labels(name)))
            images = len(dataset.splits[name])
            kept = {key: sizes[key] for key in ("classes", "smallest", "largest")}
            rows.append({"name": name, "images": images, **kept})
    return rows


def overlaps(survey: Survey) -> list[dict[str, Any]]:
    """What each two splits, `first` and `second`, have in common: `files` that are listed in both,
    `contents` (files of the second whose bytes are those of a file of the first; both must be 0),
    and `classes`.
    """
    dataset, found = survey.dataset, []
    for one, two in combinations([row["name"] for row in split_table(dataset)], 2):
        first, second = dataset.splits[one], dataset.splits[two]
        known = {survey.digests[k] for k in first}
        found.append({
            "first": one,
            "second": two,
            "files": len(np.intersect1d(first, second)),
            "contents": sum(survey.digests[k] in known for k in second),
            "classes": len(np.intersect1d(dataset.labels_N[first], dataset.labels_N[second])),
        })  # fmt: skip
    return found


def sizes(survey: Survey) -> dict[str, Any]:
    """Spread of widths, heights and aspect ratios, and the most frequent sizes.

    Returns:
        `width`, `height`, `shorter side` (pixels) and `aspect` (width / height), each a list of
        minimum, 5th percentile, median, 95th percentile and maximum; `most_frequent`: up to 3 pairs
        of "W x H" and a count.
    """
    width_N, height_N = survey.size_N2.T
    spread = {
        "width": width_N,
        "height": height_N,
        "shorter side": survey.size_N2.min(axis=1),
        "aspect": width_N / height_N,
    }
    result: dict[str, Any] = {
        name: [float(v) for v in np.percentile(values, [0, 5, 50, 95, 100])]
        for name, values in spread.items()
    }
    count = Counter(map(tuple, survey.size_N2.tolist()))
    result["most_frequent"] = [[f"{w} x {h}", n] for (w, h), n in count.most_common(3)]
    return result


@dataclass(frozen=True)
class ClassRow:
    """One class in numbers: means over its images."""

    name: str
    images: int
    brightness: float
    contrast: float
    saturation: float
    hue: float
    """Circular mean of the images' dominant hues, degrees; NaN where all are grey."""
    colour: tuple[float, float, float]
    """Mean RGB of the middle of the images, half as wide and high as they are; 0..1."""


def class_table(survey: Survey) -> list[ClassRow]:
    """Each class that has a readable image, in the order of its label."""
    rows = []
    for c in np.unique(survey.dataset.labels_N):
        own = survey.dataset.labels_N == c
        middle = survey.colour_NSS3[own][:, _MIDDLE, _MIDDLE]
        r, g, b = (middle.mean(axis=(0, 1, 2)) / 255).tolist()
        rows.append(
            ClassRow(
                name=survey.dataset.classes[c],
                images=int(own.sum()),
                brightness=float(survey.brightness_N[own].mean()),
                contrast=float(survey.contrast_N[own].mean()),
                saturation=float(survey.saturation_N[own].mean()),
                hue=mean_hue(survey.hue_N[own]),
                colour=(r, g, b),
            )
        )
    return rows


def mean_hue(hue_N: NDArray[np.float64]) -> float:
    """Circular mean of angles in degrees, without the NaN ones; NaN where none is left."""
    known = np.deg2rad(hue_N[~np.isnan(hue_N)])
    if not len(known):
        return float("nan")
    return float(np.rad2deg(np.angle(np.exp(1j * known).mean())) % 360)


def between_classes(values_N: ArrayLike, labels_N: ArrayLike) -> float:
    """Share of a value's variance that lies between the classes, 0..1, free of the bias that few
    images a class bring (epsilon squared, Kelley 1935); NaN where it is not defined.

    A high share for brightness alone is a warning: a model can tell classes by the light.
    """
    values, labels = np.asarray(values_N, np.float64), np.asarray(labels_N)
    names, group = np.unique(labels, return_inverse=True)
    total = ((values - values.mean()) ** 2).sum()
    if total == 0 or not 1 < len(names) < len(values):
        return float("nan")
    mean_C = np.bincount(group, weights=values) / np.bincount(group)
    within = ((values - mean_C[group]) ** 2).sum() / (len(values) - len(names))
    return max(0.0, float(1 - within / (total / (len(values) - 1))))


def counts_by_class(labels_N: NDArray[np.int64], classes: Sequence[str]) -> dict[str, int]:
    """Class -> images, the largest first, equal ones by name."""
    count = np.bincount(labels_N, minlength=len(classes))
    order = sorted(range(len(classes)), key=lambda c: (-count[c], classes[c]))
    return {classes[c]: int(count[c]) for c in order}
