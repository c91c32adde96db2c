"""Robustness as pictures: R@1 over the radius, and queries that an attack turned.

Letters: C H W an image.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.robustness.attack import Robustness, key
from flowerray.robustness.victim import Victim
from flowerray.show.charts import bands, group_look
from flowerray.show.contact import Group, Tile, contact_sheet
from flowerray.show.interval import read_score
from flowerray.show.style import save

MAGNIFIED = 10
"""Times that a perturbation is enlarged in the picture, around mid-grey."""
NEIGHBOURS = 3
"""That are shown of a query."""


def plot_robustness(results: dict[str, dict[str, Any]], title: str, out_png: Path) -> Path:
    """R@1 of the worst case over the radius, with its 95 % band, one line a model.

    Args:
        results: name -> a record of robustness.json (`worst_case`, `attacks`, `audit`); the first
            is the model itself, whose single attacks are drawn thin.
        title: over the picture.
    """
    radii = sorted({eps for record in results.values() for eps in record["worst_case"]}, key=float)
    content = {}
    for name, record in results.items():
        failed = (record.get("audit") or {}).get("failed")
        worst = {eps: record["worst_case"][eps] for eps in radii if eps in record["worst_case"]}
        scores = {eps: read_score(score) for eps, score in worst.items()}
        content[f"{name}: AUDIT FAILED" if failed else name] = {
            eps: found for eps, found in scores.items() if found is not None
        }
    figure = bands(
        content, radii, title, "largest change, in 1/255", "R@1, worst case over the attacks"
    )
    first = next(iter(results.values()))
    if first["rows"] == "independent":
        for scores in first["attacks"].values():
            figure.axes[0].plot(
                [radii.index(eps) for eps in scores],
                [score["recall_at_1"] for score in scores.values()],
                color=group_look(0)["color"], alpha=0.4, linewidth=0.8, linestyle="--",
            )  # fmt: skip
    return save(figure, out_png)


def worst_sheet(victim: Victim, result: Robustness, eps: float, out_png: Path) -> Path:
    """One line an example of a radius: photograph, perturbation enlarged, adversarial image,
    neighbours before and after, marked as right or wrong.
    """
    heads = ("query", f"change x{MAGNIFIED}", "attacked query", "neighbours before", "after")
    content = []
    for n, example in enumerate(result.examples[eps]):
        clean, attacked = (
            image.float().numpy() for image in (example.clean_CHW, example.adversarial_CHW)
        )
        name = victim.classes[victim.labels_Q[example.query]]

        def neighbours(index_K: NDArray[np.int64], name: str = name) -> tuple[Tile, ...]:
            found = [g for g in index_K[:NEIGHBOURS] if g >= 0]
            names = [victim.classes[victim.gallery_labels_G[g]] for g in found]
            paths = [victim.gallery_paths[g] for g in found]
            return tuple(Tile(p, (c,), c == name) for p, c in zip(paths, names, strict=True))

        groups = (
            (Tile(_pixels(clean), (name,)),),
            (Tile(_pixels((attacked - clean) * MAGNIFIED + 0.5)),),
            (Tile(_pixels(attacked), (f"by {example.attack}",)),),
            neighbours(result.nearest_QK[example.query]),
            neighbours(example.after_K),
        )
        content.append(
            [Group("" if n else head, tiles) for head, tiles in zip(heads, groups, strict=True)]
        )
    title = f"queries that fell at {key(eps)}/255 ({victim.config.norm})"
    return contact_sheet(content, out_png, title)


def _pixels(image_CHW: np.ndarray) -> NDArray[np.uint8]:
    return (image_CHW.transpose(1, 2, 0).clip(0, 1) * 255).round().astype(np.uint8)
