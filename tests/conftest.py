"""What every test shares: quiet libraries, a private FLOWERRAY_HOME, small rendered sets."""

import os
from collections.abc import Iterator
from pathlib import Path

# Before anything imports ray, mlflow or torch.
os.environ.update(
    RAY_USAGE_STATS_ENABLED="0",
    RAY_AUTH_MODE="disabled",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
    MLFLOW_DISABLE_TELEMETRY="true",
    MPLBACKEND="agg",
)
os.environ.pop("MLFLOW_TRACKING_URI", None)
os.environ.pop("MLFLOW_RUN_ID", None)

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
