"""A comparison of small trainings."""

from pathlib import Path
from typing import Any

from flowerray.comparison.plan import CompareConfig
from flowerray.data.source import DataConfig
from flowerray.model.embedder import EmbedderConfig
from flowerray.training.config import TrainConfig

ROWS = ["cross-entropy", "center", "siamese", "triplet"]
TINY = EmbedderConfig(backbone="test_efficientnet", weights="none", image_size=32, dim=16)
BATCH = TrainConfig(classes_per_batch=2, images_per_class=4, precision="fp32")


def config(root: Path, **changes: Any) -> CompareConfig:
    """A comparison on `small_set`; 60 training images make 9 steps of 2 x 4 an epoch."""
    parts = {"data": DataConfig(root=root), "embedder": TINY, "train": BATCH, "images": 80}
    return CompareConfig(**{**parts, **changes})
