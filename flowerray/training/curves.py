"""Training curves of one run as a picture."""

from pathlib import Path

from flowerray.show.charts import thinned
from flowerray.show.style import BLUE, GREEN, ORANGE, panels, plain_axes, save
from flowerray.training.rundir import RunDir

PANELS = {
    ("Training loss", "loss"): {
        "train/loss": ("steps", BLUE), "epoch/loss": ("epoch mean", ORANGE),
    },
    ("Validation retrieval", "share"): {
        "val/recall_at_1": ("R@1", BLUE), "val/map_at_r": ("MAP@R", ORANGE),
    },
    ("Distances in a batch", "distance (0..2)"): {
        "epoch/d_an": ("different classes", BLUE), "epoch/d_ap": ("same class", ORANGE),
        "epoch/spread": ("spread", GREEN),
    },
}  # fmt: skip
"""(Title, unit) -> metric -> label and colour."""
MOST_POINTS = 1000


def plot_training(run: RunDir, out_png: Path) -> Path:
    """Loss, validation and collapse curves of metrics.jsonl, over training steps."""
    figure, ((*grid,),) = panels(10.5, 3.4, 1, len(PANELS))
    for axes, ((title, unit), curves) in zip(grid, PANELS.items(), strict=True):
        plain_axes(axes, title, "step", unit)
        for name, (label, colour) in curves.items():
            series = run.series(name)
            faint = name.startswith("train/")
            if not series or (faint and len(series) <= len(run.series("epoch/loss"))):
                continue  # steps would lie under the epochs' means
            axes.plot(
                *zip(*thinned(series, MOST_POINTS), strict=True),
                label=label,
                color=colour,
                alpha=0.35 if faint else 1.0,
                linewidth=1.0 if faint else 1.8,
                marker="o" if not faint or len(series) == 1 else None,  # one point makes no line
                markersize=3,
            )
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    return save(figure, out_png)
