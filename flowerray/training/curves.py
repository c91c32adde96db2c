"""Training curves of one run as a picture."""

from pathlib import Path

from flowerray.files import atomic_file
from flowerray.show.style import BLUE, GREEN, GRID, INK, ORANGE
from flowerray.training.rundir import RunDir


def plot_training(run: RunDir, out_png: Path) -> Path:
    """Loss, validation and collapse curves of metrics.jsonl, over training steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.5, 3.4), dpi=120, layout="constrained")
    loss, retrieval, spread = figure.subplots(1, 3)
    panels = [
        (
            loss, "Training loss", "loss",
            [("train/loss", "steps", BLUE), ("epoch/loss", "epoch mean", ORANGE)],
        ),
        (
            retrieval, "Validation retrieval", "share",
            [("val/recall_at_1", "R@1", BLUE), ("val/map_at_r", "MAP@R", ORANGE)],
        ),
        (
            spread, "Distances in a batch", "distance (0..2)",
            [("epoch/d_an", "different classes", BLUE), ("epoch/d_ap", "same class", ORANGE),
             ("epoch/spread", "spread", GREEN)],
        ),
    ]  # fmt: skip
    for axes, title, label, curves in panels:
        for name, text, colour in curves:
            series = run.series(name)
            faint = name.startswith("train/")
            if not series or (faint and len(series) <= len(run.series("epoch/loss"))):
                continue  # steps would lie under the epochs' means
            axes.plot(
                *zip(*series, strict=True),
                label=text,
                color=colour,
                alpha=0.35 if faint else 1.0,
                linewidth=1.0 if faint else 1.8,
                marker="o" if not faint or len(series) == 1 else None,  # one point makes no line
                markersize=3,
            )
        axes.set_title(title, fontsize=11, color=INK)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(color=GRID, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(out_png) as temporary:
        figure.savefig(temporary, format="png")
    return out_png
