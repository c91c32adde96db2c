"""Names in the picture of accuracy against cost."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from flowerray.backbones import pictures
from flowerray.backbones.pictures import place_labels
from flowerray.show.style import BLUE, GREY, ORANGE
from tests.show.drawn import catch


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


def test_accuracy_against_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "model": name, "weights": "random" if name == "c" else "yes", "latency_ms": 10.0 + n,
            "params": 2e6 * (n + 1), "front_latency": name == "a", "front_params": name == "b",
            "recall_at_1": {"mean": 0.5 + n / 10, "low": None if n else 0.4, "high": 0.9},
        }
        for n, name in enumerate("abc")
    ]  # fmt: skip
    content = {"models": rows, "image_size": 96, "split": "val", "device": "CPU", "threads": 2}
    figures = catch(monkeypatch, pictures)
    pictures.plot_backbones(content, Path("backbones.png"))
    latency, size, side = figures[0].axes
    points = [
        (line.get_xydata()[0].tolist(), line.get_color(), line.get_marker())
        for line in latency.lines
        if len(line.get_xdata()) == 1
    ]
    assert points == [
        ([10, 0.5], ORANGE, "D"), ([11, 0.6], BLUE, "o"), ([12, 0.7], GREY, "s"),
    ]  # fmt: skip
    assert [x for line in size.lines for x in line.get_xdata()] == [2, 2, 2, 4, 6]
    assert "c (random)" in side.texts[0].get_text()
    assert sum(len(line.get_xdata()) == 2 for line in latency.lines) == 1  # one has bounds
