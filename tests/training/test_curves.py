"""The picture of a training."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flowerray.training import curves
from flowerray.training.curves import plot_training
from flowerray.training.rundir import FolderReporter, RunDir
from tests.show.drawn import catch


def draw(run: RunDir) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        figures = catch(patch, curves)
        plot_training(run, run.plots / "training.png")
    return figures[0]


def lines(run: RunDir) -> list[dict[str, list]]:
    """For each panel its curves by label."""
    return [
        {line.get_label(): line.get_xydata().tolist() for line in axes.lines}
        for axes in draw(run).axes
    ]


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create({})
    return run


def test_curves_are_drawn(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    rng = np.random.default_rng(0)
    names = ("epoch/loss", "epoch/d_ap", "epoch/d_an", "epoch/spread", "val/recall_at_1")
    values = rng.random((5, len(names)))
    for epoch, row in enumerate(values.tolist(), start=1):
        reporter.report(epoch * 2, epoch, dict(zip(names, row, strict=True)))
    loss, retrieval, spread = lines(run)
    points = [[epoch * 2, value] for epoch, value in enumerate(values[:, 0], start=1)]
    np.testing.assert_allclose(loss.pop("epoch mean"), points)
    assert loss == {} and set(retrieval) == {"R@1"}
    assert set(spread) == {"different classes", "same class", "spread"}
    figure = draw(run)
    assert all(axes.get_ylim()[0] == 0 for axes in figure.axes)
    assert [axes.get_title(loc="left") for axes in figure.axes][0] == "Training loss"


def test_a_run_without_validation_or_records_has_a_picture_too(run: RunDir) -> None:
    assert lines(run) == [{}, {}, {}]
    FolderReporter(run.path).report(1, 1, {"epoch/loss": 1.0})
    assert lines(run) == [{"epoch mean": [[1, 1]]}, {}, {}]
    picture = plot_training(run, run.plots / "training.png")
    assert picture == run.plots / "training.png"
    assert [file.name for file in run.plots.iterdir()] == ["training.png"]
    with Image.open(picture) as image:
        assert len(image.convert("RGB").getcolors(maxcolors=2**16) or []) > 10


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_are_drawn_where_they_are_more_than_the_epochs(run: RunDir, steps: int) -> None:
    reporter = FolderReporter(run.path)
    for epoch in range(1, 4):
        for step in range(steps):
            reporter.report(2 * epoch + step - 1, epoch, {"train/loss": 0.5})
        reporter.report(2 * epoch, epoch, {"epoch/loss": 0.5})
    assert ("steps" in lines(run)[0]) == (steps > 1)
