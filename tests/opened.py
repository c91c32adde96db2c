"""A finished model that the commands may write to."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from flowerray.opening import Model, open_model
from flowerray.training.rundir import RunDir


@pytest.fixture
def run(small_run: Path) -> Iterator[RunDir]:
    """A copy of the small RUN, beside it: they share one MLflow database."""
    folder = RunDir(small_run.with_name("copy"))
    shutil.copytree(small_run, folder.path)
    yield folder
    shutil.rmtree(folder.path)


@pytest.fixture
def model(run: RunDir) -> Model:
    return open_model(str(run.path), torch.device("cpu"))
