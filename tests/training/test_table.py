"""How a training ended, as it is printed."""

from pathlib import Path

import pytest

from flowerray.text import typed
from flowerray.training.table import training


@pytest.mark.parametrize(("value", "shown"), [(0.4567, True), (None, False)])
def test_the_end_of_a_training(value: float | None, shown: bool) -> None:
    summary = {
        "epochs": 3, "steps": 60, "seconds": 59.6, "val_map_at_r": value, "best_epoch": 2,
        "model": "/runs/a/best_model_triplet_loss.pth", "precision": "bf16",
    }  # fmt: skip
    text = training(Path("/runs/a"), summary)
    assert "3 epochs, 60 steps, 1 min 00 s, bf16" in text
    assert ("val MAP@R 0.457 after epoch 2" in text) == shown
    assert f"next      {typed('flowerray evaluate /runs/a --split test')}" in text
