"""What is changed for a while is put back."""

import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.model.modes import deterministic, evaluating, full_precision, own_draws


def test_modes_come_back_after_an_error() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout()))
    module[1].eval()
    with pytest.raises(ZeroDivisionError), evaluating(module):
        assert not any(part.training for part in module.modules())
        raise ZeroDivisionError
    assert module.training and module[0].training and not module[1].training


def test_precision_comes_back() -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        with full_precision():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cudnn.allow_tf32
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")


def test_draws_inside_leave_the_callers_generators() -> None:
    def drawn() -> tuple[float, float, float]:
        return torch.rand(1).item(), np.random.rand(), random.random()  # noqa: NPY002

    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    expected = drawn(), drawn()
    torch.manual_seed(3)
    np.random.seed(3)  # noqa: NPY002
    random.seed(3)
    first = drawn()
    with own_draws():
        torch.manual_seed(9)
        np.random.seed(9)  # noqa: NPY002
        random.seed(9)
        assert drawn() != expected[1]
    assert (first, drawn()) == expected


def test_an_embedder_seeds_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.manual_seed` would seed them, and queues that where CUDA has not started yet."""
    seeded: list[int] = []
    monkeypatch.setattr("torch.cuda.manual_seed_all", seeded.append)
    config = EmbedderConfig(backbone="test_efficientnet", weights="none", image_size=32, dim=4)
    one, two = (Embedder(config, seed=4).state_dict() for _ in range(2))
    assert all(torch.equal(value, two[name]) for name, value in one.items()) and not seeded


def test_the_order_of_sums_is_fixed_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")  # a user's stays
    monkeypatch.setattr("torch.backends.cudnn.benchmark", True)
    with pytest.raises(ZeroDivisionError), deterministic():
        assert torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic
        assert torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.backends.cudnn.benchmark
        raise ZeroDivisionError
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()
