"""The picture of a training."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flowerray.training.curves import BLUE, ORANGE, plot_training
from flowerray.training.rundir import FolderReporter, RunDir


def colours(picture: Path) -> set[str]:
    pixels = np.asarray(Image.open(picture).convert("RGB")).reshape(-1, 3)
    return {f"#{r:02x}{g:02x}{b:02x}" for r, g, b in np.unique(pixels, axis=0)}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.create({})
    return run


def test_curves_are_drawn(run: RunDir) -> None:
    reporter = FolderReporter(run.path)
    rng = np.random.default_rng(0)
    for epoch in range(1, 6):
        reporter.report(epoch * 2 - 1, epoch, {"train/loss": float(rng.random())})
        names = ("epoch/loss", "epoch/d_ap", "epoch/d_an", "epoch/spread", "val/recall_at_1")
        reporter.report(epoch * 2, epoch, {name: float(rng.random()) for name in names})
    picture = plot_training(run, run.plots / "training.png")
    assert picture == run.plots / "training.png"
    assert {BLUE, ORANGE} <= colours(picture)
    assert [file.name for file in run.plots.iterdir()] == ["training.png"]
    width, height = Image.open(picture).size
    assert width > 2 * height > 600


def test_a_run_without_validation_or_records_has_a_picture_too(run: RunDir) -> None:
    plot_training(run, run.plots / "training.png")
    assert not {BLUE, ORANGE} & colours(run.plots / "training.png")
    FolderReporter(run.path).report(1, 1, {"epoch/loss": 1.0})
    plot_training(run, run.plots / "training.png")
    found = colours(run.plots / "training.png")
    assert ORANGE in found and BLUE not in found


@pytest.mark.parametrize("steps", [1, 2])
def test_steps_are_drawn_where_they_are_more_than_the_epochs(run: RunDir, steps: int) -> None:
    reporter = FolderReporter(run.path)
    rng = np.random.default_rng(0)
    for epoch in range(1, 4):
        for step in range(steps):
            reporter.report(2 * epoch + step - 1, epoch, {"train/loss": float(rng.random())})
        reporter.report(2 * epoch, epoch, {"epoch/loss": float(rng.random())})
    pixels = np.asarray(Image.open(plot_training(run, run.plots / "training.png")).convert("RGB"))
    faint = 0.35 * np.array([0x00, 0x72, 0xB2]) + 0.65 * 255  # BLUE on white
    assert (np.abs(pixels - faint).max(-1) <= 2).any() == (steps > 1)
