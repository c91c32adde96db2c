"""The device that these tests train, attack and search on; see docs/gpu.md."""

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS looks at it once

import pytest
import torch

DEVICE = os.environ.get("FLOWERRAY_TEST_DEVICE", "")
"""`cpu` runs each test's body there, which shows that the test is right, not that a GPU is."""


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The first GPU, or what FLOWERRAY_TEST_DEVICE names."""
    if not DEVICE and not torch.cuda.is_available():
        pytest.skip("no GPU that torch can use (FLOWERRAY_TEST_DEVICE=cpu runs it on the CPU)")
    return torch.device(DEVICE or "cuda:0")


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The device of what a CPU has no counterpart of."""
    if device.type != "cuda":
        pytest.skip("only a GPU has such memory")
    return device
