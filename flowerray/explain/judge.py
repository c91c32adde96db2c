"""Methods compared on many images: one is chosen on val images, then all are scored once.

Letters: N images, C channels, H W S pixels, D embedding dimensions.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowerray.data.store import floats
from flowerray.errors import UserError
from flowerray.explain import baselines
from flowerray.explain.baselines import Saliency
from flowerray.explain.cam import CAMS, HEAD_METHODS, Explainer, cam_maps, upsample
from flowerray.explain.faithfulness import METRICS, FaithfulnessConfig, Scores, faithfulness
from flowerray.explain.layers import Layer, Norm, capture
from flowerray.explain.localise import energy, iou, pointing
from flowerray.model.embedder import Embedder
from flowerray.statistics import Interval, mean_interval, paired_difference

LOCALISATION = ("energy", "pointing", "iou")
LOWER_IS_BETTER = ("deletion", "road_lerf")
SIGMAS = (0.1, 0.15, 0.2, 0.25, 0.3)
"""Centre Gaussians to choose from, standard deviation as a share of the side: the baseline is tuned
on the same images as the method."""
FINEST = 1024
"""Cells of the finest layer that is chosen from: below, layers see edges and little else."""
_BATCH = 16

Advance = Callable[[int], object]


@dataclass(frozen=True)
class Subjects:
    """Images to explain, each with what it is compared to."""

    images_NCHW: Tensor
    """uint8."""
    reference_ND: NDArray[np.float32]
    """Unit norm: the prototypes of their classes."""
    masks_NHW: NDArray[np.bool_] | None
    paths: tuple[Path, ...]
    labels_N: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.images_NCHW)

    def batch(self, start: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Up to 16 images as floats in [0,1], and their references."""
        return self.take(np.arange(start, min(start + _BATCH, len(self))), device)

    def take(self, index_B: NDArray[np.int64], device: torch.device) -> tuple[Tensor, Tensor]:
        """Images as floats in [0,1], and their references."""
        images = floats(self.images_NCHW[torch.from_numpy(index_B)], device)
        return images, torch.from_numpy(self.reference_ND[index_B]).to(device)

    def spread(self, count: int) -> NDArray[np.int64]:
        """Up to so many images, of each class in turn."""
        turn_N = np.zeros(len(self), np.int64)
        for label in np.unique(self.labels_N):
            own = self.labels_N == label
            turn_N[own] = np.arange(own.sum())
        return np.lexsort((self.labels_N, turn_N))[:count]


def options(layers: Sequence[Layer], additive: bool, method: str | None) -> list[Explainer]:
    """What is chosen from: each method at each layer, with the length free and held.

    EigenCAM takes no part: it ignores the reference and is a baseline.
    """
    found = []
    if additive:
        found = [Explainer(name) for name in HEAD_METHODS]  # type: ignore[arg-type]
    norms: tuple[Norm, ...] = ("free", "held")
    for layer in layers:
        for name in CAMS:
            if name != "eigencam" and layer.grid[0] * layer.grid[1] <= FINEST:
                found += [Explainer(name, layer.name, norm) for norm in norms]
    if method is not None:
        found = [e for e in found if e.method == method]
        if not found and method == "eigencam":
            found = [Explainer("eigencam", layer.name) for layer in layers]
    return found


def choose(
    embedder: Embedder,
    subjects: Subjects,
    choices: Sequence[Explainer],
    config: FaithfulnessConfig,
    advance: Advance | None = None,
) -> list[tuple[Explainer, float]]:
    """The choices and their mean scores on these images, best first.

    With masks the score of an image is the mean of energy in mask and pointing game; without them
    it is insertion minus deletion.

    Raises:
        UserError: nothing to choose from.
    """
    if not choices:
        raise UserError("There is no layer that this method can be used at: choose another one.")
    device, masks_NHW = embedder.projection.weight.device, subjects.masks_NHW
    scores: dict[Explainer, list[float]] = {choice: [] for choice in choices}
    for start in range(0, len(subjects), _BATCH):
        images, references = subjects.batch(start, device)
        for explainer, maps in _many(embedder, images, references, choices):
            large = upsample(maps, images.shape[-1])
            for n, (image, reference, map_HW) in enumerate(
                zip(images, references, large, strict=True), start
            ):
                if masks_NHW is not None:
                    worth = (energy(map_HW, masks_NHW[n]) + pointing(map_HW, masks_NHW[n])) / 2
                else:
                    (score,) = faithfulness(
                        embedder, image, reference, map_HW[None], config, road=False
                    )
                    worth = score.insertion - score.deletion
                scores[explainer].append(worth)
        if advance is not None:
            advance(len(images))
    ranked = [(explainer, float(np.mean(values))) for explainer, values in scores.items()]
    return sorted(ranked, key=lambda choice: -choice[1])


def choose_gaussian(embedder: Embedder, subjects: Subjects) -> float:
    """The sigma whose centre Gaussian has the best score on these images (which need masks)."""
    assert subjects.masks_NHW is not None
    image, reference = subjects.batch(0, embedder.projection.weight.device)
    scores = []
    for sigma in SIGMAS:
        map_HW = baselines.centre_gaussian(sigma)(embedder, image[:1], reference[:1])[0]
        scores.append(np.mean([energy(map_HW, mask) for mask in subjects.masks_NHW]))
    return SIGMAS[int(np.argmax(scores))]


def judge(
    embedder: Embedder,
    subjects: Subjects,
    methods: Mapping[str, Saliency],
    config: FaithfulnessConfig,
    advance: Advance | None = None,
) -> dict[str, dict[str, NDArray[np.float64]]]:
    """Every method's score on every image: method -> metric -> (N,), or fewer for the metrics of
    faithfulness, which take `config.images` images at even distances.
    """
    device = embedder.projection.weight.device
    masks_NHW = subjects.masks_NHW
    metrics = (*(LOCALISATION if masks_NHW is not None else ()), *METRICS)
    found: dict[str, dict[str, list[float]]] = {
        name: {metric: [] for metric in metrics} for name in methods
    }
    tested = set(faithful_positions(len(subjects), config.images).tolist())
    for start in range(0, len(subjects), _BATCH):
        images, reference = subjects.batch(start, device)
        size = images.shape[-1]
        maps = np.stack(
            [upsample(method(embedder, images, reference), size) for method in methods.values()]
        )
        for i in range(len(images)):
            scores: Sequence[Scores | None] = [None] * len(methods)
            if start + i in tested:
                scores = faithfulness(embedder, images[i], reference[i], maps[:, i], config)
            for name, map_HW, score in zip(methods, maps[:, i], scores, strict=True):
                row = {} if score is None else score._asdict()
                if masks_NHW is not None:
                    mask = masks_NHW[start + i]
                    row["energy"], row["pointing"] = energy(map_HW, mask), pointing(map_HW, mask)
                    row["iou"] = iou(map_HW, mask, config.seed)
                for metric, value in row.items():
                    found[name][metric].append(value)
            if advance is not None:
                advance(1)
    return {
        name: {metric: np.asarray(values) for metric, values in rows.items()}
        for name, rows in found.items()
    }


def faithful_positions(count: int, images: int) -> NDArray[np.int64]:
    """Which of so many subjects the metrics of faithfulness take: up to `images`, at even
    distances.
    """
    return np.linspace(0, count - 1, min(images, count)).round().astype(np.int64)


def intervals(scores: dict[str, dict[str, NDArray]]) -> dict[str, dict[str, Interval]]:
    """Means with 95 % intervals over images."""
    return {
        name: {metric: mean_interval(values) for metric, values in rows.items()}
        for name, rows in scores.items()
    }


def gains(
    first: dict[str, NDArray], others: dict[str, dict[str, NDArray]]
) -> dict[str, dict[str, Interval]]:
    """How much better the first is than each other one on the same images, so that above 0 is
    better for every metric.
    """
    found: dict[str, dict[str, Interval]] = {}
    for name, rows in others.items():
        found[name] = {}
        for metric, values in rows.items():
            pair = (first[metric], values)
            ordered = pair[::-1] if metric in LOWER_IS_BETTER else pair
            found[name][metric] = paired_difference(*ordered)
    return found


def _many(
    embedder: Embedder, images: Tensor, reference: Tensor, choices: Sequence[Explainer]
) -> list[tuple[Explainer, NDArray[np.float32]]]:
    """Maps of every choice: layers share a pass, methods share a layer."""
    found = [(e, e(embedder, images, reference)) for e in choices if e.method in HEAD_METHODS]
    for norm in ("free", "held"):
        own = [e for e in choices if e.method not in HEAD_METHODS and e.norm == norm]
        names = list(dict.fromkeys(e.layer for e in own))
        caught = dict(zip(names, capture(embedder, images, names, reference, norm), strict=True))
        for explainer in own:
            captured = caught[explainer.layer]
            assert captured is not None, "only layers that `find_layers` gave are chosen from"
            found.append((explainer, cam_maps(explainer.method, captured)))
    return found
