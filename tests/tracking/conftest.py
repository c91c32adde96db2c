"""What every test of tracking begins with."""

import pytest

from flowerray.tracking import sync


@pytest.fixture(autouse=True)
def fresh() -> None:
    """Each test hears its own warnings."""
    sync._warned.clear()
