"""What every test shares: quiet libraries, a private FLOWERRAY_HOME, small rendered sets."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Before anything imports ray, mlflow or torch.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    MPLBACKEND="agg",
    OMP_NUM_THREADS="1",  # tiny models gain nothing from threads, and equal bits need equal counts
)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("MLFLOW_RUN_ID", None)
os.environ.pop("UV_RUN_RECURSION_DEPTH", None)  # `uv run` would stand before every advised command

import pytest  # noqa: E402 (the environment comes first)


@pytest.fixture(scope="session", autouse=True)
def flowerray_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Stores and synthetic sets of the tests stay out of the developer's cache."""
    home = tmp_path_factory.mktemp("home")
    before = os.environ.get("FLOWERRAY_HOME")
    os.environ["FLOWERRAY_HOME"] = str(home)
    yield home
    if before is None:
        del os.environ["FLOWERRAY_HOME"]
    else:
        os.environ["FLOWERRAY_HOME"] = before


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rendered set in the Oxford layout: 6 classes of 10 + 10 + 4 photographs, 48 px."""
    from flowerray.rendered.synthetic import SyntheticConfig, synthesize

    out = tmp_path_factory.mktemp("data") / "small"
    config = SyntheticConfig(classes=6, scale=0.01, size=48)
    return synthesize(out, config, progress=False, processes=1)


@pytest.fixture(scope="session")
def small_run(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished RUN on `small_set`, trained in this process; a test that changes it copies it."""
    from flowerray.cluster.driver import train_run
    from tests.small import small

    out = tmp_path_factory.mktemp("runs") / "small"
    train_run(small(small_set), out, quiet=True)
    return out


@pytest.fixture(scope="session")
def photographs(small_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve of `small_set` in two class folders."""
    root = tmp_path_factory.mktemp("photographs")
    for n, picture in enumerate(sorted((small_set / "jpg").iterdir())[:12]):
        (root / "ab"[n % 2]).mkdir(exist_ok=True)
        shutil.copy(picture, root / "ab"[n % 2] / f"{n}.jpg")
    return root


@pytest.fixture(scope="session")
def job(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A decoded store of 50 coloured noise images in 10 classes, as options of
    tests/train_process.py.
    """
    import numpy as np
    from PIL import Image

    from flowerray.data.images import resize_side
    from flowerray.data.store import build_store

    folder = tmp_path_factory.mktemp("noise")
    rng = np.random.default_rng(0)
    paths = []
    for c in range(10):
        colour = rng.integers(40, 215, 3)
        for n in range(5):
            pixels = colour + rng.normal(0, 40, (40 + 2 * n, 44, 3))
            paths.append(folder / f"{c}-{n}.png")
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(paths[-1])
    store = build_store(paths, resize_side(32), progress=False)
    targets = np.repeat(np.arange(10), 5).tolist()
    return {"store": str(store.folder), "targets": targets}


@pytest.fixture(scope="session")
def database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database that `prepare` made once; its migrations take seconds."""
    from flowerray.tracking import sync

    folder = tmp_path_factory.mktemp("prepared")
    assert sync.prepare(folder / "run")
    return folder / "mlflow.db"


@pytest.fixture
def runs(tmp_path: Path, database: Path) -> Path:
    """A folder of runs with a database; its experiment `here` keeps artifacts in it."""
    shutil.copy(database, tmp_path / "mlflow.db")
    return tmp_path


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """Runs a command that must work; gives its standard output and error."""
    from flowerray.cli import dispatch

    def run(*command: object) -> tuple[str, str]:
        capsys.readouterr()
        assert dispatch([str(word) for word in command]) == 0
        captured = capsys.readouterr()
        return captured.out, captured.err

    return run


@pytest.fixture
def run(small_run: Path) -> Iterator[Path]:
    """A copy of the small RUN, beside it: they share one MLflow database."""
    folder = shutil.copytree(small_run, small_run.with_name("cli-copy"))
    yield folder
    shutil.rmtree(folder)
