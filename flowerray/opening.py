"""A trained model as the commands use it."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from flowerray.calibration import PRIOR, Calibration
from flowerray.data.dataset import Dataset
from flowerray.data.images import LONGEST, eval_image, eval_pixels, resize_side
from flowerray.data.source import open_dataset
from flowerray.data.store import Store, build_store, floats
from flowerray.errors import UserError
from flowerray.model.embedder import Embedder
from flowerray.model.modes import evaluating, full_precision
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
    calibration: Calibration | None = None
    """Probabilities and false-match rates of its cosine; None: an older model, or no val."""
    seen: NDArray[np.uint32] | None = None
    """Checksums of the images of train and val, see `Store.checks_N`; None: an older model."""

    def calibrated(self) -> Calibration:
        """Its calibration.

        Raises:
            UserError: it has none.
        """
        if self.calibration is None:
            raise UserError(
                f"{self.name} has no calibration, which `far` and `prior` need: it is an older "
                "model, or was trained without val; train again."
            )
        return self.calibration

    def probability(self, cosine: float, prior: float | None = None) -> float | None:
        """That two images are of one class, at a prior (None: `PRIOR`); None: no calibration.

        Raises:
            UserError: a `prior` for a model without calibration, or outside 0..1.
        """
        if prior is None and self.calibration is None:
            return None
        return float(self.calibrated().probability(cosine, PRIOR if prior is None else prior))

    def own_dataset(self, quiet: bool = False, compared: bool = False) -> Dataset:
        """The set that it was trained on.

        Args:
            compared: say where photographs of the training have other content now.

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
        if compared and self.seen is not None:
            paths = [dataset.paths[i] for i in dataset.splits["train"]]
            store = store_builder(self.embedder.image_size, quiet)(paths)
            if others := int((~np.isin(store.checks_N, self.seen)).sum()):
                print(
                    f"{others} of the {len(paths)} training photographs in {dataset.root} are not "
                    f"those that {self.name} was trained on: they were replaced under their old "
                    "names, or are decoded otherwise here.",
                    file=sys.stderr,
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
        calibration=content["calibration"],
        seen=content["seen"],
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


Photo = str | Path | Image.Image | NDArray[Any] | Tensor
"""A photograph: an image file's path, a PIL image, an array (H, W, 3) of bytes, or a tensor
(3, H, W), of bytes or of floats in [0,1]."""


def embed(embedder: Embedder, photos: Iterable[Photo], *, batch_size: int = 64) -> Tensor:
    """Unit embeddings of photographs of any size, with the model's own resize and centre crop.

    The model is left as it is: its mode, device and gradients. Pixels that have been resized and
    cropped already go to `embedder(images_BCHW)` itself.

    Args:
        photos: see `Photo`; also one tensor (N, 3, H, W). They are read a batch at a time.
        batch_size: photographs at a time; changes nothing beyond rounding.

    Returns:
        float32 (N, D) on the CPU, in the order of the photographs.

    Raises:
        UserError: a file that is missing or no image, or pixels of another shape or type.
    """
    if isinstance(photos, str | Path | Image.Image) or getattr(photos, "ndim", 0) == 3:
        raise UserError("`photos` is one photograph: give a list of them, `[photo]`.")
    if not isinstance(batch_size, int) or batch_size < 1:
        raise UserError(f"`batch_size` = {batch_size!r}: give an integer of at least 1.")
    device = next(embedder.parameters()).device
    rows = [torch.empty(0, embedder.dim)]
    left = iter(photos)
    with evaluating(embedder), torch.no_grad(), full_precision():
        while batch := [as_pixels(p, embedder.image_size) for p in islice(left, batch_size)]:
            rows.append(embedder(torch.stack(batch).to(device)).float().cpu())
    emb_ND = torch.cat(rows)
    if not emb_ND.isfinite().all():
        raise UserError(
            "the model gives embeddings that are not finite numbers: its training diverged, or its "
            "file is damaged; use another checkpoint."
        )
    return emb_ND


def as_pixels(photo: Photo, size: int) -> Tensor:
    """The evaluation transform of one photograph: float32 (3, size, size) in [0,1].

    Raises:
        UserError: see `embed`.
    """
    if 0 in getattr(photo, "shape", getattr(photo, "size", ())):
        raise UserError("a photograph has no pixels: leave it out.")
    if isinstance(photo, Tensor) and photo.is_floating_point():
        if photo.ndim != 3 or len(photo) != 3 or not bool(((photo >= 0) & (photo <= 1)).all()):
            raise UserError(
                "a photograph of floats is a tensor (3, H, W) in [0,1], and one was given of shape "
                f"{tuple(photo.shape)} from {float(photo.min()):.4g} to {float(photo.max()):.4g}."
            )
        return _resized(photo.detach().float().cpu(), size)
    if isinstance(photo, str | Path):
        pixels = eval_image(Path(photo), size)
    elif isinstance(photo, Image.Image):
        try:
            pixels = eval_pixels(photo, size)
        except (OSError, ValueError) as error:  # cut short, or of a mode that has no white
            said = f"a PIL image cannot be read ({error}): replace or remove it."
            raise UserError(said) from error
    else:
        array = photo.permute(1, 2, 0).cpu().numpy() if isinstance(photo, Tensor) else photo
        if not (isinstance(array, np.ndarray) and array.ndim == 3 and array.shape[2] == 3
                and array.dtype == np.uint8):  # fmt: skip
            raise UserError(
                "a photograph is a path, a PIL image, a uint8 array (H, W, 3) or a tensor "
                f"(3, H, W), and one was given as {type(photo).__name__} "
                f"{getattr(photo, 'dtype', '')} {tuple(getattr(photo, 'shape', ()))}."
            )
        pixels = eval_pixels(Image.fromarray(array), size)
    return floats(torch.from_numpy(pixels)[None])[0]


def _resized(photo_CHW: Tensor, size: int) -> Tensor:
    """`eval_pixels` without rounding to bytes."""
    shortest = min(photo_CHW.shape[1:])
    side = [min(length, LONGEST * shortest) for length in photo_CHW.shape[1:]]
    top, left = ((n - m) // 2 for n, m in zip(photo_CHW.shape[1:], side, strict=True))
    cut_CHW = photo_CHW[:, top : top + side[0], left : left + side[1]]
    target = [round(length * resize_side(size) / shortest) for length in side]
    resized_CHW = F.interpolate(cut_CHW[None], target, mode="bicubic", antialias=True)[0]
    top, left = ((n - size) // 2 for n in target)
    return resized_CHW[:, top : top + size, left : left + size].clamp(0, 1)
