"""A model whose training ruined a good start, and photographs that the start tells apart."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from flowerray.data.source import DataConfig, open_dataset
from flowerray.files import write_json
from flowerray.model.embedder import Embedder, EmbedderConfig
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir


def ruin(run: Path, root: Path) -> Path:
    """Makes a copy of the small RUN one of the bundled backbone, whose embeddings are all alike.

    Args:
        root: where its photographs go: 4 colours, 24 of each.
    """
    rng = np.random.default_rng(0)
    for colour in ("red", "green", "blue", "yellow"):
        (root / colour).mkdir(parents=True, exist_ok=True)
        for n in range(24):
            pixels = np.asarray(Image.new("RGB", (32, 32), colour)) + rng.normal(0, 60, (32, 32, 3))
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(root / colour / f"{n}.png")
    config = EmbedderConfig(image_size=32, dim=16)
    data = DataConfig(root=root, train_per_class=8, val_per_class=8)
    old = Run.from_dict(RunDir(run).read())
    options = old.model_copy(update={"embedder": config, "data": data}).to_dict()
    write_json(run / "run.json", options)
    noted = {**options, "dataset": open_dataset(data).tags["dataset/fingerprint"]}
    embedder = Embedder(config)
    torch.nn.init.ones_(embedder.projection.weight)
    file = run / "best_model_triplet_loss.pth"
    content = torch.load(file, weights_only=True)
    content |= {"embedder": embedder.state_dict(), "run": json.dumps(noted)}
    torch.save(content, file)
    (run / "pairs.json").unlink()
    return run
