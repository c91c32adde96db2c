"""`flowerray export`: a folder with the model's file, its card, its threshold and calibration."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowerray.data.images import eval_image
from flowerray.data.source import open_all
from flowerray.description import VERSION
from flowerray.errors import UserError
from flowerray.export import portable
from flowerray.export.card import card
from flowerray.files import atomic_folder, read_json, write_json, writing
from flowerray.opening import Model
from flowerray.retrieval.measure import Evaluation
from flowerray.tracking.registry import resolve
from flowerray.training.checkpoint import load_export

CHECKED = 32
"""Photographs that the file is compared on."""


def export(
    model: Model, kind: portable.Format, out: Path, photographs: Path | None = None
) -> dict[str, Any]:
    """Writes the folder, whole or not at all; returns what model.json holds.

    Args:
        model: on the CPU.
        photographs: a folder to compare the file with the model on; None: the training's own.

    Raises:
        UserError: `out` exists, no photographs, or a file that does not compute the same.
    """
    if out.exists():
        raise UserError(f"`out` {out} exists already: choose a new folder.")
    pixels_BHWC = some_pixels(model, photographs)
    record = None
    if (
        model.folder is not None
        and (kept := model.folder.path / "evaluation" / "test.json").exists()
    ):
        record = read_json(kept, Evaluation)
    model.embedder.eval()
    with writing(out), atomic_folder(out) as made:
        file = portable.write(model.embedder, kind, made)
        least = portable.check(model.embedder, file, kind, pixels_BHWC)
        (made / "README.md").write_text(
            card(model, kind, record, len(pixels_BHWC)), encoding="utf-8"
        )
        facts = {
            "flowerray": VERSION,
            "file": file.name,
            "input": {"name": "pixels", "dtype": "uint8", "shape": ["B", *pixels_BHWC.shape[1:]]},
            "output": {"name": "embedding", "dtype": "float32", "shape": ["B", model.embedder.dim]},
            "threshold": model.threshold,
            "calibration": model.calibration and model.calibration.model_dump(mode="json"),
            "classes": load_export(resolve(model.name))["classes"],
            "dataset": model.dataset,
            "least_cosine": least,
            "photographs": len(pixels_BHWC),
            "run": model.run.to_dict(),
        }
        write_json(made / "model.json", facts)
    return facts


def some_pixels(model: Model, photographs: Path | None) -> NDArray[np.uint8]:
    """Up to `CHECKED` photographs, evenly chosen, as the model sees them: (B, H, W, 3).

    Raises:
        UserError: there are none.
    """
    if photographs is None:
        try:
            paths = model.own_dataset(quiet=True).paths
        except UserError as error:
            raise UserError(
                f"the exported file is compared on photographs, and the training's cannot be had "
                f"({str(error).rstrip('.')}): name others with `photographs`."
            ) from error
    else:
        paths = open_all(photographs, beside=True).paths
    chosen = np.unique(np.linspace(0, len(paths) - 1, CHECKED).astype(int))
    images = [eval_image(paths[i], model.embedder.image_size) for i in chosen]
    return np.ascontiguousarray(np.stack(images).transpose(0, 2, 3, 1))
