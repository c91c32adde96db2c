"""Photographs that lie on the device give what the store gives."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flowerray.data import resident as module
from flowerray.data.resident import Resident, resident
from flowerray.data.store import Store


@pytest.fixture
def store(job: dict[str, Any]) -> Store:
    """50 images of five shapes."""
    return Store(Path(job["store"]))


def test_it_gives_what_the_store_gives(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PART", 10_000)  # several copies, cut at images
    there = Resident(store, torch.device("cpu"))
    indices_B = np.random.default_rng(0).permutation(len(store))[:20]
    for mine, other in zip(there.padded(indices_B), store.padded(indices_B), strict=True):
        assert torch.equal(mine, other) and mine.dtype == other.dtype
        assert mine.stride() == other.stride()
    centre, other = there.centre(indices_B, 32), store.centre(indices_B, 32)
    assert torch.equal(centre, other) and centre.stride() == other.stride()
    assert there.centre([], 32).shape == (0, 3, 32, 32)
    assert len(there) == len(store) and there.fingerprint == store.fingerprint


def test_only_a_gpu_with_room_takes_it(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU its free memory is made up, and the pixels go nowhere."""
    assert resident(store, torch.device("cpu")) is store
    free = [4 * store.nbytes - 4]
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (free[0], free[0]))
    monkeypatch.setattr(module, "Resident", lambda *found: found)
    cuda = torch.device("cuda:0")
    assert resident(store, cuda) is store
    free[0] += 4
    assert resident(store, cuda) == (store, cuda)
