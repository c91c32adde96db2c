"""The pictures of `flowerray explain RUN`: scores, maps of images, two models side by side."""

from collections.abc import Mapping
from dataclasses import dataclass
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
ROWS = 9
"""Images of a sheet: a third of them the best, a third the worst."""


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

    @property
    def key(self) -> str:
        """The metric that the rows of a sheet are spread over."""
        return "energy" if "energy" in self.scores["chosen"] else "insertion"

    def heading(self, name: str) -> str:
        """A method in words."""
        e = self.explainer
        chosen = (e.method, e.layer, "held" if e.norm == "held" else "")
        return ", ".join(filter(None, chosen)) if name == "chosen" else name


def scores_chart(judged: Judged, title: str, out_png: Path) -> None:
    """Every metric of every method."""
    labels = {metric: LABELS[metric] for metric in judged.scores["chosen"]}
    table = {judged.heading(name): rows for name, rows in judged.table.items()}
    draw_scores(f"{title}, mean and 95 % interval", table, labels, out_png)


def maps_sheet(judged: Judged, out_png: Path, title: str) -> None:
    """Best, middle and worst images by energy in mask (by insertion without masks)."""
    columns = {judged.heading(name): (judged, name) for name in judged.methods}
    about = f"best, middle and worst {judged.key} of the chosen map; each map on its own scale"
    _sheet(judged, columns, out_png, f"{title}: {about}")


def beside_sheet(first: Judged, second: Judged, out_png: Path) -> None:
    """The chosen and the exact map of both models, on images spread over the first one's scores."""
    columns = {
        f"{place}: {judged.heading(name)}": (judged, name)
        for place, judged in (("RUN", first), ("beside", second))
        for name in ("chosen", "decomposition")
        if name in judged.methods
    }
    names = [Path(judged.model.name).name for judged in (first, second)]
    title = f"RUN = {names[0]}, beside = {names[1]}; each map on its own scale"
    _sheet(first, columns, out_png, title)


def _sheet(
    first: Judged, columns: Mapping[str, tuple[Judged, str]], out_png: Path, title: str
) -> None:
    """Columns are methods of a model, under their headings."""
    places, rows = _shown(first)
    subjects = first.subjects
    images = subjects.images_NCHW[torch.from_numpy(rows)].permute(0, 2, 3, 1).numpy()
    masks = None if subjects.masks_NHW is None else subjects.masks_NHW[rows]
    captions = {
        heading: [f"{first.key} {judged.scores[name][first.key][i]:.2f}" for i in places]
        for heading, (judged, name) in columns.items()
    }
    maps = {
        heading: _maps(judged, judged.methods[name], rows)
        for heading, (judged, name) in columns.items()
    }
    names = [subjects.paths[i].name for i in rows]
    draw_sheet(title, images, masks, maps, captions, names, out_png)


def _maps(judged: Judged, method: Saliency, rows: NDArray[np.int64]) -> NDArray[np.float32]:
    embedder = judged.model.embedder
    images, reference = judged.subjects.take(rows, embedder.projection.weight.device)
    return upsample(method(embedder, images, reference), images.shape[-1])


def _shown(judged: Judged) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """For each row of a sheet its place among the values of the key metric and among the subjects:
    the metrics of faithfulness have fewer values.
    """
    values = judged.scores["chosen"][judged.key]
    places = _spread(values, ROWS)
    return places, faithful_positions(len(judged.subjects), len(values))[places]


def _spread(values: NDArray, count: int) -> NDArray[np.int64]:
    """Positions of the best, the middle and the worst, a third each."""
    order = np.argsort(-values, kind="stable")
    third = max(1, count // 3)
    middle = max(0, (len(order) - third) // 2)
    return np.array(list(dict.fromkeys(
        [*order[:third], *order[middle : middle + third], *order[-third:]]
    )))  # fmt: skip
