"""Names in the picture of accuracy against cost."""

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from flowerray.backbones.pictures import place_labels


def test_labels_overlap_neither_each_other_nor_points() -> None:
    rng = np.random.default_rng(0)
    points = [(10 ** rng.uniform(0.4, 0.8), rng.uniform(0.4, 0.5)) for _ in range(14)]
    figure = Figure(figsize=(6, 5), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.set_xscale("log")
    axes.plot(*zip(*points, strict=True), "o")
    axes.set(xlim=(1, 12), ylim=(0.3, 0.6))
    labels = place_labels(canvas, axes, points, [f"some_network_{i}" for i in range(14)])
    canvas.draw()
    extents = [Text.get_window_extent(label) for label in labels]  # without the arrow
    spots = axes.transData.transform(points)
    for i, box in enumerate(extents):
        assert not any(box.overlaps(other) for other in extents[:i])
        assert not any(box.contains(x, y) for x, y in spots)
        frame = axes.get_window_extent()
        assert frame.x0 <= box.x0 and box.x1 <= frame.x1
