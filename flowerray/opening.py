"""A trained model as the commands use it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flowerray.data.dataset import Dataset
from flowerray.data.images import eval_image, resize_side
from flowerray.data.source import open_dataset
from flowerray.data.store import Store, build_store
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.model.precision import full_precision
from flowerray.tracking.registry import resolve
from flowerray.training import checkpoint
from flowerray.training.run import Run
from flowerray.training.rundir import RunDir


@dataclass(frozen=True)
class Model:
    """A trained model as the commands use it."""

    name: str
    """What the user called it."""
    folder: RunDir | None
    """Its RUN folder, where it is one."""
    run: Run
    embedder: Embedder
    threshold: float
    """Cosine from which two photographs count as the same class."""
    dataset: str | None = None
    """Fingerprint of what it was trained on; None: not known."""

    def own_dataset(self, quiet: bool = False) -> Dataset:
        """The set that it was trained on.

        Raises:
            UserError: it holds other files, classes or splits now; see also `open_dataset`.
        """
        dataset = open_dataset(self.run.data, progress=not quiet)
        if self.dataset not in (None, dataset.tags["dataset/fingerprint"]):
            raise UserError(
                f"{dataset.root} holds other files, classes or splits than when {self.name} was "
                "trained, so that its training images may be among the queries: put back what was "
                "there, or measure it on a folder of photographs that it has not seen."
            )
        return dataset


def open_model(name: str, device: torch.device) -> Model:
    """A RUN folder, an exported file, `models:/...` or `runs:/...`.

    Raises:
        UserError: nothing there, or not a model.
    """
    path = resolve(name)
    fetched = name.startswith("runs:/")
    content = checkpoint.load_export(path)
    return Model(
        name=name,
        # What MLflow holds is fetched anew by each command, so that nothing can be kept beside it.
        folder=RunDir(path) if not fetched and (path / "run.json").exists() else None,
        run=Run.from_dict(content["run"]),
        embedder=checkpoint.build_embedder(content).to(device),
        threshold=content["threshold"],
        dataset=content["dataset"],
    )


def load(run_or_file: str | Path) -> Embedder:
    """A trained embedder, on the CPU, in eval mode.

    Args:
        run_or_file: a RUN folder, an exported `best_model_*.pth` / `robust_model_*.pth` file, or an
            MLflow address `models:/...` or `runs:/...`.

    Raises:
        flowerray.errors.UserError: nothing there, or not a flowerray model.
    """
    if str(run_or_file).startswith(("models:/", "runs:/")):
        run_or_file = resolve(str(run_or_file))
    return checkpoint.load_embedder(run_or_file)


def store_builder(image_size: int, quiet: bool) -> Callable[[Sequence[Path]], Store]:
    """What `measure` asks for: the decoded store of a list of files."""

    def build(paths: Sequence[Path]) -> Store:
        return build_store(paths, resize_side(image_size), progress=not quiet)

    return build


@full_precision()
def embed_files(embedder: Embedder, files: Sequence[Path]) -> NDArray[np.float64]:
    """Unit embeddings (N, D) of image files, with the evaluation transform.

    Raises:
        UserError: a file that is missing or not an image.
    """
    device = next(embedder.parameters()).device
    images = [torch.as_tensor(eval_image(file, embedder.image_size)) for file in files]
    with torch.inference_mode():
        emb_ND = embedder(torch.stack(images).to(device).float() / 255)
    if not emb_ND.isfinite().all():
        raise UserError(
            "the model gives embeddings that are not finite numbers: its training diverged, or its "
            "file is damaged; use another checkpoint."
        )
    return emb_ND.cpu().numpy().astype(np.float64)
