"""A service on a small INDEX, in this process, without Ray."""

import io
from pathlib import Path

import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

from flowerray.cluster.driver import train_run
from flowerray.index import command
from flowerray.opening import open_model
from flowerray.serve.app import make_app
from flowerray.serve.service import Service
from tests.small import small

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def served(photographs: Path, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their INDEX."""
    out = tmp_path_factory.mktemp("served") / "index"
    command.build(open_model(str(small_run), CPU), photographs, out, quiet=True)
    return out


@pytest.fixture(scope="session")
def other(photographs: Path, small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Their INDEX by another model."""
    folder = tmp_path_factory.mktemp("other")
    train_run(small(small_set, "center", epochs=1), folder / "other", quiet=True)
    model = open_model(str(folder / "other"), CPU)
    command.build(model, photographs, folder / "index", quiet=True)
    return folder / "index"


@pytest.fixture(scope="session")
def client(served: Path) -> TestClient:
    return TestClient(make_app(Service(served, CPU)), "http://localhost")


@pytest.fixture(scope="session")
def photo(small_set: Path) -> bytes:
    """A photograph that the INDEX does not hold."""
    return sorted((small_set / "jpg").iterdir())[20].read_bytes()


def saved(
    kind: str, size: tuple[int, int] = (60, 50), mode: str = "RGB", **options: object
) -> bytes:
    """An image file's bytes."""
    buffer = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()
