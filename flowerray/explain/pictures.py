"""The pictures of `flowerray explain RUN`: scores, maps of images, two models side by side."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from flowerray.explain.baselines import Saliency
from flowerray.explain.cam import Explainer, upsample
from flowerray.explain.draw import draw_scores, draw_sheet
from flowerray.explain.judge import Subjects, faithful_positions, intervals
from flowerray.opening import Model
from flowerray.statistics import Interval

LABELS = {
    "energy": "energy in mask (higher)",
    "pointing": "pointing game (higher)",
    "iou": "IoU at mask area (higher)",
    "deletion": "deletion (lower)",
    "insertion": "insertion (higher)",
    "road_morf": "ROAD drop, most relevant (higher)",
    "road_lerf": "ROAD drop, least relevant (lower)",
}


@dataclass(frozen=True)
class Judged:
    """One model's choice, its maps and their scores."""

    model: Model
    explainer: Explainer
    subjects: Subjects
    methods: Mapping[str, Saliency]
    """"chosen", the exact decomposition where there is one, the baselines."""
    scores: dict[str, dict[str, NDArray]]
    """Method -> metric -> a value an image."""
    result: dict[str, Any]
    """Its part of faithfulness.json."""

    @cached_property
    def table(self) -> dict[str, dict[str, Interval]]:
        """The means of `scores`."""
        return intervals(self.scores)


def scores_chart(judged: Judged, title: str, out_png: Path) -> None:
    """Every metric of every method."""
    labels = {metric: LABELS[metric] for metric in judged.scores["chosen"]}
    table = {_heading(judged, name): rows for name, rows in judged.table.items()}
    draw_scores(f"{title}, mean and 95 % interval", table, labels, out_png)


def maps_sheet(judged: Judged, out_png: Path, title: str, count: int = 9) -> None:
    """Best, middle and worst images by energy in mask (by insertion without masks)."""
    key, places, rows = _shown(judged, count)
    columns = {_heading(judged, n): _maps(judged, m, rows) for n, m in judged.methods.items()}
    captions = {
        _heading(judged, n): [f"{key} {judged.scores[n][key][i]:.2f}" for i in places]
        for n in judged.methods
    }
    title = f"{title}: best, middle and worst {key} of the chosen map; each map on its own scale"
    _sheet(judged.subjects, rows, columns, captions, out_png, title)


def beside_sheet(first: Judged, second: Judged, out_png: Path, count: int = 9) -> None:
    """The chosen and the exact map of both models, on images spread over the first one's scores."""
    key, places, rows = _shown(first, count)
    columns, captions = {}, {}
    for place, judged in (("RUN", first), ("beside", second)):
        for name in ("chosen", "decomposition"):
            if name in judged.methods:
                heading = f"{place}: {_heading(judged, name)}"
                columns[heading] = _maps(judged, judged.methods[name], rows)
                captions[heading] = [f"{key} {judged.scores[name][key][i]:.2f}" for i in places]
    names = [Path(judged.model.name).name for judged in (first, second)]
    title = f"RUN = {names[0]}, beside = {names[1]}; each map on its own scale"
    _sheet(first.subjects, rows, columns, captions, out_png, title)


def _sheet(
    subjects: Subjects,
    rows: NDArray[np.int64],
    columns: dict[str, NDArray[np.float32]],
    captions: dict[str, list[str]],
    out_png: Path,
    title: str,
) -> None:
    images = subjects.images_NCHW[torch.from_numpy(rows)].permute(0, 2, 3, 1).numpy()
    masks = None if subjects.masks_NHW is None else subjects.masks_NHW[rows]
    names = [subjects.paths[i].name for i in rows]
    draw_sheet(title, images, masks, columns, captions, names, out_png)


def _maps(judged: Judged, method: Saliency, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    device = judged.model.embedder.projection.weight.device
    subjects = judged.subjects
    picked = replace(
        subjects,
        images_NCHW=subjects.images_NCHW[torch.from_numpy(rows)],
        reference_ND=subjects.reference_ND[rows],
    )
    images, reference = picked.batch(0, device)
    return upsample(method(judged.model.embedder, images, reference), images.shape[-1])


def _shown(judged: Judged, count: int) -> tuple[str, NDArray[np.int64], NDArray[np.int64]]:
    """The metric that the rows of a sheet are spread over, and for each row its place among the
    metric's values and among the subjects: the metrics of faithfulness have fewer values.
    """
    own = judged.scores["chosen"]
    key = "energy" if "energy" in own else "insertion"
    places = _spread(own[key], count)
    return key, places, faithful_positions(len(judged.subjects), len(own[key]))[places]


def _spread(values: NDArray, count: int) -> NDArray[np.int64]:
    """Positions of the best, the middle and the worst, a third each."""
    order = np.argsort(-values, kind="stable")
    third = max(1, count // 3)
    middle = max(0, (len(order) - third) // 2)
    return np.array(list(dict.fromkeys(
        [*order[:third], *order[middle : middle + third], *order[-third:]]
    )))  # fmt: skip


def _heading(judged: Judged, name: str) -> str:
    if name != "chosen":
        return name
    e = judged.explainer
    return ", ".join(filter(None, (e.method, e.layer, "held" if e.norm == "held" else "")))
